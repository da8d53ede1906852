# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The operator that ablates several directions at once, as LoRA factors and as forward hooks.

Every composition has the form C = V K Vᵀ with the directions as columns of V (hidden_size × n_directions) and
a small matrix K (n_directions × n_directions). An output projection W (hidden_size × in_features) becomes
W − C W. The change has rank n_directions at most and is exactly a LoRA pair; the dense C is never formed.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .errors import ContrastError


class Composition(str, Enum):
    """How the ablations of several directions are put together."""

    SUM = "sum"
    """Σ_k w_k v_k v_kᵀ: the paper, and Heretic's pull request 196. Parallel directions add up."""

    SEQUENTIAL = "sequential"
    """I − Π_k (I − w_k v_k v_kᵀ): one direction after the other (Piras et al., 2026)."""

    CAPPED = "capped"
    """The sum, its eigenvalues capped at max_k w_k, so that parallel directions do not add up."""


@dataclass(frozen=True)
class Operator:
    """
    C = V K Vᵀ.

    `vectors`: Tensor of shape (n_directions, hidden_size), float32, the columns of V as rows.
    `kernel`: Tensor of shape (n_directions, n_directions), float32, the matrix K.
    """

    vectors: Tensor
    kernel: Tensor

    @cached_property
    def mixed_vectors(self) -> Tensor:
        """The columns of V K as rows, computed once. Tensor of shape (n_directions, hidden_size)."""

        return self.kernel.T @ self.vectors

    def apply(self, output: Tensor) -> Tensor:
        """
        Returns C y for outputs y on the operator's device.

        Tensor of shape (..., hidden_size) to one of the same shape and dtype.
        """

        coefficients = output.float() @ self.vectors.T
        return (coefficients @ self.mixed_vectors).to(output.dtype)

    def lora_factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """
        Returns the LoRA pair (A, B) with B A = −C W, exactly.

        `weight`: Tensor of shape (hidden_size, in_features), float32.
        A: Tensor of shape (n_directions, in_features). B: Tensor of shape (hidden_size, n_directions).
        """

        vectors = self.vectors.to(weight.device)
        return vectors @ weight, -(vectors.T @ self.kernel.to(weight.device))

    def to(self, device: torch.device) -> "Operator":
        """Returns the operator on a device: itself where it is there already."""

        if self.vectors.device == device:
            return self
        return Operator(self.vectors.to(device), self.kernel.to(device))


def compose(
    vectors: Tensor, weights: Tensor, composition: Composition | str = Composition.SUM
) -> Operator:
    """
    Returns the operator that ablates `vectors` with `weights` (design, section 5).

    `vectors`: Tensor of shape (n_directions, hidden_size). `weights`: Tensor of shape (n_directions,).
    The small matrix K is computed in float64.

    Raises `ContrastError` when a weight is negative under `capped`, which has no meaning there.
    """

    composition = Composition(composition)
    exact_weights = weights.to(torch.float64).cpu()
    exact_vectors = vectors.to(torch.float64).cpu()
    if composition is Composition.SUM:
        kernel = torch.diag(exact_weights)
    elif composition is Composition.SEQUENTIAL:
        kernel = _sequential_kernel(exact_vectors, exact_weights)
    else:
        kernel = _capped_kernel(exact_vectors, exact_weights)
    return Operator(vectors.to(torch.float32), kernel.to(torch.float32))


def _sequential_kernel(vectors: Tensor, weights: Tensor) -> Tensor:
    """
    Returns K of I − Π_k (I − w_k v_k v_kᵀ).

    From (I − C)(I − w v vᵀ) = I − (C + w v vᵀ − w C v vᵀ) follows one new column of K per direction.
    """

    n_directions = len(weights)
    gram = vectors @ vectors.T
    kernel = torch.zeros(n_directions, n_directions, dtype=torch.float64)
    for k in range(n_directions):
        kernel[:k, k] = -weights[k] * (kernel[:k, :k] @ gram[:k, k])
        kernel[k, k] = weights[k]
    return kernel


def _capped_kernel(vectors: Tensor, weights: Tensor) -> Tensor:
    """
    Returns K of the sum Σ_k w_k v_k v_kᵀ with its eigenvalues capped at max_k w_k.

    With s = √w, the sum V s (V s)ᵀ shares its nonzero eigenvalues λ_i with the small matrix
    (V s)ᵀ V s = Q diag(λ) Qᵀ, and capping λ_i is the factor min(1, cap / λ_i) between Q and Qᵀ.
    """

    if bool((weights < 0).any()):
        raise ContrastError(
            'A negative weight has no meaning under the composition "capped": use "sum" or "sequential".'
        )
    roots = weights.sqrt()
    gram = roots[:, None] * (vectors @ vectors.T) * roots[None, :]
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    cap = weights.max() if len(weights) else weights.new_zeros(())
    factors = torch.where(
        eigenvalues > cap, cap / eigenvalues.clamp_min(1e-300), torch.ones_like(eigenvalues)
    )
    inner = (eigenvectors * factors) @ eigenvectors.T
    return roots[:, None] * inner * roots[None, :]


