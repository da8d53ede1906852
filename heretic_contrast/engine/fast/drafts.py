# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Greedy responses under many interventions, by draft verification and batches of what departs.

Most interventions answer most prompts like the unmodified model. So its response is a draft that one teacher-forced pass
verifies: as long as each of its tokens is the one that the ablated model would choose, greedy decoding would have produced
it. Only what follows a departure is generated token by token, for many interventions on any layers in one batch, from
the KV cache of the verification where tokens after the departure can be masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...ablation.hooks import Intervention, ablated_samples
from ...language_model import Batches, Tokens, until_end
from ...vectors import to_device
from ..compat import (
    CACHE,
    Cache,
    concatenate,
    forget_images,
    join,
    keeps_every_token,
    new_cache,
    select_rows,
)
from ..cpu.layers import fast_on_cpu
from ..interface import Continuations, Count, pad_right
from .decoder import Decoder
from .teacher_forcing import Pass, TeacherForcing

STRIDE = 8
"""How many tokens are generated before responses that have ended leave the batch."""

CPU_STRIDE = 4
"""The same on a CPU, where each row of a step takes its time."""


@dataclass(frozen=True)
class Departures:
    """
    Responses that are to be generated further.

    `rows`: intervention and prompt of each. `cache`: of the tokens of the drafts, None where it has to be read again.
    """

    rows: list[tuple[int, int]]
    cache: Cache | None


