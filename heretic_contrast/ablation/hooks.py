# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Ablation by forward hooks: of all samples of a batch in one way, or of each in its own.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence

from ..language_model import LanguageModel, hooked
from ..offloading import loaded
from ..vectors import to_device
from .operator import Operator
from .writers import EMBEDDINGS, Writer, some_tokens, with_embeddings

LENGTH = 0.125
"""Root mean square that no stream is above where it is looked at what layers add to it: see `short_streams`."""


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

        nothing = torch.zeros(0, hidden_size)
        rows = [
            (item.vectors, item.mixed_vectors) if item else (nothing, nothing) for item in operators
        ]
        columns = zip(*rows, strict=True)
        return cls(*(pad_sequence(list(column), batch_first=True) for column in columns))

    def select(self, indices: Tensor) -> "BatchOperator":
        return BatchOperator(self.vectors[indices], self.mixed_vectors[indices])

    def to(self, device: torch.device) -> "BatchOperator":
        return BatchOperator(to_device(self.vectors, device), to_device(self.mixed_vectors, device))

    def apply(self, output: Tensor) -> Tensor:
        """
        Returns C y for outputs y of every sample.

        Tensor of shape (batch, length, hidden_size), or (batch · length, hidden_size) as experts give it, to one of the same
        shape and dtype.
        """

        if output.ndim == 3 and len(output) == 1:
            # Embeddings of positions, which all samples share.
            output = output.expand(len(self.vectors), -1, -1)
        outputs = output.reshape(len(self.vectors), -1, output.shape[-1]).float()
        coefficients = torch.bmm(outputs, self.vectors.transpose(1, 2))
        return torch.bmm(coefficients, self.mixed_vectors).to(output.dtype).view(output.shape)