def effective_weight(operator: Operator) -> float:
    """
    Returns the largest amount of any unit direction that the operator removes: the spectral norm of C.

    For the composition `sum` with weights that are not negative this is λ_max(Σ_k w_k v_k v_kᵀ).
    """

    vectors = operator.vectors.to(torch.float64).cpu()
    kernel = operator.kernel.to(torch.float64).cpu()
    # With the Gram matrix G = L Lᵀ of the directions, C has the singular values of Lᵀ K L.
    eigenvalues, eigenvectors = torch.linalg.eigh(vectors @ vectors.T)
    factor = eigenvectors * eigenvalues.clamp_min(0).sqrt()
    return (
        float(torch.linalg.matrix_norm(factor.T @ kernel @ factor, ord=2)) if len(kernel) else 0.0
    )


def weight_along(operator: Operator, direction: Tensor) -> float:
    """
    Returns r̂ᵀ C r̂, the share of the direction r that the operator removes.

    `direction`: Tensor of shape (hidden_size,), of any length; a zero direction gives 0.
    """

    unit = torch.nn.functional.normalize(direction.to(torch.float64).cpu(), dim=0)
    projections = operator.vectors.to(torch.float64).cpu() @ unit
    return float(projections @ operator.kernel.to(torch.float64).cpu() @ projections)


def equalize(vectors: Tensor, weights: Tensor) -> Tensor:
    """
    Rescales weights so that λ_max(Σ_k w_k v_k v_kᵀ) is the largest of them.

    The control for compounding: parallel directions then remove no more than a single one would.
    `vectors`: Tensor of shape (n_directions, hidden_size). `weights`: Tensor of shape (n_directions,).
    """

    largest = effective_weight(compose(vectors, weights, Composition.SUM))
    return weights if largest == 0 else weights * (float(weights.max()) / largest)


@contextmanager
def ablated(modules: Iterable[Module], operator: "Operator | BatchOperator") -> Iterator[None]:
    """
    Ablates the outputs of output projections with forward hooks for as long as the context lasts.

    Does what changing their weights to W − C W does: a bias is not ablated. The operator is moved to the modules' devices
    here, once, so that no call copies between devices or waits for one. Only where a module computes elsewhere than its
    parameters are kept, as with offloading, its first call does.
    """

    handles: list[Any] = []
    moved: dict[torch.device, Operator | BatchOperator] = {}

    def on(device: torch.device) -> "Operator | BatchOperator":
        if device not in moved:
            moved[device] = operator.to(device)
        return moved[device]

    def hook(module: Module, args: Any, output: Tensor) -> Tensor:
        bias = getattr(module, "bias", None)
        return output - on(output.device).apply(output if bias is None else output - bias)

    try:
        for module in modules:
            on(next(module.parameters()).device)
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class BatchOperator:
    """
    One operator per sample of a batch.

    `vectors`: Tensor of shape (batch, n_directions, hidden_size), the columns of each V as rows. `mixed_vectors`:
    Tensor of the same shape, the columns of each V K as rows. A sample that is not ablated has zeros.
    """

    vectors: Tensor
    mixed_vectors: Tensor

    @classmethod
    def stack(cls, operators: Sequence[Operator | None], hidden_size: int) -> "BatchOperator":
        """Stacks operators, some of which may be missing or have fewer directions than others."""

        n_directions = max(len(operator.kernel) for operator in operators if operator is not None)
        vectors = torch.zeros(len(operators), n_directions, hidden_size)
        mixed_vectors = torch.zeros(len(operators), n_directions, hidden_size)
        for index, operator in enumerate(operators):
            if operator is not None:
                n = len(operator.kernel)
                vectors[index, :n] = operator.vectors
                mixed_vectors[index, :n] = operator.mixed_vectors
        return cls(vectors, mixed_vectors)

    def select(self, indices: Tensor) -> "BatchOperator":
        """Returns the operators of some samples, in a new order."""

        return BatchOperator(self.vectors[indices], self.mixed_vectors[indices])

    def to(self, device: torch.device) -> "BatchOperator":
        """Returns the operators on a device: themselves where they are there already."""

        if self.vectors.device == device:
            return self
        return BatchOperator(self.vectors.to(device), self.mixed_vectors.to(device))

    def apply(self, output: Tensor) -> Tensor:
        """
        Returns C y for outputs y of every sample.

        Tensor of shape (batch, length, hidden_size) to one of the same shape and dtype.
        """

        coefficients = torch.bmm(output.float(), self.vectors.transpose(1, 2))
        return torch.bmm(coefficients, self.mixed_vectors).to(output.dtype)
