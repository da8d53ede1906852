# SPDX-License-Identifier: AGPL-3.0-or-later

"""Plugins that Heretic 2.0 loads by the path of their file, outside of any package, as in `path/to/modifier.py:Class`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import heretic_contrast
from heretic_contrast.hosts.surface import Modifier, Scorer
from tests.contract.standin import load_class, load_plugin

PACKAGE = Path(heretic_contrast.__file__).parent


@pytest.mark.parametrize(
    "file", [pytest.param("modifier.py", marks=pytest.mark.slow), "__init__.py"]
)
def test_modifier(file: str, run: Any) -> None:
    run.restore(run.trials[0])
    expected = run.factors()
    plugin = load_plugin(
        f"{PACKAGE / file}:ContrastAbliteration", Modifier, "modifier", run.settings
    )
    if file == "modifier.py":
        assert type(plugin) is not heretic_contrast.ContrastAbliteration
    plugin.directions = run.loaded_modifier.directions
    plugin.reset_model(run.context())
    assert not any(bool(f.any()) for name, f in run.factors().items() if "lora_B" in name)
    plugin.modify_model(run.context(), plugin.parameters_class.from_dict(json.loads(run.trials[0])))
    found = run.factors()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("file", ["response_scorers.py", "__init__.py"])
def test_scorer(file: str, run: Any) -> None:
    run.loaded_modifier.reset_model(run.context())
    plugin = load_plugin(f"{PACKAGE / file}:RefusalTiers", Scorer, "scorer", run.settings)
    plugin.init(run.context())
    assert plugin.get_score(run.context()).value == 1.0


@pytest.mark.parametrize("name", ["TeacherForcedDivergence", "FixedWeightSweep"])
def test_scorers_that_need_the_model(name: str) -> None:
    assert load_class(f"{PACKAGE / 'scorers.py'}:{name}", Scorer).__name__ == name
