# SPDX-License-Identifier: AGPL-3.0-or-later

"""Parameters to begin a study with, chosen by what a trial is worth at a fraction of its cost."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from optuna import Trial, create_study
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from .stopping import Point, front

Item = TypeVar("Item")


def best_candidates(
    evaluate: Callable[[Trial], Point],
    n_candidates: int,
    n_wanted: int,
    n_prompts: int,
    sampler: BaseSampler,
) -> list[dict[str, Any]]:
    """
    Returns the parameters of at most `n_wanted` candidates on the front of `n_candidates`, evenly spread along it, the fewest refusals first.

    `evaluate`: gives the expected share of refusals and the divergence of a candidate, both of which are minimized, and asks it for its
    parameters. `n_prompts`: how many there are to refuse, so that smaller differences do not count.
    """

    study = create_study(directions=["minimize", "minimize"], sampler=sampler)
    points: dict[int, Point] = {}
    for _ in range(n_candidates):
        # Optuna's own loop writes of every interruption.
        trial = study.ask()
        share, divergence = evaluate(trial)
        if not math.isfinite(share + divergence):
            # It breaks the model.
            study.tell(trial, state=TrialState.FAIL)
            continue
        study.tell(trial, (share, divergence))
        points[trial.number] = (round(share * n_prompts), divergence)
    trials = study.get_trials(deepcopy=False)
    return [trials[number].params for number in spread(front(points), n_wanted)]


def spread(items: Sequence[Item], n: int) -> list[Item]:
    """Returns at most `n` items, evenly spread from the first to the last."""

    n = min(n, len(items))
    return [items[round(index * (len(items) - 1) / max(1, n - 1))] for index in range(n)]
