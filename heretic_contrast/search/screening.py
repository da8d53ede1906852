# SPDX-License-Identifier: AGPL-3.0-or-later

"""Parameters to begin a study with, chosen by what a trial is worth at a fraction of its cost."""

import math
from collections.abc import Callable, Mapping, Sequence
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
    Returns the parameters of at most `n_wanted` candidates on the front of `n_candidates`, those first that add most to what it dominates.

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
    on_front = {number: points[number] for number in front(points)}
    return [trials[number].params for number in by_gain(on_front, n_prompts, n_wanted)]


def by_gain(points: Mapping[int, Point], most_refusals: float, n: int) -> list[int]:
    """
    Returns the keys of at most `n` points of refusals and divergence, each the one that adds most to the area that those before it dominate.

    The area reaches to `most_refusals` and to the largest divergence.
    """

    corner = most_refusals, max((divergence for _, divergence in points.values()), default=0.0)
    chosen: list[int] = []
    while len(chosen) < min(n, len(points)):
        left = [key for key in points if key not in chosen]
        areas = [
            dominated_area([points[other] for other in (*chosen, key)], corner) for key in left
        ]
        chosen.append(left[areas.index(max(areas))])
    return chosen


def dominated_area(points: Sequence[Point], corner: Point) -> float:
    """Returns the area of what points of two objectives dominate, up to a corner that none of them exceeds."""

    area, height = 0.0, corner[1]
    for first, second in sorted(points):
        area += (corner[0] - first) * max(0.0, height - second)
        height = min(height, second)
    return area


def spread(items: Sequence[Item], n: int) -> list[Item]:
    """Returns at most `n` items, evenly spread from the first to the last."""

    n = min(n, len(items))
    return [items[round(index * (len(items) - 1) / max(1, n - 1))] for index in range(n)]
