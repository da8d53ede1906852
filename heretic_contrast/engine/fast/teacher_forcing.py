# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Known continuations, run through a model under many interventions.

What lies below the ablated layer is run once for all interventions: what enters that layer is kept, and moved up as the
sweep moves up the layers. The prefix that all prompts share, such as the system prompt, is read once for each intervention and group of prompts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ablation.hooks import Intervention, ablated_samples, carries_samples
from ...language_model import Batches, Tokens
from ...vectors import to_device
from ..compat import Cache, join, new_cache, select_rows
from ..interface import Continuations
from .decoder import Decoder, LayerInput, TokenBatch

CPU_ELEMENTS_PER_PASS = 2**18
"""Elements of the hidden states in one pass on a CPU, where they should stay in the cache from one layer to the next."""

DEVICE_TOKENS_PER_PASS = 2**14
"""Tokens of one pass elsewhere, which are enough to keep a GPU busy: long prompts are read fewer at a time."""

CPU_TOKENS_PER_PASS = 512
"""Tokens of one pass on a CPU that are allowed in any case: enough to share a pass over the weights, and of few lengths, so that little is padding."""


@dataclass(frozen=True)
class Pass:
    """
    What one pass gives where continuations are predicted.

    `rows`: intervention and prompt of each sample. `hidden_states`: final ones, Tensor of shape (n_positions, hidden_size),
    one sample after the other. `cache`: KV cache of the layers from `first_layer` on, None where no prefix is shared.
    """

    rows: tuple[tuple[int, int], ...]
    hidden_states: Tensor
    cache: Cache | None
    first_layer: int


