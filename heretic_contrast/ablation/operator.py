# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The operator that ablates several directions at once.

Every composition has the form C = V K Vᵀ with the directions, or a basis of their span, as columns of V (hidden_size ×
n_directions) and a small matrix K (n_directions × n_directions). An output projection W (hidden_size × in_features) becomes
W − C W. The change has rank n_directions at most and is exactly a LoRA pair; the dense C is never formed.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor

from ..errors import ContrastError, require_choice
from ..settings import Composition
from ..vectors import to_device, unit_vectors

LONGEST = 1e15
"""The longest direction that is ablated. Directions as trained, which are as long as residuals, are far shorter."""

STRONGEST = 1e33
"""The largest element of K, times the square of the longest direction: below it nothing in C y overflows float32."""


DAMPING = 0.1
"""Below which share of their mean square the squares of a norm's gains are not divided by: see docs/writers.md."""

CPU_PARTS = 8
"""How many parts a weight is read in on a CPU; not the number of cores, on which no result may depend."""


@dataclass(frozen=True)
class Operator:
    """
    C = V K Vᵀ.

    `vectors`: Tensor of shape (n_directions, hidden_size), float32, the columns of V as rows: the directions, or under
    `capped` an orthonormal basis of their span.
    `kernel`: Tensor of shape (n_directions, n_directions), float32, the matrix K.
    `written`: what stands in the place of the first V, as rows, behind norms; None for V itself. See `behind`.
    """

    vectors: Tensor
    kernel: Tensor
    written: Tensor | None = None

    @cached_property
    def mixed_vectors(self) -> Tensor:
        """The columns of V K as rows, computed once. Tensor of shape (n_directions, hidden_size)."""

        return self.kernel.T @ (self.vectors if self.written is None else self.written)

    def behind(self, gain: Tensor, centered: bool = False) -> "Operator":
        """
        Returns the operator on x that removes C from the contribution g ∘ x / rms(x): see docs/writers.md.

        With an orthonormal basis B of the span of the columns of V that C uses and a damped inverse D = g / (g² + DAMPING · mean g²), it is
        A (Bᵀ C B) (G B)ᵀ with A = D B (Bᵀ G D B)⁻¹, so that Bᵀ G (I − C′) x = Bᵀ (I − C) G x: exact for any C, but for the norm's
        own division. Equal gains give C itself.

        `gain`: Tensor of shape (hidden_size,). `centered`: whether the norm takes the mean away first, by M: then G M stands for G, and M D
        for D.
        """

        gain = gain.to(torch.float64).cpu()
        scale = gain.square().mean().sqrt()
        if not float(scale) > 0:
            return self
        gain = gain / scale
        vectors = self.vectors.to(torch.float64).cpu()
        # A direction of weight 0 is no part of C, and shapes nothing.
        used = ((self.kernel != 0).any(dim=0) | (self.kernel != 0).any(dim=1)).cpu()
        _, sizes, basis = torch.linalg.svd(unit_vectors(vectors[used])[0], full_matrices=False)
        basis = basis[sizes > 1e-6]
        read, written = vectors * gain, basis * (gain / (gain.square() + DAMPING))
        if centered:
            read, written = (rows - rows.mean(dim=1, keepdim=True) for rows in (read, written))
        # Nothing is written along a coordinate whose gain is 0, or along the mean, so that there is nothing to solve for.
        gram = written @ (basis * gain).T
        least = 1e-14 if centered else 0.0
        damped = torch.linalg.pinv(gram, atol=least, hermitian=not centered) @ written
        return Operator(
            read.to(self.vectors),
            self.kernel,
            (vectors @ basis.T @ damped).to(self.vectors),
        )

    def apply(self, output: Tensor) -> Tensor:
        """
        Returns C y for outputs y on the operator's device.

        Tensor of shape (..., hidden_size) to one of the same shape and dtype.
        """

        coefficients = output.float() @ self.vectors.T
        return (coefficients @ self.mixed_vectors).to(output.dtype)

    def to(self, device: torch.device) -> "Operator":
        if self.vectors.device == device:
            return self
        written = None if self.written is None else to_device(self.written, device)
        return Operator(to_device(self.vectors, device), to_device(self.kernel, device), written)


