# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Prompts with known continuations, run through a model under many interventions.

Both the check of a known response and the divergence need nothing else. What lies below the ablated layer, and its
attention up to the output projection, is run once for all interventions: what enters that layer is kept, and moved up
as the sweep moves up the layers. What all prompts begin with, such as the system prompt, is read once for each
intervention.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from ...ablation.hooks import Intervention
from ...language_model import batches
from .caches import Past, join
from .interventions import LayerInput, TeacherForcing, TokenBatch

Tokens = tuple[int, ...]

Count = Callable[[int], None]
"""Is told how many more sequences have been read, each under each intervention."""

CPU_ELEMENTS_PER_PASS = 2**19
"""Elements of the hidden states in one pass on a CPU, where they should stay in the cache from one layer to the next."""

CPU_TOKENS_PER_PASS = 1536
"""Tokens of one pass on a CPU that are allowed in any case, so that a pass over the weights is shared by enough of them."""


@dataclass(frozen=True)
class Piece:
    """
    Final hidden states where continuations are predicted.

    `interventions`: under which of the interventions. `sequences`: which of the sequences, in the order of
    `KnownSequences.order`. `hidden_states`: Tensor of shape (n_positions, hidden_size), one sequence after the other for
    one intervention after the other. `cache`: what the model keeps of them in its layers from `first_layer` on, a
    sample for each sequence in the same order; None where it cannot be read on from.
    """

    interventions: tuple[int, ...]
    sequences: slice
    hidden_states: Tensor
    cache: Cache | None
    first_layer: int


@dataclass(frozen=True)
class _Inputs:
    """
    What enters a layer of the unmodified model.

    `beginning`: of the common beginning, one sample; None without one. `rest`: of what follows, a sample for each sequence,
    each as long as the longest.
    """

    beginning: LayerInput | None
    rest: LayerInput


