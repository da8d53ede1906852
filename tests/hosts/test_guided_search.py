# SPDX-License-Identifier: AGPL-3.0-or-later

"""Searches through the real Heretic 1.4 on the built-in refuser, guided by what is known already."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.command_server import Server
from tests.conftest import DATA
from tests.engine.test_judge import write_keyword_judge
from tests.small_runs import COMMON, pools, study

pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")

pytestmark = pytest.mark.slow

Point = tuple[float, float]


def options(folder: Path, n_trials: int) -> list[str]:
    """The smallest search, whose prompts are judged in three batches."""

    return [
        *COMMON,
        *pools(folder),
        "--batch-size=6",
        "--contrast.classes=category",
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
    attributes = trial["attributes"]
    return attributes.get("refusal_sum", attributes["refusals"]), attributes["kl_divergence"]


@pytest.mark.parametrize("classifier", ["markers", "tiers", "judge"])
def test_no_point_of_the_front_is_lost(
    classifier: str, command_server: Server, tmp_path: Path
) -> None:
    # All trials are random, so that both searches try the same.
    chosen = f"--contrast.refusal-classifier={classifier}"
    if classifier == "judge":
        chosen = (
            f"--contrast.judge-model={write_keyword_judge(tmp_path / 'judge', ('I', 'nobody'))}"
        )
    shared = [*options(tmp_path, 12), "--n-startup-trials=12", chosen]
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
        assert trial["attributes"]["bound"] <= 18
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
    assert f"the Pareto front has {len(expected)} trial" in " ".join(command.output().split())
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
    n_moved = sum(layer < 0.6 * 7 for _, _, layer, _ in best)
    said = f"{n_moved} of them lie beyond what is searched" in " ".join(command.output().split())
    assert said == (n_moved > 0)
    # The sweep was of this one.
    assert "on another model" not in " ".join(command.output().split())
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


def test_a_study_that_begins_with_one_of_the_same_seed_tries_something_else(
    command_server: Server, tmp_path: Path
) -> None:
    weak = '--contrast.search-space={"max_weight": [0.1, 0.4]}'
    found: list[tuple[Path, list[Any]]] = []
    for name, n_trials in (("first", 2), ("second", 5), ("third", 9)):
        shared = [*options(tmp_path, n_trials), "--n-startup-trials=30", weak]
        warm = [f"--contrast.warm-start={found[-1][0]}"] if found else []
        command = command_server.run([*shared, *warm], tmp_path / name)
        assert command.code == 0, command.output()[-3000:]
        (path,) = (tmp_path / name / "checkpoints").rglob("*.jsonl")
        trials = [trial["params"] for trial in study(tmp_path / name / "checkpoints")]
        earlier = [params for _, known in found for params in known]
        # It begins with the front of the last one, of at most as many trials as that has.
        new = [params for params in trials if params not in earlier]
        assert len(trials) == n_trials and (not found or 3 <= len(new) < n_trials)
        assert len(trials) == len({json.dumps(params) for params in trials})
        found.append((path, trials))


def test_a_study_begins_with_candidates_that_were_screened(
    command_server: Server, tmp_path: Path
) -> None:
    shared = [*options(tmp_path, 7), "--n-startup-trials=7", "--contrast.screening=12"]
    # Every divergence counts, even if it is as small as here.
    weak = '--contrast.search-space={"max_weight": [0.1, 0.6]}'
    shared.append("--kl-divergence-target=0")
    found = {}
    for name, extra in (("once", []), ("again", []), ("ended", ["--contrast.stop-dominated"])):
        command = command_server.run([*shared, weak, *extra], tmp_path / name)
        assert command.code == 0, command.output()[-3000:]
        assert "Screening 12 candidates" in command.output()
        found[name] = study(tmp_path / name / "checkpoints")
    assert found["once"] == found["again"]
    (path,) = (tmp_path / "once" / "checkpoints").rglob("*.jsonl")
    first = optuna.load_study(
        study_name="heretic", storage=JournalStorage(JournalFileBackend(str(path)))
    ).user_attrs["screened"]
    # At most a third of the trials.
    assert len(first) == 2
    for trials in found.values():
        params = [trial["params"] for trial in trials]
        assert params[:2] == first and len({json.dumps(values) for values in params}) == 7
    # The fewest refusals first.
    assert measured(found["once"][0])[0] <= measured(found["once"][1])[0]

    # Whoever goes on has them already, and nothing else is tried.
    asked = ["--n-trials=8", "--checkpoint-action=continue"]
    kept = [option for option in shared if not option.startswith("--n-trials")]
    command = command_server.run([*kept, weak, *asked], tmp_path / "once")
    assert command.code == 0 and "Screening" not in command.output()
    trials = study(tmp_path / "once" / "checkpoints")
    assert trials[:7] == found["once"] and len(trials) == 8


def test_the_front_is_judged_on_fresh_prompts(command_server: Server, tmp_path: Path) -> None:
    from heretic_contrast.hosts.evaluator import count_refusals
    from heretic_contrast.hosts.settings import HostSettings, load_settings

    lines = (DATA / "refuser_prompts" / "harmful" / "test.jsonl").read_text().splitlines()[30:45]
    fresh = tmp_path / "fresh.jsonl"
    fresh.write_text("\n".join(lines) + "\n")
    shared = [
        *options(tmp_path, 6)[:-1],
        "--n-startup-trials=6",
        # Weak enough for some to be refused.
        '--contrast.search-space={"max_weight": [0.1, 0.4]}',
        f"--contrast.finalist-prompts.dataset={fresh}",
        "--trial-index=0",
        "--model-action=save",
        "--save-directory=saved",
        "--export-strategy=merge",
    ]
    command = command_server.run(shared, tmp_path)
    assert command.code == 0, command.output()[-3000:]
    trials = study(tmp_path / "checkpoints")
    best = front([measured(trial) for trial in trials])
    rows = {
        cells[0]: cells[1:]
        for line in command.output().splitlines()
        if len(cells := [cell.strip() for cell in line.strip("│ ").split("│")]) == 8
    }
    assert len(rows) == len(best)

    # The saved model, read by transformers alone.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    settings = load_settings(HostSettings, "", ["--model=builtin:refuser"])
    expected = []
    responses = []
    for line in lines:
        chat = [
            {"role": "system", "content": settings.system_prompt},
            {"role": "user", "content": json.loads(line)["text"]},
        ]
        tokens = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = loaded.generate(**tokens, max_new_tokens=150, do_sample=False)
        responses.append(output[0, tokens["input_ids"].shape[1] :])
    # The first look judged responses of 8 tokens.
    for length in (8, 30, 50, 100, 150):
        texts = [
            tokenizer.decode(response[:length], skip_special_tokens=True) for response in responses
        ]
        expected.append(str(count_refusals(settings, [], texts)))
    index = next(trial["attributes"]["index"] for trial in trials if measured(trial) == best[0])
    found = rows[str(index)]
    assert found[:5] == expected and found[6] == f"{100 * best[0][0] / 18:.0f} %"

    # What the search has seen is not fresh.
    seen = next(word for word in shared if word.startswith("--contrast.bad-prompts")).split("=")[1]
    command = command_server.run(
        [*shared, f"--contrast.finalist-prompts.dataset={seen}"], tmp_path / "seen"
    )
    assert command.code == 2
    assert (
        "18 of the 18 finalist prompts are among those that directions are made from"
        in " ".join(command.output().split())
    )
