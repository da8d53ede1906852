# SPDX-License-Identifier: AGPL-3.0-or-later

"""Heretic 1.4's menu after a study: what a saved model leaves behind, and what comes after it."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

heretic_model = pytest.importorskip("heretic.model")
heretic_utils = pytest.importorskip("heretic.utils")
pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")

from heretic_contrast.hosts import answers, heretic14  # noqa: E402
from heretic_contrast.hosts.evaluator import Evaluator  # noqa: E402
from heretic_contrast.hosts.settings import HostSettings, load_settings  # noqa: E402
from heretic_contrast.hosts.surface import from_heretic  # noqa: E402
from heretic_contrast.modifier import ContrastAbliteration  # noqa: E402
from tests.conftest import small_pool  # noqa: E402

FIRST_TRIAL = "the first trial"
SAVE, BACK, MORE, EXIT = "Save the model to a local folder", "", "continue", ""


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
    chosen = iter([FIRST_TRIAL, SAVE, BACK, MORE, EXIT])

    def select(message: str, choices: list[Any]) -> Any:
        answer = next(chosen)
        return choices[0].value if answer == FIRST_TRIAL else answer

    monkeypatch.setattr(answers, "has_terminal", lambda: True)
    monkeypatch.setattr(heretic_utils, "prompt_select", select)
    monkeypatch.setattr(heretic_utils, "prompt_path", lambda *_: str(tmp_path / "saved"))
    monkeypatch.setattr(heretic_utils, "prompt_text", lambda *_: "1")

    # Which models there are while one is loaded.
    models: list[weakref.ref[Any]] = []
    found: list[int] = []
    get_model_class = heretic_model.get_model_class

    class Model(heretic14.HostModel):
        def reset_model(self) -> bool:
            models.append(weakref.ref(self.get_layers()[0]))
            return super().reset_model()

    def loading(name: str) -> Any:
        found.append(sum(model() is not None for model in models))
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
    assert (tmp_path / "saved" / "heretic-contrast.json").exists()
    assert len(models) > 2 and found[-1] == 0
    assert fast == [True, True]
