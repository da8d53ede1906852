# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Known continuations, run through a model under many interventions.

What lies below the ablated layer is run once for all interventions: what enters that layer is kept, and moved up as the
sweep moves up the layers. The prefix that all prompts share, such as the system prompt, is read once for each intervention.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ablation.hooks import Intervention, ablated_samples, carries_samples
from ...language_model import Batches, Tokens, batches, is_out_of_memory
from ...vectors import to_device
from ..compat import Cache, join, new_cache, select_rows
from ..interface import Continuations, pad_right
from .decoder import Decoder, LayerInput, TokenBatch

CPU_ELEMENTS_PER_PASS = 2**19
"""Elements of the hidden states in one pass on a CPU, where they should stay in the cache from one layer to the next."""

DEVICE_TOKENS_PER_PASS = 2**14
"""Tokens of one pass elsewhere, which are enough to keep a GPU busy: long prompts are read fewer at a time."""

CPU_TOKENS_PER_PASS = 1536
"""Tokens of one pass on a CPU that are allowed in any case, so that a pass over the weights is shared by enough of them."""


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

    `n_rows`: the largest number of samples in one pass. Sequences of similar length share a pass. `prefix`: the tokens that
    all prompts begin with, at most all but the last of a prompt.
    """

    def __init__(self, decoder: Decoder, known: Continuations, n_rows: int) -> None:
        self._decoder = decoder
        self._known = known
        # The last token of a continuation predicts nothing.
        sequences = [a + b[:-1] for a, b in zip(known.prompts, known.tokens, strict=True)]
        self._order = sorted(
            range(len(sequences)), key=lambda index: (len(sequences[index]), index)
        )
        self.prefix = common_prefix(known.prompts)
        self._sequences = [sequences[index][len(self.prefix) :] for index in self._order]
        self._width = max(map(len, self._sequences), default=0)
        n_tokens = DEVICE_TOKENS_PER_PASS
        if decoder.model.device.type == "cpu":
            n_tokens = max(CPU_TOKENS_PER_PASS, CPU_ELEMENTS_PER_PASS // decoder.model.hidden_size)
        self._batches = Batches(min(n_rows, max(1, n_tokens // max(1, self._width))))
        self._inputs: tuple[LayerInput | None, LayerInput] | None = None
        self._prefix_cache: Cache | None = None

    @cached_property
    def carries_samples(self) -> bool:
        """Whether one batch may hold several interventions."""

        return carries_samples(self._decoder.model)

    def unmodified(self) -> Iterator[Pass]:
        """Yields the hidden states of a model as it is at this moment."""

        cache = self._read_prefix()

        def read(part: slice) -> Pass:
            tokens = self._batch(part)
            known = _for_each(cache, 1, len(tokens.input_ids))
            hidden_states = self._decoder.run(tokens, known, len(self.prefix))
            return self._pass((0,), part, hidden_states, known, 0)

        yield from self._batches.run(len(self._order), read)

    def modified(self, interventions: Sequence[Intervention]) -> Iterator[Pass]:
        """Yields the hidden states under each intervention. The unmodified model must be the same in all calls."""

        for layer, group in self._shared_passes(interventions):
            # Interventions that do not fit into one pass beside each other take turns.
            while group:
                chosen, group = group[: self._batches.size], group[self._batches.size :]
                yield from self._turn(layer, chosen, interventions)

    def _turn(
        self, layer: int, chosen: list[int], interventions: Sequence[Intervention], first: int = 0
    ) -> Iterator[Pass]:
        """Yields the passes of some interventions from a sequence on; not all at once where memory does not suffice for that."""

        try:
            for item in self._passes(layer, chosen, interventions, first):
                first += len(item.rows) // len(chosen)
                yield item
                # Not to be held beside the next one.
                del item
            return
        except Exception as error:
            if len(chosen) == 1 or not is_out_of_memory(error):
                raise
        self._batches.halve(len(chosen))
        for part in batches(len(chosen), self._batches.size):
            yield from self._turn(layer, chosen[part], interventions, first)

    def _passes(
        self, layer: int, chosen: list[int], interventions: Sequence[Intervention], first: int
    ) -> Iterator[Pass]:
        prefix, rest = self._layer_inputs(layer)
        ablated = [interventions[index] for index in chosen]
        cache = None if prefix is None else self._read_ablated_prefix(ablated, prefix)

        def read(part: slice) -> Pass:
            tokens = self._batch(part)
            n_sequences, width = tokens.input_ids.shape
            known = _for_each(cache, len(chosen), n_sequences, layer)
            rows = [intervention for intervention in ablated for _ in range(n_sequences)]
            with ablated_samples(self._decoder.model, rows):
                hidden_states = self._decoder.run(
                    tokens.repeat(len(chosen)),
                    known,
                    len(self.prefix),
                    rest.select(part, width).repeat(len(chosen)),
                )
            return self._pass(chosen, part, hidden_states, known, layer)

        yield from self._batches.run(len(self._order), read, len(chosen), first)

    def _pass(
        self,
        interventions: Sequence[int],
        part: slice,
        hidden_states: Tensor,
        cache: Cache | None,
        first_layer: int,
    ) -> Pass:
        """Returns what is predicted of the continuations, from the hidden states at all positions."""

        rows = [(index, prompt) for index in interventions for prompt in self._order[part]]
        lengths = torch.tensor([len(self._known.tokens[prompt]) for _, prompt in rows])
        starts = torch.tensor(
            [len(self._known.prompts[prompt]) - 1 - len(self.prefix) for _, prompt in rows]
        )
        steps = torch.arange(int(lengths.max()))
        samples, columns = (steps < lengths[:, None]).nonzero(as_tuple=True)
        places = torch.stack([samples, columns + starts[samples]])
        samples, columns = to_device(places, hidden_states.device)
        return Pass(tuple(rows), hidden_states[samples, columns], cache, first_layer)

    def _shared_passes(
        self, interventions: Sequence[Intervention]
    ) -> Iterator[tuple[int, list[int]]]:
        """
        Yields layers at which passes start, each with the indices of the interventions that share these passes.

        Where modules do not carry the samples of a batch apart, every intervention has passes of its own.
        """

        by_layer: dict[int, list[int]] = {}
        for index, intervention in enumerate(interventions):
            layer = min(intervention.first_layer, self._decoder.highest_start)
            by_layer.setdefault(layer, []).append(index)
        for layer in sorted(by_layer):
            group = by_layer[layer]
            parts = [group] if self.carries_samples else [[index] for index in group]
            yield from ((layer, part) for part in parts)

    def _read_prefix(self) -> Cache | None:
        """Returns the KV cache of the prefix, of a model as it is at this moment."""

        if not self.prefix:
            return None
        cache = new_cache(self._decoder.config)
        self._decoder.run(self._prefix_batch(), cache)
        return cache

    def _read_ablated_prefix(
        self, interventions: Sequence[Intervention], start: LayerInput
    ) -> Cache:
        """Returns the KV cache of the prefix, a sample for each intervention in the layers that are ablated."""

        above, count = new_cache(self._decoder.config), len(interventions)
        with ablated_samples(self._decoder.model, interventions):
            self._decoder.run(self._prefix_batch().repeat(count), above, 0, start.repeat(count))
        assert self._prefix_cache is not None
        return join(self._prefix_cache, above, start.layer)

    def _layer_inputs(self, layer: int) -> tuple[LayerInput | None, LayerInput]:
        """Returns the inputs of a layer for the prefix, and for what follows: from those that were asked for last."""

        known = self._inputs
        if known is not None and known[1].layer == layer:
            return known
        if known is not None and known[1].layer > layer:
            known = None
        below, start = (None, None) if known is None else known
        prefix = None
        if self.prefix:
            if self._prefix_cache is None:
                self._prefix_cache = self._read_prefix()
            prefix = self._decoder.layer_input(self._prefix_batch(), layer, start=below)

        def read(part: slice) -> LayerInput:
            tokens = self._batch(part)
            n_sequences, width = tokens.input_ids.shape
            cache = _for_each(self._prefix_cache, 1, n_sequences)
            own = None if start is None else start.select(part, width)
            return self._decoder.layer_input(tokens, layer, cache, len(self.prefix), own)

        parts = list(self._batches.run(len(self._order), read))
        states = [item.hidden_states for item in parts]
        padded = [pad(item, (0, 0, 0, self._width - item.shape[1])) for item in states]
        self._inputs = prefix, LayerInput(layer, torch.cat(padded), parts[0].n_outputs)
        return self._inputs

    def _batch(self, part: slice) -> TokenBatch:
        """Returns the tokens of some sequences, padded on the right no further than they need."""

        model = self._decoder.model
        tokens, mask = pad_right(self._sequences[part], model.pad_token_id())
        return TokenBatch(to_device(tokens, model.device), to_device(mask, model.device))

    def _prefix_batch(self) -> TokenBatch:
        tokens = to_device([self.prefix], self._decoder.model.device)
        return TokenBatch(tokens, torch.ones_like(tokens))


def common_prefix(prompts: Sequence[Tokens]) -> Tokens:
    """Returns the tokens that all prompts begin with, at most all but the last token of each."""

    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return tuple(column[0] for column in takewhile(lambda items: len(set(items)) == 1, columns))


def _for_each(
    cache: Cache | None, n_samples: int, n_sequences: int, first_layer: int = 0
) -> Cache | None:
    """Returns a cache with each of its samples once for every sequence."""

    if cache is None:
        return None
    rows = torch.arange(n_samples).repeat_interleave(n_sequences)
    return select_rows(cache, rows, slice(first_layer, None))
