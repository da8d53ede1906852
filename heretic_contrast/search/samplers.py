# SPDX-License-Identifier: AGPL-3.0-or-later

"""Samplers whose proposal for a trial depends on the seed, the trial's number and the earlier trials alone."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ..settings import Sampler


def trial_seed(seed: int, number: int) -> int:
    """Returns the seed of one trial: 32 bits that differ between trials and between studies."""

    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


class PerTrialSampler(BaseSampler):
    """
    Makes a sampler anew for each trial, with a seed of the trial's own.

    A sampler that lives through a study draws from one stream of random numbers, so that a resumed study differs
    from an uninterrupted one. Here both are the same, also where trials were lost in between.

    `fixed` names parameters that have no meaning in this configuration: they get the given value and take no
    part in the search.
    """

    def __init__(
        self, make: Callable[[int], BaseSampler], seed: int, fixed: dict[str, Any]
    ) -> None:
        self._make = make
        self._seed = seed
        self._fixed = fixed
        self._sampler = make(trial_seed(seed, 0))

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        # A trial that has failed, or was interrupted, is made up for by the next one, which gets its seed.
        lost = study.get_trials(deepcopy=False, states=(TrialState.FAIL, TrialState.PRUNED))
        n_lost = sum(other.number < trial.number for other in lost)
        self._sampler = self._make(trial_seed(self._seed, trial.number - n_lost))
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        space = self._sampler.infer_relative_search_space(study, trial)
        return {name: value for name, value in space.items() if name not in self._fixed}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        if param_name in self._fixed:
            value = self._fixed[param_name]
            return getattr(param_distribution, "low", None) if value is None else value
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._sampler.after_trial(study, trial, state, values)


def make_sampler(
    kind: Sampler,
    seed: int,
    n_startup_trials: int,
    fixed: dict[str, Any],
    constraints: Callable[[FrozenTrial], Sequence[float]] | None = None,
) -> PerTrialSampler:
    """
    Returns Heretic's multivariate TPE, or NSGA-II, seeded per trial.

    `constraints`: values of a trial, one of which above 0 makes it worse than any other, whatever it has reached.
    """

    def make(trial: int) -> BaseSampler:
        # Optuna 5 warns of `constraints_func`, for which the versions before have nothing else.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*constraints_func", FutureWarning)
            if kind is Sampler.NSGA2:
                # A generation as large as Heretic's random start-up keeps both samplers comparable.
                size = max(2, min(n_startup_trials, 50))
                return NSGAIISampler(population_size=size, seed=trial, constraints_func=constraints)
            return TPESampler(
                n_startup_trials=n_startup_trials,
                n_ei_candidates=128,
                multivariate=True,
                seed=trial,
                constraints_func=constraints,
            )

    return PerTrialSampler(make, seed, fixed)
