# SPDX-License-Identifier: AGPL-3.0-or-later

"""What is recorded of directions themselves: lengths, angles, capture, and perturbation against natural variation."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from heretic_contrast.directions.directions import Directions
from heretic_contrast.evaluation.capture import max_cosine, subspace_capture
from heretic_contrast.evaluation.geometry import compare, measure_activities, measure_layer
from heretic_contrast.evaluation.plan_settings import WEIGHTS
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.prompts import Prompt

DIGITS = 4


def describe_shape(configurations: Mapping[str, Directions], differences: Tensor) -> dict[str, Any]:
    """
    Returns, by name of the directions and for each decoder layer, what their geometry is.

    `norm_ratio` and `cosine` (mean over classes) are relative to the unmatched baseline of the same method; `parallel` is
    λ_max(Σ v vᵀ) of the directions as ablated at weight 1. `capture` and `max_cosine` are means over pairs, and
    `pair_capture` and `pair_max_cosine` means over layers for each pair.

    `differences`: residuals of refused minus answered prompts, Tensor of shape (n_pairs, n_layers + 1, hidden_size).
    """

    described = {}
    for name, directions in configurations.items():
        method = "mean" if name.startswith("mean") else "som"
        reference = configurations[f"{method} unmatched"]
        layers = range(directions.tensor.shape[0] - 1)
        comparisons = [compare("reference", reference, name, directions, layer) for layer in layers]
        subspace = [
            subspace_capture(differences[:, layer + 1], directions.tensor[layer + 1])
            for layer in layers
        ]
        cosines = [
            max_cosine(differences[:, layer + 1], directions.tensor[layer + 1]) for layer in layers
        ]
        described[name] = {
            "norm_ratio": [_rounded(item.norm_ratio) for item in comparisons],
            "cosine": [_mean_cosine(list(item.class_angles.values())) for item in comparisons],
            "parallel": [
                _rounded(measure_layer(name, directions, layer).effective_weight)
                for layer in layers
            ],
            "capture": [_rounded(float(values.nanmean())) for values in subspace],
            "max_cosine": [_rounded(float(values.nanmean())) for values in cosines],
            "pair_capture": _pair_means(subspace),
            "pair_max_cosine": _pair_means(cosines),
        }
    return described


def _pair_means(by_layer: Sequence[Tensor]) -> list[float | None]:
    n_pairs = len(by_layer[0])
    return [
        _rounded(sum(float(values[pair]) for values in by_layer) / len(by_layer))
        for pair in range(n_pairs)
    ]


def _mean_cosine(degrees: Sequence[float]) -> float | None:
    if not degrees:
        return None
    return _rounded(sum(math.cos(math.radians(value)) for value in degrees) / len(degrees))


def _rounded(value: float | None) -> float | None:
    """Rounds for storage; None where there is no number."""

    return None if value is None or value != value else round(value, DIGITS)


def noise_floor(
    model: LanguageModel,
    make: Callable[[str], Directions],
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    tokens: int,
) -> dict[str, Any]:
    """Returns, by directions and layer, the perturbation at the paper's weights over the natural variation."""

    names = ("som unmatched", "som matched", "svd matched", "raw matched")
    activities = measure_activities(
        model,
        {name: make(name) for name in names},
        list(harmful),
        list(harmless),
        WEIGHTS,
        max_new_tokens=tokens,
    )
    found: dict[str, Any] = {"weights": list(WEIGHTS)}
    for name in names:
        found[name] = [
            [_rounded(value) for _, value in activity.perturbations]
            for activity in activities
            if activity.configuration == name
        ]
    return found


def rounded(value: float | None) -> float | None:
    """Rounds to six significant digits, so that results stay small."""

    return None if value is None else float(f"{value:.6g}")
