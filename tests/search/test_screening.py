# SPDX-License-Identifier: AGPL-3.0-or-later

"""Candidates that a study begins with, on functions whose fronts are known."""

from math import inf, nan

import pytest
from optuna import Trial
from optuna.samplers import RandomSampler

from heretic_contrast.search.screening import best_candidates


@pytest.mark.parametrize(("n_wanted", "n_expected"), [(1, 1), (4, 4), (10, 10), (99, 30)])
def test_the_best_are_spread_along_the_front(n_wanted: int, n_expected: int) -> None:
    seen: list[float] = []

    def evaluate(trial: Trial) -> tuple[float, float]:
        # Every second candidate is dominated by the one before.
        behind = trial.number % 2
        seen.append(seen[-1] if behind else trial.suggest_float("x", 0, 1))
        return seen[-1] + behind, 1 - seen[-1]

    found = best_candidates(evaluate, 60, n_wanted, 10**6, RandomSampler(seed=0))
    front = sorted(seen[::2])
    places = {front.index(values["x"]) for values in found}
    assert len(found) == len(places) == n_expected
    assert [values["x"] for values in found] == sorted(values["x"] for values in found)
    assert min(places) == 0 and (n_wanted == 1 or max(places) == 29)
    gaps = [b - a for a, b in zip(sorted(places), sorted(places)[1:], strict=False)]
    assert n_wanted == 1 or max(gaps) - min(gaps) <= 1


def test_of_one_candidate_there_is_one() -> None:
    def evaluate(trial: Trial) -> tuple[float, float]:
        return trial.suggest_float("x", 2, 2), 0.0

    assert best_candidates(evaluate, 1, 10, 9, RandomSampler(seed=0)) == [{"x": 2.0}]


def test_differences_of_less_than_a_prompt_do_not_count() -> None:
    values = iter([(0.0, 0.9), (0.04, 0.2), (0.06, 0.1), (0.5, 0.3), (1.0, 0.0)])

    def evaluate(trial: Trial) -> tuple[float, float]:
        trial.suggest_float("x", trial.number, trial.number)
        return next(values)

    found = best_candidates(evaluate, 5, 10, 10, RandomSampler(seed=0))
    assert [item["x"] for item in found] == [1, 2, 4]


def test_candidates_that_break_the_model_are_left_out() -> None:
    values = iter([(0.3, 0.1), (nan, nan), (0.0, inf), (0.2, nan)])

    def evaluate(trial: Trial) -> tuple[float, float]:
        trial.suggest_float("x", trial.number, trial.number)
        return next(values)

    assert best_candidates(evaluate, 4, 10, 10, RandomSampler(seed=0)) == [{"x": 0.0}]
