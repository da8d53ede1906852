# SPDX-License-Identifier: AGPL-3.0-or-later

"""Heretic 1.4's menu after a study: what a saved model leaves behind, and what comes after it."""

import inspect
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

heretic_main = pytest.importorskip("heretic.main")
heretic_model = pytest.importorskip("heretic.model")
heretic_utils = pytest.importorskip("heretic.utils")
pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")

from heretic_contrast.commands.run import choose_directions  # noqa: E402
from heretic_contrast.errors import ContrastError  # noqa: E402
from heretic_contrast.files import file_digest  # noqa: E402
from heretic_contrast.hosts import answers as questions  # noqa: E402
from heretic_contrast.hosts import heretic14  # noqa: E402
from heretic_contrast.hosts.answers import (  # noqa: E402
    ACTION_QUESTION,
    TRIAL_QUESTION,
    UPLOADED,
    WRITTEN,
    Answers,
)
from heretic_contrast.hosts.evaluator import Evaluator  # noqa: E402
from heretic_contrast.hosts.record import RECORD, read_record  # noqa: E402
from heretic_contrast.hosts.settings import HostSettings, load_settings  # noqa: E402
from heretic_contrast.hosts.surface import from_heretic  # noqa: E402
from heretic_contrast.modifier import ContrastAbliteration  # noqa: E402
from tests.conftest import small_pool  # noqa: E402

FIRST_TRIAL = "the first trial"
SAVE, BACK, MORE, EXIT = "Save the model to a local folder", "", "continue", ""


def test_notebooks_are_asked_for_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLAB_GPU", "1")
    monkeypatch.setattr("builtins.input", Mock(side_effect=["2", "2", EOFError]))
    assert choose_directions([]) == (
        "--contrast.baseline matched --contrast.method som --contrast.classes category".split()
    )
    shown = capsys.readouterr().out
    assert "[2] Matched: harmless" in shown and "[1] One: the difference" in shown
    with pytest.raises(KeyboardInterrupt):
        choose_directions([])


@pytest.mark.slow
def test_another_trial_after_a_merged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = {
        f"{name}{part}-prompts": small_pool(tmp_path, pool, split, n_prompts)
        for name, pool, n_prompts in (("bad", "harmful", 1), ("good", "harmless", 6))
        for part, split in (("", "train"), ("-evaluation", "test"))
    }
    settings = load_settings(
        HostSettings,
        "heretic-contrast",
        [
            "--model=builtin:refuser",
            *(f"--{name}.dataset={path}" for name, path in pools.items()),
            *"--response-prefix= --batch-size=16 --max-response-length=8 --seed=1".split(),
            *"--contrast.method=mean --n-trials=1 --n-startup-trials=1 --export-strategy=merge".split(),
            f"--study-checkpoint-dir={tmp_path / 'checkpoints'}",
        ],
    )
    # Loading the model again fails once, after which there is none.
    chosen = iter([FIRST_TRIAL, SAVE, BACK, FIRST_TRIAL, BACK, MORE, EXIT])

    def select(message: str, choices: list[Any]) -> Any:
        answer = next(chosen)
        return choices[0].value if answer == FIRST_TRIAL else answer

    monkeypatch.setattr(questions, "has_terminal", lambda: True)
    monkeypatch.setattr(heretic_utils, "prompt_select", select)
    monkeypatch.setattr(heretic_utils, "prompt_path", lambda *_: str(tmp_path / "saved"))
    monkeypatch.setattr(heretic_utils, "prompt_text", lambda *_: "1")

    # Which models there are while one is loaded.
    models: list[weakref.ref[Any]] = []
    found: list[int] = []
    get_model_class = heretic_model.get_model_class

    class Model(heretic14.HostModel):
        def reset_model(self) -> bool:
            if self.model is not None:
                models.append(weakref.ref(self.get_layers()[0]))
            return super().reset_model()

    def loading(name: str) -> Any:
        if models:
            found.append(sum(model() is not None for model in models))
            if len(found) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return get_model_class(name)

    monkeypatch.setattr(heretic14, "HostModel", Model)
    monkeypatch.setattr(heretic_model, "get_model_class", loading)
    # Whether a trial is computed in the fast way.
    fast: list[bool] = []
    get_score = Evaluator.get_score

    def scoring(evaluator: Evaluator) -> Any:
        model = from_heretic(evaluator.model, evaluator.settings)
        fast.append(evaluator._trials is not None and evaluator._trials.knows(model))
        return get_score(evaluator)

    monkeypatch.setattr(Evaluator, "get_score", scoring)
    # Heretic turns gradients off, which come back at the end of the context.
    with torch.no_grad():
        heretic14.run(settings, ContrastAbliteration)
    assert found == [0, 0]
    assert fast == [True, True]
    record = read_record(tmp_path / "saved")
    assert record.files == {
        "model.safetensors": file_digest(tmp_path / "saved" / "model.safetensors")
    }
    assert record.measured["index"] == 1


