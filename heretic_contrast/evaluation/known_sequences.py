# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Prompts with known continuations, run through a model under many interventions.

Both the check of a known response and the divergence need nothing else. What lies below the ablated layer is run
once for all interventions: the inputs of that layer are kept, and moved up as the sweep moves up the layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..language_model import batches
from .interventions import Intervention, LayerInput, TeacherForcing, TokenBatch

Tokens = tuple[int, ...]

CPU_TOKENS_PER_PASS = 1024
"""Tokens of one pass on a CPU, where what a layer computes should not leave the cache before the next one reads it."""


@dataclass(frozen=True)
class Piece:
    """
    Final hidden states where continuations are predicted.

    `interventions`: under which of the interventions. `sequences`: which of the sequences, in the order of
    `KnownSequences.order`. `hidden_states`: Tensor of shape (n_positions, hidden_size), one sequence after the other for
    one intervention after the other.
    """

    interventions: tuple[int, ...]
    sequences: slice
    hidden_states: Tensor


class KnownSequences:
    """
    Prompts with known continuations.

    `n_rows`: the largest number of samples in one pass. Sequences of similar length share a pass: `order` gives their
    places among the prompts, and `lengths` the number of tokens of each continuation in that order.
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
        self._starts = [len(prompts[index]) - 1 for index in self.order]
        self._widths = [len(sequences[index]) for index in self.order]
        shape = (len(sequences), max(self._widths, default=0))
        if model.model.device.type == "cpu":
            n_rows = min(n_rows, max(1, CPU_TOKENS_PER_PASS // max(1, shape[1])))
        self._n_rows = n_rows
        self._tokens = TokenBatch(
            torch.full(shape, model.pad_token_id()), torch.zeros(shape, dtype=torch.long)
        )
        for row, index in enumerate(self.order):
            width = len(sequences[index])
            self._tokens.input_ids[row, :width] = torch.tensor(sequences[index])
            self._tokens.attention_mask[row, :width] = 1
        self._input: LayerInput | None = None

    def unmodified(self, forcing: TeacherForcing) -> Iterator[Piece]:
        """Yields the hidden states of a model as it is at this moment."""

        for part in batches(len(self.order), self._n_rows):
            hidden_states = forcing.unmodified(self._batch(part, forcing))
            positions = self._positions(part, 1, hidden_states.device)
            yield Piece((0,), part, hidden_states[positions])

    def modified(
        self, forcing: TeacherForcing, interventions: Sequence[Intervention]
    ) -> Iterator[Piece]:
        """Yields the hidden states under each intervention. The unmodified model must be the same in all calls."""

        for start, group in shared_passes(forcing, interventions):
            known = self._layer_input(forcing, start)
            for part in batches(len(self.order), max(1, self._n_rows // len(group))):
                tokens = self._batch(part, forcing)
                n_sequences, width = tokens.input_ids.shape
                inputs = known[part, :width]
                # Interventions that do not fit into one pass beside each other take turns.
                for turn in batches(len(group), max(1, self._n_rows // n_sequences)):
                    chosen = group[turn]
                    hidden_states = forcing.modified(
                        tokens.repeat(len(chosen)),
                        [interventions[index] for index in chosen for _ in range(n_sequences)],
                        LayerInput(start, inputs.repeat(len(chosen), 1, 1)),
                    )
                    positions = self._positions(part, len(chosen), hidden_states.device)
                    yield Piece(tuple(chosen), part, hidden_states[positions])

    def _layer_input(self, forcing: TeacherForcing, layer: int) -> Tensor:
        """Returns the input of a layer for all sequences, from that of the layer below that was asked for last."""

        start = self._input
        if start is not None and start.layer > layer:
            start = None
        if start is None or start.layer < layer:
            found: Tensor | None = None
            for part in batches(len(self.order), self._n_rows):
                tokens = self._batch(part, forcing)
                width = tokens.input_ids.shape[1]
                below = (
                    None
                    if start is None
                    else LayerInput(start.layer, start.hidden_states[part, :width])
                )
                hidden_states = forcing.layer_input(tokens, layer, below)
                if found is None:
                    shape = (*self._tokens.input_ids.shape, hidden_states.shape[-1])
                    found = hidden_states.new_zeros(shape)
                found[part, :width] = hidden_states
            assert found is not None
            start = LayerInput(layer, found)
        self._input = start
        return start.hidden_states

    def _batch(self, part: slice, forcing: TeacherForcing) -> TokenBatch:
        """Returns the tokens of some sequences, padded on the right no further than they need."""

        device = forcing.model.model.device
        width = max(self._widths[part])
        return TokenBatch(
            self._tokens.input_ids[part, :width].to(device),
            self._tokens.attention_mask[part, :width].to(device),
        )

    def _positions(self, part: slice, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the rows and columns that predict the continuations, for some sequences that are repeated."""

        rows: list[int] = []
        columns: list[int] = []
        places = list(zip(self._starts[part], self.lengths[part], strict=True))
        for row, (start, length) in enumerate(places * count):
            rows += [row] * length
            columns += range(start, start + length)
        return torch.tensor(rows, device=device), torch.tensor(columns, device=device)


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
