# SPDX-License-Identifier: AGPL-3.0-or-later

"""Samplers whose proposal for a trial depends on the seed, the trial's number and the earlier trials alone."""

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from optuna import create_study
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, NSGAIISampler, PartialFixedSampler, TPESampler
from optuna.search_space import intersection_search_space
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ..settings import Sampler


def trial_seed(seed: int, *of: Any) -> int:
    """Returns the seed of one trial, or of whatever else JSON can hold: 32 bits that differ between these and between studies."""

    digest = hashlib.sha256(json.dumps([seed, *of], sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def stream_of(trial: FrozenTrial, earlier: Sequence[FrozenTrial]) -> int:
    """
    Returns the number of a trial's own stream of random numbers: the first that no earlier trial has.

    A trial that had failed, or was interrupted, before another one began, is made up for by that one, which gets its stream.
    """

    lost = [other for other in earlier if other.state in (TrialState.FAIL, TrialState.PRUNED)]
    if not lost:
        return trial.number
    streams: dict[int, int] = {}
    for current in (*earlier, trial):
        gone = {
            other.number
            for other in lost
            if other.datetime_complete
            and current.datetime_start
            and other.datetime_complete <= current.datetime_start
        }
        taken = {stream for number, stream in streams.items() if number not in gone}
        streams[current.number] = next(n for n in count() if n not in taken)
    return streams[trial.number]


class StudySampler(PartialFixedSampler):
    """
    Goes on in a resumed study as in an uninterrupted one, also where trials were lost in between.

    `make` returns a sampler for a seed. `fixed`: values of parameters that have no meaning in this configuration, and take no part in the
    search. With `heretic` it draws what Heretic's own sampler draws, which lives through a study with one stream of random numbers: finished
    trials of other processes are drawn once more, to no other end than that the stream moves on. A trial beside one that runs elsewhere, and
    every trial without `heretic`, has a stream of its own.
    """

    def __init__(
        self, make: Callable[[int], BaseSampler], seed: int, fixed: dict[str, Any], heretic: bool
    ) -> None:
        self._make = make
        self._seed = seed
        self._fixed = fixed
        self._heretic = heretic
        self._drawn: list[int] | None = None
        self._begin(seed)

    def _begin(self, seed: int) -> None:
        """Samples by a sampler of this seed from now on, which has drawn nothing."""

        with warnings.catch_warnings():
            # Optuna 5 warns of `constraints_func`, for which the versions before have nothing else, and all of them of `PartialFixedSampler`.
            warnings.filterwarnings("ignore", ".*constraints_func", FutureWarning)
            warnings.filterwarnings("ignore", category=ExperimentalWarning)
            super().__init__(self._fixed, self._make(seed))

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        earlier = [
            other for other in study.get_trials(deepcopy=False) if other.number < trial.number
        ]
        finished = [other for other in earlier if other.state is TrialState.COMPLETE]
        if not self._heretic or any(other.state is TrialState.RUNNING for other in earlier):
            self._begin(trial_seed(self._seed, stream_of(trial, earlier)))
            self._drawn = None
        else:
            if self._drawn != [other.number for other in finished]:
                self._begin(self._seed)
                self._drawn = []
                self._draw_again(study, finished)
            self._drawn = [*(other.number for other in finished), trial.number]
        super().before_trial(study, trial)

    def _draw_again(self, study: Study, finished: Sequence[FrozenTrial]) -> None:
        again = create_study(sampler=self, directions=study.directions)
        for earlier in finished:
            if "fixed_params" in earlier.system_attrs:
                again.enqueue_trial(earlier.system_attrs["fixed_params"])
            trial = again.ask(earlier.distributions)
            for name, value in earlier.user_attrs.items():
                # They may be what makes a trial worse than any other.
                trial.set_user_attr(name, value)
            again.tell(trial, earlier.values)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """As Optuna's own, which may be asked about one study only."""

        space = intersection_search_space(study.get_trials(deepcopy=False), include_pruned=True)
        return {
            name: distribution
            for name, distribution in space.items()
            if name not in self._fixed and not distribution.single()
        }


def make_sampler(
    kind: Sampler,
    seed: int,
    n_startup_trials: int,
    fixed: dict[str, Any],
    constraints: Callable[[FrozenTrial], Sequence[float]] | None = None,
) -> StudySampler:
    """
    Returns Heretic's multivariate TPE with Heretic's random numbers, or NSGA-II, seeded per trial.

    `fixed`: as in `StudySampler`. `constraints`: values of a trial, one of which above 0 makes it worse than any other, whatever it
    has reached.
    """

    def make(trial: int) -> BaseSampler:
        if kind == "nsga2":
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

    return StudySampler(make, seed, fixed, kind == "tpe")