def headless(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Answers:
    """Answers whose action was taken with the first trial, unless trials are chosen by hand."""

    monkeypatch.setattr(sys, "argv", ["heretic-contrast"])
    answers = Answers(
        HostSettings(**{"model": "builtin:refuser", "trial_index": 0, **options}),
        lambda folder: (folder / RECORD).write_text("{}"),
    )
    assert answers.select(ACTION_QUESTION, [])
    return answers


def test_a_front_of_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = headless(monkeypatch, model_action="save", save_directory="saved")
    with pytest.raises(ContrastError, match="has no trial, since all break the model"):
        answers.select(TRIAL_QUESTION, [SimpleNamespace(value="continue")])


@pytest.mark.parametrize("is_written", [True, False])
def test_a_failure_to_go_on_leaves_a_saved_model(
    is_written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "saved"
    answers = headless(monkeypatch, model_action="save", save_directory=str(saved))
    unfinished = Path(answers.path("Path to the folder:"))
    unfinished.mkdir()
    (unfinished / "config.json").write_text("{}")
    answers.show("Saving merged model...")
    if is_written:
        answers.show("* Resetting model...")
    answers.format_exception(torch.OutOfMemoryError("no more"))
    answers.select(ACTION_QUESTION, [])
    names = ["config.json", RECORD] if is_written else []
    assert [path.name for path in sorted(saved.iterdir())] == names
    expected = "was saved to .* and is whole" if is_written else "could not be saved to"
    with pytest.raises(ContrastError, match=rf"{expected}.*\(OutOfMemoryError: no more\)"):
        answers.require_success()


@pytest.mark.parametrize("action", ["save", "upload"])
def test_an_action_that_a_user_gives_up_is_no_success(
    action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = headless(monkeypatch, model_action=action)
    # As after an empty line where Heretic asks for a token, or for a folder.
    assert answers.select(ACTION_QUESTION, []) == ""
    with pytest.raises(ContrastError, match=rf"could not be {action}\w+, since a question about"):
        answers.require_success()
    if action == "upload":
        answers.show("Model uploaded to [bold]somebody/refuser-heretic[/].")
        answers.require_success()


def test_an_upload_after_which_another_model_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = headless(monkeypatch, model_action="upload")
    answers.show("* Resetting model...")
    answers.format_exception(ContrastError("It has become another model: start again."))
    with pytest.raises(ContrastError) as error:
        answers.require_success()
    # Nobody can go on with the study of the model that was there.
    assert str(error.value) == (
        "The model was not uploaded to its end: It has become another model: start again."
    )


def test_another_trial_that_is_chosen_by_hand_asks_what_to_do_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "given", tmp_path / "asked"]
    answers = headless(
        monkeypatch, trial_index=None, model_action="save", save_directory=str(folders[0])
    )
    monkeypatch.setattr(heretic_utils, "prompt_path", lambda *_: str(folders[1]))
    monkeypatch.setattr(heretic_utils, "prompt_select", lambda message, choices: choices[0])
    for folder in folders:
        unfinished = Path(answers.path("Path to the folder:"))
        unfinished.mkdir()
        answers.show(f"Model saved to {unfinished}.")
        assert (folder / RECORD).exists()
        assert answers.select(ACTION_QUESTION, [SAVE]) == SAVE
    # What is given up, or fails, after the model was saved.
    answers.path("Path to the folder:")
    answers.format_exception(torch.OutOfMemoryError("no more"))
    assert answers.select(ACTION_QUESTION, [EXIT]) == EXIT
    answers.require_success()


def test_heretic_prints_what_is_waited_for() -> None:
    source = inspect.getsource(heretic_main)
    assert all(f'"{beginning}' in source for beginning in (*WRITTEN, UPLOADED))
