# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Greedy responses of many interventions to the same prompts.

Most interventions answer most prompts like the unmodified model. So its response is first checked in one
teacher-forced pass: as long as each of its tokens is the one that the ablated model would choose, greedy decoding
would have produced it. Only what follows a departure is generated token by token, for many interventions on any
layers in one batch, from the keys and values of the check where these can be cut at the departure. The result is
that of the model's own `generate`; where its generation configuration asks for more than the most likely token, that is
what is called, for each response as a whole.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessorList
from transformers.cache_utils import Cache

from ...ablation.hooks import Intervention, ablated_samples
from ...greedy import generation_batches, is_plainly_greedy
from ...language_model import LanguageModel
from ...prompts import Prompt
from ..cpu.few_rows import fast_with_few_rows
from ..cpu.layers import fast_on_cpu
from .caches import (
    CACHE,
    can_be_joined,
    concatenate,
    join,
    keeps_every_token,
    move_to_the_end,
    select_rows,
    side_by_side,
    with_room,
)
from .head import Head
from .interventions import TeacherForcing
from .known_sequences import Count, KnownSequences, Piece, Tokens, n_common

STRIDE = 8
"""How many tokens are generated before responses that have ended leave the batch."""

CPU_STRIDE = 4
"""The same on a CPU, where each row of a step takes its time."""


def end_tokens(model: LanguageModel) -> frozenset[int]:
    """Returns the tokens that end a response; none where the model's generation goes on to the limit."""

    found = model.model.generation_config.eos_token_id
    return frozenset([found] if isinstance(found, int) else found or [])


@dataclass(frozen=True)
class Running:
    """
    Sequences that are being generated, padded on the left.

    `tokens` and `mask`: integer Tensors of shape (batch, length). `cache`: what the model keeps of all tokens but the
    last; None at the beginning, when they have to be read. `rows`: which samples of the cache the sequences are, integer
    Tensor of shape (batch,); None for all, in their order. They are taken out when they go on, which saves a copy.
    """

    tokens: Tensor
    mask: Tensor
    cache: Cache | None
    rows: Tensor | None = None

    @classmethod
    def start(
        cls, head: Head, sequences: Sequence[Tokens], cache: Cache | None = None
    ) -> "Running":
        """Returns sequences that are to be continued."""

        model = head.model
        inputs = model.pad(sequences)
        return cls(inputs["input_ids"], inputs["attention_mask"], cache)

    @torch.no_grad()
    def advance(
        self,
        head: Head,
        n_tokens: int,
        interventions: Sequence[Intervention] | None,
    ) -> tuple[list[Tokens], "Running"]:
        """Returns the next greedy tokens of each sequence, fewer if all have ended, and the sequences with them."""

        model = head.model
        forget_images(model)
        hooks = nullcontext() if interventions is None else ablated_samples(model, interventions)
        room: AbstractContextManager[Cache | None] = nullcontext()
        if self.cache is not None:
            rows = self.rows
            if rows is None:
                rows = torch.arange(len(self.tokens), device=self.tokens.device)
            room = with_room(self.cache, n_tokens, rows)
        with (
            # The head may have to find out about the model as it is, before anything is ablated.
            head.only_most_likely() as processors,
            hooks,
            fast_on_cpu(model),
            fast_with_few_rows(model),
            room as cache,
        ):
            output = model.model.generate(
                input_ids=self.tokens,
                attention_mask=self.mask,
                **{CACHE: cache},
                # One that is named cannot be given.
                cache_implementation=None,
                max_new_tokens=n_tokens,
                do_sample=False,
                logits_processor=LogitsProcessorList(processors),
                pad_token_id=model.pad_token_id(),
                return_dict_in_generate=True,
            )
        new = output.sequences[:, self.tokens.shape[1] :]
        mask = torch.cat([self.mask, self.mask.new_ones(new.shape)], dim=1)
        running = Running(output.sequences, mask, getattr(output, CACHE))
        return [tuple(row) for row in new.tolist()], running

    def select(self, rows: list[int]) -> "Running":
        """Returns some of the sequences."""

        if len(rows) == len(self.tokens):
            return self
        indices = torch.tensor(rows, dtype=torch.long, device=self.tokens.device)
        chosen = indices if self.rows is None else self.rows[indices]
        return Running(self.tokens[indices], self.mask[indices], self.cache, chosen)

    def own_cache(self) -> Cache | None:
        """Returns what the model keeps of these sequences alone."""

        if self.cache is None or self.rows is None:
            return self.cache
        return select_rows(self.cache, self.rows)

    def joined_by(self, other: "Running") -> "Running":
        """Returns both as one, where their caches allow it: see `can_be_joined`."""

        first_cache, second_cache = self.own_cache(), other.own_cache()
        assert first_cache is not None and second_cache is not None
        length = max(self.tokens.shape[1], other.tokens.shape[1])

        def join(first: Tensor, second: Tensor) -> Tensor:
            return torch.cat([pad(part, (length - part.shape[1], 0)) for part in (first, second)])

        return Running(
            join(self.tokens, other.tokens),
            join(self.mask, other.mask),
            side_by_side([first_cache, second_cache]),
        )


