# SPDX-License-Identifier: AGPL-3.0-or-later

"""Capture against dense projectors, planted differences, and the built-in refuser."""

import json
import math
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from heretic_contrast.builtin import REFUSER, refuser_pool
from heretic_contrast.errors import ContrastError
from heretic_contrast.evaluation.capture import (
    capture_pairs,
    load_pairs,
    max_cosine,
    measure_capture,
    span_basis,
    split_by_behavior,
    subspace_capture,
)
from heretic_contrast.evaluation.results import Pair
from heretic_contrast.prompts import load_pool
from heretic_contrast.tiers.responses import Tier, classify_response
from tests.made_directions import make_directions, random_tensor


def test_subspace_capture_equals_a_dense_projector() -> None:
    differences, vectors = random_tensor(7, 20), random_tensor(4, 20, seed=1) * 3
    matrix = vectors.double().numpy().T
    projector = matrix @ np.linalg.inv(matrix.T @ matrix) @ matrix.T
    expected = [
        np.linalg.norm(projector @ row) / np.linalg.norm(row)
        for row in differences.double().numpy()
    ]
    found = subspace_capture(differences, span_basis(vectors))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_max_cosine_equals_a_loop() -> None:
    differences, vectors = random_tensor(5, 12), random_tensor(3, 12, seed=1) * 0.01
    expected = [
        max(
            abs(float(np.dot(d, v))) / (np.linalg.norm(d) * np.linalg.norm(v))
            for v in vectors.double().numpy()
        )
        for d in differences.double().numpy()
    ]
    np.testing.assert_allclose(max_cosine(differences, vectors), expected, rtol=1e-10)


def test_zero_and_dependent_directions_add_nothing() -> None:
    vectors = random_tensor(3, 16)
    dependent = torch.cat([vectors, vectors[:1] * 1e-3 - vectors[1:2] * 50, torch.zeros(1, 16)])
    differences = random_tensor(6, 16, seed=2)
    bases = span_basis(dependent), span_basis(vectors)
    assert bases[0].shape == (3, 16)
    torch.testing.assert_close(*(subspace_capture(differences, basis) for basis in bases))
    # However short a direction is beside others, it counts.
    lengths = torch.tensor([[1.0], [1e-8], [1e4]])
    assert span_basis(vectors * lengths).shape == (3, 16)
    nothing = torch.zeros(2, 16)
    assert span_basis(nothing).shape == (0, 16)
    assert subspace_capture(differences, span_basis(nothing)).tolist() == [0.0] * 6
    assert max_cosine(differences, nothing).tolist() == [0.0] * 6


def test_planted_differences() -> None:
    # Layer 0: inside the span, between two directions. Layer 1: half inside. The embedding is not looked at.
    tensor = torch.zeros(3, 2, 4)
    tensor[:, 0, 0] = 1
    tensor[:, 1, 1] = 5
    differences = torch.zeros(2, 3, 4)
    differences[:, 1] = torch.tensor([1.0, 1.0, 0.0, 0.0])
    differences[0, 2] = torch.tensor([3.0, 0.0, 4.0, 0.0])
    first, second = measure_capture("planted", make_directions(tensor), differences)
    assert (first.layer, second.layer) == (0, 1)
    assert first.subspace == pytest.approx(1)
    assert first.subspace_error == pytest.approx(0, abs=1e-12)
    assert first.max_cosine == pytest.approx(1 / math.sqrt(2))
    # The second pair has no difference there, so that one pair is left, and no error.
    assert second.subspace == pytest.approx(0.6)
    assert second.max_cosine == pytest.approx(0.6)
    assert second.subspace_error is None
    assert second.rank == 2
    assert second.random_subspace == pytest.approx(math.sqrt(2 / 4))


def test_random_directions_capture_about_what_is_said() -> None:
    differences = random_tensor(400, 2, 64)
    tensor = random_tensor(2, 9, 64, seed=5)
    (layer,) = measure_capture("random", make_directions(tensor), differences)
    assert layer.subspace == pytest.approx(layer.random_subspace, rel=0.05)
    assert layer.subspace_error is not None and layer.subspace_error < 0.02


def test_errors_are_standard_errors_over_pairs() -> None:
    differences, tensor = random_tensor(8, 2, 10), random_tensor(2, 3, 10, seed=3)
    (layer,) = measure_capture("a", make_directions(tensor), differences)
    values = subspace_capture(differences[:, 1], span_basis(tensor[1])).numpy()
    assert layer.subspace == pytest.approx(values.mean())
    assert layer.subspace_error == pytest.approx(values.std(ddof=1) / math.sqrt(8))


