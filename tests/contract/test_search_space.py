# SPDX-License-Identifier: AGPL-3.0-or-later

"""The space of one direction against that of Heretic 2.0's own directional ablation, where that is installed."""

from types import SimpleNamespace

import optuna
import pytest
import torch

from heretic_contrast.search.parameters import HERETIC_20_RANGES, suggest_parameters
from tests.made_directions import make_directions

abliteration = pytest.importorskip(
    "heretic.modifiers.abliteration", reason="needs Heretic 2.0's own modifiers"
)


@pytest.mark.parametrize("n_layers", [2, 24])
def test_one_direction_searches_what_heretic_searches(n_layers: int) -> None:
    components = ["attn.o_proj", "mlp.down_proj"]
    model = SimpleNamespace(
        get_layers=lambda: [None] * n_layers, get_abliterable_components=lambda: components
    )
    theirs, ours = (optuna.create_study().ask() for _ in range(2))
    abliteration.Abliteration.suggest_parameters(
        None, SimpleNamespace(get_model=lambda: model), theirs
    )
    directions = make_directions(torch.ones(n_layers + 1, 1, 4))
    suggest_parameters(ours, components, n_layers, directions, {}, HERETIC_20_RANGES)
    assert ours.distributions == theirs.distributions
    assert len(ours.distributions) == 10
