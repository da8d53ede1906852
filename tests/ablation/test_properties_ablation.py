# SPDX-License-Identifier: AGPL-3.0-or-later

"""Properties of the ablation operator and its LoRA factors, against dense algebra in float64."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from heretic_contrast.ablation.hooks import BatchOperator, ablated
from heretic_contrast.ablation.lora import lora_factors
from heretic_contrast.ablation.operator import (
    LONGEST,
    Composition,
    Operator,
    compose,
    effective_weight,
    equalize,
    weight_along,
)
from heretic_contrast.errors import ContrastError
from heretic_contrast.settings import RowNormalization
from tests.strategies import direction_sets, fewer, normal, seeds, weights_for

compositions = st.sampled_from(get_args(Composition))


def dense(vectors: Tensor, weights: Tensor, composition: Composition) -> Tensor:
    """Returns C as the design defines it, one outer product after the other."""

    exact = vectors.double()
    identity = torch.eye(exact.shape[1], dtype=torch.float64)
    total, product = torch.zeros_like(identity), identity
    for weight, vector in zip(weights, exact, strict=True):
        total = total + weight * torch.outer(vector, vector)
        product = product @ (identity - weight * torch.outer(vector, vector))
    if composition == "sum":
        return total
    if composition == "sequential":
        return identity - product
    eigenvalues, eigenvectors = torch.linalg.eigh(total)
    return (eigenvectors * eigenvalues.clamp_max(float(weights.max()))) @ eigenvectors.T


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), ord=2))


def distance(found: Tensor, expected: Tensor, scale: float) -> float:
    """Returns how far two matrices are apart, relative to a scale of the computation."""

    return norm(found.double() - expected.double()) / max(scale, 1e-300)


@given(st.data(), direction_sets(), compositions, seeds)
def test_all_forms_equal_dense_algebra(
    data: st.DataObject, vectors: Tensor, composition: Composition, seed: int
) -> None:
    weights = data.draw(weights_for(vectors))
    expected = dense(vectors, weights, composition)
    operator = compose(vectors, weights, composition)
    n, hidden = vectors.shape
    weight = normal(hidden, data.draw(st.integers(1, 40)), seed=seed)
    # The single products that are added up may be larger than their sum.
    scale = (1 + norm(expected)) * norm(weight)

    factor_a, factor_b = lora_factors(operator, weight)
    assert factor_a.shape == (n, weight.shape[1]) and factor_b.shape == (hidden, n)
    assert distance(factor_b @ factor_a, -(expected @ weight.double()), scale) < 1e-5

    outputs = normal(3, 5, hidden, seed=seed + 1)
    flat = outputs.reshape(-1, hidden).double() @ expected.T
    scale = (1 + norm(expected)) * norm(outputs.reshape(-1, hidden))
    assert distance(operator.apply(outputs).reshape(-1, hidden), flat, scale) < 1e-5
    batch = BatchOperator.stack([None, operator, operator], hidden)
    stacked = batch.apply(outputs)
    assert not bool(stacked[0].any())
    assert (
        distance(
            stacked[1:].reshape(-1, hidden), operator.apply(outputs[1:]).reshape(-1, hidden), scale
        )
        < 1e-5
    )


@given(st.data(), direction_sets(), compositions, seeds, st.booleans())
def test_hooks_equal_changed_weights(
    data: st.DataObject, vectors: Tensor, composition: Composition, seed: int, bias: bool
) -> None:
    weights = data.draw(weights_for(vectors))
    operator = compose(vectors, weights, composition)
    module = torch.nn.Linear(7, vectors.shape[1], bias=bias)
    module.weight.data = normal(vectors.shape[1], 7, seed=seed)
    if bias:
        module.bias.data = normal(vectors.shape[1], seed=seed + 1)
    inputs = normal(4, 7, seed=seed + 2)
    with torch.no_grad():
        with ablated([module], operator):
            hooked = module(inputs)
        exact = module.weight.double()
        exact = exact - dense(vectors, weights, composition) @ exact
        expected = inputs.double() @ exact.T
        if bias:
            expected = expected + module.bias.double()
    scale = 1 + norm(exact) * norm(inputs)
    assert distance(hooked, expected, scale) < 1e-5


@given(st.data(), direction_sets(), compositions, seeds)
def test_effective_weight_is_the_spectral_norm(
    data: st.DataObject, vectors: Tensor, composition: Composition, seed: int
) -> None:
    weights = data.draw(weights_for(vectors))
    operator = compose(vectors, weights, composition)
    expected = dense(vectors, weights, composition)
    assert effective_weight(operator) == pytest.approx(norm(expected), rel=1e-5, abs=1e-6)
    if composition == "sum":
        largest = float(torch.linalg.eigvalsh(expected)[-1])
        assert effective_weight(operator) == pytest.approx(largest, rel=1e-5, abs=1e-6)
    direction = normal(vectors.shape[1], seed=seed)
    unit = direction.double() / direction.double().norm()
    along = weight_along(operator, direction)
    assert along == pytest.approx(float(unit @ expected @ unit), rel=1e-5, abs=1e-5)
    # The length of the direction says nothing, however small or large it is.
    for factor in (2.0**-100, 2.0**100):
        assert weight_along(operator, direction * factor) == pytest.approx(along, rel=1e-9)
    assert weight_along(operator, torch.zeros_like(direction)) == 0


@given(st.data(), direction_sets())
def test_capped_has_the_largest_weight_as_spectral_norm(
    data: st.DataObject, vectors: Tensor
) -> None:
    weights = data.draw(weights_for(vectors))
    found = effective_weight(compose(vectors, weights, "capped"))
    of_the_sum = norm(dense(vectors, weights, "sum"))
    assert found == pytest.approx(min(float(weights.max()), of_the_sum), rel=1e-5, abs=1e-6)


@given(st.data(), direction_sets(lowest=-6, highest=6))
def test_equalized_weights_have_the_largest_weight_as_effective_weight(
    data: st.DataObject, vectors: Tensor
) -> None:
    weights = data.draw(weights_for(vectors))
    equal = equalize(vectors, weights)
    if bool((vectors.norm(dim=1) * weights).any()):
        largest = torch.linalg.eigvalsh(dense(vectors, equal, "sum"))[-1]
        assert float(largest) == pytest.approx(float(weights.max()), rel=1e-5)
        # One factor for all, so that the directions keep their proportions.
        assert torch.allclose(equal * weights.max(), weights * equal.max(), rtol=1e-9)
    else:
        assert torch.equal(equal, weights)


@given(st.data(), direction_sets(most=1), st.floats(0, 1.5), st.floats(0, 1.5))
def test_copies_of_a_direction(
    data: st.DataObject, vectors: Tensor, first: float, second: float
) -> None:
    copies = torch.cat([vectors, vectors])
    weights = torch.tensor([first, second], dtype=torch.float64)
    length = float(vectors.double().norm() ** 2)
    for composition, total in (
        ("sum", first + second),
        ("sequential", 1 - (1 - first) * (1 - second)),
        ("capped", max(first, second)),
    ):
        found = weight_along(compose(copies, weights, composition), vectors[0])
        assert found == pytest.approx(total * length, rel=1e-5, abs=1e-6)


@given(st.data(), direction_sets(most=1), st.integers(2, 9))
def test_capping_of_long_copies(data: st.DataObject, vectors: Tensor, n: int) -> None:
    outputs = normal(3, vectors.shape[1], seed=0)
    unit = vectors[0].double()
    weights = data.draw(weights_for(vectors.repeat(n, 1)))
    along = float(weights.max()) * outputs.double() @ torch.outer(unit, unit)
    for exponent in (0, 1, 2, 4, 8, 15):
        operator = compose(vectors.repeat(n, 1) * 10.0**exponent, weights, "capped")
        assert norm(operator.apply(outputs).double() - along) < 1e-5 * norm(outputs)


@given(st.data(), seeds, st.integers(1, 12))
def test_compositions_of_orthonormal_directions_agree(
    data: st.DataObject, seed: int, n: int
) -> None:
    vectors = torch.linalg.qr(normal(16, n, seed=seed)).Q.T.contiguous()
    weights = data.draw(weights_for(vectors))
    weight = normal(16, 9, seed=seed + 1)
    changes = []
    for composition in get_args(Composition):
        factor_a, factor_b = lora_factors(compose(vectors, weights, composition), weight)
        changes.append(factor_b @ factor_a)
    assert torch.allclose(changes[0], changes[1], atol=1e-4)
    assert torch.allclose(changes[0], changes[2], atol=1e-4)


@given(st.data(), direction_sets(lowest=-30, highest=30), compositions, seeds)
def test_any_length_is_right_or_refused(
    data: st.DataObject, vectors: Tensor, composition: Composition, seed: int
) -> None:
    weights = data.draw(weights_for(vectors))
    lengths = vectors.double().norm(dim=1)
    longest = float(lengths.max())
    try:
        operator = compose(vectors, weights, composition)
    except ContrastError as error:
        assert "float32" in str(error)
        # What is capped never overflows; the terms of a product may be larger than each of its factors.
        assert composition != "capped"
        assert longest > (LONGEST if composition == "sum" else 5)
        return
    assert longest <= LONGEST or composition == "capped"
    outputs = normal(4, vectors.shape[1], seed=seed)
    found = operator.apply(outputs).double()
    assert bool(found.isfinite().all())
    if composition == "capped":
        assert effective_weight(operator) <= float(weights.max()) * (1 + 1e-5)
    if composition == "sum" or (composition == "capped" and longest < 1e3):
        expected = outputs.double() @ dense(vectors, weights, composition).T
        # A short direction beside a long one is lost in the rounding of the long one.
        scale = norm(dense(vectors, weights, composition)) * norm(outputs)
        assert norm(found - expected) <= 1e-5 * scale + 1e-36


@pytest.mark.parametrize("composition", get_args(Composition))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(composition: Composition, value: float) -> None:
    vectors, weights = normal(3, 8, seed=0), torch.ones(3)
    broken = vectors.clone()
    broken[1, 4] = value
    with pytest.raises(
        ContrastError, match=r"^A direction to ablate is infinite or not a number: .*\.$"
    ):
        compose(broken, weights, composition)
    with pytest.raises(
        ContrastError, match=r"^A weight to ablate is infinite or not a number: .*\.$"
    ):
        compose(vectors, torch.tensor([1.0, value, 1.0]), composition)


def normalized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rows of length 1 and their lengths; a row of zeros stays one."""

    lengths = weight.double().norm(dim=1, keepdim=True)
    return weight.double() / lengths.clamp_min(1e-300), lengths


