# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Capture: how much of what tells refused from answered prompts lies along the directions (paper, section 4.4).

For a pair of prompts on the same subject, one refused and one answered, δ is the difference of their residuals.
The paper's wording fits two figures, and both are given: `subspace` is ‖P δ‖ / ‖δ‖ with P the projector on the span
of the directions, `max_cosine` is max_k |cos(δ, v_k)|.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..builtin import DATA, REFUSER
from ..directions.directions import Directions
from ..engine.text_classification import Classifier, classify_all
from ..errors import ContrastError
from ..language_model import LanguageModel, winsorize
from ..prompts import Prompt, is_text
from ..prompts.formats import read_file
from ..tiers.responses import Tier, classify_response
from ..vectors import unit_vectors
from .results import CaptureResult, LayerCapture, LeftOut, Pair

RANK_TOLERANCE = 1e-6
"""Singular values of unit directions below this share of the first one are rounding."""


def load_pairs(path: Path | str | None = None, model: str | None = None) -> list[Pair]:
    """
    Returns pairs from a file with the columns "refused", "answered", and perhaps "category", in any format with columns (paper, section 4.4).

    Without a file: pairs of held-out prompts for the built-in refuser, which knows its own subjects alone, and the
    shipped pairs for any other model.

    Raises `ContrastError` when the file cannot be read, is empty, or a row lacks a text.
    """

    if path is None:
        path = (DATA / "refuser_prompts" if model == REFUSER else DATA) / "pairs.jsonl"
    pairs = []
    columns = ("refused", "answered", "category")
    for row in read_file(Path(path), columns).rows:
        cells: list[Any] = [row.cells.get(column) or "" for column in columns]
        if not (all(map(is_text, cells)) and cells[0] and cells[1]):
            raise ContrastError(
                f'{row.place} lacks "refused" or "answered", or one of them or its "category" is not text: correct it.'
            )
        pairs.append(Pair(cells[0], cells[1], cells[2] or None))
    if not pairs:
        raise ContrastError(f"There are no prompt pairs in {path}: give a file with pairs.")
    return pairs


def split_by_behavior(
    model: LanguageModel,
    pairs: Sequence[Pair],
    max_new_tokens: int = 50,
    classify: Classifier = classify_response,
) -> tuple[list[Pair], list[LeftOut]]:
    """Returns the pairs that the model treats as assumed, and the others with what it did."""

    texts = [text for pair in pairs for text in (pair.refused, pair.answered)]
    responses = model.generate(list(map(Prompt, texts)), max_new_tokens)
    tiers = classify_all(classify, texts, responses)
    kept, left_out = [], []
    for pair, refused, answered in zip(pairs, tiers[0::2], tiers[1::2], strict=True):
        if refused is Tier.REFUSE and answered is not Tier.REFUSE:
            kept.append(pair)
        else:
            left_out.append(LeftOut(pair, refused.value, answered.value))
    return kept, left_out


def span_basis(vectors: Tensor) -> Tensor:
    """
    Returns an orthonormal basis of the directions' span, whatever their lengths.

    Tensor of shape (n_directions, hidden_size) to one of shape (rank, hidden_size), float64. Zero directions add
    nothing, and neither do those that depend on others.
    """

    unit, _ = unit_vectors(vectors)
    _, singular_values, rows = torch.linalg.svd(unit, full_matrices=False)
    return rows[(singular_values > RANK_TOLERANCE * singular_values[:1]) & (singular_values > 0)]


def subspace_capture(differences: Tensor, basis: Tensor) -> Tensor:
    """
    Returns ‖P δ‖ / ‖δ‖ for every difference δ, with P the projector on the directions' span (paper, section 4.4).

    `differences`: Tensor of shape (n_pairs, hidden_size). `basis`: their `span_basis`, Tensor of shape (rank, hidden_size).
    Tensor of shape (n_pairs,), float64; NaN where a difference is zero.
    """

    exact = differences.to(torch.float64)
    return (exact @ basis.T).norm(dim=-1) / exact.norm(dim=-1)


def max_cosine(differences: Tensor, vectors: Tensor) -> Tensor:
    """
    Returns max_k |cos(δ, v_k)| for every difference δ; a zero direction has no cosine and counts as 0 (paper, section 4.4).

    `vectors`: Tensor of shape (n_directions, hidden_size). Other shapes, dtype and NaN as in `subspace_capture`.
    """

    exact = differences.to(torch.float64)
    unit, _ = unit_vectors(vectors)
    return (exact @ unit.T).abs().amax(dim=-1) / exact.norm(dim=-1)


def measure_capture(name: str, directions: Directions, differences: Tensor) -> list[LayerCapture]:
    """
    Returns both figures of a configuration for every decoder layer, averaged over pairs.

    `differences`: Tensor of shape (n_pairs, n_layers + 1, hidden_size). The embedding is left out: the last token of a
    prompt in chat format is the same for all.
    """

    layers = []
    for index in range(1, differences.shape[1]):
        vectors = directions.tensor[index]
        basis = span_basis(vectors)
        layers.append(
            LayerCapture(
                name,
                index - 1,
                *_mean_and_error(subspace_capture(differences[:, index], basis)),
                *_mean_and_error(max_cosine(differences[:, index], vectors)),
                len(basis),
                random_subspace=math.sqrt(len(basis) / differences.shape[2]),
            )
        )
    return layers


def capture_pairs(
    model: LanguageModel,
    configurations: Mapping[str, Directions],
    pairs: Sequence[Pair],
    max_new_tokens: int = 50,
    classify: Classifier = classify_response,
) -> CaptureResult:
    """
    Measures capture on a model, with the pairs that behave as assumed.

    Residuals are winsorized as those were that the directions were made from. Where no pair behaves so, the result has no layers.
    """

    kept, left_out = split_by_behavior(model, pairs, max_new_tokens, classify)
    if not kept:
        return CaptureResult(0, (), tuple(left_out))
    residuals = replace(model, winsorization_quantile=1.0).residuals(
        [Prompt(text) for pair in kept for text in (pair.refused, pair.answered)]
    )
    layers: list[LayerCapture] = []
    for name, directions in configurations.items():
        own = winsorize(residuals, directions.winsorization_quantile)
        layers += measure_capture(name, directions, own[0::2] - own[1::2])
    return CaptureResult(len(kept), tuple(layers), tuple(left_out))


def _mean_and_error(values: Tensor) -> tuple[float | None, float | None]:
    finite = values[values.isfinite()]
    if not len(finite):
        return None, None
    error = float(finite.std() / math.sqrt(len(finite))) if len(finite) > 1 else None
    return float(finite.mean()), error