class Drafts:
    """The unmodified model's responses, of at most `limit` tokens, as drafts. `n_rows`: the largest batch."""

    def __init__(
        self,
        decoder: Decoder,
        forcing: TeacherForcing,
        known: Continuations,
        limit: int,
        n_rows: int,
    ) -> None:
        self._decoder = decoder
        self._model = decoder.model
        self._forcing = forcing
        self._known = known
        self._limit = limit
        self._batches = Batches(n_rows)
        self._ends = self._model.end_tokens()
        self._unmodified, self._places = self._unmodified_cache()

    def respond(self, interventions: Sequence[Intervention], count: Count) -> list[list[Tokens]]:
        """Returns the responses to all prompts under each intervention."""

        found: list[list[Tokens]] = [[()] * len(self._known.prompts) for _ in interventions]
        waiting: list[Departures] = []
        for item in self._forcing.modified(interventions):
            departures = self._verify(item, found)
            count(len(item.rows))
            if not departures.rows:
                continue
            n_waiting = sum(len(others.rows) for others in waiting)
            if n_waiting + len(departures.rows) > self._batches.size or (
                waiting and not self._can_share(waiting[0], departures)
            ):
                self._generate(waiting, interventions, found)
            waiting.append(departures)
        self._generate(waiting, interventions, found)
        return found

    def _verify(self, item: Pass, found: list[list[Tokens]]) -> Departures:
        """
        Returns the responses that are not finished with their draft.

        Fills in how each response starts: as its draft, and one token more where it departs.
        """

        predicted = self._decoder.most_likely(item.hidden_states).tolist()
        departed: list[int] = []
        for sample, (index, prompt) in enumerate(item.rows):
            draft = self._known.tokens[prompt]
            own, predicted = predicted[: len(draft)], predicted[len(draft) :]
            agreed = next(
                (n for n, (a, b) in enumerate(zip(own, draft, strict=True)) if a != b), len(draft)
            )
            # Where the response departs, the prediction there is the right next token.
            found[index][prompt] = until_end(tuple(own[: agreed + 1]), self._limit, self._ends)
            if not self._has_ended(found[index][prompt]):
                departed.append(sample)
        return Departures([item.rows[sample] for sample in departed], self._kept(item, departed))

    def _has_ended(self, tokens: Tokens) -> bool:
        return len(tokens) >= self._limit or (len(tokens) > 0 and tokens[-1] in self._ends)

    def _can_share(self, some: Departures, others: Departures) -> bool:
        """Returns whether two sets of departures may be generated in one batch."""

        one_intervention = some.rows[0][0] == others.rows[0][0]
        return self._forcing.carries_samples or one_intervention

    def _unmodified_cache(self) -> tuple[Cache | None, dict[int, int]]:
        """Returns the KV cache of all drafts, where tokens can be masked in it, and the row of each prompt."""

        # Responses that go on follow the longest draft.
        longest = max(map(len, self._known.prompts), default=0) + 2 * self._limit
        # Nothing needs to be read to know that recurrent layers do not keep every token.
        empty = new_cache(self._decoder.config)
        if (
            not self._forcing.prefix
            or not self._decoder.takes_positions
            or not keeps_every_token(empty, longest)
        ):
            return None, {}
        passes = list(self._forcing.unmodified())
        caches = [item.cache for item in passes if item.cache is not None]
        if not all(keeps_every_token(cache, longest) for cache in caches):
            return None, {}
        prompts = [prompt for item in passes for _, prompt in item.rows]
        return concatenate(caches), {prompt: row for row, prompt in enumerate(prompts)}

    def _kept(self, item: Pass, samples: list[int]) -> Cache | None:
        """Returns the KV cache of some samples of a pass, in all layers."""

        if item.cache is None or self._unmodified is None or not samples:
            return None
        layer = item.first_layer
        places = [self._places[item.rows[sample][1]] for sample in samples]
        rows, chosen = to_device([places, samples], self._model.device)
        below = select_rows(self._unmodified, rows, slice(layer))
        above = select_rows(item.cache, chosen, slice(layer, None))
        return join(below, above, layer)

    def _generate(
        self,
        waiting: list[Departures],
        interventions: Sequence[Intervention],
        found: list[list[Tokens]],
    ) -> None:
        """Generates responses to their end, in one batch where memory suffices for that. None waits any more."""

        rows = [row for departures in waiting for row in departures.rows]
        caches = [departures.cache for departures in waiting if departures.cache is not None]
        waiting.clear()

        def generate(part: slice) -> None:
            # What there is of a response stays where memory was exhausted, and is read again.
            left = [row for row in rows[part] if not self._has_ended(found[row[0]][row[1]])]
            cache = concatenate(caches) if caches and len(left) == len(rows) else None
            # Not to be held beside it.
            caches.clear()
            self._generate_together(left, cache, interventions, found)

        for _ in self._batches.run(len(rows), generate):
            pass

    @torch.no_grad()
    def _generate_together(
        self,
        rows: list[tuple[int, int]],
        cache: Cache | None,
        interventions: Sequence[Intervention],
        found: list[list[Tokens]],
    ) -> None:
        """
        Generates responses to their end. Those that have ended leave the batch.

        `cache`: of the tokens of the drafts, None where they have to be read.
        """

        if not rows:
            return
        sequences = [self._known.prompts[prompt] + found[index][prompt] for index, prompt in rows]
        if cache is None:
            inputs = self._model.pad(sequences)
            tokens, mask = inputs["input_ids"], inputs["attention_mask"]
        else:
            # What the cache holds of the draft after the departure is masked; the last token is not read yet.
            read = [sequence[:-1] for sequence in sequences]
            filler = self._model.pad_token_id()
            tokens, mask = pad_right(read, filler, cache.get_seq_length())
            last = torch.tensor([[sequence[-1]] for sequence in sequences])
            tokens = to_device(torch.cat([tokens, last], dim=1), self._model.device)
            mask = to_device(torch.cat([mask, torch.ones_like(last)], dim=1), self._model.device)
        stride = CPU_STRIDE if self._model.device.type == "cpu" else STRIDE
        while rows:
            left = self._limit - min(len(found[index][prompt]) for index, prompt in rows)
            chosen = [interventions[index] for index, _ in rows]
            forget_images(self._model.model)
            with ablated_samples(self._model, chosen), fast_on_cpu(self._model):
                output = self._model.model.generate(
                    input_ids=tokens,
                    attention_mask=mask,
                    **{CACHE: cache},
                    # One that is named cannot be given.
                    cache_implementation=None,
                    max_new_tokens=min(stride, left),
                    do_sample=False,
                    pad_token_id=self._model.pad_token_id(),
                    return_dict_in_generate=True,
                )
            new = output.sequences[:, tokens.shape[1] :]
            unfinished = []
            for sample, ((index, prompt), more) in enumerate(zip(rows, new.tolist(), strict=True)):
                response = found[index][prompt] + tuple(more)
                found[index][prompt] = until_end(response, self._limit, self._ends)
                if not self._has_ended(found[index][prompt]):
                    unfinished.append(sample)
            tokens, cache = output.sequences, getattr(output, CACHE)
            mask = torch.cat([mask, mask.new_ones(new.shape)], dim=1)
            if len(unfinished) < len(rows) and unfinished:
                kept = to_device(unfinished, tokens.device)
                tokens, mask, cache = tokens[kept], mask[kept], select_rows(cache, kept)
            rows = [rows[sample] for sample in unfinished]