@given(
    st.data(),
    direction_sets(most=16, hidden=24),
    compositions,
    st.sampled_from(get_args(RowNormalization)),
    seeds,
    st.integers(-6, 6),
)
def test_row_normalizations_equal_dense_algebra(
    data: st.DataObject,
    vectors: Tensor,
    composition: Composition,
    normalization: RowNormalization,
    seed: int,
    exponent: int,
) -> None:
    weights = data.draw(weights_for(vectors, highest=0.9))
    weight = normal(vectors.shape[1], data.draw(st.integers(1, 30)), seed=seed) * 10.0**exponent
    weight[data.draw(st.integers(0, len(weight) - 1))] = 0
    rows, lengths = normalized(weight)
    remaining = rows - dense(vectors, weights, composition) @ rows
    if normalization == "none":
        expected = -(dense(vectors, weights, composition) @ weight.double())
    elif normalization == "pre":
        expected = lengths * (remaining - rows)
    else:
        # What is left of a row may be nothing but rounding, which has no direction.
        assume(bool((remaining.norm(dim=1) > 0.01)[lengths[:, 0] > 0].all()))
        expected = lengths * normalized(remaining)[0] - weight.double()
    # Of full rank, the truncation of a renormalized change loses nothing.
    rank = min(weight.shape) if normalization == "full" else None
    operator = compose(vectors, weights, composition)
    factor_a, factor_b = lora_factors(operator, weight, normalization, rank, seed=seed % 1000)
    scale = norm(weight) * (1 + norm(dense(vectors, weights, composition)))
    assert distance(factor_b @ factor_a, expected, scale) < 2e-5


