# SPDX-License-Identifier: AGPL-3.0-or-later

"""The benchmark of searches, on the built-in refuser and on numbers that can be counted by hand."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_1samp

pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")

from benchmarks import search


def made_study(trials: list[tuple[int | None, float | None]], base: int = 4) -> dict[str, Any]:
    """A study whose trials take a second each."""

    return {
        "configuration": search.PLAIN,
        "seed": 0,
        "base_refusals": {"judged": base, "fresh": base},
        "screening_seconds": 0.0,
        "trials": [
            {"seconds": 1.0, "refusals": refusals, "kl_divergence": divergence, "fresh": None}
            for refusals, divergence in trials
        ],
    }


def test_shares_are_those_of_a_fine_grid() -> None:
    trials = [(3, 0.01), (None, None), (1, 0.06), (1, 0.2), (2, 0.04), (4, 0.001), (0, 0.09)]
    found = search.shares(made_study(trials), limit=0.1)
    # The middles of 4 × 100 cells of the box.
    cells = [(row + 0.5, (column + 0.5) / 1000) for row in range(4) for column in range(100)]
    for count, share in enumerate(found, 1):
        finished = [(r, k) for r, k in trials[:count] if r is not None and k is not None]
        below = sum(any(r <= x and k <= y for r, k in finished) for x, y in cells)
        assert share == pytest.approx(below / len(cells), abs=1e-12)
    assert found == sorted(found) and 0 < found[0] < found[-1]
    assert search.shares(made_study([(0, 0.01)], base=0), limit=0.1) == [0.0]


def test_intervals_are_those_of_a_t_test() -> None:
    values = [0.61, 0.64, 0.5, 0.72]
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    mean, low, high = search.interval(values)
    assert (low, high) == pytest.approx((expected.low, expected.high)) and mean == sum(values) / 4


def test_times_until_a_share() -> None:
    study = made_study([(3, 0.05), (2, 0.05), (0, 0.05)])
    assert search.seconds_until(study, 0.25, 0.1) == 2.0
    assert search.seconds_until(study, 0.51, 0.1) is None
    # What comes before the first trial counts as well.
    screened = {**study, "screening_seconds": 5.0}
    assert search.seconds_until(screened, 0.25, 0.1) == 7.0
    assert search.by_second([screened], 0.1, points=9)[5:] == [
        [5.0, 0.0],
        [6.0, pytest.approx(0.125)],
        [7.0, pytest.approx(0.25)],
        [8.0, pytest.approx(0.5)],
    ]
    assert search.by_second([study], 0.1, points=4) == [
        [0.0, 0.0],
        [1.0, pytest.approx(0.125)],
        [2.0, pytest.approx(0.25)],
        [3.0, pytest.approx(0.5)],
    ]


@pytest.mark.slow
def test_a_benchmark_goes_on_where_it_was(tmp_path: Path) -> None:
    command = "--trials 5 --startup-trials 2 --seeds 1 --judged 8 --fresh 8 --tokens 8"
    names = [search.PLAIN, "default"]
    arguments = [f"--output={tmp_path}", *command.split(), "--configurations", *names]
    search.main(arguments)
    first = json.loads((tmp_path / "search.json").read_text())
    plain, ours = first["studies"]
    assert plain["base_refusals"] == ours["base_refusals"] == {"judged": 8, "fresh": 8}
    for study in first["studies"]:
        assert len(study["trials"]) == 5
        judged = [trial for trial in study["trials"] if trial["fresh"] is not None]
        assert judged and all(0 <= trial["fresh"][0] <= 8 for trial in judged)
    # The default makes Heretic's own trials, random ones and proposed ones, and measures what Heretic measures.
    theirs, own = (
        [(trial["refusals"], trial["kl_divergence"]) for trial in study["trials"]]
        for study in (plain, ours)
    )
    assert len(set(theirs)) == 5 and own == [
        (refusals, pytest.approx(kl, rel=1e-3)) for refusals, kl in theirs
    ]
    # One study is lost, and the other is not run again.
    kept, lost = (tmp_path / "studies" / f"{name}-0" for name in ("heretic", "default"))
    shutil.rmtree(lost)
    written = (kept / "result.json").stat().st_mtime_ns
    search.main(arguments)
    again = json.loads((tmp_path / "search.json").read_text())
    assert (kept / "result.json").stat().st_mtime_ns == written
    for study in (*first["studies"], *again["studies"]):
        for trial in study["trials"]:
            del trial["seconds"]
        del study["screening_seconds"]
    assert again["studies"] == first["studies"]
    assert (tmp_path / "table.md").read_text().count("\n") == 4
