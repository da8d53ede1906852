# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Passes of a model's decoder over known tokens that start at any layer, and the head that gives logits.

An intervention changes nothing below the lowest layer that it ablates, so that a pass may start there, from what the
unmodified model has computed.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import Module

from ...language_model import LanguageModel, Reached, hooked
from ...vectors import to_device
from ..compat import CACHE, Cache, shares_its_cache
from ..cpu.layers import fast_on_cpu

ELEMENTS = 2**23
"""Logits that are held at the same time: fewer positions would share a pass over the head's weights on a CPU."""

LEAST_POSITIONS = 256
"""Positions whose logits are held at the same time in any case, elsewhere than on a CPU."""


class TokenBatch(NamedTuple):
    """Known tokens that no cache holds, masked behind the last of a sample: integer tensors of shape (batch, length)."""

    input_ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class LayerInput:
    """
    What enters a layer of the unmodified model.

    `hidden_states`: Tensor of shape (batch, length, hidden_size), the output of the layer below `layer`. `n_outputs`: the
    length of the tuple that layers return, with nothing after the hidden states; 0 where they return a tensor.
    """

    layer: int
    hidden_states: Tensor
    n_outputs: int = 0

    def select(self, samples: Sequence[int], length: int) -> "LayerInput":
        """Returns the first tokens of some samples, which may be repeated."""

        rows = to_device(samples, self.hidden_states.device)
        return replace(self, hidden_states=self.hidden_states[:, :length][rows])

    def passed(self) -> Any:
        states = self.hidden_states
        return (states, *[None] * (self.n_outputs - 1)) if self.n_outputs else states


class Decoder:
    """A model's decoder and its head, as they are hooked at the moment of a call."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._decoder: Any = model.decoder()
        parameters = inspect.signature(self._decoder.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self._output_class: Any = None
        # What decides which caches it needs.
        self.config = self._decoder.config
        # No pass starts above a layer whose keys and values layers above it attend to.
        shared = (index for index, layer in enumerate(model.layers) if shares_its_cache(layer))
        self.highest_start = next(shared, model.n_layers)

    @torch.no_grad()
    def run(
        self,
        tokens: TokenBatch,
        cache: Cache | None = None,
        n_cached: int = 0,
        start: LayerInput | None = None,
    ) -> Tensor:
        """
        Returns the final (normalized) hidden states. Tensor of shape (batch, length, hidden_size).

        `cache`: of `n_cached` tokens that every sample has read, to which those of the batch are added. `start`: the input of
        the layer at which the pass starts.
        """

        mask = tokens.attention_mask
        mask = torch.cat([mask.new_ones(len(mask), n_cached), mask], dim=1)
        arguments: dict[str, Any] = {} if cache is None else {CACHE: cache}
        if self.takes_positions:
            positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
            arguments["position_ids"] = positions[:, n_cached:]
        # The layers below pass on what is known already.
        below = [] if start is None else self.model.layers[: start.layer]
        with fast_on_cpu(self.model), replaced_forwards(below, start and start.passed()):
            output = self._decoder(
                input_ids=tokens.input_ids,
                attention_mask=mask,
                use_cache=cache is not None,
                **arguments,
            )
        self._output_class = type(output)
        hidden_states: Tensor = output.last_hidden_state
        return hidden_states

    def layer_input(
        self,
        tokens: TokenBatch,
        layer: int,
        cache: Cache | None = None,
        n_cached: int = 0,
        start: LayerInput | None = None,
    ) -> LayerInput:
        """
        Returns the input of a layer, and computes nothing above it.

        `start`: the input of a layer below, where it is known, so that nothing is computed below it either. Raises
        `NotImplementedError` where layers pass on more than hidden states.
        """

        entered: list[Tensor] = []
        n_outputs = 0

        def enter(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append(args[0] if args else kwargs["hidden_states"])
            raise Reached

        def leave(module: Module, args: Any, output: Any) -> None:
            nonlocal n_outputs
            if isinstance(output, tuple):
                n_outputs = len(output)
                if any(item is not None for item in output[1:]):
                    raise NotImplementedError("its layers pass on more than hidden states")

        layers = self.model.layers
        below = [(item, leave) for item in layers[max(layer - 1, 0) : layer]]
        with hooked([(layers[layer], enter)], below), suppress(Reached):
            self.run(tokens, cache, n_cached, start)
        return LayerInput(layer, entered[0], n_outputs)

    @torch.no_grad()
    def logits(self, hidden_states: Tensor) -> Tensor:
        """
        Returns the logits of final hidden states, with whatever scaling or capping the model applies to them.

        Tensor of shape (n_positions, hidden_size) to one of shape (n_positions, vocabulary), float32.
        """

        output = self._output_class(last_hidden_state=hidden_states[None])
        token = torch.full(
            (1, len(hidden_states)), self.model.pad_token_id(), device=hidden_states.device
        )
        with replaced_forwards([self._decoder], output):
            logits: Tensor = self.model.model(input_ids=token, use_cache=False).logits
        return logits[0].float()

    def chunks(self, hidden_states: Tensor) -> list[slice]:
        """Returns positions of final hidden states whose logits may be held at the same time."""

        is_cpu = hidden_states.device.type == "cpu"
        n = max(1 if is_cpu else LEAST_POSITIONS, ELEMENTS // self.model.vocabulary_size)
        return [slice(start, start + n) for start in range(0, len(hidden_states), n)]

    def most_likely(self, hidden_states: Tensor) -> Tensor:
        """Returns the most likely token of each position. Integer Tensor of shape (n_positions,)."""

        parts = self.chunks(hidden_states)
        return torch.cat([self.logits(hidden_states[part]).argmax(dim=1) for part in parts])


@contextmanager
def replaced_forwards(modules: Any, output: Any) -> Iterator[None]:
    """Makes modules return a given output, for as long as the context lasts. Their hooks go on to run."""

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.object(module, "forward", lambda *args, **kwargs: output))
        yield