class TeacherForcing:
    """
    Continuations that a model reads.

    `prompts`: the indices of those of `known` that are read, shortest first; what is kept is padded to the last. `n_rows`: the largest
    number of samples in one pass. `n_starts`: of how many layers the inputs are kept. `prefix`: the tokens that all prompts of `known`
    begin with, at most all but the last of a prompt.
    """

    def __init__(
        self,
        decoder: Decoder,
        known: Continuations,
        prompts: Sequence[int],
        prefix: Tokens,
        n_rows: int,
        n_starts: int = 1,
    ) -> None:
        self.decoder = decoder
        self.known = known
        self.prompts = prompts
        self.prefix = prefix
        sequences = known.sequences
        self._sequences = [sequences[index][len(self.prefix) :] for index in prompts]
        self._width = len(self._sequences[-1])
        n_tokens = DEVICE_TOKENS_PER_PASS
        if decoder.model.device.type == "cpu":
            n_tokens = max(CPU_TOKENS_PER_PASS, CPU_ELEMENTS_PER_PASS // decoder.model.hidden_size)
        self._batches = Batches(min(n_rows, max(1, n_tokens // max(1, self._width))))
        self._n_starts = n_starts
        self._inputs: dict[int, tuple[LayerInput | None, LayerInput]] = {}
        self._prefix_cache: Cache | None = None

    @cached_property
    def carries_samples(self) -> bool:
        """Whether one batch may hold several interventions."""

        return carries_samples(self.decoder.model)

    def unmodified(self) -> Iterator[Pass]:
        """Yields the hidden states of a model as it is at this moment."""

        # Who keeps these passes may exhaust memory, which does not make those to come smaller.
        yield from self._passes(None, [0], None, self._read_prefix(), replace(self._batches))

    def modified(self, interventions: Sequence[Intervention]) -> Iterator[Pass]:
        """Yields the hidden states under each intervention. The unmodified model must be the same in all calls."""

        by_layer: dict[int, list[int]] = {}
        for index, intervention in enumerate(interventions):
            layer = min(intervention.first_layer, self.decoder.highest_start)
            by_layer.setdefault(layer, []).append(index)
        for layer, group in sorted(by_layer.items()):
            # Where modules do not carry the samples of a batch apart, every intervention has passes of its own.
            for part in [group] if self.carries_samples else [[index] for index in group]:
                yield from self._modified(interventions, layer, part)

    def _modified(
        self, interventions: Sequence[Intervention], layer: int, group: list[int]
    ) -> Iterator[Pass]:
        prefix, start = self._layer_inputs(layer)

        def read_prefix(part: slice) -> tuple[list[int], Cache | None]:
            ablated = [interventions[index] for index in group[part]]
            cache = None if prefix is None else self._read_ablated_prefix(ablated, prefix)
            return group[part], cache

        # Interventions that do not fit into one pass beside each other take turns.
        for chosen, cache in self._batches.run(len(group), read_prefix):
            yield from self._passes(interventions, chosen, start, cache, self._batches)

    def _passes(
        self,
        interventions: Sequence[Intervention] | None,
        chosen: list[int],
        start: LayerInput | None,
        cache: Cache | None,
        batches: Batches,
    ) -> Iterator[Pass]:
        """Yields the passes of some interventions, or of none. `cache`: of the prefix, a sample for each of these."""

        layer = 0 if start is None else start.layer
        # Those of one sequence beside each other, since they are of one length.
        rows = [(sequence, index) for sequence in range(len(self.prompts)) for index in chosen]

        def read(part: slice) -> Pass:
            sequences = [sequence for sequence, _ in rows[part]]
            indices = [index for _, index in rows[part]]
            tokens = self._batch([self._sequences[sequence] for sequence in sequences])
            known = self._select(cache, [chosen.index(index) for index in indices], layer)
            own = start and start.select(sequences, tokens.input_ids.shape[1])
            ablated = [interventions[index] for index in indices] if interventions else []
            with ablated_samples(self.decoder.model, ablated):
                hidden_states = self.decoder.run(tokens, known, len(self.prefix), own)
            return self._pass(rows[part], hidden_states, known, layer)

        yield from batches.run(len(rows), read)

    def _pass(
        self,
        rows: Sequence[tuple[int, int]],
        hidden_states: Tensor,
        cache: Cache | None,
        first_layer: int,
    ) -> Pass:
        """
        Returns what is predicted of the continuations, from the hidden states at all positions.

        `rows`: sequence and intervention of each sample.
        """

        prompts = [self.prompts[sequence] for sequence, _ in rows]
        lengths = torch.tensor([len(self.known.tokens[prompt]) for prompt in prompts])
        starts = torch.tensor(
            [len(self.known.prompts[prompt]) - 1 - len(self.prefix) for prompt in prompts]
        )
        steps = torch.arange(int(lengths.max()))
        samples, columns = (steps < lengths[:, None]).nonzero(as_tuple=True)
        places = torch.stack([samples, columns + starts[samples]])
        samples, columns = to_device(places, hidden_states.device)
        shown = tuple((index, prompt) for (_, index), prompt in zip(rows, prompts, strict=True))
        return Pass(shown, hidden_states[samples, columns], cache, first_layer)

    def _read_prefix(self) -> Cache | None:
        """Returns the KV cache of the prefix, of a model as it is at this moment."""

        if not self.prefix:
            return None
        cache = new_cache(self.decoder.config)
        self.decoder.run(self._batch([self.prefix]), cache)
        return cache

    def _read_ablated_prefix(
        self, interventions: Sequence[Intervention], start: LayerInput
    ) -> Cache:
        """Returns the KV cache of the prefix, a sample for each intervention in the layers that are ablated."""

        above, count = new_cache(self.decoder.config), len(interventions)
        own = start.select([0] * count, len(self.prefix))
        with ablated_samples(self.decoder.model, interventions):
            self.decoder.run(self._batch([self.prefix] * count), above, 0, own)
        assert self._prefix_cache is not None
        return join(self._prefix_cache, above, start.layer)

    def _layer_inputs(self, layer: int) -> tuple[LayerInput | None, LayerInput]:
        """Returns the inputs of a layer for the prefix, and for what follows: from those that were asked for before."""

        if layer in self._inputs:
            return self._inputs[layer]
        lower = max((other for other in self._inputs if other < layer), default=-1)
        below, start = self._inputs.get(lower, (None, None))
        prefix = None
        if self.prefix:
            if self._prefix_cache is None:
                self._prefix_cache = self._read_prefix()
            prefix = self.decoder.layer_input(self._batch([self.prefix]), layer, start=below)

        def read(part: slice) -> LayerInput:
            sequences = range(len(self.prompts))[part]
            tokens = self._batch([self._sequences[index] for index in sequences])
            cache = self._select(self._prefix_cache, [0] * len(sequences))
            own = start and start.select(sequences, tokens.input_ids.shape[1])
            return self.decoder.layer_input(tokens, layer, cache, len(self.prefix), own)

        parts = list(self._batches.run(len(self.prompts), read))
        states = [item.hidden_states for item in parts]
        padded = [pad(item, (0, 0, 0, self._width - item.shape[1])) for item in states]
        while len(self._inputs) >= self._n_starts:
            del self._inputs[next(iter(self._inputs))]
        self._inputs[layer] = prefix, LayerInput(layer, torch.cat(padded), parts[0].n_outputs)
        return self._inputs[layer]

    def _select(
        self, cache: Cache | None, rows: Sequence[int], first_layer: int = 0
    ) -> Cache | None:
        if cache is None:
            return None
        chosen = to_device(rows, self.decoder.model.device)
        return select_rows(cache, chosen, slice(first_layer, None))

    def _batch(self, sequences: Sequence[Tokens]) -> TokenBatch:
        """Returns sequences as a batch, padded on the right no further than they need."""

        return TokenBatch(**self.decoder.model.pad(sequences, "right"))


def common_prefix(prompts: Sequence[Tokens]) -> Tokens:
    """Returns the tokens that all prompts begin with, at most all but the last token of each."""

    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return tuple(column[0] for column in takewhile(lambda items: len(set(items)) == 1, columns))
