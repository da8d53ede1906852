# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Teacher-forced passes of a model whose samples are ablated each in their own way.

An intervention changes nothing below the lowest layer that it ablates, and in that layer nothing before its first
output projection. A pass over known tokens therefore starts there, from what the unmodified model has computed, and
many interventions share one batch.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import DynamicCache

from ...ablation.hooks import Intervention, ablated_samples, carries_samples, output_projections
from ...errors import ContrastError
from ...language_model import LanguageModel
from ..cpu.layers import fast_on_cpu
from .caches import CACHE, Past, join
from .head import Head
from .replaced_forwards import replaced_forwards


@dataclass(frozen=True)
class TokenBatch:
    """
    Known tokens: `input_ids` and `attention_mask`, integer tensors of shape (batch, length).

    Padding on the left or on the right, or both, is masked. Tokens of a past are not among them.
    """

    input_ids: Tensor
    attention_mask: Tensor

    def repeat(self, count: int) -> "TokenBatch":
        """Returns the batch `count` times, one after the other."""

        return TokenBatch(self.input_ids.repeat(count, 1), self.attention_mask.repeat(count, 1))


@dataclass(frozen=True)
class LayerInput:
    """
    What enters a layer of the unmodified model.

    `hidden_states`: Tensor of shape (batch, length, hidden_size), the output of the layer below `layer`. `projected`: what
    the first output projection of the layer gives, usually that of its attention, which then need not run again; a
    Tensor of the same shape, or None where it has to run.
    """

    layer: int
    hidden_states: Tensor
    projected: Tensor | None = None

    @property
    def first_read(self) -> int:
        """The lowest layer that reads the tokens in a pass that starts here, and adds them to a cache."""

        return self.layer if self.projected is None else self.layer + 1

    def repeat(self, count: int) -> "LayerInput":
        """Returns the batch `count` times, one after the other."""

        return self._with(lambda states: states.repeat(count, 1, 1))

    def select(self, samples: slice, length: int) -> "LayerInput":
        """Returns the first tokens of some samples."""

        return self._with(lambda states: states[samples, :length])

    def _with(self, change: Callable[[Tensor], Tensor]) -> "LayerInput":
        projected = None if self.projected is None else change(self.projected)
        return LayerInput(self.layer, change(self.hidden_states), projected)


@dataclass(frozen=True)
class _Projection:
    """
    The output projection that a layer comes to first, and the module around it, which returns its output as it is.

    `n_outputs`: the length of the tuple that the module returns, with None after the output; 0 where it returns a tensor.
    """

    projection: Module
    around: Module
    n_outputs: int


class _Reached(Exception):
    """Ends a pass where everything that was asked for is known."""