def rows_times(vectors: Tensor, weight: Tensor) -> Tensor:
    """
    Returns the product of a few rows and a weight.

    `vectors`: Tensor of shape (n_directions, hidden_size). `weight`: Tensor of shape (hidden_size, in_features).
    Tensor of shape (n_directions, in_features).
    """

    hidden_size, in_features = weight.shape
    if weight.device.type != "cpu" or hidden_size % CPU_PARTS != 0:
        return vectors @ weight
    # Libraries give a product with so few rows to one core, and a sum over parts of the weight to all of them.
    parts = vectors.reshape(len(vectors), CPU_PARTS, -1).transpose(0, 1)
    return torch.bmm(parts, weight.reshape(CPU_PARTS, -1, in_features)).sum(dim=0)


def compose(vectors: Tensor, weights: Tensor, composition: Composition = "sum") -> Operator:
    """
    Returns the operator that ablates `vectors` with `weights` (paper, section 2.1; design, section 5).

    - "sum": Σ_k w_k v_k v_kᵀ: the paper, and Heretic's pull request 196. Parallel directions add up.
    - "sequential": I − Π_k (I − w_k v_k v_kᵀ): one direction after the other (Piras et al., 2026).
    - "capped": the sum, its eigenvalues capped at max_k w_k, so that parallel directions do not add up.

    `vectors`: Tensor of shape (n_directions, hidden_size). `weights`: Tensor of shape (n_directions,).
    V and the small matrix K are computed in float64.

    Raises `ContrastError` when a direction or a weight is not finite, when they are so large that C y would not
    fit into float32, and when a weight is negative under `capped`, which has no meaning there.
    """

    exact_weights = weights.to(torch.float64).cpu()
    exact_vectors = vectors.to(torch.float64).cpu()
    for what, tensor in (("direction", exact_vectors), ("weight", exact_weights)):
        if not bool(tensor.isfinite().all()):
            raise ContrastError(
                f"A {what} to ablate is infinite or not a number: look for a broken model or a broken file of directions."
            )
    require_choice("composition", composition, get_args(Composition))
    if composition == "sum":
        kernel = torch.diag(exact_weights)
    elif composition == "sequential":
        kernel = _sequential_kernel(exact_vectors @ exact_vectors.T, exact_weights)
    else:
        vectors, kernel = _capped(exact_vectors, exact_weights)
        exact_vectors = vectors
    longest, largest = float(exact_vectors.norm(dim=1).max()), float(kernel.abs().max())
    # Written so that what is not a number is refused, too.
    if not (longest <= LONGEST and largest * max(longest, 1.0) ** 2 <= STRONGEST):
        raise ContrastError(
            f"Directions of lengths up to {longest:.3g} with weights up to {float(exact_weights.abs().max()):.3g} cannot be "
            f'composed by "{composition}" within the range of float32: use scale "unit" or smaller weights.'
        )
    return Operator(vectors.to(torch.float32), kernel.to(torch.float32))


def _sequential_kernel(gram: Tensor, weights: Tensor) -> Tensor:
    """
    Returns K of I − Π_k (I − w_k v_k v_kᵀ), from the Gram matrix of the directions.

    From (I − C)(I − w v vᵀ) = I − (C + w v vᵀ − w C v vᵀ) follows one new column of K per direction.
    """

    n_directions = len(weights)
    kernel = torch.zeros(n_directions, n_directions, dtype=torch.float64)
    for k in range(n_directions):
        kernel[:k, k] = -weights[k] * (kernel[:k, :k] @ gram[:k, k])
        kernel[k, k] = weights[k]
    return kernel