def generate_tokens(
    head: Head,
    sequences: Sequence[Tokens],
    max_new_tokens: Sequence[int],
    interventions: Sequence[Intervention] | None = None,
    n_rows: int | None = None,
) -> list[Tokens]:
    """
    Returns the greedy continuation of each sequence, up to and with the token that ends it.

    It is what the model's `generate` gives for the sequence alone, with the model's generation configuration.
    `max_new_tokens` is per sequence; sample i is ablated as `interventions[i]` says. `n_rows`: the largest batch, all if
    not given. Sequences of similar length share a batch; when half of it has ended, others join it.

    Raises `ContrastError` when the generation configuration does not work.
    """

    found: list[Tokens] = [()] * len(sequences)
    n_rows = n_rows or max(1, len(sequences))
    if not is_plainly_greedy(head.model.model):
        return whole_continuations(head.model, sequences, max_new_tokens, interventions, n_rows)
    coming = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    waiting: list[int] = []
    running: Running | None = None
    while coming or waiting:
        joins = running is not None and running.cache is not None and can_be_joined(running.cache)
        n_that_may_stay = n_rows // 2 if joins else 0
        if running is None or (coming and len(waiting) <= n_that_may_stay):
            joining = coming[: n_rows - len(waiting)]
            coming = coming[len(joining) :]
            others = Running.start(head, [sequences[index] for index in joining])
            # They are read together with their first token.
            joining, others = extend(head, others, joining, found, max_new_tokens, interventions, 1)
            running = running.joined_by(others) if running is not None and waiting else others
            waiting += joining
        else:
            waiting, running = extend(
                head, running, waiting, found, max_new_tokens, interventions, stride(head.model)
            )
    return found


def whole_continuations(
    model: LanguageModel,
    sequences: Sequence[Tokens],
    max_new_tokens: Sequence[int],
    interventions: Sequence[Intervention] | None,
    n_rows: int,
) -> list[Tokens]:
    """
    As `generate_tokens`, in one call of `generate` for each continuation.

    For generation settings that look at more than the next token: how a continuation began, how long it may become, or
    what else is in its batch.
    """

    found: list[Tokens] = [()] * len(sequences)
    ends = end_tokens(model)
    kinds = [(len(tokens), limit) for tokens, limit in zip(sequences, max_new_tokens, strict=True)]
    for batch in generation_batches(model.model, kinds, n_rows):
        limit = max_new_tokens[batch[0]]
        chosen = None if interventions is None else [interventions[index] for index in batch]
        tokens = torch.tensor([sequences[index] for index in batch], device=model.model.device)
        forget_images(model)
        with (
            nullcontext() if chosen is None else ablated_samples(model, chosen),
            fast_on_cpu(model),
            fast_with_few_rows(model),
        ):
            inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            continuations = model.continue_tokens(inputs, limit)
        for index, row in zip(batch, continuations.tolist(), strict=True):
            found[index] = until_end(tuple(row), limit, ends)
    return found


def extend(
    head: Head,
    running: Running,
    rows: Sequence[int],
    found: list[Tokens],
    max_new_tokens: Sequence[int],
    interventions: Sequence[Intervention] | None,
    n_tokens: int,
) -> tuple[list[int], Running]:
    """
    Generates at most `n_tokens` more tokens of each sequence, and returns which ones are unfinished, and their state.

    `rows`: which of the sequences are running. `found`: what has been generated of each sequence, to which the new tokens
    are added.
    """

    ends = end_tokens(head.model)
    left = max(max_new_tokens[index] - len(found[index]) for index in rows)
    chosen = None if interventions is None else [interventions[index] for index in rows]
    new, running = running.advance(head, min(n_tokens, left), chosen)
    unfinished = []
    for row, index in enumerate(rows):
        found[index] = until_end(found[index] + new[row], max_new_tokens[index], ends)
        if not has_ended(found[index], max_new_tokens[index], ends):
            unfinished.append(row)
    return [rows[row] for row in unfinished], running.select(unfinished)


