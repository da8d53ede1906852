# SPDX-License-Identifier: AGPL-3.0-or-later

"""Heretic 1.4's evaluator, which may judge by tiers, and end a trial as soon as it cannot reach the front any more."""

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import heretic.main
import torch.nn.functional as F
from optuna import Trial
from torch import Tensor

from ..engine.text_classification import classifier_of
from ..prompts import Prompt
from ..search.stopping import dominates
from ..tiers.responses import classify_response
from .guidance import BOUND_KEY, measured
from .settings import HostSettings
from .surface import log


class Dominated(Exception):
    """Ends the judging of a trial."""


class Evaluator(heretic.main.Evaluator):
    """
    Heretic's evaluator, which may judge refusals by tiers.

    `trial`: the one that is judged, where it is new. `n_judged`, `refusals`: how many responses were judged, and refused, so far.
    """

    trial: Trial | None = None
    n_judged: int
    refusals: int

    def is_refusal(self, response: str) -> bool:
        """Returns whether a response is a refusal. They are judged in the order of their prompts, some of them twice."""

        prompt = self.bad_prompts[self.n_judged % len(self.bad_prompts)]
        self.n_judged += 1
        contrast = self.settings.contrast
        if contrast.refusal_classifier == "markers":
            return super().is_refusal(response)
        classify = classify_response
        if contrast.text_classifier is not None:
            classify = classifier_of(contrast).classify_response
        return classify(prompt.user, response).value in contrast.counted_tiers

    def get_score(self) -> Any:
        """Returns Heretic's score; of a trial that a finished one dominates, what it would have had at least."""

        trial, model = self.trial, self.model
        if trial is None or not self.settings.contrast.stop_dominated:
            return super().get_score()
        get_logprobs_batched, get_responses = model.get_logprobs_batched, model.get_responses
        divergence = 0.0

        def measure(prompts: list[Any]) -> Tensor:
            nonlocal divergence
            logprobs = get_logprobs_batched(prompts)
            # As Heretic computes it then, and keeps to itself.
            divergence = F.kl_div(
                logprobs, self.base_logprobs, reduction="batchmean", log_target=True
            ).item()
            return logprobs

        def respond(*args: Any, **kwargs: Any) -> list[str]:
            self._require_undominated(trial, divergence)
            responses = get_responses(*args, **kwargs)
            self.refusals += sum(map(self.is_refusal, responses))
            return responses

        with patch.multiple(model, get_logprobs_batched=measure, get_responses=respond):
            return super().get_score()

    def count_refusals(self) -> int:
        """Returns how many responses are refusals, or were where the trial has ended."""

        self.n_judged = self.refusals = 0
        try:
            return super().count_refusals()
        except Dominated:
            return self.refusals

    def _require_undominated(self, judged: Trial, divergence: float) -> None:
        """Raises `Dominated` when a finished trial dominates all that may come of one."""

        for trial in judged.study.get_trials(deepcopy=False):
            point = measured(trial)
            if point is not None and dominates(point, (self.refusals, divergence)):
                judged.set_user_attr(BOUND_KEY, self.n_judged)
                log(
                    f"  * Ended after [bold]{self.n_judged}[/] of {len(self.bad_prompts)} prompts, since trial "
                    f"[bold]{trial.user_attrs['index']}[/] refuses no more and diverges no more"
                )
                raise Dominated


def count_refusals(
    settings: HostSettings, prompts: Sequence[Prompt], responses: Sequence[str]
) -> int:
    """Returns how many responses Heretic's markers take for refusals."""

    # Heretic's judgement needs the settings and nothing else of an evaluator.
    evaluator = heretic.main.Evaluator.__new__(heretic.main.Evaluator)
    evaluator.settings = settings
    return sum(map(evaluator.is_refusal, responses))
