# SPDX-License-Identifier: AGPL-3.0-or-later

"""The operator against dense algebra."""

from typing import get_args
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from heretic_contrast.ablation.hooks import ablated
from heretic_contrast.ablation.lora import lora_factors
from heretic_contrast.ablation.operator import (
    Composition,
    Operator,
    compose,
    effective_weight,
    equalize,
    rows_times,
    weight_along,
)
from heretic_contrast.errors import ContrastError

N, HIDDEN, INPUTS = 5, 16, 24


def random_unit(n: int = N, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Nearly parallel, as class directions are.
    shared = torch.randn(HIDDEN, generator=generator)
    vectors = shared + 0.4 * torch.randn(n, HIDDEN, generator=generator)
    return torch.nn.functional.normalize(vectors, dim=1)


def dense(vectors: Tensor, weights: Tensor, composition: str) -> Tensor:
    """C as the design defines it, in float64."""

    vectors, weights = vectors.double(), weights.double()
    identity = torch.eye(HIDDEN, dtype=torch.float64)
    total = sum(w * torch.outer(v, v) for w, v in zip(weights, vectors, strict=True))
    assert isinstance(total, Tensor)
    if composition == "sum":
        return total
    if composition == "sequential":
        product = identity
        for w, v in zip(weights, vectors, strict=True):
            product = product @ (identity - w * torch.outer(v, v))
        return identity - product
    eigenvalues, eigenvectors = torch.linalg.eigh(total)
    return (eigenvectors * eigenvalues.clamp_max(weights.max())) @ eigenvectors.T


@pytest.mark.parametrize("composition", get_args(Composition))
@pytest.mark.parametrize("weights", [[0.5] * N, [0.0, 1.2, 0.3, 0.9, 0.1], [0.0] * N])
def test_lora_factors_and_hook_equal_dense_operator(composition: str, weights: list[float]) -> None:
    vectors, amounts = random_unit(), torch.tensor(weights)
    operator = compose(vectors, amounts, composition)
    expected = dense(vectors, amounts, composition)
    weight = torch.randn(HIDDEN, INPUTS, generator=torch.Generator().manual_seed(1))
    factor_a, factor_b = lora_factors(operator, weight)
    assert factor_a.shape == (N, INPUTS) and factor_b.shape == (HIDDEN, N)
    change = -(expected @ weight.double())
    assert torch.allclose((factor_b @ factor_a).double(), change, rtol=1e-5, atol=1e-5)
    outputs = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(
        operator.apply(outputs).double(), outputs.double() @ expected.T, rtol=1e-5, atol=1e-5
    )


def test_sum_of_orthonormal_directions_equals_capped() -> None:
    vectors = torch.linalg.qr(torch.randn(HIDDEN, N)).Q.T.contiguous()
    weights = torch.full((N,), 0.7)
    weight = torch.randn(HIDDEN, INPUTS)
    products = [
        factor_b @ factor_a
        for factor_a, factor_b in (
            lora_factors(compose(vectors, weights, name), weight) for name in ("sum", "capped")
        )
    ]
    assert torch.allclose(*products, rtol=1e-5, atol=1e-6)


def test_effective_weight_is_the_largest_eigenvalue() -> None:
    vectors, weights = random_unit(), torch.tensor([0.5, 0.2, 0.9, 0.4, 0.5])
    eigenvalues = torch.linalg.eigvalsh(dense(vectors, weights, "sum"))
    assert effective_weight(compose(vectors, weights)) == pytest.approx(
        float(eigenvalues[-1]), rel=1e-5
    )
    # Nearly parallel directions add up.
    assert float(eigenvalues[-1]) > 1.5
    direction = 3 * vectors.mean(dim=0)
    unit = torch.nn.functional.normalize(direction.double(), dim=0)
    assert weight_along(compose(vectors, weights), direction) == pytest.approx(
        float(unit @ dense(vectors, weights, "sum") @ unit), rel=1e-5
    )


@pytest.mark.parametrize(
    "values", [[0.5, 0.2, 0.9, 0.4, 0.5], [-0.5, -0.2, -0.9, -0.4, -0.5], [0.5, 0.2, -0.9, 0.4, 0]]
)
def test_equalized_weights_remove_or_add_no_more_than_the_largest_weight(
    values: list[float],
) -> None:
    vectors, weights = random_unit(), torch.tensor(values)
    equal = equalize(vectors, weights)
    eigenvalues = torch.linalg.eigvalsh(dense(vectors, equal, "sum"))
    assert float(eigenvalues.abs().max()) == pytest.approx(0.9, rel=1e-5)
    # One positive factor for all.
    factor = float(equal[2] / weights[2])
    assert factor > 0 and torch.allclose(equal, weights * factor)


@pytest.mark.parametrize("composition", ["capped", "sequential"])
@pytest.mark.parametrize("length", [1.0, 0.25, 3.0])
def test_equalized_directions_remove_the_largest_weight_however_they_are_composed(
    length: float, composition: str
) -> None:
    vectors, weights = length * random_unit(), torch.tensor([0.5, 0.2, 0.9, 0.4, 0.5])
    equal = equalize(vectors, weights, composition)
    assert torch.allclose(equal / weights, equal[:1] / weights[:1])
    removed = dense(vectors, equal, composition)
    assert float(torch.linalg.matrix_norm(removed, ord=2)) == pytest.approx(0.9, rel=1e-5)


def test_directions_are_composed_twice_to_be_equalized(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search equalizes each layer in each trial; to compose long directions for every factor that is tried took minutes."""

    vectors, weights = random_unit(), torch.tensor([0.5, 0.2, 0.9, 0.4, 0.5])
    composed = Mock(wraps=compose)
    monkeypatch.setattr("heretic_contrast.ablation.operator.compose", composed)
    equal = equalize(vectors, weights, "sequential")
    assert composed.call_count == 2
    # The smallest factor at which the product over dense matrices removes 0.9, by trying.
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        removed = torch.linalg.matrix_norm(dense(vectors, middle * weights, "sequential"), ord=2)
        low, high = (middle, high) if float(removed) < 0.9 else (low, middle)
    assert torch.allclose(equal, weights * high, rtol=1e-5)


def test_a_long_direction_of_small_weight_holds_no_other_back() -> None:
    # At right angles each removes its weight times its squared length: 64 and 14.4, so that a factor of 1 / 64 makes the larger 1.
    vectors = torch.eye(2, HIDDEN) * torch.tensor([[8.0], [12.0]])
    for composition in ("sum", "sequential"):
        equal = equalize(vectors, torch.tensor([1.0, 0.1]), composition)
        assert torch.allclose(equal, torch.tensor([1 / 64, 0.1 / 64]))


def test_directions_that_undo_each_other_remove_less() -> None:
    # Twice the same at 1.2: 1 − (1 − 1.2)² = 0.96, which no factor brings to 1.2.
    vectors = torch.nn.functional.normalize(torch.ones(2, HIDDEN), dim=1)
    equal = equalize(vectors, torch.tensor([1.2, 1.2]), "sequential")
    assert torch.allclose(equal, torch.tensor([1.2, 1.2]))
    assert effective_weight(compose(vectors, equal, "sequential")) == pytest.approx(0.96)


def test_capped_caps_at_the_largest_weight() -> None:
    operator = compose(random_unit(), torch.full((N,), 0.8), "capped")
    assert effective_weight(operator) == pytest.approx(0.8, rel=1e-5)


@pytest.mark.parametrize("rest", [1e-2, 1e-5, 3e-6, 1e-7, 0.0])
def test_a_row_that_is_all_but_removed_does_not_grow(rest: float) -> None:
    """Its length after the ablation is noise, which nothing may be divided by."""

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 32, generator=generator)
    direction = rest * torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    direction[7] = 1
    operator = compose(torch.nn.functional.normalize(direction, dim=0)[None], torch.ones(1))
    factor_a, factor_b = lora_factors(operator, weight, "full")
    # One direction has the rank that Heretic has by default.
    assert factor_a.shape == (3, 32) and factor_b.shape == (64, 3)
    lengths = (weight + factor_b @ factor_a).norm(dim=1) / weight.norm(dim=1)
    assert float(lengths[7]) < 1.01
    kept = torch.arange(64) != 7
    assert torch.allclose(lengths[kept], torch.ones(63), atol=1e-2)


def test_a_direction_where_a_norm_writes_nothing() -> None:
    gain = torch.ones(8)
    gain[3] = 0
    direction = torch.nn.functional.one_hot(torch.tensor([3]), 8).float()
    behind = compose(direction, torch.ones(1)).behind(gain)
    assert not behind.apply(torch.randn(4, 8)).any()


def test_zero_and_duplicate_directions() -> None:
    vectors = random_unit()
    vectors[1] = 0
    vectors[2] = vectors[3]
    for composition in get_args(Composition):
        operator = compose(vectors, torch.full((N,), 0.6), composition)
        assert torch.isfinite(operator.kernel).all()
        expected = dense(vectors, torch.full((N,), 0.6), composition)
        probe = torch.randn(4, HIDDEN)
        assert torch.allclose(
            operator.apply(probe).double(), probe.double() @ expected.T, rtol=1e-4, atol=1e-5
        )


def test_capped_refuses_negative_weights() -> None:
    with pytest.raises(ContrastError, match="negative weight"):
        compose(random_unit(), torch.tensor([-1.0, 0, 0, 0, 0]), "capped")


@pytest.mark.parametrize(
    ("length", "weight"), [(1e15, 900.0), (1e15, 1100.0), (1e-3, 0.9e33), (1e-3, 1.1e33)]
)
def test_what_overflows_float32_is_refused(length: float, weight: float) -> None:
    """A weight times the square of a length of 1 or more is 1e33 at most."""

    vectors = torch.eye(1, HIDDEN, dtype=torch.float64) * length
    weights = torch.tensor([weight], dtype=torch.float64)
    if weight in (1100.0, 1.1e33):
        with pytest.raises(ContrastError, match="within the range of float32"):
            compose(vectors, weights)
        return
    found = compose(vectors, weights).apply(torch.eye(1, HIDDEN))
    torch.testing.assert_close(found, torch.eye(1, HIDDEN) * weight * length**2)


def test_an_unknown_composition_is_refused() -> None:
    with pytest.raises(ContrastError, match='no composition "Sum": choose sum, sequential, capped'):
        compose(random_unit(), torch.ones(5), "Sum")  # type: ignore[arg-type]


def test_an_unknown_row_normalization_is_refused() -> None:
    operator = compose(random_unit(), torch.ones(5))
    with pytest.raises(ContrastError, match='no row normalization "Full": choose none, pre, full'):
        lora_factors(operator, torch.randn(HIDDEN, 6), "Full")  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [False, True])
def test_hook_does_what_a_changed_weight_does(bias: bool) -> None:
    module = torch.nn.Linear(INPUTS, HIDDEN, bias=bias)
    operator = compose(random_unit(), torch.full((N,), 0.6))
    changed = torch.nn.Linear(INPUTS, HIDDEN, bias=bias)
    changed.load_state_dict(module.state_dict())
    factor_a, factor_b = lora_factors(operator, module.weight.detach())
    changed.weight.data += factor_b @ factor_a
    inputs = torch.randn(2, 7, INPUTS)
    before = module(inputs)
    with ablated([module], operator):
        assert torch.allclose(module(inputs), changed(inputs), atol=1e-5)
        assert not torch.allclose(before, changed(inputs), atol=1e-3)
    assert torch.equal(module(inputs), before)


def test_operator_keeps_the_dtype_of_outputs() -> None:
    operator = Operator(random_unit(), torch.eye(N))
    assert operator.apply(torch.randn(2, HIDDEN, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("hidden_size", [8, 40, 41])
@pytest.mark.parametrize("n_directions", [1, 3])
def test_few_rows_times_a_weight(hidden_size: int, n_directions: int) -> None:
    generator = torch.Generator().manual_seed(hidden_size)
    vectors = torch.randn(n_directions, hidden_size, generator=generator)
    weight = torch.randn(hidden_size, 6, generator=generator)
    expected = (vectors.double() @ weight.double()).float()
    torch.testing.assert_close(rows_times(vectors, weight), expected, rtol=1e-5, atol=1e-5)
    # Strides make no difference.
    strided = weight.T.contiguous().T
    torch.testing.assert_close(rows_times(vectors, strided), expected, rtol=1e-5, atol=1e-5)