def stride(model: LanguageModel) -> int:
    """Returns how many tokens are generated before responses that have ended leave the batch."""

    return CPU_STRIDE if model.device.type == "cpu" else STRIDE


def forget_images(model: LanguageModel) -> None:
    """
    Makes a model with vision forget where the images of its last batch stood, which it takes for those of the next.

    Without any, the positions are those of the text, and the batch may have other samples.
    """

    for module in model.model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


def has_ended(tokens: Tokens, limit: int, ends: frozenset[int]) -> bool:
    """Returns whether a response is complete."""

    return len(tokens) >= limit or (len(tokens) > 0 and tokens[-1] in ends)


def until_end(tokens: Tokens, limit: int, ends: frozenset[int]) -> Tokens:
    """Returns at most `limit` tokens, up to and with the first that ends the response."""

    tokens = tokens[:limit]
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    return tokens


@dataclass(frozen=True)
class _Departures:
    """
    Responses that are to be generated further.

    `rows`: intervention and prompt of each. `cache`: what the model keeps of all their tokens but the last; None where it has
    to read them again. `lengths`: where these tokens end in the cache.
    """

    rows: tuple[tuple[int, int], ...]
    cache: Cache | None = None
    lengths: tuple[int, ...] = ()


class Responder:
    """
    Greedy responses of a model to fixed prompts.

    `n_rows`: the number of samples in one pass. `base`: the tokens of the unmodified model's responses, where they are known.
    """

    def __init__(
        self,
        forcing: TeacherForcing,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        n_rows: int,
        base: Sequence[Tokens] | None = None,
    ) -> None:
        self.model = forcing.model
        self.prompts = tuple(prompts)
        self._forcing = forcing
        self._max_new_tokens = max_new_tokens
        self._n_rows = n_rows
        self._ends = end_tokens(self.model)
        self._tokens = self.model.token_ids(prompts)
        if base is None:
            limits = [max_new_tokens] * len(prompts)
            base = generate_tokens(forcing.head, self._tokens, limits, n_rows=n_rows)
        self.base = list(base)
        self._is_plainly_greedy = is_plainly_greedy(self.model.model)
        self._known = KnownSequences(forcing, self._tokens, self.base, n_rows)
        self._unmodified = self._unmodified_cache() if self._is_plainly_greedy else None

    def base_responses(self) -> list[str]:
        """Returns the responses of the unmodified model."""

        return self._decode(self.base)

    def respond(
        self, interventions: Sequence[Intervention], count: Count = lambda n_sequences: None
    ) -> list[list[str]]:
        """Returns the responses to all prompts under each intervention. `count`: told of each check of a response."""

        found: list[list[Tokens]] = [[()] * len(self.prompts) for _ in interventions]
        waiting: list[_Departures] = []
        for departures in self._check(interventions, found, count):
            n_left = self._n_that_may_stay(waiting, departures)
            if sum(len(item.rows) for item in waiting) > n_left:
                waiting = self._generate(waiting, interventions, found, n_left)
            waiting.append(departures)
        self._generate(waiting, interventions, found, 0)
        return [self._decode(rows) for rows in found]

    def _check(
        self,
        interventions: Sequence[Intervention],
        found: list[list[Tokens]],
        count: Count,
    ) -> Iterator[_Departures]:
        """
        Yields the responses that are not those of the unmodified model.

        Fills in how each response starts: as the unmodified model's does, and one token more where it departs.
        """

        if not self._is_plainly_greedy:
            for index in range(len(interventions)):
                yield _Departures(tuple(product((index,), range(len(self.prompts)))))
                count(len(self.prompts))
            return
        for piece in self._known.modified(self._forcing, interventions):
            predictions = tuple(self._forcing.head.most_likely(piece.hidden_states).tolist())
            places = zip(
                self._known.order[piece.sequences],
                self._known.lengths[piece.sequences],
                strict=True,
            )
            rows_read = list(product(piece.interventions, places))
            departed: dict[int, tuple[int, int]] = {}
            for row, (index, (prompt, length)) in enumerate(rows_read):
                predicted, predictions = predictions[:length], predictions[length:]
                agreed = n_common(predicted, self.base[prompt])
                # Where the response departs, the prediction there is the right next token.
                tokens = until_end(predicted[: agreed + 1], self._max_new_tokens, self._ends)
                found[index][prompt] = tokens
                if not has_ended(tokens, self._max_new_tokens, self._ends):
                    departed[row] = (index, prompt)
            count(len(rows_read))
            if departed:
                rows = tuple(departed.values())
                lengths = tuple(len(self._sequence(row, found)) - 1 for row in rows)
                yield _Departures(rows, self._kept(piece, list(departed)), lengths)

    def _sequence(self, row: tuple[int, int], found: list[list[Tokens]]) -> Tokens:
        """Returns a prompt and how the response to it starts."""

        index, prompt = row
        return self._tokens[prompt] + found[index][prompt]

    def _n_that_may_stay(self, waiting: Sequence[_Departures], departures: _Departures) -> int:
        """Returns how many of the waiting responses may be unfinished when others join them."""

        if (
            waiting
            and not self._forcing.carries_samples
            and waiting[0].rows[0][0] != departures.rows[0][0]
        ):
            return 0
        n_waiting = sum(len(item.rows) for item in waiting)
        # Those that are read again can still be distributed over several batches.
        if departures.cache is None or n_waiting + len(departures.rows) <= self._n_rows:
            return n_waiting
        # A step of more rows takes less time for each, and a join copies all that has been read.
        return min(self._n_rows - len(departures.rows), self._n_rows * 3 // 4)

    def _generate(
        self,
        waiting: Sequence[_Departures],
        interventions: Sequence[Intervention],
        found: list[list[Tokens]],
        n_left: int,
    ) -> list[_Departures]:
        """Generates responses until at most `n_left` are unfinished, and returns these."""

        rows = [row for departures in waiting for row in departures.rows]
        caches = [departures.cache for departures in waiting if departures.cache is not None]
        if caches:
            lengths = [length for departures in waiting for length in departures.lengths]
            longest = max(len(self._sequence(row, found)) for row in rows) - 1
            cache = move_to_the_end(caches, lengths, longest)
            return self._advance(rows, cache, interventions, found, n_left)
        continuations = generate_tokens(
            self._forcing.head,
            [self._sequence(row, found) for row in rows],
            [self._max_new_tokens - len(found[index][prompt]) for index, prompt in rows],
            [interventions[index] for index, _ in rows],
            self._n_rows,
        )
        for (index, prompt), continuation in zip(rows, continuations, strict=True):
            found[index][prompt] += continuation
        return []

    def _advance(
        self,
        rows: list[tuple[int, int]],
        cache: Cache,
        interventions: Sequence[Intervention],
        found: list[list[Tokens]],
        n_left: int,
    ) -> list[_Departures]:
        """As `_generate`, for responses that go on from what has been read."""

        running = Running.start(
            self._forcing.head, [self._sequence(row, found) for row in rows], cache
        )
        responses = [found[index][prompt] for index, prompt in rows]
        limits = [self._max_new_tokens] * len(rows)
        chosen = [interventions[index] for index, _ in rows]
        unfinished = list(range(len(rows)))
        while len(unfinished) > n_left:
            unfinished, running = extend(
                self._forcing.head,
                running,
                unfinished,
                responses,
                limits,
                chosen,
                stride(self.model),
            )
        for (index, prompt), response in zip(rows, responses, strict=True):
            found[index][prompt] = response
        if not unfinished:
            return []
        n_cached = running.tokens.shape[1] - 1
        return [
            _Departures(
                tuple(rows[row] for row in unfinished),
                running.own_cache(),
                (n_cached,) * len(unfinished),
            )
        ]

    def _unmodified_cache(self) -> Cache | None:
        """Returns what the unmodified model keeps of all known sequences, where tokens can be taken out of it."""

        longest = max(map(len, self._tokens), default=0) + self._max_new_tokens
        # Nothing needs to be read to know that recurrent layers do not keep every token.
        if not self._forcing.reads_on or not keeps_every_token(
            self._forcing.nothing_read().cache, longest
        ):
            return None
        caches = [piece.cache for piece in self._known.unmodified(self._forcing)]
        kept = [
            cache for cache in caches if cache is not None and keeps_every_token(cache, longest)
        ]
        return concatenate(kept) if kept and len(kept) == len(caches) else None

    def _kept(self, piece: Piece, rows: list[int]) -> Cache | None:
        """Returns what the model keeps of some rows of a piece, in all layers."""

        if piece.cache is None or self._unmodified is None:
            return None
        first, end, _ = piece.sequences.indices(len(self._known.order))
        sequences = torch.tensor([first + row % (end - first) for row in rows])
        layer = piece.first_layer
        below = select_rows(self._unmodified, sequences, slice(layer))
        above = select_rows(piece.cache, torch.tensor(rows), slice(layer, None))
        return join(below, above, layer)

    def _decode(self, tokens: Sequence[Tokens]) -> list[str]:
        return self.model.tokenizer.batch_decode(
            [list(sequence) for sequence in tokens], skip_special_tokens=True
        )
