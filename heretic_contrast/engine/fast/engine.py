# SPDX-License-Identifier: AGPL-3.0-or-later

"""The fast engine: what is known is not computed again."""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch

from ...ablation.hooks import Intervention
from ...greedy import is_plainly_greedy
from ...language_model import LanguageModel, Tokens, groups_by_length
from ...vectors import to_device
from ..cpu.layers import fast_on_cpu
from ..interface import Continuations, Count, Logits, no_count
from ..plain import PlainEngine
from ..strides import Watch, none_leaves
from .decoder import Decoder
from .drafts import Drafts, Row
from .teacher_forcing import TeacherForcing, common_prefix


class FastEngine(PlainEngine):
    """
    Must give what the plain engine gives, but for rounding. What is known of continuations is kept.

    `n_starts`: of how many layers it is kept what enters them, for interventions that begin at one or another.
    """

    def __init__(self, model: LanguageModel, n_starts: int = 1) -> None:
        super().__init__(model)
        self._n_starts = n_starts
        self._decoder = Decoder(model)
        # One for each group of prompts, so that a long one makes nothing of the others longer.
        self._forcings: dict[Continuations, list[TeacherForcing]] = {}
        self._drafts: dict[tuple[Continuations, int], list[Drafts]] = {}

    def generate(self, prompts: Sequence[Tokens], limits: Sequence[int]) -> list[Tokens]:
        with fast_on_cpu(self.model):
            return super().generate(prompts, limits)

    def respond(
        self,
        known: Continuations,
        limit: int,
        interventions: Sequence[Intervention],
        count: Count = no_count,
        watch: Watch[Row] = none_leaves,
    ) -> list[list[Tokens]]:
        """As the plain engine's; `watch` lets responses go that are needed no further, where a model decodes plainly: see `greedy`."""

        if not is_plainly_greedy(self.model.model):
            # Looks at more than the next token: how a response began, how long it may become, or what else is in its batch.
            return super().respond(known, limit, interventions, count)
        found: dict[Row, Tokens] = {}
        for drafts in self.drafts(known, limit):
            drafts.respond(interventions, count, watch, found)
        prompts = range(len(known.prompts))
        return [[found[index, prompt] for prompt in prompts] for index in range(len(interventions))]

    def drafts(self, known: Continuations, limit: int) -> list[Drafts]:
        """Returns the drafts of responses of at most `limit` tokens. The model must be the unmodified one when they are asked for first."""

        key = known, limit
        if key not in self._drafts:
            self._drafts[key] = [Drafts(forcing, limit) for forcing in self._forcing(known)]
        return self._drafts[key]

    # A decorator without gradients would hold what was yielded last beside what comes next.
    def logits(
        self,
        known: Continuations,
        interventions: Sequence[Intervention] | None = None,
        count: Count = no_count,
    ) -> Iterator[Logits]:
        starts, lengths = known.starts, known.lengths
        for item in chain.from_iterable(
            forcing.unmodified() if interventions is None else forcing.modified(interventions)
            for forcing in self._forcing(known)
        ):
            places = [
                torch.stack([torch.full((n,), index), torch.arange(n) + starts[prompt]])
                for index, prompt in item.rows
                for n in [lengths[prompt]]
            ]
            indices, positions = to_device(torch.cat(places, dim=1), item.hidden_states.device)
            for part in self._decoder.chunks(item.hidden_states):
                # Kept by no name here while those of the next positions are computed.
                yield Logits(
                    indices[part],
                    positions[part],
                    self._decoder.logits(item.hidden_states[part]),
                )
            count(len(item.rows))

    def _forcing(self, known: Continuations) -> list[TeacherForcing]:
        if known not in self._forcings:
            n_rows = self.model.batch_size
            # The prefix is read apart.
            prefix = common_prefix(known.prompts)
            self._forcings[known] = [
                TeacherForcing(self._decoder, known, group, prefix, n_rows, self._n_starts)
                for group in groups_by_length([tokens[len(prefix) :] for tokens in known.sequences])
            ]
        return self._forcings[known]
