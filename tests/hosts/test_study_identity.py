# SPDX-License-Identifier: AGPL-3.0-or-later

"""Trials of a study are not taken for those of another, which has the same settings."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState, create_trial

from heretic_contrast.errors import ContrastError
from heretic_contrast.hosts.settings import HostSettings
from heretic_contrast.search.parameters import configuration_digest
from heretic_contrast.settings import ABLATION_FIELDS, ContrastSettings
from tests.command_server import Server
from tests.conftest import DATA
from tests.made_directions import make_directions, random_tensor
from tests.small_runs import COMMON, pools

pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A model's folder, with files of prompts beside it."""

    shutil.copytree(DATA / "refuser", tmp_path / "model")
    for name in ("evaluation.txt", "train.txt", "directions.safetensors"):
        (tmp_path / name).write_text("One prompt\nand another\n")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "data.jsonl").write_text('{"text": "One"}\n')
    return tmp_path


def checkpoint(files: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the trials of a run are kept."""

    arguments = [
        f"--model={files / 'model'}",
        f"--bad-evaluation-prompts.dataset={files / 'evaluation.txt'}",
        f"--good-evaluation-prompts.dataset={files / 'dataset'}",
        f"--bad-prompts.dataset={files / 'train.txt'}",
        f"--contrast.directions={files / 'directions.safetensors'}",
    ]
    monkeypatch.setattr(sys, "argv", ["heretic-contrast", *arguments])
    return HostSettings().study_checkpoint_dir


def append(name: str) -> Callable[[Path], None]:
    def edit(files: Path) -> None:
        with (files / name).open("a") as file:
            file.write(" ")

    return edit


def same_length(files: Path) -> None:
    path = files / "evaluation.txt"
    path.write_text(path.read_text().replace("One", "Two"))


def other_weights(files: Path) -> None:
    path = files / "model" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def new_adapter(files: Path) -> None:
    (files / "model" / "adapter_config.json").write_text("{}")


EDITS: dict[str, Callable[[Path], None]] = {
    "evaluation": append("evaluation.txt"),
    "evaluation of the same length": same_length,
    "training prompts": append("train.txt"),
    "dataset folder": append("dataset/data.jsonl"),
    "directions": append("directions.safetensors"),
    "chat template": append("model/chat_template.jinja"),
    "generation": append("model/generation_config.json"),
    "tokenizer": append("model/tokenizer_config.json"),
    "weights": other_weights,
    "adapter": new_adapter,
}


@pytest.mark.parametrize("name", EDITS)
def test_files_changed_in_place_make_another_study(
    name: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = checkpoint(files, monkeypatch)
    for path in files.rglob("*"):
        path.touch()
    assert checkpoint(files, monkeypatch) == before
    EDITS[name](files)
    assert checkpoint(files, monkeypatch) != before


def test_a_response_prefix_that_is_given_makes_a_study_of_its_own(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {checkpoint(files, monkeypatch)}
    for prefix in ("", "Well"):
        monkeypatch.setattr(sys, "argv", [*sys.argv, f"--response-prefix={prefix}"])
        found.add(HostSettings().study_checkpoint_dir)
    assert len(found) == 3
    before = HostSettings().study_checkpoint_dir
    monkeypatch.setattr(
        sys,
        "argv",
        [
            *sys.argv,
            "--export-strategy=merge",
            "--n-trials=7",
            "--batch-size=2",
            "--contrast.batch-size=2",
            "--no-offload-outputs-to-cpu",
        ],
    )
    assert HostSettings().study_checkpoint_dir == before


def test_what_is_written_beside_a_model_is_no_part_of_it(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    before = checkpoint(files, monkeypatch)
    for name in ("model/README.md", "model/directions.safetensors", "checkpoints/trials.jsonl"):
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_text("Something new.")
    assert checkpoint(files, monkeypatch) == before
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--bad-prompts.dataset=."])
    before = HostSettings().study_checkpoint_dir
    (files / "checkpoints" / "trials.jsonl").write_text("More of them.")
    assert HostSettings().study_checkpoint_dir == before
    (files / "prompts.txt").write_text("Another one")
    assert HostSettings().study_checkpoint_dir != before


@pytest.mark.parametrize("is_equal", [False, True])
@pytest.mark.parametrize("composition", ["sum", "sequential", "capped"])
@pytest.mark.parametrize("first", ["fraud", "shared"])
def test_trials_that_earlier_versions_meant_otherwise_have_another_digest(
    first: str, composition: str, is_equal: bool
) -> None:
    settings = ContrastSettings(
        classes="category",  # type: ignore[arg-type]
        composition=composition,  # type: ignore[arg-type]
        equal_effective_weight=is_equal,
    ).model_dump(mode="json", include=ABLATION_FIELDS)
    made_with = {"settings": {"shared_direction": first == "shared"}, "identity": {}}
    directions = make_directions(
        random_tensor(3, 2, 8), names=(first, "theft"), provenance=made_with
    )
    # What they digested.
    content = {"names": [first, "theft"], **made_with, "prompts": None}
    text = json.dumps({**content, "ablation": settings}, sort_keys=True)
    is_the_same = hashlib.sha256(text.encode()).hexdigest()[:16] == configuration_digest(
        directions, settings
    )
    assert is_the_same == (first == "fraud" and not (is_equal and composition != "sum"))


def test_trials_measured_on_something_else_are_refused() -> None:
    from heretic_contrast.hosts.heretic14 import Host
    from heretic_contrast.modifier import ContrastAbliteration

    class Settings:
        study_checkpoint_dir = "checkpoints"
        save_directory = None

    host = Host(Settings(), ContrastAbliteration)  # type: ignore[arg-type]
    host.identity = {"weights": "a", "tokens": {"evaluation": "b"}, "rules": "c"}

    def trial(**identity: Any) -> Any:
        return create_trial(
            state=TrialState.COMPLETE, values=[0, 0], user_attrs={"identity": identity}
        )

    host._require_own([trial(**host.identity)])
    for change, expected in (
        ({"weights": "x"}, "weights"),
        ({"tokens": {"evaluation": "x"}}, "prompts as the model reads them"),
        ({"rules": "x"}, "rules for tiers"),
    ):
        with pytest.raises(
            ContrastError, match=f"with other {expected}.*: give --checkpoint-action"
        ):
            host._require_own([trial(**host.identity), trial(**{**host.identity, **change})])
    with pytest.raises(ContrastError):
        host._require_own([create_trial(values=[0, 0])])


@pytest.mark.slow
def test_a_study_goes_on_only_with_what_it_was_begun_with(
    tmp_path: Path, command_server: Server
) -> None:
    arguments = [
        "--n-trials=2",
        "--n-startup-trials=1",
        "--study-checkpoint-dir=checkpoints",
        "--checkpoint-action=continue",
        "--trial-index=0",
        "--model-action=save",
        "--export-strategy=adapter",
        "--save-directory=output",
        *COMMON,
        *pools(tmp_path),
    ]
    command = command_server.run(arguments, tmp_path / "run")
    assert command.code == 0, command.output()[-3000:]
    (path,) = (tmp_path / "run").glob("checkpoints/contrast-*/*.jsonl")
    lines = path.read_text().splitlines()
    identities = [json.loads(line)["user_attr"] for line in lines if '"identity"' in line]
    assert len(identities) == 2 and identities[0] == identities[1]
    command = command_server.run(arguments, tmp_path / "run")
    assert command.code == 0 and "Running trial" not in command.output()

    # What does not decide trials counts as it is given now.
    changed = [*arguments, "--n-trials=3", "--export-strategy=merge", "--save-directory=whole"]
    command = command_server.run(changed, tmp_path / "run")
    assert command.code == 0 and "Running trial 3 of 3" in command.output()
    assert "Running trial 2" not in command.output()
    saved = {path.name for path in (tmp_path / "run" / "whole").glob("*.safetensors")}
    assert saved == {"model.safetensors"}
    # What was left open keeps its number.
    fewer = [option for option in arguments if not option.startswith("--n-trials")]
    command = command_server.run(fewer, tmp_path / "run")
    assert command.code == 0 and "Running trial" not in command.output()

    # Edited in place: a study of its own.
    evaluation = tmp_path / "harmful-test.txt"
    evaluation.write_text(evaluation.read_text().replace("a", "e", 1))
    command = command_server.run(arguments, tmp_path / "run")
    assert command.code == 0 and "Running trial 1" in command.output()
    assert len(list((tmp_path / "run").glob("checkpoints/contrast-*/*.jsonl"))) == 2
