# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Greedy responses of many interventions to the same prompts.

Most interventions answer most prompts like the unmodified model, or like a neighboring intervention. So a response
that is known already is first checked in one teacher-forced pass: as long as each of its tokens is the one that
the ablated model would choose, greedy decoding would have produced it. Only where it departs are tokens generated
one by one. The result is that of plain greedy decoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..language_model import LanguageModel, batches
from ..prompts import Prompt
from .divergence import CHUNK
from .interventions import Intervention, TeacherForcing, TokenBatch, ablated_samples

GENERATION_ROUNDS = 3
"""How often a few representatives are generated before everything that is left is."""

Tokens = tuple[int, ...]


def pad_left(sequences: Sequence[Sequence[int]], pad: int, length: int) -> tuple[Tensor, Tensor]:
    """Returns tokens and mask, integer tensors of shape (n, length), padded on the left."""

    tokens = torch.full((len(sequences), length), pad)
    mask = torch.zeros(len(sequences), length, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        if sequence:
            tokens[row, length - len(sequence) :] = torch.tensor(sequence)
            mask[row, length - len(sequence) :] = 1
    return tokens, mask


def join(
    prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], pad: int
) -> tuple[TokenBatch, int]:
    """
    Returns prompts, padded on the left, with continuations, padded on the right.

    Also returns the length that the prompts are padded to: a continuation's token j stands there + j.
    """

    length = max(len(prompt) for prompt in prompts)
    width = max(len(continuation) for continuation in continuations)
    tokens, mask = pad_left(prompts, pad, length)
    right = torch.full((len(prompts), width), pad)
    right_mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, continuation in enumerate(continuations):
        right[row, : len(continuation)] = torch.tensor(continuation, dtype=torch.long)
        right_mask[row, : len(continuation)] = 1
    return TokenBatch(torch.cat([tokens, right], 1), torch.cat([mask, right_mask], 1)), length


def prompt_tokens(model: LanguageModel, prompts: Sequence[Prompt]) -> list[Tokens]:
    """Returns the tokens of each prompt in chat format, without padding."""

    return [tuple(ids) for ids in model.tokenizer(model.chat_texts(prompts))["input_ids"]]


def end_tokens(model: LanguageModel) -> frozenset[int]:
    """Returns the tokens that end a response."""

    found = model.model.generation_config.eos_token_id
    if found is None:
        found = model.tokenizer.eos_token_id
    return frozenset([found] if isinstance(found, int) else found or [])


def is_plain_greedy(model: LanguageModel) -> bool:
    """
    Returns whether greedy decoding takes the most likely token and nothing else.

    Models may ship a generation configuration that penalizes or forbids tokens, which one pass cannot check.
    """

    config = model.model.generation_config
    return (
        (config.repetition_penalty or 1.0) == 1.0
        and (config.encoder_repetition_penalty or 1.0) == 1.0
        and not config.no_repeat_ngram_size
        and not config.bad_words_ids
        and not config.suppress_tokens
        and not config.begin_suppress_tokens
        and not config.min_length
        and not config.min_new_tokens
        and not config.sequence_bias
        and config.forced_bos_token_id is None
        and config.forced_eos_token_id is None
    )


def generate_tokens(
    model: LanguageModel,
    sequences: Sequence[Tokens],
    max_new_tokens: Sequence[int],
    interventions: Sequence[Intervention] | None = None,
) -> list[Tokens]:
    """
    Returns the greedy continuation of each sequence, up to and with the token that ends it.

    `max_new_tokens` is per sequence; sample i is ablated as `interventions[i]` says.
    """

    length = max(len(sequence) for sequence in sequences)
    tokens, mask = pad_left(sequences, model.pad_token_id(), length)
    device = model.model.device
    arguments = {
        "input_ids": tokens.to(device),
        "attention_mask": mask.to(device),
        "max_new_tokens": max(max_new_tokens),
        "do_sample": False,
        "pad_token_id": model.pad_token_id(),
    }
    with torch.no_grad():
        if interventions is None:
            output = model.model.generate(**arguments)
        else:
            with ablated_samples(model, interventions):
                output = model.model.generate(**arguments)
    ends = end_tokens(model)
    return [
        until_end(tuple(row), limit, ends)
        for row, limit in zip(output[:, length:].tolist(), max_new_tokens, strict=True)
    ]


def until_end(tokens: Tokens, limit: int, ends: frozenset[int]) -> Tokens:
    """Returns at most `limit` tokens, up to and with the first that ends the response."""

    tokens = tokens[:limit]
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    return tokens


@dataclass
class _Row:
    """One prompt under one intervention, and what is known of its response."""

    intervention: int
    prompt: int
    accepted: Tokens = ()
    done: bool = False
    tried: set[Tokens] = field(default_factory=set)