def _capped(vectors: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """
    Returns V (as rows) and K of the sum Σ_k w_k v_k v_kᵀ with its eigenvalues capped at max_k w_k.

    With rows √w_k v_k = P S Q, the sum is Qᵀ S² Q, so that Q and the capped S² are V and K. With the directions themselves as
    V, K would have large elements that cancel, and its rounding would remain where directions are long and parallel.
    """

    if bool((weights < 0).any()):
        raise ContrastError(
            'A negative weight has no meaning under the composition "capped": use "sum" or "sequential".'
        )
    n_directions, hidden_size = vectors.shape
    _, singular_values, basis = torch.linalg.svd(
        weights.sqrt()[:, None] * vectors, full_matrices=False
    )
    # Singular values at the level of rounding belong to no direction, but may exceed the cap where directions are long.
    epsilon = torch.finfo(torch.float64).eps
    real = singular_values > singular_values[0] * max(n_directions, hidden_size) * epsilon
    eigenvalues = torch.where(real, singular_values.square().clamp_max(weights.max()), 0.0)
    missing = n_directions - len(basis)
    return (
        torch.nn.functional.pad(basis, (0, 0, 0, missing)),
        torch.diag(torch.nn.functional.pad(eigenvalues, (0, missing))),
    )


def effective_weight(operator: Operator) -> float:
    """
    Returns the largest amount of any unit direction that the operator removes: the spectral norm of C.

    For the composition `sum` with weights that are not negative this is λ_max(Σ_k w_k v_k v_kᵀ).
    """

    return _spectral_norm(operator.kernel, _gram_factor(operator))


def _gram_factor(operator: Operator) -> Tensor:
    """Returns L of the Gram matrix G = L Lᵀ of the directions. Tensor of shape (n_directions, n_directions), float64."""

    vectors = operator.vectors.to(torch.float64).cpu()
    eigenvalues, eigenvectors = torch.linalg.eigh(vectors @ vectors.T)
    return eigenvectors * eigenvalues.clamp_min(0).sqrt()


def _spectral_norm(kernel: Tensor, factor: Tensor) -> float:
    """Returns the spectral norm of C from K and L, since C has the singular values of Lᵀ K L."""

    kernel = kernel.to(torch.float64).cpu()
    return float(torch.linalg.matrix_norm(factor.T @ kernel @ factor, ord=2))


def weight_along(operator: Operator, direction: Tensor) -> float:
    """
    Returns r̂ᵀ C r̂, the share of the direction r that the operator removes.

    `direction`: Tensor of shape (hidden_size,), of any length; a zero direction gives 0.
    """

    unit, _ = unit_vectors(direction.cpu())
    projections = operator.vectors.to(torch.float64).cpu() @ unit
    return float(projections @ operator.kernel.to(torch.float64).cpu() @ projections)


def equalize(vectors: Tensor, weights: Tensor, composition: Composition = "sum") -> Tensor:
    """
    Rescales weights so that the spectral norm of C is the largest of their absolute values (paper, section 5.2).

    The control for compounding: parallel directions then remove no more than a single one would. Under `sequential` less is removed
    where even the weights of single directions remove less: one that follows may bring back what an overshoot has turned around.
    `vectors`: Tensor of shape (n_directions, hidden_size). `weights`: Tensor of shape (n_directions,).
    """

    largest = float(weights.abs().max())
    removed = effective_weight(compose(vectors, weights, "sum"))
    if removed == 0:
        return weights
    if composition != "sequential":
        # What is capped does not compound, and only falls short of its cap where directions are short.
        least = 1.0 if composition == "capped" else 0.0
        return weights * max(least, largest / removed)
    # The factor at which the strongest direction alone removes the largest weight, and the others add to it.
    exact_vectors = vectors.to(torch.float64).cpu()
    strengths = weights.abs().cpu() * exact_vectors.square().sum(dim=1)
    low, high = 0.0, largest / float(strengths.max())
    operator = compose(vectors, weights * high, composition)
    if effective_weight(operator) <= largest:
        return weights * high
    # How the directions lie to each other stays the same, and is all that is needed of them.
    gram, factor = exact_vectors @ exact_vectors.T, _gram_factor(operator)
    for _ in range(50):
        middle = (low + high) / 2
        kernel = _sequential_kernel(gram, (weights * middle).to(torch.float64).cpu())
        if _spectral_norm(kernel.to(torch.float32), factor) < largest:
            low = middle
        else:
            high = middle
    return weights * high