@fewer(2)
@given(direction_sets(most=8, hidden=24), seeds, st.integers(1, 12))
def test_truncation_is_the_best_of_its_rank(vectors: Tensor, seed: int, rank: int) -> None:
    weight = normal(vectors.shape[1], 20, seed=seed)
    operator = compose(vectors, torch.full((len(vectors),), 0.5))
    exact_a, exact_b = lora_factors(operator, weight, "full", min(weight.shape))
    factor_a, factor_b = lora_factors(operator, weight, "full", rank)
    assert factor_a.shape == (rank, 20) and factor_b.shape == (vectors.shape[1], rank)
    values = torch.linalg.svdvals((exact_b @ exact_a).double())
    best = float(values[rank:].square().sum().sqrt())
    found = float((factor_b @ factor_a - exact_b @ exact_a).double().norm())
    assert found <= best * 1.01 + 1e-5 * norm(weight)


@given(direction_sets(most=8), st.integers(0, 8))
def test_samples_of_a_batch_do_not_touch_each_other(vectors: Tensor, n_others: int) -> None:
    hidden = vectors.shape[1]
    operator = compose(vectors, torch.full((len(vectors),), 0.7))
    others = [
        Operator(normal(2, hidden, seed=index), torch.eye(2)) if index % 2 else None
        for index in range(n_others)
    ]
    batch = BatchOperator.stack([*others, operator], hidden)
    outputs = normal(n_others + 1, 3, hidden, seed=7)
    assert torch.allclose(batch.apply(outputs)[-1], operator.apply(outputs[-1]), atol=1e-5)
    # Whatever the others are, nothing of them reaches the sample.
    changed = outputs.clone()
    changed[:-1] = 1e3 * normal(n_others, 3, hidden, seed=8)
    assert torch.equal(batch.apply(changed)[-1], batch.apply(outputs)[-1])
    order = torch.arange(n_others, -1, -1)
    reordered = batch.select(order).apply(outputs[order])
    # On some processors the rounding of a batched product depends on the place in the batch.
    assert torch.allclose(reordered, batch.apply(outputs)[order], atol=1e-5)
