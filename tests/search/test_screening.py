# SPDX-License-Identifier: AGPL-3.0-or-later

"""Candidates that a study begins with, on functions whose fronts are known."""

from math import inf, nan

import numpy as np
import pytest
from optuna import Trial
from optuna._hypervolume import compute_hypervolume
from optuna.samplers import RandomSampler

from heretic_contrast.search.screening import best_candidates


@pytest.mark.parametrize(("n_wanted", "n_expected"), [(1, 1), (4, 4), (10, 10), (99, 30)])
def test_first_are_those_that_add_most_to_what_the_front_dominates(
    n_wanted: int, n_expected: int
) -> None:
    refusals = np.random.default_rng(0).permutation(30)
    points: list[tuple[float, float]] = []

    def evaluate(trial: Trial) -> tuple[float, float]:
        # Every second candidate is dominated by the one before.
        behind = trial.number % 2
        count = refusals[trial.number // 2]
        trial.suggest_int("x", trial.number, trial.number)
        points.append((count + behind, 0.9**count))
        return (count + behind) / 40, 0.9**count

    found = [item["x"] for item in best_candidates(evaluate, 60, n_wanted, 40, RandomSampler())]
    assert len(found) == len(set(found)) == n_expected and not any(x % 2 for x in found)
    corner = np.array([40.0, 1.0])

    def area(numbers: list[int]) -> float:
        return compute_hypervolume(np.array([points[number] for number in numbers]), corner)

    for n, x in enumerate(found):
        best = max(area([*found[:n], other]) for other in range(60))
        assert area([*found[:n], x]) == pytest.approx(best, rel=1e-12)


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
    assert sorted(item["x"] for item in found) == [1, 2, 4]


def test_candidates_that_break_the_model_are_left_out() -> None:
    values = iter([(0.3, 0.1), (nan, nan), (0.0, inf), (0.2, nan)])

    def evaluate(trial: Trial) -> tuple[float, float]:
        trial.suggest_float("x", trial.number, trial.number)
        return next(values)

    assert best_candidates(evaluate, 4, 10, 10, RandomSampler(seed=0)) == [{"x": 0.0}]