def test_shipped_pairs_and_refuser_pairs() -> None:
    for pairs in (load_pairs(), load_pairs(model=REFUSER)):
        assert len(pairs) == 18
        assert set(Counter(pair.category for pair in pairs).values()) == {2}
        assert not {pair.refused for pair in pairs} & {pair.answered for pair in pairs}
    # Those of the refuser are held out.
    held_out = [load_pool(refuser_pool(name, "test"), name) for name in ("harmful", "matched")]
    assert {(pair.refused, pair.answered) for pair in pairs} <= {
        (refused.text, answered.text) for refused, answered in zip(*held_out, strict=True)
    }


def test_pairs_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"refused": "a", "answered": "b"}) + "\n\n")
    assert load_pairs(path) == [Pair("a", "b")]
    for content, message in (
        ("", "no prompt pairs"),
        ('{"refused": "a"}\n', "Line 1"),
        ("[]\n", "no prompt pairs"),
        ("[3]\n", "Item 1"),
        ('{"refused": "a", "answered": 3}\n', "not text"),
    ):
        path.write_text(content)
        with pytest.raises(ContrastError, match=message):
            load_pairs(path)
    with pytest.raises(ContrastError, match="There is no file"):
        load_pairs(tmp_path / "missing.jsonl")


def test_pairs_that_behave_otherwise_are_left_out(refuser: Any) -> None:
    pairs = load_pairs(model=REFUSER)[:4]
    swapped = Pair(pairs[0].answered, pairs[0].refused, "swapped")
    both_refused = Pair(pairs[1].refused, pairs[2].refused, "both refused")
    # A judge may say otherwise.
    opposite = {Tier.REFUSE: Tier.COMPLY, Tier.EVASIVE: Tier.REFUSE, Tier.COMPLY: Tier.REFUSE}
    turned = split_by_behavior(
        refuser, [swapped], classify=lambda *pair: opposite[classify_response(*pair)]
    )
    assert turned == ([swapped], [])
    kept, left_out = split_by_behavior(refuser, [*pairs, swapped, both_refused])
    assert kept == pairs
    assert [(item.pair, item.answered_tier) for item in left_out] == [
        (swapped, "REFUSE"),
        (both_refused, "REFUSE"),
    ]
    assert left_out[0].refused_tier != "REFUSE"


def test_capture_on_the_refuser(refuser: Any) -> None:
    pairs = load_pairs(model=REFUSER)
    residuals = {
        text: refuser.residuals([_prompt(text)])[0]
        for pair in pairs[:2]
        for text in (pair.refused, pair.answered)
    }
    # Directions that are the differences of two pairs capture these pairs wholly.
    differences = torch.stack(
        [residuals[pair.refused] - residuals[pair.answered] for pair in pairs[:2]]
    )
    directions = make_directions(differences.transpose(0, 1).contiguous())
    result = capture_pairs(refuser, {"own": directions}, pairs[:2])
    assert result.n_pairs == 2
    for layer in result.layers:
        assert layer.subspace == pytest.approx(1, abs=1e-4)
        assert layer.max_cosine == pytest.approx(1, abs=1e-4)
    # Directions that were made from winsorized residuals, as numpy has them, capture what is left of the pairs.
    winsorized = {}
    for text, residual in residuals.items():
        limit = np.quantile(np.abs(residual.numpy()), 0.7, axis=-1, keepdims=True)
        winsorized[text] = torch.from_numpy(np.clip(residual.numpy(), -limit, limit)).float()
    differences = torch.stack(
        [winsorized[pair.refused] - winsorized[pair.answered] for pair in pairs[:2]]
    )
    tensor = differences.transpose(0, 1).contiguous()
    provenance = {"settings": {"winsorization_quantile": 0.7}}
    both = {"own": directions, "winsorized": make_directions(tensor, provenance=provenance)}
    beside = capture_pairs(refuser, both, pairs[:2])
    assert beside.layers[: len(result.layers)] == result.layers
    # Whatever the model's residuals are winsorized by otherwise.
    model = replace(refuser, winsorization_quantile=0.5)
    assert capture_pairs(model, both, pairs[:2]).layers == beside.layers
    for layer in beside.layers[len(result.layers) :]:
        assert layer.subspace == pytest.approx(1, abs=1e-4)
        assert layer.max_cosine == pytest.approx(1, abs=1e-4)
    nothing = capture_pairs(refuser, {"own": directions}, [Pair(pairs[0].answered, "Hello")])
    assert (nothing.n_pairs, nothing.layers, len(nothing.left_out)) == (0, (), 1)
    json.dumps(asdict(result), allow_nan=False)


def _prompt(text: str) -> Any:
    from heretic_contrast.prompts import Prompt

    return Prompt(text)
