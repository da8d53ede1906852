# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Greedy responses under many interventions, by draft verification and batches of what departs.

Most interventions answer most prompts like the unmodified model. So its response is a draft that one teacher-forced pass
verifies: as long as each of its tokens is the one that the ablated model would choose, greedy decoding would have produced
it. Only what follows a departure is generated token by token, for many interventions on any layers in one batch, from
the KV cache of the verification where tokens after the departure can be masked.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...ablation.hooks import Intervention, ablated_samples
from ...errors import warn
from ...language_model import Batches, Tokens, is_out_of_memory, until_end
from ...vectors import to_device
from ..compat import Cache, concatenate, join, keeps_every_token, new_cache, select_rows
from ..interface import Count
from ..strides import Watch, generate_together, has_ended, staying
from .teacher_forcing import Pass, TeacherForcing

Row = tuple[int, int]
"""Intervention and prompt of a response."""

Departures = tuple[list[Row], Cache | None]
"""Responses that are to be generated further, and the cache of their drafts' tokens; None where it has to be read again."""


class Drafts:
    """The unmodified model's responses, of at most `limit` tokens, as drafts."""

    def __init__(self, forcing: TeacherForcing, limit: int) -> None:
        self._forcing = forcing
        self._decoder, self._known = forcing.decoder, forcing.known
        self._model = self._decoder.model
        self._limit = limit
        self._batches = Batches(self._model.batch_size)
        self._ends = self._model.end_tokens()
        self._unmodified, self._places = self._unmodified_cache()

    @property
    def are_read_once(self) -> bool:
        """Whether responses go on from the KV cache of a pass over their drafts."""

        return self._unmodified is not None

    def respond(
        self,
        interventions: Sequence[Intervention],
        count: Count,
        watch: Watch[Row],
        found: dict[Row, Tokens],
    ) -> None:
        """Fills in the response to each of the prompts under each intervention."""

        waiting: list[Departures] = []
        for item in self._forcing.modified(interventions):
            rows, cache = self._verify(item, found, watch)
            count(len(item.rows))
            together = [row for part, _ in (*waiting, (rows, cache)) for row in part]
            if len(together) > self._batches.size or (
                len({index for index, _ in together}) > 1 and not self._forcing.carries_samples
            ):
                self._generate(waiting, interventions, found, watch)
            if rows:
                waiting.append((rows, cache))
        self._generate(waiting, interventions, found, watch)

    def _verify(self, item: Pass, found: dict[Row, Tokens], watch: Watch[Row]) -> Departures:
        """
        Returns the responses that are not finished with their draft, and that are needed further.

        Fills in how each response starts: as its draft, and one token more where it departs.
        """

        predicted = self._decoder.most_likely(item.hidden_states).tolist()
        for index, prompt in item.rows:
            draft = self._known.tokens[prompt]
            own, predicted = predicted[: len(draft)], predicted[len(draft) :]
            agreed = next(
                (n for n, (a, b) in enumerate(zip(own, draft, strict=True)) if a != b), len(draft)
            )
            # Where the response departs, the prediction there is the right next token.
            found[index, prompt] = until_end(tuple(own[: agreed + 1]), self._limit, self._ends)
        departed = staying(item.rows, found, self._limit, self._ends, watch)
        return [item.rows[sample] for sample in departed], self._kept(item, departed)

    def _unmodified_cache(self) -> tuple[Cache | None, dict[int, int]]:
        """Returns the KV cache of all drafts, where tokens can be masked in it and memory suffices, and the row of each prompt."""

        # Responses that go on follow the longest draft.
        longest = max(len(self._known.prompts[prompt]) for prompt in self._forcing.prompts)
        longest += 2 * self._limit
        # Nothing needs to be read to know that recurrent layers do not keep every token.
        empty = new_cache(self._decoder.config)
        if (
            not self._forcing.prefix
            or not self._decoder.takes_positions
            or not keeps_every_token(empty, longest)
        ):
            return None, {}
        try:
            passes = list(self._forcing.unmodified())
            caches = [item.cache for item in passes if item.cache is not None]
            if not all(keeps_every_token(cache, longest) for cache in caches):
                return None, {}
            prompts = [prompt for item in passes for _, prompt in item.rows]
            return concatenate(caches), {prompt: row for row, prompt in enumerate(prompts)}
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        warn(
            "Memory is exhausted by the KV cache of all drafts: going on without, which is slower."
        )
        return None, {}

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
        found: dict[Row, Tokens],
        watch: Watch[Row],
    ) -> None:
        """Generates responses to their end, in one batch where memory suffices for that. None waits any more."""

        rows = [row for part, _ in waiting for row in part]
        caches = [cache for _, cache in waiting if cache is not None]
        waiting.clear()

        def ablated(rows: list[Row]) -> AbstractContextManager[None]:
            return ablated_samples(self._model, [interventions[index] for index, _ in rows])

        def generate(part: slice) -> None:
            # What there is of a response stays where memory was exhausted, and is read again.
            left = [row for row in rows[part] if not has_ended(found[row], self._limit, self._ends)]
            if not left:
                return
            cache = concatenate(caches) if caches and len(left) == len(rows) else None
            # Not to be held beside it.
            caches.clear()
            sequences = [self._known.prompts[row[1]] + found[row] for row in left]
            tokens, mask = self._inputs(sequences, cache)
            generate_together(
                self._model, left, tokens, mask, cache, found, self._limit, watch, ablated
            )

        for _ in self._batches.run(len(rows), generate):
            pass

    def _inputs(self, sequences: list[Tokens], cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Returns tokens and mask of what is to be generated further. `cache`: of the tokens of the drafts."""

        if cache is None:
            inputs = self._model.pad(sequences)
            return inputs["input_ids"], inputs["attention_mask"]
        # What the cache holds of the draft after the departure is masked; the last token is not read yet.
        read = [*(sequence[:-1] for sequence in sequences), (0,) * cache.get_seq_length()]
        tokens, mask = (item[:-1] for item in self._model.pad(read, "right").values())
        last = to_device([[sequence[-1]] for sequence in sequences], self._model.device)
        return torch.cat([tokens, last], dim=1), torch.cat([mask, torch.ones_like(last)], dim=1)