class Responder:
    """
    Greedy responses of a model to fixed prompts.

    `n_rows`: the number of samples in one pass. `per_sample`: whether one batch may hold several interventions.
    """

    def __init__(
        self,
        forcing: TeacherForcing,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        n_rows: int,
        per_sample: bool,
    ) -> None:
        self.model = forcing.model
        self.prompts = tuple(prompts)
        self._forcing = forcing
        self._max_new_tokens = max_new_tokens
        self._n_rows = n_rows
        self._per_sample = per_sample
        self._ends = end_tokens(self.model)
        self._plain = is_plain_greedy(self.model)
        self._tokens = prompt_tokens(self.model, prompts)
        self.base: list[Tokens] = []
        for part in batches(len(prompts), n_rows):
            limits = [max_new_tokens] * len(self._tokens[part])
            self.base += generate_tokens(self.model, self._tokens[part], limits)
        self._known: list[dict[Tokens, None]] = [{tokens: None} for tokens in self.base]

    def base_responses(self) -> list[str]:
        """Returns the responses of the unmodified model."""

        return self._decode(self.base)

    def respond(self, interventions: Sequence[Intervention]) -> list[list[str]]:
        """Returns the responses to all prompts under each intervention."""

        groups = [interventions] if self._per_sample else [[item] for item in interventions]
        return [self._decode(tokens) for group in groups for tokens in self._respond(group)]

    def _decode(self, tokens: Sequence[Tokens]) -> list[str]:
        return self.model.tokenizer.batch_decode(
            [list(sequence) for sequence in tokens], skip_special_tokens=True
        )

    def _respond(self, interventions: Sequence[Intervention]) -> list[list[Tokens]]:
        rows = [
            _Row(intervention, prompt)
            for intervention in range(len(interventions))
            for prompt in range(len(self.prompts))
        ]
        rounds = 0
        while any(not row.done for row in rows):
            pending = [row for row in rows if not row.done]
            drafted = [(row, draft) for row in pending if (draft := self._draft(row)) is not None]
            for part in batches(len(drafted), self._n_rows):
                self._verify(drafted[part], interventions)
            if drafted:
                continue
            if rounds < GENERATION_ROUNDS and self._plain:
                # One row per prompt and departure: the others can then be checked against it.
                pending = list({(row.prompt, row.accepted): row for row in pending}.values())
            rounds += 1
            pending.sort(key=lambda row: len(self._tokens[row.prompt]) + len(row.accepted))
            for part in batches(len(pending), self._n_rows):
                self._generate(pending[part], interventions)
        responses = [row.accepted for row in rows]
        n_prompts = len(self.prompts)
        return [
            responses[start : start + n_prompts] for start in range(0, len(responses), n_prompts)
        ]

    def _draft(self, row: _Row) -> Tokens | None:
        """Returns a known response that starts with what is accepted, and was not tried for this row."""

        if not self._plain:
            return None
        for tokens in self._known[row.prompt]:
            if (
                tokens not in row.tried
                and len(tokens) > len(row.accepted)
                and tokens[: len(row.accepted)] == row.accepted
            ):
                return tokens
        return None

    def _verify(
        self, drafted: Sequence[tuple[_Row, Tokens]], interventions: Sequence[Intervention]
    ) -> None:
        """Accepts each draft as far as the ablated model would have chosen it, and one token more."""

        device = self.model.model.device
        unique = sorted({(row.prompt, draft) for row, draft in drafted})
        place = {key: index for index, key in enumerate(unique)}
        tokens, start = join(
            [self._tokens[prompt] for prompt, _ in unique],
            [draft for _, draft in unique],
            self.model.pad_token_id(),
        )
        tokens = TokenBatch(tokens.input_ids.to(device), tokens.attention_mask.to(device))
        chosen = [interventions[row.intervention] for row, _ in drafted]
        first_layer = min(intervention.first_layer for intervention in chosen)
        rows = torch.tensor([place[row.prompt, draft] for row, draft in drafted], device=device)
        hidden_states = self._forcing.modified(
            tokens.select(rows),
            chosen,
            first_layer,
            self._forcing.layer_input(tokens, first_layer)[rows],
        )
        # The token at position j is predicted at position j − 1.
        lengths = [len(draft) for _, draft in drafted]
        flat = torch.cat(
            [
                hidden_states[index, start - 1 : start - 1 + length]
                for index, length in enumerate(lengths)
            ]
        )
        predictions = torch.cat(
            [
                self._forcing.logits(flat[offset : offset + CHUNK]).argmax(dim=1)
                for offset in range(0, len(flat), CHUNK)
            ]
        ).tolist()
        offset = 0
        for row, draft in drafted:
            predicted = tuple(predictions[offset : offset + len(draft)])
            offset += len(draft)
            row.tried.add(draft)
            agreed = next(
                (
                    index
                    for index, (a, b) in enumerate(zip(predicted, draft, strict=True))
                    if a != b
                ),
                len(draft),
            )
            # Where the draft departs, the prediction there is the right next token.
            row.accepted = until_end(predicted[: agreed + 1], self._max_new_tokens, self._ends)
            self._finish(row)

    def _generate(self, rows: Sequence[_Row], interventions: Sequence[Intervention]) -> None:
        """Generates the rest of each row's response."""

        continuations = generate_tokens(
            self.model,
            [self._tokens[row.prompt] + row.accepted for row in rows],
            [self._max_new_tokens - len(row.accepted) for row in rows],
            [interventions[row.intervention] for row in rows],
        )
        for row, continuation in zip(rows, continuations, strict=True):
            row.accepted += continuation
            row.done = True
            self._known[row.prompt][row.accepted] = None

    def _finish(self, row: _Row) -> None:
        """Marks a row as done when its response has ended."""

        row.done = len(row.accepted) >= self._max_new_tokens or row.accepted[-1] in self._ends
        if row.done:
            self._known[row.prompt][row.accepted] = None
