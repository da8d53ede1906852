# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Greedy responses of many interventions to the same prompts.

Most interventions answer most prompts like the unmodified model. So its response is first checked in one
teacher-forced pass: as long as each of its tokens is the one that the ablated model would choose, greedy decoding
would have produced it. Only what follows a departure is generated token by token, for many interventions on any
layers in one batch. The result is that of plain greedy decoding.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product

import torch
from torch import Tensor

from ..language_model import LanguageModel, batches
from ..prompts import Prompt
from .divergence import CHUNK
from .interventions import Intervention, TeacherForcing, ablated_samples
from .known_sequences import KnownSequences, Tokens

STRIDE = 16
"""How many tokens are generated before responses that have ended leave the batch."""


def pad_left(sequences: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Returns tokens and mask, integer tensors of shape (n, length), padded on the left."""

    length = max(map(len, sequences))
    tokens = torch.full((len(sequences), length), pad)
    mask = torch.zeros(len(sequences), length, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        tokens[row, length - len(sequence) :] = torch.tensor(sequence)
        mask[row, length - len(sequence) :] = 1
    return tokens, mask


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


@torch.no_grad()
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

    device = model.model.device
    ends = end_tokens(model)
    tokens, mask = (tensor.to(device) for tensor in pad_left(sequences, model.pad_token_id()))
    found: list[Tokens] = [()] * len(sequences)
    waiting = list(range(len(sequences)))
    cache = None
    while waiting:
        chosen = None if interventions is None else [interventions[index] for index in waiting]
        with nullcontext() if chosen is None else ablated_samples(model, chosen):
            output = model.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=min(
                    STRIDE, max(max_new_tokens[index] - len(found[index]) for index in waiting)
                ),
                do_sample=False,
                pad_token_id=model.pad_token_id(),
                return_dict_in_generate=True,
            )
        new = output.sequences[:, tokens.shape[1] :].tolist()
        unfinished = []
        for row, index in enumerate(waiting):
            found[index] = until_end(found[index] + tuple(new[row]), max_new_tokens[index], ends)
            if len(found[index]) < max_new_tokens[index] and found[index][-1] not in ends:
                unfinished.append(row)
        rows = torch.tensor(unfinished, dtype=torch.long, device=device)
        tokens = output.sequences[rows]
        mask = torch.cat([mask, mask.new_ones(len(mask), len(new[0]))], dim=1)[rows]
        cache = output.past_key_values
        if cache is not None and len(unfinished) < len(waiting):
            cache.reorder_cache(rows)
        waiting = [waiting[row] for row in unfinished]
    return found


def until_end(tokens: Tokens, limit: int, ends: frozenset[int]) -> Tokens:
    """Returns at most `limit` tokens, up to and with the first that ends the response."""

    tokens = tokens[:limit]
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    return tokens


class Responder:
    """
    Greedy responses of a model to fixed prompts.

    `n_rows`: the number of samples in one pass.
    """

    def __init__(
        self,
        forcing: TeacherForcing,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        n_rows: int,
    ) -> None:
        self.model = forcing.model
        self.prompts = tuple(prompts)
        self._forcing = forcing
        self._max_new_tokens = max_new_tokens
        self._n_rows = n_rows
        self._ends = end_tokens(self.model)
        self._tokens = prompt_tokens(self.model, prompts)
        limits = [max_new_tokens] * len(prompts)
        self.base: list[Tokens] = []
        for part in batches(len(prompts), n_rows):
            self.base += generate_tokens(self.model, self._tokens[part], limits[part])
        self._known = KnownSequences(forcing, self._tokens, self.base, n_rows)

    def base_responses(self) -> list[str]:
        """Returns the responses of the unmodified model."""

        return self._decode(self.base)

    def respond(self, interventions: Sequence[Intervention]) -> list[list[str]]:
        """Returns the responses to all prompts under each intervention."""

        accepted = self._accepted(interventions)
        unfinished = [
            (index, prompt)
            for index, rows in enumerate(accepted)
            for prompt, tokens in enumerate(rows)
            if len(tokens) < self._max_new_tokens and not (tokens and tokens[-1] in self._ends)
        ]
        # Sequences of similar length share a batch.
        unfinished.sort(key=lambda row: len(self._tokens[row[1]]) + len(accepted[row[0]][row[1]]))
        for rows in self._generation_batches(unfinished):
            continuations = generate_tokens(
                self.model,
                [self._tokens[prompt] + accepted[index][prompt] for index, prompt in rows],
                [self._max_new_tokens - len(accepted[index][prompt]) for index, prompt in rows],
                [interventions[index] for index, _ in rows],
            )
            for (index, prompt), continuation in zip(rows, continuations, strict=True):
                accepted[index][prompt] += continuation
        return [self._decode(rows) for rows in accepted]

    def _generation_batches(self, rows: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """Returns the rows (intervention, prompt) that are generated together."""

        groups = [rows]
        if not self._forcing.carries_samples:
            groups = [
                [row for row in rows if row[0] == index]
                for index in sorted({row[0] for row in rows})
            ]
        return [group[part] for group in groups for part in batches(len(group), self._n_rows)]

    def _decode(self, tokens: Sequence[Tokens]) -> list[str]:
        return self.model.tokenizer.batch_decode(
            [list(sequence) for sequence in tokens], skip_special_tokens=True
        )

    def _accepted(self, interventions: Sequence[Intervention]) -> list[list[Tokens]]:
        """
        Returns how each response starts: as the unmodified model's does, and one token more where it departs.

        By intervention and prompt.
        """

        accepted: list[list[Tokens]] = [[()] * len(self.prompts) for _ in interventions]
        if not is_plain_greedy(self.model):
            return accepted
        for piece in self._known.modified(self._forcing, interventions):
            predictions = self._predict(piece.hidden_states)
            places = zip(
                self._known.order[piece.sequences],
                self._known.lengths[piece.sequences],
                strict=True,
            )
            for intervention, (prompt, length) in product(piece.interventions, places):
                predicted, predictions = predictions[:length], predictions[length:]
                agreed = _n_common(predicted, self.base[prompt])
                # Where the response departs, the prediction there is the right next token.
                accepted[intervention][prompt] = until_end(
                    predicted[: agreed + 1], self._max_new_tokens, self._ends
                )
        return accepted

    def _predict(self, hidden_states: Tensor) -> Tokens:
        """Returns the most likely token at each position."""

        parts = [
            self._forcing.logits(hidden_states[start : start + CHUNK]).argmax(dim=1)
            for start in range(0, len(hidden_states), CHUNK)
        ]
        return tuple(torch.cat(parts).tolist())


def _n_common(first: Tokens, second: Tokens) -> int:
    """Returns the number of tokens that two sequences start with in common."""

    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
