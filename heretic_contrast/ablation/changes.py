# SPDX-License-Identifier: AGPL-3.0-or-later

"""
What is changed of a model where LoRA adapters cannot reach: experts in one tensor, biases, and embeddings.

While a study runs, hooks on the modules do it, which costs no memory and leaves every weight as it is. Where a model is to be
saved, the weights are changed once. docs/writers.md says why.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, Module, Parameter

from ..errors import ContrastError, warn
from ..language_model import LanguageModel
from ..offloading import changing
from ..weights import FULL_PRECISION, is_plain, is_projection, is_transposed, require_known
from .hooks import ablated
from .operator import Operator
from .writers import EMBEDDINGS, Writer

UNCHANGED = math.inf
"""The lowest layer that is changed, where none is."""

ROWS_AT_A_TIME = 2**16
"""Rows of a matrix that are held in float32 at the same time."""


def takes_adapter(writer: Writer) -> bool:
    return writer.component != EMBEDDINGS and is_projection(writer.layer)


def beyond_adapters(model: LanguageModel) -> list[str]:
    """
    Returns what of a model's writers no LoRA adapter carries that can be saved by itself, sorted, in words.

    PEFT loads none onto Mamba, whose kernels for training read the weight of the output by themselves.
    """

    return sorted(
        {
            f"the bias of {writer.component}" if writer.bias is not None else writer.component
            for writers in model.writers
            for writer in writers
            if not takes_adapter(writer)
            or writer.bias is not None
            or writer.component.startswith("mamba.")
        }
    )


def require_known_writers(model: LanguageModel, is_reloaded: bool) -> None:
    """
    Checks that the weights of all writers can be changed, so far as adapters or hooks do not do it.

    `is_reloaded`: whether they are exported from a model that is loaded anew in full precision. Raises `ContrastError`.
    """

    for writers in model.writers:
        for writer in writers:
            if takes_adapter(writer):
                require_known(writer.module)
            elif not is_reloaded:
                require_editable(writer)


def require_editable(writer: Writer) -> None:
    """Raises `ContrastError` when a writer's weights cannot be changed in place."""

    layer = writer.layer
    if writer.is_fused:
        tensor = _expert_tensor(layer)
        known = tensor is not None and tensor.dtype in FULL_PRECISION
    elif isinstance(layer, Embedding):
        known = type(layer.weight) is Parameter and layer.weight.dtype in FULL_PRECISION
    else:
        known = is_plain(layer)
    if not known:
        setting = "embeddings = false" if writer.component == EMBEDDINGS else "writers = heretic"
        raise ContrastError(
            f"It is not known how {type(layer).__name__} ({writer.component}) keeps its weights, so that they cannot be "
            f"changed: use the model in full precision, or leave them as they are with {setting}."
        )


def _expert_tensor(layer: Module) -> Tensor | None:
    """Returns the tensor of the experts' output projections, as modules of transformers call it."""

    found: Any = getattr(layer, "down_proj", getattr(layer, "weight", None))
    return found if isinstance(found, Tensor) and found.ndim == 3 else None


def expert_matrices(layer: Module, hidden_size: int) -> Tensor:
    """Returns a view of the output projections of experts. Tensor of shape (n_experts, hidden_size, in_features)."""

    tensor = _expert_tensor(layer)
    assert tensor is not None
    _, first, second = tensor.shape
    transposed = getattr(layer, "is_transposed", None)
    if first != second:
        transposed = second == hidden_size
    elif transposed is None:
        # The other matrices of the experts read the hidden state.
        transposed = getattr(layer, "gate_up_proj", tensor).shape[-1] != hidden_size
    return tensor.data.transpose(1, 2) if transposed else tensor.data


