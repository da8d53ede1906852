# SPDX-License-Identifier: AGPL-3.0-or-later

"""Searches through the real Heretic 1.4 on the built-in refuser, by several processes."""

import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import optuna
import pytest
from optuna.trial import TrialState

from heretic_contrast.errors import ContrastError
from heretic_contrast.hosts.settings import HostSettings, load_settings
from heretic_contrast.hosts.studies import open_shared, require_same_identity
from tests.command_server import Server
from tests.small_runs import COMMON, pools, study

pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")

from heretic_contrast.hosts import heretic14
from heretic_contrast.leases import open_storage
from heretic_contrast.modifier import ContrastAbliteration
from heretic_contrast.search.samplers import make_sampler


def options(folder: Path, n_trials: int, *more: str) -> list[str]:
    return [
        *COMMON,
        *pools(folder),
        "--contrast.classes=category",
        f"--n-trials={n_trials}",
        "--n-startup-trials=2",
        "--model-action=none",
        *more,
    ]


def trials(url: str) -> list[Any]:
    return optuna.load_study(study_name="heretic", storage=url).get_trials()


def complete(url: str) -> list[dict[str, Any]]:
    """What every trial that was finished has tried and found."""

    return [
        {"params": trial.params, "values": trial.values}
        for trial in trials(url)
        if trial.state is TrialState.COMPLETE
    ]


@pytest.mark.slow
def test_one_process_finds_what_it_would_find_alone(command_server: Server, tmp_path: Path) -> None:
    again, note = "--checkpoint-action=continue", "There is no study of this model"
    alone = options(tmp_path, 4, "--study-checkpoint-dir=checkpoints", again)
    command = command_server.run(alone, tmp_path / "alone")
    assert command.code == 0, command.output()[-3000:]
    assert note in " ".join(command.output().split())
    expected = [
        {"params": trial["params"], "values": trial["values"]}
        for trial in study(tmp_path / "alone" / "checkpoints")
    ]
    url = f"sqlite:///{tmp_path / 'study.db'}"
    shared = options(tmp_path, 4, f"--contrast.storage={url}")
    command = command_server.start(shared, tmp_path / "shared")
    command.wait_for("Running trial 3")
    command.signal(signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    command = command_server.run([*shared, again], tmp_path / "shared")
    assert command.code == 0, command.output()[-3000:]
    # It is in the storage.
    assert note not in " ".join(command.output().split())
    assert complete(url) == expected
    assert [trial.state.name for trial in trials(url)].count("FAIL") == 1
    # No checkpoint of its own is left.
    assert not list((tmp_path / "shared").rglob("*.jsonl"))

    # Storages of other studies.
    for change, message in (
        ("--contrast.composition=capped", "another --contrast.composition:"),
        ("--seed=4", "another --seed:"),
        ("--checkpoint-action=restart", "is not removed"),
    ):
        command = command_server.run([*shared, change], tmp_path / "other")
        output = " ".join(command.output().split())
        assert command.code == 2 and message in output and "Loading model" not in output
    evaluation = tmp_path / "harmful-test.txt"
    evaluation.write_text(evaluation.read_text().replace("a", "e", 1))
    command = command_server.run(shared, tmp_path / "other")
    output = " ".join(command.output().split())
    assert command.code == 2 and "Running trial" not in output
    assert "holds a study with other prompts as the model reads them" in output
    assert complete(url) == expected


@pytest.mark.slow
def test_two_processes_and_one_that_is_killed(command_server: Server, tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    shared = options(tmp_path, 12, f"--contrast.storage={journal}")
    saving = ["--trial-index=0", "--model-action=save", "--save-directory=saved"]
    first = command_server.start(shared, tmp_path / "first")
    second = command_server.start(
        [*shared, *saving, "--export-strategy=merge"], tmp_path / "second"
    )
    for command in (second, first):
        command.wait_for("of the shared study")
    first.signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert second.wait() == 0, second.output()[-3000:]
    found = optuna.load_study(
        study_name="heretic",
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(journal))
        ),
    ).get_trials()
    states = [trial.state for trial in found]
    assert states.count(TrialState.COMPLETE) == 12
    assert set(states) <= {TrialState.COMPLETE, TrialState.FAIL}
    done = [trial for trial in found if trial.state is TrialState.COMPLETE]
    # Whoever was killed may not have finished any.
    assert len({trial.user_attrs["lease"]["worker"] for trial in done}) in (1, 2)
    assert all(trial.user_attrs["index"] == trial.number + 1 for trial in done)
    assert (tmp_path / "second" / "saved" / "heretic-contrast.json").exists()


BEGUN = ["--contrast.baseline=unmatched", "--seed=3"]