@contextmanager
def ablated(
    modules: Iterable[Module], operator: Operator | BatchOperator, with_bias: bool = False
) -> Iterator[None]:
    """
    Ablates the outputs of modules with forward hooks for as long as the context lasts.

    Does what changing their weights to W − C W does: a bias is ablated on request alone. The operator is moved to the modules' devices
    here, once, so that no call copies between devices or waits for one. Only where a module computes elsewhere than its
    parameters are kept, as with offloading, its first call does.
    """

    moved: dict[torch.device, Operator | BatchOperator] = {}

    def on(device: torch.device) -> Operator | BatchOperator:
        if device not in moved:
            moved[device] = operator.to(device)
        return moved[device]

    def hook(module: Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (hook(module, args, output[0]), *output[1:])
        bias = biases.get(module)
        return output - on(output.device).apply(output if bias is None else output - bias)

    biases: dict[Module, Tensor] = {}
    modules = list(modules)
    for module in modules:
        # Some quantized projections have buffers alone.
        on(next(chain(module.parameters(), module.buffers())).device)
        if not with_bias and getattr(module, "bias", None) is not None:
            # An offloaded bias is gone again when the hook runs.
            with loaded(module, None):
                biases[module] = cast(Tensor, module.bias)
    with hooked(after=[(module, hook) for module in modules]):
        yield


@dataclass(frozen=True)
class Intervention:
    """
    Operators by layer: what is done to the output projections of one sample.

    `components` names the projections, such as "attn.o_proj", or single ones by their paths in a layer; None means all.
    `embeddings`: whether the embeddings are ablated as the first layer is, where that is.
    """

    operators: Mapping[int, Operator]
    components: tuple[str, ...] | None = None
    embeddings: bool = False

    @property
    def first_layer(self) -> int:
        return min(self.operators)

    def operator(self, layer: int, writer: Writer) -> Operator | None:
        """Returns what is removed from a writer's contribution, if anything is."""

        is_embedding = writer.component == EMBEDDINGS
        takes = self.embeddings if is_embedding else writer.is_among(self.components)
        return self.operators.get(layer) if takes else None


@dataclass(frozen=True)
class OwnWeights(Intervention):
    """A model with the weights that it has at this moment, which are not changed below a layer. No hook does anything."""

    operators: Mapping[int, Operator] = field(default_factory=dict)
    changed_from: int = 0

    @property
    def first_layer(self) -> int:
        return self.changed_from


def output_projections(
    model: LanguageModel, layer: int, components: tuple[str, ...] | None
) -> list[Module]:
    """Returns the modules of a layer that are ablated. A layer of a hybrid model may lack a component."""

    return [writer.module for writer in model.writers[layer] if writer.is_among(components)]


@contextmanager
def ablated_writers(writers: Iterable[Writer], operator: Operator) -> Iterator[None]:
    """Removes the operator from the contributions of writers, with forward hooks, for as long as the context lasts."""

    with ExitStack() as stack:
        for writer in writers:
            stack.enter_context(
                ablated([writer.module], writer.operator(operator), writer.with_bias)
            )
        yield


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
    rows = to_device([place[id(intervention)] for intervention in interventions], device)
    layers = sorted({layer for item in unique.values() for layer in item.operators})
    if any(item.embeddings for item in unique.values()):
        model = with_embeddings(model)
    with ExitStack() as stack:
        for layer in layers:
            # Most writers have no norm behind them, and share what is on the device.
            moved: dict[tuple[int, ...], Operator | BatchOperator] = {}
            for writer in model.writers[layer]:
                originals = [item.operator(layer, writer) for item in unique.values()]
                if not any(originals):
                    continue
                key = tuple(map(id, (writer.gain, *originals)))
                if key not in moved:
                    operators = [item and writer.operator(item) for item in originals]
                    if len(operators) == 1 and operators[0] is not None:
                        moved[key] = operators[0].to(device)
                    else:
                        batch = BatchOperator.stack(operators, model.hidden_size)
                        moved[key] = batch.to(device).select(rows)
                stack.enter_context(ablated([writer.module], moved[key], writer.with_bias))
        yield


@torch.no_grad()
def carries_samples(model: LanguageModel) -> bool:
    """
    Returns whether the outputs of all output projections keep the tokens of all samples in their order.

    Some mixtures hand the tokens of all samples to their experts in one list of another order, in which a hook cannot tell
    them apart.
    """

    seen: list[Tensor] = []

    def see(module: Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        kept = (output.ndim == 3 and output.shape[0] == 2) or (
            output.ndim == 2 and len(output) == 6
        )
        seen.append(output.reshape(2, 3, -1) if kept else output)

    writers = [writer for writers in model.writers for writer in writers]
    if any(part.isdigit() for writer in writers for part in writer.path.split(".")):
        # Each expert of a list sees the tokens that are its own.
        return False
    tokens = (torch.arange(3, 9, device=model.device) % model.vocabulary_size).view(2, 3)
    with hooked(after=[(writer.module, see) for writer in writers]):
        for batch in (tokens, tokens.flip(0)):
            model.model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False)
    pairs = zip(seen[: len(seen) // 2], seen[len(seen) // 2 :], strict=True)
    return all(
        first.ndim == 3
        and first.shape == second.shape
        and bool((first - second.flip(0)).float().norm() <= 0.1 * first.float().norm())
        for first, second in pairs
    )


def short_streams(layers: Iterable[Module]) -> AbstractContextManager[None]:
    """
    Shortens the stream that each layer is given for as long as the context lasts.

    A long stream in 16 bits holds its rounding in place of the little that a layer adds.
    """

    def shorten(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        lengths = before.float().square().mean(dim=-1, keepdim=True).sqrt()
        before = (before / (lengths / LENGTH).clamp_min(1)).to(before.dtype)
        if args:
            return (before, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": before}

    return hooked([(layer, shorten) for layer in layers])


@torch.no_grad()
def missed_shares(model: LanguageModel, tolerance: float | None = None) -> dict[int, float]:
    """
    Returns the layers that add more of a direction than rounding explains while all writers are ablated, and how much.

    In each layer the direction is what the layer adds to a token, at weight 1, so that nothing of it should be left. The share
    is of the length of what is added. A layer may multiply the whole stream by a number.
    """

    if tolerance is None:
        tolerance = 1e-3 if model.model.dtype in (torch.float32, torch.float64) else 0.1
    layers = {layer: index for index, layer in enumerate(model.layers)}
    entered: dict[int, Tensor] = {}
    states: dict[int, tuple[Tensor, Tensor]] = {}

    def enter(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[layers[module]] = args[0] if args else kwargs["hidden_states"]

    def leave(module: Module, args: Any, output: Any) -> None:
        before, after = (
            model.stream(item).flatten(0, 1).cpu().double()
            for item in (entered[layers[module]], output)
        )
        states[layers[module]] = (before, after)

    decoder, tokens = model.decoder(), some_tokens(model)
    with (
        short_streams(layers),
        hooked([(layer, enter) for layer in layers], [(layer, leave) for layer in layers]),
        ExitStack() as stack,
    ):
        decoder(input_ids=tokens, use_cache=False)
        directions = {
            layer: torch.nn.functional.normalize((after - before)[-1], dim=0)
            for layer, (before, after) in states.items()
        }
        states.clear()
        for layer, direction in directions.items():
            operator = Operator(direction.float()[None], torch.ones(1, 1))
            stack.enter_context(ablated_writers(model.writers[layer], operator))
        decoder(input_ids=tokens, use_cache=False)
    shares = {}
    for layer, (before, after) in states.items():
        first, second = before @ directions[layer], after @ directions[layer]
        factor = float(first @ second) / max(float(first @ first), 1e-30)
        left = (second - factor * first).norm() / (after - before).norm().clamp_min(1e-30)
        if not float(left) <= tolerance:
            shares[layer] = float(left)
    return shares