@torch.no_grad()
def subtract(writer: Writer, operator: Operator, weight: bool = True) -> None:
    """
    Changes the weights of a writer to W − C W, and its biases, where they are ablated, to b − C b.

    `operator`: what is to be removed from the writer's contribution. `weight`: whether the weight is changed, or the bias alone.
    Raises `ContrastError` where they have no data.
    """

    operator = writer.operator(operator)
    layer: Any = writer.layer

    def remove(vectors: Tensor) -> None:
        """Ablates rows of shape (..., hidden_size) in place."""

        if vectors.is_meta:
            raise ContrastError(
                f"The weights of {writer.component} have no data, so that they cannot be changed: load the whole model."
            )
        moved = operator.to(vectors.device)
        vectors -= moved.apply(vectors.float()).to(vectors.dtype)

    if writer.is_fused:
        for matrix in expert_matrices(layer, operator.vectors.shape[1]):
            remove(matrix.T)
        bias = getattr(layer, "down_proj_bias", None)
        if bias is not None and writer.with_bias:
            remove(bias.data)
        return
    if weight:
        as_rows = is_transposed(layer) or isinstance(layer, Embedding)
        rows = layer.weight.data if as_rows else layer.weight.data.T
        # Vocabularies are large, and a part in float32 is enough.
        for part in rows.split(ROWS_AT_A_TIME):
            remove(part)
    if writer.with_bias and getattr(layer, "bias", None) is not None:
        remove(layer.bias.data)


class Changes:
    """
    The changes of a trial that no adapter carries: hooks until `undo`, and new weights by `write`.

    `first_layer`: the lowest layer that is changed, also by adapters, -1 where embeddings are.
    """

    def __init__(self) -> None:
        self.first_layer = UNCHANGED
        self._hooks = ExitStack()
        self._kept: list[tuple[int, Writer, Operator, bool]] = []

    def undo(self) -> None:
        self._hooks.close()
        self._kept.clear()
        self.first_layer = UNCHANGED

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Undoes the changes for as long as the context lasts."""

        kept, first_layer = list(self._kept), self.first_layer
        self.undo()
        try:
            yield
        finally:
            for layer, writer, operator, _ in kept:
                self.add(layer, writer, operator)
            self.first_layer = first_layer

    def add(self, layer: int, writer: Writer, operator: Operator) -> None:
        """Ablates what adapters do not: a writer, or its bias alone where it carries an adapter."""

        is_adapted = hasattr(writer.module, "base_layer")
        self.first_layer = min(self.first_layer, -1 if writer.component == EMBEDDINGS else layer)
        bias = writer.bias
        if is_adapted and bias is None:
            return
        self._kept.append((layer, writer, operator, is_adapted))
        changed = writer.operator(operator)
        if not is_adapted or bias is None:
            self._hooks.enter_context(ablated([writer.module], changed, writer.with_bias))
            return
        constant = changed.to(bias.device).apply(bias.float())

        def hook(module: Module, args: Any, output: Tensor) -> Tensor:
            return output - constant.to(output.device, output.dtype)

        self._hooks.callback(writer.module.register_forward_hook(hook).remove)

    def write(self, network: Any, layers: Sequence[Module]) -> None:
        """
        Changes the weights of a model whose adapters have been merged, which has these layers. The hooks stay where they are.

        A head that shares the weights of the embeddings gets its own, since it is not ablated.
        """

        for layer, writer, operator, is_adapted in self._kept:
            is_embedding = writer.component == EMBEDDINGS
            module = (network if is_embedding else layers[layer]).get_submodule(writer.path)
            if is_embedding:
                untie(network, module)
            with changing(module):
                subtract(replace(writer, module=module), operator, not is_adapted)


def untie(network: Any, embedding: Any) -> None:
    """Gives the output head of a model, and all else that is tied, weights of its own, where it shares those of an embedding."""

    head = network.get_output_embeddings()
    names = [name.rpartition(".") for name in network.all_tied_weights_keys]
    tied = {(network.get_submodule(path), leaf) for path, _, leaf in names}
    # Offloaded weights are not one tensor, though they are tied.
    if head is None or (head.weight is not embedding.weight and (head, "weight") not in tied):
        return
    for configuration in (network.config, network.config.get_text_config()):
        if getattr(configuration, "tie_word_embeddings", False):
            configuration.tie_word_embeddings = False
    # Without the setting nothing is tied when the model is loaded, such as the blocks that layers of Zamba share.
    for owner, leaf in tied | {(head, "weight")}:
        with changing(owner):
            own = getattr(owner, leaf).detach().clone()
            setattr(owner, leaf, Parameter(own, requires_grad=False))
    network.all_tied_weights_keys = {}
    warn(
        "The output head shares the weights of the embeddings, which are ablated: the saved model has a head of its own, and is "
        "larger by that."
    )
