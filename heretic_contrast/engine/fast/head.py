# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The language model's head: the logits of final hidden states, on a CPU for a part of the vocabulary at a time.

A logit needs no other row of the head's weights than its own. Products whose results stay in the processor's cache are
faster, and so is what is done with the results, of which there are more than of anything else.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module
from transformers import LogitsProcessor

from ...language_model import LanguageModel, batches
from ..cpu.few_rows import linear_of_few_rows
from .replaced_forwards import replaced_forwards

CHUNK = 256
"""Positions whose logits are held at the same time where the vocabulary is not taken apart."""

CPU_CHUNK = 512
"""The same where it is, so that each part of the weights is read for enough positions."""

CPU_ELEMENTS = 2**19
"""Logits that are held at the same time on a CPU."""


class Head:
    """
    What turns final hidden states into logits, with whatever scaling or capping the model applies to them.

    `vocabulary`: the number of logits of a position.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._network = model.model
        self._decoder: Any = model.decoder()
        self._pad_token_id = model.pad_token_id()
        projection = self._network.get_output_embeddings()
        if projection is None:
            projection = self._network.get_input_embeddings()
        self._projection: Any = projection
        self.vocabulary = int(projection.weight.shape[0])

    @property
    def n_positions(self) -> int:
        """How many positions' logits are held at the same time, of the whole vocabulary or a part."""

        if self._is_large:
            return CPU_CHUNK if self._can_be_split else CHUNK
        return 2 * CPU_ELEMENTS // self.vocabulary

    def parts(self, n_positions: int) -> list[slice]:
        """Returns the parts of the vocabulary whose logits are computed at the same time, for so many positions."""

        width = self.vocabulary
        if self._is_large and self._can_be_split:
            width = max(1, CPU_ELEMENTS // max(n_positions, CHUNK))
        return list(batches(self.vocabulary, width))

    @property
    def _is_large(self) -> bool:
        """Whether the vocabulary is worth being taken apart."""

        return self.vocabulary > 2 * CPU_ELEMENTS // CPU_CHUNK

    @torch.no_grad()
    def logits(self, hidden_states: Tensor, part: slice | None = None) -> Tensor:
        """
        Returns the logits of final hidden states, all or those of a part of the vocabulary.

        Tensor of shape (n_positions, hidden_size) to one of shape (n_positions, n_logits), float32.
        """

        template = self._output_template
        template.last_hidden_state = hidden_states[None]
        replacements: list[tuple[Module, Callable[..., Any]]] = [
            (self._decoder, lambda *args, **kwargs: template)
        ]
        if part is not None and part != slice(0, self.vocabulary):
            weight, bias = self._projection.weight[part], self._projection.bias
            biases = None if bias is None else bias[part]
            replacements.append(
                (self._projection, lambda states: linear_of_few_rows(states, weight, biases))
            )
        token = torch.full((1, len(hidden_states)), self._pad_token_id, device=hidden_states.device)
        try:
            with replaced_forwards(replacements):
                return self._network(input_ids=token, use_cache=False).logits[0].float()
        finally:
            template.last_hidden_state = None

    def most_likely(self, hidden_states: Tensor) -> Tensor:
        """Returns the most likely token of each position. Integer Tensor of shape (n_positions,)."""

        found = []
        for piece in hidden_states.split(self.n_positions):
            best: tuple[Tensor, Tensor] | None = None
            for part in self.parts(len(piece)):
                logits, tokens = self.logits(piece, part).max(dim=1)
                tokens += part.start
                if best is not None:
                    # Of equal ones the first, as in the whole vocabulary; what is no number counts as the largest.
                    is_better = ~(logits <= best[0]) & ~best[0].isnan()
                    tokens = torch.where(is_better, tokens, best[1])
                    logits = torch.where(is_better, logits, best[0])
                best = logits, tokens
            assert best is not None
            found.append(best[1])
        return torch.cat(found)

    def largest(self, hidden_states: Tensor, count: int) -> Tensor:
        """Returns the `count` most likely tokens of each position, at most all. Integer Tensor (n_positions, count)."""

        values = torch.empty(len(hidden_states), 0, device=hidden_states.device)
        tokens = torch.empty(len(hidden_states), 0, dtype=torch.long, device=hidden_states.device)
        for part in self.parts(len(hidden_states)):
            logits = self.logits(hidden_states, part)
            more = logits.topk(min(count, logits.shape[1]), dim=1)
            values = torch.cat([values, more.values], dim=1)
            tokens = torch.cat([tokens, more.indices + part.start], dim=1)
            values, places = values.topk(min(count, values.shape[1]), dim=1)
            tokens = tokens.gather(1, places)
        return tokens

    @contextmanager
    def only_most_likely(self) -> Iterator[list[LogitsProcessor]]:
        """
        Makes `generate` find out the most likely token of each step without all logits, where that is faster.

        Gives the processors of logits that `generate` then needs. Nothing else may change the logits.
        """

        if len(self.parts(1)) == 1:
            yield []
            return
        # Adapters are around the network whose outputs `generate` sees.
        network = getattr(self._network, "get_base_model", lambda: self._network)()
        original = network.forward

        # Its arguments are looked at.
        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            seen: list[Tensor] = []

            def see(states: Tensor) -> Tensor:
                seen.append(states[:, -1])
                return states.new_zeros(*states.shape[:2], 1)

            with replaced_forwards([(self._projection, see)]):
                output = original(*args, **kwargs)
            with replaced_forwards([(network, original)]):
                output.logits = self.most_likely(seen[0])[:, None, None]
            return output

        with replaced_forwards([(network, forward)]):
            yield [_Chosen(self.vocabulary)]

    @cached_property
    @torch.no_grad()
    def _output_template(self) -> Any:
        """What the decoder returns, without its hidden states: its form, not its tensors."""

        token = torch.full((1, 1), self._pad_token_id, device=self.model.device)
        output = self._decoder(input_ids=token, use_cache=False)
        output.last_hidden_state = None
        return output

    @cached_property
    def _can_be_split(self) -> bool:
        """Whether parts of the vocabulary give the logits of the whole, found out with a few hidden states."""

        projection = self._projection
        if (
            type(projection) is not Linear
            or projection.weight.device.type != "cpu"
            # Libraries that move weights between devices put a method of their own in front of it.
            or "forward" in vars(projection)
        ):
            return False
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(3, projection.in_features, generator=generator)
        states = states.to(projection.weight.dtype)
        whole = self.logits(states)
        try:
            thirds = batches(self.vocabulary, -(-self.vocabulary // 3))
            joined = torch.cat([self.logits(states, part) for part in thirds], dim=1)
        except RuntimeError:
            # What follows the projection takes the whole vocabulary only.
            return False
        # Rounding differs by far less, and what depends on other logits by more.
        return joined.shape == whole.shape and bool((joined - whole).norm() <= 1e-3 * whole.norm())


class _Chosen(LogitsProcessor):
    """Gives tokens that are chosen already, which stand where their logits would, the only logits that are not zero."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        # Kept from step to step, since it takes longer to make than to read.
        self._logits = torch.empty(0, 0)
        self._tokens = torch.empty(0, 1, dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns logits, Tensor of shape (batch, vocabulary), from tokens of shape (batch, 1) as numbers of any dtype."""

        if len(self._logits) != len(scores):
            self._logits = scores.new_zeros(len(scores), self._vocabulary)
        else:
            self._logits.scatter_(1, self._tokens, 0.0)
        self._tokens = scores.long()
        return self._logits.scatter_(1, self._tokens, 1.0)
