# SPDX-License-Identifier: AGPL-3.0-or-later

"""What is measured of directions on the model that they belong to, before any cell of a sweep."""

from collections.abc import Mapping, Sequence

import torch

from ..directions.directions import Directions
from ..language_model import LanguageModel
from ..prompts import Prompt
from .capture import capture_pairs
from .geometry import measure_activities, measure_geometry
from .plan import Configuration
from .plan_settings import WEIGHTS
from .results import (
    MAX_RESPONSE_LENGTH,
    N_PROMPTS,
    CaptureResult,
    Extracted,
    Extraction,
    Geometry,
    Pair,
)


def measure_directions(
    model: LanguageModel,
    configurations: Mapping[str, Configuration],
    pairs: Sequence[Pair],
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    weights: Sequence[float] = WEIGHTS,
    max_new_tokens: int = MAX_RESPONSE_LENGTH,
) -> tuple[CaptureResult, Geometry]:
    """Returns capture with pairs, and geometry with activities observed on prompts, of every configuration."""

    directions = {name: item.directions for name, item in configurations.items()}
    capture = capture_pairs(model, directions, pairs, max_new_tokens)
    activities = measure_activities(
        model, configurations, harmful, harmless, weights, max_new_tokens
    )
    return capture, measure_geometry(directions, activities)


def measure_extraction(
    model: LanguageModel,
    configurations: Mapping[str, Configuration],
    pairs: Sequence[Pair],
    harmful: Sequence[Prompt],
    bulk: Sequence[Prompt],
) -> Extraction:
    """Measures the directions of an extraction, with activities on the first few prompts of each pool."""

    capture, geometry = measure_directions(
        model, configurations, pairs, harmful[:N_PROMPTS], bulk[:N_PROMPTS]
    )
    seen: list[Directions] = []
    extracted = {}
    for name, configuration in configurations.items():
        directions = configuration.directions
        # SVD and scale change nothing about the classes themselves.
        repeated = any(
            torch.equal(directions.class_directions, other.class_directions) for other in seen
        )
        seen.append(directions)
        extracted[name] = Extracted(
            directions.n_directions,
            directions.provenance.get("settings", {}),
            tuple(directions.class_names),
            directions.hits[1:].numpy(),
            repeated,
        )
    return Extraction(model.name, extracted, capture, geometry)
