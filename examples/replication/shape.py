# SPDX-License-Identifier: AGPL-3.0-or-later

"""What is recorded of directions themselves: lengths, angles, capture, and perturbation against natural variation."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heretic_contrast.directions.directions import Directions
from heretic_contrast.evaluation.capture import max_cosine, span_basis, subspace_capture
from heretic_contrast.evaluation.geometry import compare, measure_activities, measure_layer
from heretic_contrast.evaluation.plan import Configuration
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
        at_layers = zip(differences.unbind(dim=1)[1:], directions.tensor[1:], strict=True)
        measured = [
            (subspace_capture(d, span_basis(rows)), max_cosine(d, rows)) for d, rows in at_layers
        ]
        # Of shape (n_layers, n_pairs).
        subspace, cosines = map(torch.stack, zip(*measured, strict=True))
        angles = [list(item.class_angles.values()) for item in comparisons]
        described[name] = {
            "norm_ratio": _rounded(item.norm_ratio for item in comparisons),
            "cosine": _rounded(np.cos(np.radians(of)).mean() if of else None for of in angles),
            "parallel": _rounded(
                measure_layer(name, Configuration(directions), layer).effective_weight
                for layer in layers
            ),
            "capture": _rounded(subspace.nanmean(dim=1).tolist()),
            "max_cosine": _rounded(cosines.nanmean(dim=1).tolist()),
            "pair_capture": _rounded(subspace.mean(dim=0).tolist()),
            "pair_max_cosine": _rounded(cosines.mean(dim=0).tolist()),
        }
    return described


def _rounded(values: Iterable[float | None]) -> list[float | None]:
    """Rounds for storage; None where there is no number."""

    return [
        None if value is None or math.isnan(value) else round(float(value), DIGITS)
        for value in values
    ]


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
            _rounded(value for _, value in activity.perturbations)
            for activity in activities
            if activity.configuration == name
        ]
    return found


def rounded(value: float | None) -> float | None:
    """Rounds to six significant digits, so that results stay small."""

    return None if value is None else float(f"{value:.6g}")
