# SPDX-License-Identifier: AGPL-3.0-or-later

"""Searches through the real Heretic 1.4 on the built-in refuser, guided by what is known already."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command_server import Server
from tests.small_runs import COMMON, pools, study

pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")

pytestmark = pytest.mark.slow

Point = tuple[int, float]


def options(folder: Path, n_trials: int) -> list[str]:
    """The smallest search, whose prompts are judged in three batches."""

    return [
        *COMMON,
        *pools(folder),
        "--batch-size=6",
        "--contrast.method=mean",
        f"--n-trials={n_trials}",
        "--study-checkpoint-dir=checkpoints",
        "--model-action=none",
    ]


def front(points: list[Point]) -> list[Point]:
    """The points that no other one is as good as in both, each once."""

    return sorted(
        point
        for point in set(points)
        if not any(other[0] <= point[0] and other[1] <= point[1] for other in set(points) - {point})
    )


def measured(trial: dict[str, Any]) -> Point:
    return trial["attributes"]["refusals"], trial["attributes"]["kl_divergence"]


@pytest.mark.parametrize("classifier", ["markers", "tiers"])
def test_no_point_of_the_front_is_lost(
    classifier: str, command_server: Server, tmp_path: Path
) -> None:
    # All trials are random, so that both searches try the same.
    shared = [
        *options(tmp_path, 12),
        "--n-startup-trials=12",
        f"--contrast.refusal-classifier={classifier}",
    ]
    found = {}
    for name, extra in (("whole", []), ("ended", ["--contrast.stop-dominated"])):
        command = command_server.run([*shared, *extra], tmp_path / name)
        assert command.code == 0, command.output()[-3000:]
        found[name] = study(tmp_path / name / "checkpoints")
    whole, ended = found["whole"], found["ended"]
    assert [trial["params"] for trial in ended] == [trial["params"] for trial in whole]
    assert {trial["state"] for trial in whole} == {"COMPLETE"}
    points = {trial["number"]: measured(trial) for trial in whole}
    stopped = [trial for trial in ended if "bound" in trial["attributes"]]
    assert 0 < len(stopped) < 12
    for trial in stopped:
        bound, point = measured(trial), points[trial["number"]]
        assert bound[1] == point[1] and bound[0] <= point[0]
        assert trial["attributes"]["bound"] in (0, 6, 12)
    assert any(measured(trial) != points[trial["number"]] for trial in stopped)
    finished = [trial for trial in ended if trial not in stopped]
    assert all(measured(trial) == points[trial["number"]] for trial in finished)
    expected = front(list(points.values()))
    assert front([measured(trial) for trial in finished]) == expected

    # The menu offers just these, also where the study is continued.
    asked = ["--checkpoint-action=continue", "--trial-index=99", "--contrast.stop-dominated"]
    save = ["--model-action=save", "--save-directory=saved", "--export-strategy=merge"]
    command = command_server.run([*shared, *asked, *save], tmp_path / "ended")
    assert command.code == 2
    assert f"the Pareto front has {len(expected)} trials" in " ".join(command.output().split())
    assert study(tmp_path / "ended" / "checkpoints") == ended


def test_a_study_begins_with_a_sweep_and_ends_when_it_finds_no_more(
    command_server: Server, whole_runs: Any, tmp_path: Path
) -> None:
    file = whole_runs.directory("sweep") / "output" / "sweep.json"
    shared = [
        *options(tmp_path, 30),
        "--n-startup-trials=30",
        # As the sweep has it.
        "--contrast.method=som",
        f"--contrast.warm-start={file}",
        "--contrast.patience=2",
        '--contrast.search-space={"max_weight": [0.1, 1.0]}',
    ]
    command = command_server.run(shared, tmp_path / "search")
    assert command.code == 0, command.output()[-3000:]
    trials = study(tmp_path / "search" / "checkpoints")
    swept = json.loads(file.read_text())
    cells = [
        (
            cell["measurement"]["refusals"],
            cell["measurement"]["kl_divergence"],
            cell["layers"][0],
            cell["weight"],
        )
        for cell in swept["cells"]
        if len(cell["layers"]) == 1
        and cell["measurement"]["refusals"] < swept["baseline"]["refusals"]
    ]
    best = [cell for cell in cells if cell[:2] in front([cell[:2] for cell in cells])]
    assert best
    for trial, (_, _, layer, weight) in zip(trials, sorted(best), strict=False):
        # The built-in refuser has eight layers.
        assert trial["params"]["mlp.down_proj.max_weight_position"] == max(layer, 0.6 * 7)
        assert trial["params"]["attn.o_proj.max_weight"] == weight
    points = [measured(trial) for trial in trials]
    fronts = [front(points[:count]) for count in range(len(points) + 1)]
    assert fronts[-1] == fronts[-3] != fronts[-4]
    assert "The front has not grown for 2 trials" in " ".join(command.output().split())

    again = command_server.run([*shared, "--checkpoint-action=continue"], tmp_path / "search")
    assert again.code == 0 and study(tmp_path / "search" / "checkpoints") == trials