class TeacherForcing:
    """
    Runs a model's decoder over known tokens.

    `unmodified` gives the final hidden states, `layer_input` the input of a layer; `modified` starts at a layer from
    such an input. `head` turns hidden states into logits.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.head = Head(model)
        self._decoder: Any = model.decoder()
        self._takes_position_ids = (
            "position_ids" in inspect.signature(self._decoder.forward).parameters
        )

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the model knows."""

        return int(self.model.model.get_input_embeddings().weight.shape[0])

    @cached_property
    def carries_samples(self) -> bool:
        """Whether one batch may hold several interventions: see `carries_samples`."""

        return carries_samples(self.model)

    def start_layer(self, intervention: Intervention) -> int:
        """Returns the highest layer at which a pass may start under an intervention."""

        return min(intervention.first_layer, self._highest_start)

    @cached_property
    def _highest_start(self) -> int:
        """The lowest layer whose keys and values layers above it attend to (as in Gemma 4), or the number of layers."""

        for index, layer in enumerate(self.model.layers):
            if any(_is_shared(module) for module in layer.modules()):
                return index
        return self.model.n_layers

    @torch.no_grad()
    def unmodified(self, tokens: TokenBatch, past: Past | None = None) -> Tensor:
        """Returns the final (normalized) hidden states. Tensor of shape (batch, length, hidden_size)."""

        return self._run(tokens, past)

    @torch.no_grad()
    def layer_input(
        self,
        tokens: TokenBatch,
        layer: int,
        start: LayerInput | None = None,
        past: Past | None = None,
    ) -> LayerInput:
        """
        Returns the unmodified input of a layer, and computes nothing above its first output projection.

        `start`: the input of a layer below, where it is known, so that nothing is computed below it either.
        """

        if start is not None and start.layer == layer:
            return start
        first = self._first_projections[layer]
        entered: list[Tensor] = []
        projected: list[Tensor] = []

        def enter(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append(args[0] if args else kwargs["hidden_states"])
            if first is None:
                raise _Reached

        def project(module: Module, args: Any, output: Tensor) -> None:
            projected.append(output)
            raise _Reached

        with ExitStack() as stack:
            hook = self.model.layers[layer].register_forward_pre_hook(enter, with_kwargs=True)
            stack.callback(hook.remove)
            if first is not None:
                stack.callback(first.projection.register_forward_hook(project).remove)
            stack.enter_context(self._replayed(start))
            stack.enter_context(suppress(_Reached))
            self._run(tokens, past)
        return LayerInput(layer, entered[0], projected[0] if projected else None)

    @torch.no_grad()
    def modified(
        self,
        tokens: TokenBatch,
        interventions: Sequence[Intervention],
        start: LayerInput,
        past: Past | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """
        Returns the final hidden states of ablated samples. Tensor of shape (batch, length, hidden_size).

        `start`: the input of a layer below which no sample is ablated. `past`: what each sample has read before, and was
        ablated in the same way. `columns`: which tokens of each sample are asked for, integer Tensor of shape
        (batch, n_columns), where other hidden states may be wrong; None for all.
        """

        if any(intervention.first_layer < start.layer for intervention in interventions):
            raise AssertionError("An intervention starts below the layer that is replayed.")
        with (
            # Finds out about the whole model when it is first asked, so that nothing may be replayed yet.
            self._only_at(columns),
            self._replayed(start),
            ablated_samples(self.model, interventions),
        ):
            return self._run(tokens, past)

    def nothing_read(self) -> Past:
        """Returns a past without tokens, to be filled by a pass."""

        return Past(DynamicCache(config=self._decoder.config), 0)

    @cached_property
    def reads_on(self) -> bool:
        """
        Whether a pass may start from what an earlier one has read, found out by reading a few tokens in both ways.

        Some recurrent layers start anew in every pass, and some models have caches of another kind.
        """

        ids = torch.arange(3, 15, device=self.model.device).view(2, 6) % self.vocabulary
        # Both samples begin in the same way, and one of them is padded.
        ids[1, :3] = ids[0, :3]
        mask = torch.ones_like(ids)
        mask[1, 5] = 0
        tokens = TokenBatch(ids, mask)
        middle = self.model.n_layers // 2
        expected = self._run(tokens)
        beginning, rest = (
            TokenBatch(ids[:, part], mask[:, part]) for part in (slice(0, 3), slice(3, 6))
        )
        first = TokenBatch(beginning.input_ids[:1], beginning.attention_mask[:1])
        try:
            whole, upper = self.nothing_read(), self.nothing_read()
            self.unmodified(first, whole)
            start = self.layer_input(first, middle)
            self.modified(first, [], start, upper)
            past = Past(join(whole.cache, upper.cache, start.first_read), 3)
            rows = torch.zeros(2, dtype=torch.long, device=ids.device)
            start = self.layer_input(rest, middle, None, past.select(rows))
            found = self.modified(rest, [], start, past.select(rows, slice(start.first_read, None)))
        except Exception:
            # Every architecture fails in its own way; then whole sequences are read.
            return False
        expected = expected[:, 3:]
        difference = torch.where(mask[:, 3:, None] > 0, found - expected, 0).float().norm()
        # Reading without the beginning differs by about the norm itself, rounding by far less.
        return bool(difference < 0.05 * expected.float().norm())

    def _run(self, tokens: TokenBatch, past: Past | None = None) -> Tensor:
        """Runs the decoder, as it is hooked and patched at this moment. Adds the tokens to the cache of the past."""

        mask = tokens.attention_mask
        if past is not None:
            mask = torch.cat([mask.new_ones(len(mask), past.length), mask], dim=1)
        arguments: dict[str, Any] = {
            "input_ids": tokens.input_ids,
            "attention_mask": mask,
            "use_cache": past is not None,
        }
        if past is not None:
            arguments[CACHE] = past.cache
        if self._takes_position_ids:
            positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
            arguments["position_ids"] = positions[:, mask.shape[1] - tokens.input_ids.shape[1] :]
        with fast_on_cpu(self.model):
            output = self._decoder(**arguments)
        hidden_states: Tensor = output.last_hidden_state
        return hidden_states

    @contextmanager
    def _replayed(self, start: LayerInput | None) -> Iterator[None]:
        """Makes the layers below `start`, and the beginning of its layer, pass on what is known already."""

        if start is None:
            yield
            return
        skipped = self.model.layers[: start.layer]
        # Some architectures return tuples from their layers.
        states = start.hidden_states
        passed_on = (states,) if skipped and self._returns_tuple else states
        replacements: list[tuple[Module, Callable[..., Any]]] = [
            (layer, lambda *args, **kwargs: passed_on) for layer in skipped
        ]
        first = self._first_projections[start.layer] if start.projected is not None else None
        if first is not None:
            projection, n_outputs = first.projection, first.n_outputs

            def around(*args: Any, **kwargs: Any) -> Any:
                # The projection is called for its hooks, which ablate its output.
                output = projection(start.projected)
                return (output, *[None] * (n_outputs - 1)) if n_outputs else output

            replacements += [(projection, lambda output: output), (first.around, around)]
        with replaced_forwards(replacements):
            yield

    @contextmanager
    def _only_at(self, columns: Tensor | None) -> Iterator[None]:
        """Makes the last layer leave out what does not reach the final hidden states of some tokens: see `modified`."""

        mlp = None if columns is None else self._last_mlp
        if columns is None or mlp is None:
            yield
            return
        original = mlp.forward

        def forward(states: Tensor) -> Tensor:
            places = columns[:, :, None].expand(-1, -1, states.shape[2])
            outputs = original(states.gather(1, places))
            return torch.zeros_like(states).scatter_(1, places, outputs)

        with replaced_forwards([(mlp, forward)]):
            yield

    @cached_property
    @torch.no_grad()
    def _last_mlp(self) -> Module | None:
        """The MLP of the last layer, if it sees each token by itself, found out by one pass over a few tokens."""

        layer = self.model.n_layers - 1
        first = self._first_projections[layer]
        if first is None:
            return None
        calls: list[tuple[Module, Tensor, Tensor]] = []

        def leave(module: Module, args: tuple[Any, ...], output: Any) -> None:
            if len(args) == 1 and isinstance(output, Tensor) and output.ndim == 3:
                calls.append((module, args[0], output))

        projections = set(output_projections(self.model, layer, None)) - {first.projection}
        with ExitStack() as stack:
            for module in self.model.layers[layer].children():
                # Not the attention, which mixes tokens.
                parts = set(module.modules())
                if parts & projections and first.projection not in parts:
                    stack.callback(module.register_forward_hook(leave).remove)
            ids = torch.arange(3, 9, device=self.model.device).view(2, 3) % self.vocabulary
            self._run(TokenBatch(ids, torch.ones_like(ids)))
        if len(calls) != 1:
            return None
        mlp, states, output = calls[0]
        expected = output[:, 1:].float()
        difference = mlp(states[:, 1:]).float() - expected
        # A token that is mixed with others differs by about the norm itself, rounding by far less.
        return mlp if bool(difference.norm() <= 0.01 * expected.norm()) else None

    @cached_property
    @torch.no_grad()
    def _first_projections(self) -> tuple[_Projection | None, ...]:
        """What each layer may skip, found out by one pass over two tokens; None where nothing can be left out."""

        found: list[_Projection | None] = [None] * self.model.n_layers
        # Which projection each layer comes to first, and what that gives.
        first: dict[int, tuple[Module, Tensor]] = {}

        def project(layer: int, module: Module, args: Any, output: Tensor) -> None:
            first.setdefault(layer, (module, output))

        def leave(layer: int, module: Module, args: Any, output: Any) -> None:
            if layer not in first or module is first[layer][0]:
                return
            projection, projected = first[layer]
            outputs = output if isinstance(output, tuple) else (output,)
            if outputs[0] is projected and all(item is None for item in outputs[1:]):
                # The outermost module is left last.
                n_outputs = len(output) if isinstance(output, tuple) else 0
                found[layer] = _Projection(projection, module, n_outputs)

        with ExitStack() as stack:
            for index, layer in enumerate(self.model.layers):
                # Layers above attend to the keys and values of this one.
                if any(_is_shared(module) for module in layer.modules()):
                    continue
                for module in output_projections(self.model, index, None):
                    hook = partial(project, index)
                    stack.callback(module.register_forward_hook(hook).remove)
                for module in layer.modules():
                    if module is not layer:
                        hook = partial(leave, index)
                        stack.callback(module.register_forward_hook(hook).remove)
            token = torch.full((1, 2), self.model.pad_token_id(), device=self.model.device)
            self._run(TokenBatch(token, torch.ones_like(token)))
        return tuple(found)

    @cached_property
    def _returns_tuple(self) -> bool:
        """Whether the layers return tuples, found out by one pass over two tokens."""

        found: list[bool] = []

        def hook(module: Module, args: Any, output: Any) -> None:
            found.append(isinstance(output, tuple))

        handle = self.model.layers[0].register_forward_hook(hook)
        try:
            token = torch.full((1, 2), self.model.pad_token_id(), device=self.model.device)
            self._run(TokenBatch(token, torch.ones_like(token)))
        finally:
            handle.remove()
        return found[0]


def _is_shared(module: Module) -> bool:
    """Returns whether layers above attend to the keys and values of an attention, as in Gemma 4."""

    return bool(getattr(module, "store_full_length_kv", False))


def require_layers(model: LanguageModel, layers: Sequence[int]) -> None:
    """Raises `ContrastError` when a layer does not exist."""

    for layer in layers:
        if not 0 <= layer < model.n_layers:
            raise ContrastError(
                f"Layer {layer} is out of range: {model.name} has layers 0 to {model.n_layers - 1}."
            )
