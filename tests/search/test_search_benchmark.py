# SPDX-License-Identifier: AGPL-3.0-or-later

"""The benchmark of searches, on the built-in refuser and on numbers that can be counted by hand."""

import json
import shutil
from argparse import Namespace
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


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Studies that run no model; their names, in the order in which they ran."""

    names: list[str] = []

    def flags(study: Any, paths: Any) -> list[str]:
        study.evaluator = None
        names.append(study.name)
        return []

    def collected(study: Any) -> dict[str, Any]:
        made = made_study([(3, 0.01), (1, 0.06)])
        screening = study.screening_seconds
        found = {"configuration": study.name, "seed": study.seed, "screening_seconds": screening}
        return {**made, **found}

    monkeypatch.setattr(search.Study, "flags", flags)
    monkeypatch.setattr(search.Study, "collected", collected)
    monkeypatch.setattr(search, "load_settings", lambda *_: None)
    monkeypatch.setattr(search.heretic.main, "run", lambda: None)
    monkeypatch.setattr(search.heretic14, "run", lambda *_: None)
    monkeypatch.setattr(search, "can_plot", lambda: False)
    return names


SMALL = (
    "--seeds 1 --judged 8 --fresh 8 --trials 2 --startup-trials 1 --configurations heretic default"
)


CHANGES = [
    ("--trials=3", "trials 2 instead of 3"),
    ("--startup-trials=2", "startup_trials 1 instead of 2"),
    ("--tokens=9", "tokens 24 instead of 9"),
    ("--judged=9", "judged 8 instead of 9"),
    ("--batch-size=9", "batch_size 64 instead of 9"),
    ("--options=--kl-divergence-target=1", "--options [] instead of ['--kl-d"),
    ("--model=other", "model builtin:refuser instead of other"),
    ("--harmful=prompts.txt", "with prompts "),
    ("--add=x=--b", "its options ['--a'] instead of ['--b']"),
]


def test_results_are_not_taken_for_those_of_other_settings(
    ran: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(f"Steal {number}." for number in range(40)))
    small = ["--output=out", *SMALL.split()]
    search.main([*small, "--add=x=--a"])
    search.main([*small, "--add=x=--a"])
    assert ran == ["heretic", "default", "x"]
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    # A study that was interrupted counts as well as one that is finished.
    lost = Path("out/studies/x-0/result.json")
    del before[lost]
    lost.unlink()
    capsys.readouterr()
    for changed, said in CHANGES:
        is_added = changed.startswith("--add")
        with pytest.raises(SystemExit) as stopped:
            search.main([*small, *([] if is_added else ["--add=x=--a"]), changed])
        error = capsys.readouterr().err
        folder = "x-0" if is_added else "heretic-0"
        assert stopped.value.code == 2 and len(ran) == 3 and said in error
        assert f"studies/{folder} holds" in error and error.endswith("or delete this folder.\n")
        assert before == {
            path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()
        }


def test_results_of_an_earlier_version_are_not_taken_for_those_of_any_settings(
    ran: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [f"--output={tmp_path}", *SMALL.split()]
    folder = tmp_path / "studies" / "default-0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(made_study([(0, 0.01)])))
    with pytest.raises(SystemExit) as stopped:
        search.main(small)
    assert stopped.value.code == 2 and not ran
    assert "that an earlier version did not record" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--configurations", "default", "default"],
        ["--configurations", "default", "--add=default=--a"],
        ["--configurations", "default", "--add=x=--a", "--add=x=--b"],
        ["--configurations", "default", "--add=a, x=--a", "--add=a-x=--b"],
    ],
)
def test_each_configuration_has_studies_of_its_own(
    words: list[str], ran: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        search.main([f"--output={tmp_path}", *SMALL.split()[:-3], *words])
    assert stopped.value.code == 2 and not ran
    assert "would share folders" in capsys.readouterr().err


def test_seconds_of_screening_outlive_an_interruption(
    ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Screening takes 7 s, and a quarter of a second to be read again."""

    times = iter([10.0, 17.0, 20.0, 20.25])
    interruptions = iter([True, False])

    def run(*_: Any) -> None:
        search.heretic14.Host.screened(None)  # type: ignore[arg-type, call-arg]
        if next(interruptions):
            raise KeyboardInterrupt

    monkeypatch.setattr(search.heretic14, "run", run)
    monkeypatch.setattr(search.heretic14.Host, "screened", lambda host: [])
    monkeypatch.setattr(search, "time", Namespace(perf_counter=lambda: next(times)))
    arguments = Namespace(
        output=tmp_path,
        model="m",
        options="",
        all_configurations=search.CONFIGURATIONS,
        prompts="",
        **dict.fromkeys(("trials", "startup_trials", "tokens", "judged", "fresh", "batch_size"), 1),
    )
    with pytest.raises(KeyboardInterrupt):
        search.Study("screened", 0, arguments).run({})
    assert search.Study("screened", 0, arguments).run({})["screening_seconds"] == 7.25


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
