# SPDX-License-Identifier: AGPL-3.0-or-later

"""
LoRA factors of an ablated weight, with Heretic's row normalizations.

With W = diag(ρ) Ŵ, rows of Ŵ of length 1, and C the ablation operator, the change of W is

| row normalization | change                                                            | rank         |
|-------------------|-------------------------------------------------------------------|--------------|
| `none`            | −C W                                                              | n_directions |
| `pre`             | −diag(ρ) C Ŵ                                                      | n_directions |
| `full`            | diag(ρ) (rows of (Ŵ − C Ŵ) normalized) − W, truncated to a rank    | as set       |
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn import Module, Parameter

from ..errors import ContrastError, require_choice
from ..offloading import computing_device
from ..settings import RowNormalization
from ..weights import FULL_PRECISION, is_bitsandbytes, is_plain
from .operator import Operator, rows_times


def set_factors(layer: Any, factor_a: Tensor, factor_b: Tensor) -> None:
    """
    Writes the LoRA factors of a PEFT layer.

    `factor_a`: Tensor of shape (rank, in_features). `factor_b`: Tensor of shape (hidden_size, rank). They are kept in
    PEFT's data type where it has the digits, and in float32 where the layer is quantized or offloaded, for which PEFT makes
    adapters like its codes or without data.
    """

    for adapters, factor in ((layer.lora_A, factor_a), (layer.lora_B, factor_b)):
        adapter = adapters["default"]
        kept = adapter.weight
        if kept.device.type == "meta" or kept.dtype not in FULL_PRECISION:
            adapter.weight = Parameter(factor.contiguous(), requires_grad=False)
        else:
            kept.data = factor.to(kept.dtype).contiguous()


def zero_factors(layer: Any) -> None:
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    device = computing_device(layer, factors[0].device)
    set_factors(layer, *(torch.zeros(factor.shape, device=device) for factor in factors))


def require_no_adapters(model: Module, name: str) -> None:
    """
    Checks that a model has come without adapters, which those of the modification would take the place of.

    `name` is that of the model. Raises `ContrastError`.
    """

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ContrastError(
            f"{name} comes with an adapter of its own (adapter_config.json), whose place the modification would take: merge "
            "it into the model, and give the merged one."
        )


def require_mergeable(layers: Iterable[Module]) -> None:
    """
    Checks that PEFT can add the changes of LoRA layers to the weights below them, `layers`.

    Raises `ContrastError` when a weight is kept as codes with a scale beside them, which PEFT would take for weights.
    """

    for base in layers:
        if not (is_plain(base) or is_bitsandbytes(base)):
            raise ContrastError(
                f"The change cannot be merged into the weights of {type(base).__name__}, which are kept as codes: save the "
                "adapter alone (--export-strategy adapter), or use the model in full precision."
            )


def lora_factors(
    operator: Operator,
    weight: Tensor,
    row_normalization: RowNormalization = "none",
    rank: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """
    Returns the LoRA pair (A, B) whose product B A is the change of the weight, exactly unless it is truncated (paper, section 2.1).

    `weight`: Tensor of shape (hidden_size, in_features), float32.
    A: Tensor of shape (rank, in_features). B: Tensor of shape (hidden_size, rank). The rank is n_directions,
    or `rank` for `full`, where `seed` fixes the random projection.
    """

    require_choice("row normalization", row_normalization, get_args(RowNormalization))
    vectors = operator.vectors.to(weight.device)
    factor_b = -operator.mixed_vectors.T.to(weight.device)
    if row_normalization == "none":
        return rows_times(vectors, weight), factor_b

    norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    safe_norms = norms.clamp_min(1e-12)
    # The rows are scaled on the small side: Vᵀ Ŵ = (Vᵀ diag(1 / ρ)) W.
    factor_a = rows_times(vectors / safe_norms.T, weight)
    if row_normalization == "pre":
        return factor_a, factor_b * norms

    # Row lengths from Gram terms: ‖ŵ + b A‖² = ‖ŵ‖² + 2 b (A ŵ) + b (A Aᵀ) bᵀ.
    cross, gram = (weight @ factor_a.T) / safe_norms, factor_a @ factor_a.T
    added = ((2 * cross + factor_b @ gram) * factor_b).sum(dim=1, keepdim=True)
    squares = (norms / safe_norms).square() + added
    # Of a row of which less than a thousandth is left, rounding says no length: it gets shorter, and never longer.
    lengths = squares.clamp_min(1e-6).sqrt()
    change = RenormalizedChange(weight, 1 / lengths - 1, factor_b * norms / lengths, factor_a)
    return change.truncate(len(operator.vectors) + 2 if rank is None else rank, seed)


@dataclass(frozen=True)
class RenormalizedChange:
    """
    The change of a weight under `full` row normalization, as an operator that is applied and never formed.

    With Ŵ − C Ŵ = Ŵ + B A and row lengths τ of that sum, the change is
    diag(1 / τ) ρ (Ŵ + B A) − ρ Ŵ = diag(left) W + right A: a diagonal times the weight, plus a low rank.

    `weight`: Tensor of shape (hidden_size, in_features). `left`: (hidden_size, 1).
    `right`: (hidden_size, n_directions). `factor_a`: (n_directions, in_features).
    """

    weight: Tensor
    left: Tensor
    right: Tensor
    factor_a: Tensor

    def apply(self, right: Tensor) -> Tensor:
        """Returns the change times a matrix of shape (in_features, n)."""

        return self.left * (self.weight @ right) + self.right @ (self.factor_a @ right)

    def apply_transposed(self, left: Tensor) -> Tensor:
        """Returns the transposed change times a matrix of shape (hidden_size, n)."""

        # Written with the weight on the right: the transposed order reads it several times slower.
        return ((self.left * left).T @ self.weight).T + self.factor_a.T @ (self.right.T @ left)

    def truncate(self, rank: int, seed: int, n_iterations: int = 6) -> tuple[Tensor, Tensor]:
        """
        Returns balanced factors (A, B) of a randomized truncated SVD (Halko et al., 2011, algorithm 4.4).

        The random projection has the size, the seed and the device of Heretic's call, so that one direction gives
        Heretic's own result.
        """

        n_rows, n_columns = self.weight.shape
        n_random = min(2 * rank + 4, n_rows, n_columns)
        # The narrower side carries the random matrix.
        forward, backward = (
            (self.apply_transposed, self.apply)
            if n_rows < n_columns
            else (self.apply, self.apply_transposed)
        )
        device = self.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        random = torch.randn(min(n_rows, n_columns), n_random, generator=generator, device=device)
        basis = torch.linalg.qr(forward(random)).Q
        for _ in range(n_iterations):
            basis = torch.linalg.qr(backward(basis)).Q
            basis = torch.linalg.qr(forward(basis)).Q
        left, singular_values, right = torch.linalg.svd(backward(basis).T, full_matrices=False)
        left = basis @ left
        if n_rows < n_columns:
            left, right = right.T, left.T
        roots = singular_values[:rank].sqrt()
        factor_a = roots[:, None] * right[:rank]
        factor_b = left[:, :rank] * roots
        missing = rank - factor_a.shape[0]
        if missing > 0:
            factor_a = torch.nn.functional.pad(factor_a, (0, 0, 0, missing))
            factor_b = torch.nn.functional.pad(factor_b, (0, missing))
        return factor_a, factor_b