class KnownSequences:
    """
    Prompts with known continuations.

    `n_rows`: the largest number of samples in one pass. Sequences of similar length share a pass: `order` gives their
    places among the prompts, and `lengths` the number of tokens of each continuation in that order. `n_common`: how
    many tokens all of them begin with, at most all but the last of a prompt.
    """

    def __init__(
        self,
        forcing: TeacherForcing,
        prompts: Sequence[Tokens],
        continuations: Sequence[Tokens],
        n_rows: int,
    ) -> None:
        model = forcing.model
        # The last token of a continuation predicts nothing.
        sequences = [
            prompt + continuation[:-1]
            for prompt, continuation in zip(prompts, continuations, strict=True)
        ]
        self.order = sorted(range(len(sequences)), key=lambda index: (len(sequences[index]), index))
        self.lengths = [len(continuations[index]) for index in self.order]
        beginning = common_beginning(prompts) if forcing.reads_on else ()
        self.n_common = len(beginning)
        self._starts = [len(prompts[index]) - 1 - self.n_common for index in self.order]
        self._widths = [len(sequences[index]) - self.n_common for index in self.order]
        shape = (len(sequences), max(self._widths, default=0))
        if model.device.type == "cpu":
            n_tokens = max(CPU_TOKENS_PER_PASS, CPU_ELEMENTS_PER_PASS // model.hidden_size)
            n_rows = min(n_rows, max(1, n_tokens // max(1, shape[1])))
        self._n_rows = n_rows
        self._tokens = TokenBatch(
            torch.full(shape, model.pad_token_id()), torch.zeros(shape, dtype=torch.long)
        )
        for row, (index, width) in enumerate(zip(self.order, self._widths, strict=True)):
            self._tokens.input_ids[row, :width] = torch.tensor(sequences[index][self.n_common :])
            self._tokens.attention_mask[row, :width] = 1
        ids = torch.tensor([beginning], dtype=torch.long, device=model.device)
        self._beginning = TokenBatch(ids, torch.ones_like(ids))
        self._inputs: _Inputs | None = None
        self._past: Past | None = None

    def unmodified(self, forcing: TeacherForcing) -> Iterator[Piece]:
        """Yields the hidden states of a model as it is at this moment."""

        past = self._read_beginning(forcing)
        for part in batches(len(self.order), self._n_rows):
            tokens = self._batch(part, forcing)
            known = _for_each(past, 1, len(tokens.input_ids))
            hidden_states = forcing.unmodified(tokens, known)
            yield self._piece((0,), part, hidden_states, known, 0)

    def modified(
        self, forcing: TeacherForcing, interventions: Sequence[Intervention]
    ) -> Iterator[Piece]:
        """Yields the hidden states under each intervention. The unmodified model must be the same in all calls."""

        for start, group in shared_passes(forcing, interventions):
            inputs = self._layer_inputs(forcing, start)
            # Interventions that do not fit into one pass beside each other take turns.
            for turn in batches(len(group), self._n_rows):
                chosen = tuple(group[turn])
                ablated = [interventions[index] for index in chosen]
                past = self._read_ablated_beginning(forcing, ablated, inputs)
                first_read = inputs.rest.first_read
                for part in batches(len(self.order), self._n_rows // len(chosen)):
                    tokens = self._batch(part, forcing)
                    n_sequences, width = tokens.input_ids.shape
                    known = _for_each(past, len(chosen), n_sequences, first_read)
                    hidden_states = forcing.modified(
                        tokens.repeat(len(chosen)),
                        [intervention for intervention in ablated for _ in range(n_sequences)],
                        inputs.rest.select(part, width).repeat(len(chosen)),
                        known,
                        self._columns(part, len(chosen), tokens.input_ids),
                    )
                    yield self._piece(chosen, part, hidden_states, known, first_read)

    def _piece(
        self,
        interventions: tuple[int, ...],
        part: slice,
        hidden_states: Tensor,
        known: Past | None,
        first_layer: int,
    ) -> Piece:
        """Returns what is predicted of the continuations, from the hidden states at all positions."""

        positions = self._positions(part, len(interventions), hidden_states.device)
        cache = None if known is None else known.cache
        return Piece(interventions, part, hidden_states[positions], cache, first_layer)

    def _read_beginning(self, forcing: TeacherForcing) -> Past | None:
        """Returns what a model as it is at this moment keeps of the common beginning."""

        if self.n_common == 0:
            return None
        past = forcing.nothing_read()
        forcing.unmodified(self._beginning, past)
        return Past(past.cache, self.n_common)

    def _unmodified_beginning(self, forcing: TeacherForcing) -> Past | None:
        """Returns what the unmodified model keeps of the common beginning, which it reads only once."""

        if self._past is None:
            self._past = self._read_beginning(forcing)
        return self._past

    def _read_ablated_beginning(
        self, forcing: TeacherForcing, interventions: Sequence[Intervention], inputs: _Inputs
    ) -> Past | None:
        """Returns what is kept of the common beginning, a sample for each intervention."""

        below, start = self._unmodified_beginning(forcing), inputs.beginning
        if below is None or start is None:
            return None
        above = forcing.nothing_read()
        count = len(interventions)
        forcing.modified(self._beginning.repeat(count), interventions, start.repeat(count), above)
        return Past(join(below.cache, above.cache, start.first_read), self.n_common)

    def _layer_inputs(self, forcing: TeacherForcing, layer: int) -> _Inputs:
        """Returns the inputs of a layer, from those of the layer below that was asked for last."""

        start = self._inputs
        if start is not None and start.rest.layer > layer:
            start = None
        if start is None or start.rest.layer < layer:
            past = self._unmodified_beginning(forcing)
            beginning = None
            if past is not None:
                below = None if start is None else start.beginning
                beginning = forcing.layer_input(self._beginning, layer, below)
            parts = []
            for part in batches(len(self.order), self._n_rows):
                tokens = self._batch(part, forcing)
                n_sequences, width = tokens.input_ids.shape
                below = None if start is None else start.rest.select(part, width)
                known = _for_each(past, 1, n_sequences)
                parts.append(forcing.layer_input(tokens, layer, below, known))
            start = _Inputs(beginning, _joined(parts, self._tokens.input_ids.shape[1]))
        self._inputs = start
        return start

    def _batch(self, part: slice, forcing: TeacherForcing) -> TokenBatch:
        """Returns the tokens of some sequences, padded on the right no further than they need."""

        device = forcing.model.device
        width = max(self._widths[part])
        return TokenBatch(
            self._tokens.input_ids[part, :width].to(device),
            self._tokens.attention_mask[part, :width].to(device),
        )

    def _columns(self, part: slice, count: int, input_ids: Tensor) -> Tensor:
        """Returns the columns that predict the continuations, as many in each row. Tensor of shape (n_rows, n_columns)."""

        starts = torch.tensor(self._starts[part] * count)[:, None]
        columns = starts + torch.arange(max(self.lengths[part]))
        return columns.clamp_max(input_ids.shape[1] - 1).to(input_ids.device)

    def _positions(self, part: slice, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the rows and columns that predict the continuations, for some sequences that are repeated."""

        starts = torch.tensor(self._starts[part] * count)
        lengths = torch.tensor(self.lengths[part] * count)[:, None]
        rows, steps = (torch.arange(max(self.lengths[part])) < lengths).nonzero(as_tuple=True)
        return rows.to(device), (starts[rows] + steps).to(device)


def common_beginning(prompts: Sequence[Tokens]) -> Tokens:
    """Returns the tokens that all prompts begin with, at most all but the last token of each."""

    if not prompts:
        return ()
    shared = min(n_common(prompts[0], prompt) for prompt in prompts)
    return prompts[0][: min(shared, min(map(len, prompts)) - 1)]


def n_common(first: Tokens, second: Tokens) -> int:
    """Returns the number of tokens that two sequences start with in common."""

    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def _for_each(
    past: Past | None, n_samples: int, n_sequences: int, first_layer: int = 0
) -> Past | None:
    """Returns a past with each of its samples once for every sequence."""

    if past is None:
        return None
    rows = torch.arange(n_samples).repeat_interleave(n_sequences)
    return past.select(rows, slice(first_layer, None))


def _joined(parts: Sequence[LayerInput], length: int) -> LayerInput:
    """Returns the samples of all parts, each with room for `length` tokens."""

    def joined(states: Sequence[Tensor]) -> Tensor:
        return torch.cat([pad(item, (0, 0, 0, length - item.shape[1])) for item in states])

    projected = [part.projected for part in parts if part.projected is not None]
    return LayerInput(
        parts[0].layer,
        joined([part.hidden_states for part in parts]),
        joined(projected) if projected else None,
    )


def shared_passes(
    forcing: TeacherForcing, interventions: Sequence[Intervention]
) -> Iterator[tuple[int, list[int]]]:
    """
    Yields layers at which passes start, each with the indices of the interventions that share these passes.

    Where modules do not carry the samples of a batch apart, every intervention has passes of its own.
    """

    by_layer: dict[int, list[int]] = {}
    for index, intervention in enumerate(interventions):
        by_layer.setdefault(forcing.start_layer(intervention), []).append(index)
    for layer in sorted(by_layer):
        if forcing.carries_samples:
            yield layer, by_layer[layer]
        else:
            yield from ((layer, [index]) for index in by_layer[layer])