def shared_settings(
    monkeypatch: pytest.MonkeyPatch, storage: str, *arguments: str, model: str = "builtin:refuser"
) -> HostSettings:
    monkeypatch.setattr(sys, "argv", [])
    named = [f"--contrast.storage={storage}", f"--model={model}", *arguments]
    return load_settings(HostSettings, "heretic-contrast", named)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A storage in which a study was begun, beside one of another program."""

    url = f"sqlite:///{tmp_path / 'study.db'}"
    settings = shared_settings(monkeypatch, url, *BEGUN)
    storage = open_shared(settings)
    assert storage is not None and storage.get_all_studies() == []
    optuna.create_study(study_name="another", storage=url)
    study = optuna.create_study(study_name="heretic", storage=storage)
    require_same_identity(study, settings, {"weights": "a"})
    study.set_user_attr("settings", settings.model_dump_json())
    study.set_user_attr("finished", False)
    return url


def test_a_study_goes_on_with_what_it_was_begun_with(
    begun: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (
        BEGUN,
        # Whoever names no seed takes that of the study; the rest decides no trial.
        [BEGUN[0], "--n-trials=7", "--batch-size=3", "--study-checkpoint-dir=elsewhere"],
    ):
        settings = shared_settings(monkeypatch, begun, *arguments)
        storage = open_shared(settings)
        assert storage is not None
        (study,) = storage.get_all_studies()
        assert study.study_name == "heretic"
        # Passwords are kept nowhere.
        assert "study.db" not in study.user_attrs["settings"]
        loaded = optuna.load_study(study_name="heretic", storage=storage)
        require_same_identity(loaded, settings, {"weights": "a"})
        with pytest.raises(ContrastError, match="holds a study with other weights: give another"):
            require_same_identity(loaded, settings, {"weights": "b"})


@pytest.mark.parametrize("given", [None, 3])
def test_processes_that_start_at_once_have_one_seed(
    given: int | None, begun: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has begun the study, of seed 3, while this one was loading its model."""

    settings = shared_settings(monkeypatch, begun, BEGUN[0])
    settings.seed = given
    host = heretic14.Host(settings, ContrastAbliteration)
    host.shared, host.identity = open_storage(begun), {"weights": "a"}
    # Heretic draws a seed where none is given.
    host.evaluator = Mock(settings=settings.model_copy(update={"seed": given or 77}))
    host.modifier = Mock(settings=settings.contrast, directions=Mock(aligned=True))
    directions = ["minimize", "minimize"]
    study = host.create_study(
        study_name="heretic",
        storage=host.shared,
        directions=directions,
        load_if_exists=True,
        sampler=host.make_sampler(seed=given or 77, n_startup_trials=60),
    )
    sampler = make_sampler("tpe", 3, 60, {})
    expected = optuna.create_study(directions=directions, sampler=sampler).ask()
    assert study.ask().suggest_float("x", 0, 1) == expected.suggest_float("x", 0, 1)
    assert host.evaluator.settings.seed == 3


@pytest.mark.parametrize(
    ("arguments", "model", "message"),
    [
        (["--contrast.baseline=matched"], "builtin:refuser", "another --contrast.baseline: give"),
        (["--seed=4"], "builtin:refuser", "another --seed: give"),
        (["--max-response-length=7"], "builtin:refuser", "another --max-response-length: give"),
        ([], "some/model", "another --model"),
        (["--checkpoint-action=restart"], "builtin:refuser", "is not removed"),
    ],
)
def test_a_storage_of_another_study(
    arguments: list[str], model: str, message: str, begun: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ContrastError, match=message) as raised:
        open_shared(shared_settings(monkeypatch, begun, *BEGUN, *arguments, model=model))
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


@pytest.mark.parametrize("place", ["sqlite:///{}/study.db", "{}/study.journal"])
def test_a_new_storage_needs_no_restart(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_shared(
        shared_settings(monkeypatch, place.format(tmp_path), "--checkpoint-action=restart")
    )
    assert storage is not None and storage.get_all_studies() == []


def test_whoever_goes_on_hears_that_there_is_no_study(
    begun: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as who has mistyped its name."""

    for storage, action, is_said in (
        (f"sqlite:///{tmp_path / 'stduy.db'}", "continue", True),
        (f"{tmp_path / 'stduy[1].journal'}", "continue", True),
        (f"sqlite:///{tmp_path / 'new.db'}", "restart", False),
        (begun, "continue", False),
    ):
        arguments = [*BEGUN, f"--checkpoint-action={action}"]
        open_shared(shared_settings(monkeypatch, storage, *arguments))
        said = "".join(capsys.readouterr().out.split())
        assert (f"*Thereisnostudyin{storage}:anewonebegins." in said) == is_said, storage


def test_what_is_no_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for storage in ("nosuchdatabase://user:secret@host/name", f"sqlite:///{tmp_path}/no/study.db"):
        with pytest.raises(ContrastError, match=r"The storage .* cannot be read") as raised:
            open_shared(shared_settings(monkeypatch, storage))
        assert "secret" not in str(raised.value)
    assert open_shared(load_settings(HostSettings, "", ["--model=builtin:refuser"])) is None
