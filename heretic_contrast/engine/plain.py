# SPDX-License-Identifier: AGPL-3.0-or-later

"""The plain engine, the definition of right: hooks, the model's own `generate`, and whole forward passes."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from ..ablation.hooks import Intervention, ablated_samples
from ..language_model import Batches, LanguageModel, Tokens
from .compat import forget_images
from .interface import Continuations, Count, Logits, no_count

ELEMENTS = 2**24
"""Logits of one pass, 64 MiB, that are allowed where it holds more than one sequence."""


class PlainEngine:
    """
    Runs a model under many interventions: one after the other, the prompts of each in batches of the model's size.

    All that the rest of the package asks of a running model. `engine.fast` must give the same. Without an intervention the
    model is run as it is at that moment.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def generate(self, prompts: Sequence[Tokens], limits: Sequence[int]) -> list[Tokens]:
        """
        Returns the greedy continuation of each prompt, at most `limits` tokens, up to and with the one that ends it.

        It is what the model's own `generate` gives for the prompt alone, with the model's generation configuration. Raises
        `ContrastError` when that does not work.
        """

        forget_images(self.model.model)
        return self.model.generate_tokens(prompts, limits)

    def respond(
        self,
        known: Continuations,
        limit: int,
        interventions: Sequence[Intervention],
        count: Count = no_count,
    ) -> list[list[Tokens]]:
        """
        Returns what `generate` gives for each prompt under each intervention.

        `known`: with the unmodified model's responses of at most `limit` tokens.
        """

        found = []
        for intervention in interventions:
            with self._ablated(intervention):
                found.append(
                    PlainEngine.generate(self, known.prompts, [limit] * len(known.prompts))
                )
            count(len(known.prompts))
        return found

    def logits(
        self,
        known: Continuations,
        interventions: Sequence[Intervention] | None = None,
        count: Count = no_count,
    ) -> Iterator[Logits]:
        """
        Yields what is predicted at all positions of continuations that the model reads, under each intervention.

        With interventions, the unmodified model must be the same in all calls for the same continuations.
        """

        sequences = known.sequences
        # Logits are asked for from the first prediction on, and not of what comes before.
        length = max(map(len, sequences), default=1) - min(map(len, known.prompts), default=1) + 1
        n_rows = ELEMENTS // (length * self.model.vocabulary_size)
        n_rows = max(1, min(self.model.batch_size, n_rows))
        sizes = Batches(n_rows)
        for index, intervention in enumerate([None] if interventions is None else interventions):

            def read(
                part: slice, index: int = index, intervention: Intervention | None = intervention
            ) -> tuple[Logits, int]:
                inputs = self.model.pad(sequences[part], "right")
                n_sequences, width = inputs["input_ids"].shape
                first = min(map(len, known.prompts[part])) - 1
                forget_images(self.model.model)
                with torch.no_grad(), self._ablated(intervention):
                    logits = self.model.model(
                        **inputs, use_cache=False, logits_to_keep=width - first
                    ).logits
                    # Some models ignore what is asked for, and give the logits of all positions.
                    logits = logits[:, first - width :]
                return _predictions(logits, first, known, index, part), n_sequences

            for found, n_prompts in sizes.run(len(sequences), read):
                yield found
                # Not to be held beside the next one.
                del found
                count(n_prompts)

    def _ablated(self, intervention: Intervention | None) -> AbstractContextManager[None]:
        if intervention is None:
            return nullcontext()
        return ablated_samples(self.model, [intervention])


class AloneEngine(PlainEngine):
    """Runs every prompt alone: for models that give a prompt something else beside others."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(replace(model, batch_size=1))


def _predictions(
    logits: Tensor, start: int, known: Continuations, intervention: int, part: slice
) -> Logits:
    """
    Returns the logits of the positions that predict continuations.

    `logits`: from the position `start` on, Tensor of shape (n_sequences, n_positions, vocabulary).
    """

    values, positions, starts = [], [], known.starts
    for row, index in enumerate(range(*part.indices(len(known.prompts)))):
        first, length = len(known.prompts[index]) - 1 - start, len(known.tokens[index])
        values.append(logits[row, first : first + length].float())
        positions.append(torch.arange(length) + starts[index])
    found = torch.cat(positions).to(logits.device)
    return Logits(torch.full_like(found, intervention), found, torch.cat(values))
