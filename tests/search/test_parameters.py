# SPDX-License-Identifier: AGPL-3.0-or-later

"""The parameters of a trial: what they belong to, and what a suggestion means."""

from dataclasses import replace
from typing import Any

import optuna
import pytest

from heretic_contrast.errors import ContrastError
from heretic_contrast.search.parameters import (
    Kernel,
    Parameters,
    require_ranges_of,
    suggest_parameters,
)
from tests.made_directions import make_directions, random_tensor

# Four decoder layers.
DIRECTIONS = make_directions(random_tensor(5, 2, 6))
KERNEL = Kernel(1.0, 2.0, 0.5, 2.0)
PARAMETERS = Parameters(3.0, {"mlp": KERNEL}, {"class 0": 0.5, "class 1": 1.0}, "own")


def test_a_kernel_reaches_as_far_as_its_distance() -> None:
    assert [KERNEL.weight(layer) for layer in range(6)] == [0.5, 0.75, 1.0, 0.75, 0.5, 0.0]


@pytest.mark.parametrize(
    "changes", [{}, {"direction_index": 0.0}, {"direction_index": None}, {"configuration": ""}]
)
def test_parameters_that_fit(changes: dict[str, Any]) -> None:
    replace(PARAMETERS, **changes).require_fit(DIRECTIONS, ["mlp"], "own")
    replace(PARAMETERS, **changes).require_fit(DIRECTIONS, ["mlp"])


@pytest.mark.parametrize(
    "changes",
    [
        {"direction_index": -0.1},
        {"direction_index": 3.1},
        {"kernels": {"mlp": KERNEL, "attn": KERNEL}},
        {"scales": {"class 0": 0.5}},
        {"scales": {"class 0": 0.5, "class 2": 1.0}},
        {"configuration": "other"},
    ],
)
def test_parameters_of_something_else_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ContrastError, match="belong to another configuration"):
        replace(PARAMETERS, **changes).require_fit(DIRECTIONS, ["mlp"], "own")


@pytest.mark.parametrize(("scope", "index"), [("global", 1.5), ("per layer", None)])
def test_what_a_suggestion_means(scope: str, index: float | None) -> None:
    fixed = {
        "direction_scope": scope,
        "direction_index": 1.5,
        "mlp.max_weight": 1.2,
        "mlp.max_weight_position": 2.0,
        "mlp.min_weight": 0.25,
        "mlp.min_weight_distance": 1.5,
        "scale.class 0": 0.5,
        "scale.class 1": 1.0,
    }
    trial: Any = optuna.trial.FixedTrial(fixed)
    found = suggest_parameters(trial, ["mlp"], 4, DIRECTIONS, configuration="own")
    kernel = Kernel(1.2, 2.0, 0.25 * 1.2, 1.5)
    assert found == replace(PARAMETERS, direction_index=index, kernels={"mlp": kernel})


def test_a_shared_direction_has_no_range() -> None:
    shared = replace(
        DIRECTIONS,
        names=("shared", "class 1"),
        provenance={"settings": {"shared_direction": True}},
    )
    with pytest.raises(ContrastError, match="one direction has no scale"):
        require_ranges_of(shared, {"scale.shared": (0.0, 1.0)})
    three = make_directions(random_tensor(5, 3, 6), names=("shared", "class 1", "class 2"))
    three = replace(three, provenance=shared.provenance)
    require_ranges_of(three, {"scale.class 2": (0.0, 1.0), "rest": (0.0, 1.0)})
    with pytest.raises(ContrastError, match='"shared", but there are class 1, class 2'):
        require_ranges_of(three, {"scale.shared": (0.0, 1.0)})
