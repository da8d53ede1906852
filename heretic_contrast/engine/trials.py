# SPDX-License-Identifier: AGPL-3.0-or-later

"""
A model whose weights change from trial to trial, and the same prompts in each: what no trial changes is not computed again.

Prompts are read without what they all begin with, and from the lowest layer on that is changed.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from ..ablation.changes import UNCHANGED
from ..ablation.hooks import OwnWeights
from ..greedy import is_plainly_greedy
from ..language_model import LanguageModel, Tokens, groups_by_length, is_out_of_memory
from .check import all_logits, checked_engine
from .fast.drafts import Row
from .fast.engine import FastEngine
from .interface import Continuations
from .strides import Watch

N_STARTS = 8
"""At how many layers, evenly apart, a trial may begin: of each is kept what enters it."""

MOST_KEPT = 2**28
"""Elements of keys and values that are kept in any case; half as many as the model has parameters where these are more."""

Result = TypeVar("Result")


class TrialEngine:
    """
    Gives what a model gives that decodes plainly (see `greedy`), but for rounding.

    `model`: the unmodified one. `prompts`: some that the fast engine is tried with. The methods return None where it does not work for
    them: for this model, for one that was loaded anew, and where more would be kept than memory allows. `first_layer`: the lowest layer that is changed at
    the moment of a call; -1 for the embeddings. What prompts are asked for first is asked of the unmodified model.
    """

    def __init__(self, model: LanguageModel, prompts: Sequence[Tokens]) -> None:
        self._model = model.model
        self._engine: FastEngine | None = None
        if is_plainly_greedy(model.model) and type(checked_engine(model, prompts)) is FastEngine:
            self._engine = FastEngine(model, N_STARTS)
        self._known: dict[tuple[Tokens, ...], Continuations] = {}

    def knows(self, model: LanguageModel) -> bool:
        return self._model is model.model

    def respond(
        self,
        model: LanguageModel,
        prompts: Sequence[Tokens],
        limit: int,
        first_layer: float,
        watch: Watch[int],
    ) -> list[Tokens] | None:
        """Returns the response to each prompt, of at most `limit` tokens, or what there is of it where `watch` lets it go."""

        def respond(engine: FastEngine, weights: OwnWeights) -> list[Tokens] | None:
            known = self._asked(prompts, first_layer)
            if known is None or not may_keep(model, prompts):
                return None
            are_read_once = [drafts.are_read_once for drafts in engine.drafts(known, limit)]
            if not all(are_read_once):
                if any(are_read_once):
                    # Memory did not suffice for all groups of prompts.
                    self._forget()
                return None
            return engine.respond(known, limit, [weights], watch=by_prompt)[0]

        def by_prompt(
            found: Mapping[Row, Tokens], ended: list[Row], others: list[Row]
        ) -> Collection[Row]:
            responses = {prompt: tokens for (_, prompt), tokens in found.items()}
            leaving = watch(responses, [row for _, row in ended], [row for _, row in others])
            return [(0, prompt) for prompt in leaving]

        return self._run(respond, model, first_layer)

    def first_logprobs(
        self, model: LanguageModel, prompts: Sequence[Tokens], first_layer: float
    ) -> Tensor | None:
        """Returns the logarithms of the probabilities of each response's first token. Tensor of shape (n_prompts, vocabulary), float32."""

        known = self._asked(prompts, first_layer)
        logits = None if known is None else self.logits(model, known, first_layer)
        return None if logits is None else logits.log_softmax(dim=-1)

    def logits(
        self, model: LanguageModel, known: Continuations, first_layer: float
    ) -> Tensor | None:
        """Returns the logits at all positions of continuations. Tensor of shape (n_positions, vocabulary), float32."""

        def read(engine: FastEngine, weights: OwnWeights) -> Tensor:
            (logits,) = all_logits(engine, known, [weights])
            return logits

        return self._run(read, model, first_layer)

    def _asked(self, prompts: Sequence[Tokens], first_layer: float) -> Continuations | None:
        """Returns prompts with a continuation of one token, which nothing reads."""

        key = tuple(prompts)
        if first_layer == UNCHANGED:
            self._known.setdefault(key, Continuations(key, ((0,),) * len(key)))
        return self._known.get(key)

    def _run(
        self,
        run: Callable[[FastEngine, OwnWeights], Result | None],
        model: LanguageModel,
        first_layer: float,
    ) -> Result | None:
        engine = self._engine
        if engine is None or not self.knows(model) or first_layer < 0:
            return None
        step = -(-model.n_layers // N_STARTS)
        lowest = int(min(first_layer, model.n_layers - 1)) // step * step
        try:
            return run(engine, OwnWeights(changed_from=lowest))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._forget()
            return None

    def _forget(self) -> None:
        """Lets go of what is kept beside the model, which is too much."""

        self._engine = None
        self._known.clear()


def may_keep(model: LanguageModel, prompts: Sequence[Tokens]) -> bool:
    """Returns whether the keys and values of all prompts, in all layers, may be kept: at most so many, where no heads share them."""

    n_tokens = sum(len(group) * len(prompts[group[-1]]) for group in groups_by_length(prompts))
    n_parameters = sum(parameter.numel() for parameter in model.model.parameters())
    kept = 2 * n_tokens * model.n_layers * model.hidden_size
    return kept <= max(MOST_KEPT, n_parameters // 2)
