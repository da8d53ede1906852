# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Ablation by forward hooks: of all samples of a batch in one way, or of each in its own.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module

from ..language_model import LanguageModel
from ..offloading import loaded
from .operator import Operator


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


@contextmanager
def ablated(modules: Iterable[Module], operator: Operator | BatchOperator) -> Iterator[None]:
    """
    Ablates the outputs of output projections with forward hooks for as long as the context lasts.

    Does what changing their weights to W − C W does: a bias is not ablated. The operator is moved to the modules' devices
    here, once, so that no call copies between devices or waits for one. Only where a module computes elsewhere than its
    parameters are kept, as with offloading, its first call does.
    """

    handles: list[Any] = []
    moved: dict[torch.device, Operator | BatchOperator] = {}

    def on(device: torch.device) -> Operator | BatchOperator:
        if device not in moved:
            moved[device] = operator.to(device)
        return moved[device]

    def hook(module: Module, args: Any, output: Tensor) -> Tensor:
        bias = biases.get(module)
        return output - on(output.device).apply(output if bias is None else output - bias)

    biases: dict[Module, Tensor] = {}
    try:
        for module in modules:
            on(next(module.parameters()).device)
            if getattr(module, "bias", None) is not None:
                # An offloaded bias is gone again when the hook runs.
                with loaded(module, None):
                    biases[module] = cast(Tensor, module.bias)
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Intervention:
    """
    Operators by layer: what is done to the output projections of one sample.

    `components` names the projections, such as "attn.o_proj"; None means all.
    """

    operators: Mapping[int, Operator]
    components: tuple[str, ...] | None = None

    @property
    def first_layer(self) -> int:
        """The lowest layer that is ablated."""

        return min(self.operators)


def output_projections(
    model: LanguageModel, layer: int, components: tuple[str, ...] | None
) -> list[Module]:
    """
    Returns the modules of a layer that are ablated.

    A layer of a hybrid model may lack a component, and then contributes nothing to it.
    """

    return [
        module
        for name, modules in model.components[layer].items()
        if components is None or name in components
        for module in modules
    ]


@contextmanager
def ablated_samples(model: LanguageModel, interventions: Sequence[Intervention]) -> Iterator[None]:
    """
    Ablates sample i of every batch as `interventions[i]` says, for as long as the context lasts.

    Where all samples share one intervention, the modules may have any output shape. Otherwise they must keep the
    batch dimension: see `carries_samples`.
    """

    device = model.device
    unique = {id(intervention): intervention for intervention in interventions}
    place = {key: index for index, key in enumerate(unique)}
    rows = torch.tensor([place[id(intervention)] for intervention in interventions], device=device)
    layers = sorted({layer for item in unique.values() for layer in item.operators})
    with ExitStack() as stack:
        for layer in layers:
            modules = output_projections(model, layer, interventions[0].components)
            operators = [item.operators.get(layer) for item in unique.values()]
            operator: Operator | BatchOperator
            if len(operators) == 1 and operators[0] is not None:
                operator = operators[0].to(device)
            else:
                operator = BatchOperator.stack(operators, model.hidden_size).to(device).select(rows)
            stack.enter_context(ablated(modules, operator))
        yield


@torch.no_grad()
def carries_samples(model: LanguageModel) -> bool:
    """
    Returns whether the outputs of all output projections keep the batch dimension.

    The experts of a mixture see the tokens of all samples in one list, so that a hook cannot tell them apart.
    """

    kept = True

    def check(module: Module, args: Any, output: Tensor) -> None:
        nonlocal kept
        kept = kept and output.ndim == 3 and output.shape[0] == 2

    handles = [
        module.register_forward_hook(check)
        for layer in range(model.n_layers)
        for module in output_projections(model, layer, None)
    ]
    try:
        token = torch.full((2, 3), model.pad_token_id(), device=model.device)
        model.model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return kept
