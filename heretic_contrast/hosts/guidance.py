# SPDX-License-Identifier: AGPL-3.0-or-later

"""What guides the study of Heretic 1.4 beside its sampler: the trials that it begins with, and when it has found enough."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

from optuna.exceptions import TrialPruned, UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from ..leases import Leases
from ..search.stopping import Point, trials_since_growth
from .surface import log

BOUND_KEY = "bound"
"""
The user attribute of a trial that was ended early: on how many prompts its refusals were counted.

Its values are what it would have had at least. A finished trial is as good in both, so that Heretic's menu never offers it.
"""

FALSE_KEY = "false_refusals"
"""The user attribute of a trial that holds how many sensitive prompts were refused, and of how many."""

SUM_KEY = "refusal_sum"
"""The user attribute of a trial that holds the sum of a judge model's probabilities, which is minimized in the place of a count."""

EXCLUDED_KEY = "excluded"
"""The user attribute of a trial that refused too many sensitive prompts: by which share it exceeds what may be."""

SCREENED_KEY = "screened"
"""The user attribute of a study that holds the parameters of the candidates that it begins with."""

SEEN_KEY = "seen"
"""The user attribute of a study that holds how many trials it had when the user last told it to go on."""

Values = dict[str, Any]
"""Values of parameters by name; "component." stands for every component, and "scale." for every direction."""


def measured(trial: FrozenTrial) -> Point | None:
    """Returns what is minimized of a trial that was judged to its end, and None for any other, or one that broke the model."""

    attributes = trial.user_attrs
    if trial.state is not TrialState.COMPLETE or {BOUND_KEY, EXCLUDED_KEY} & set(attributes):
        return None
    refusals = attributes.get(SUM_KEY, attributes["refusals"])
    if not math.isfinite(attributes["kl_divergence"]):
        return None
    point: Point = (refusals, attributes["kl_divergence"])
    return point if len(trial.values) == 2 else (*point, attributes[FALSE_KEY][0])


class GuidedStudy:
    """
    Makes a study begin with trials of the `first` values, and end when its front has not grown for so many trials.

    These are asked for when it begins, since only then Heretic has said what study it is.

    `ended` is called with the number of its trials then, and where it has more than were asked for. A study that goes on begins where
    it was; one that is told to go on by the user, who has seen its front, has as much patience again.

    `n_shared`: of a study that other processes work on as well, how many trials they make together. Those of processes that died are
    marked as failed and made up for, and who has nothing more to do waits for the others.
    """

    def __init__(
        self,
        study: Study,
        first: Callable[[], Sequence[Values]],
        patience: int | None,
        ended: Callable[[int], None],
        n_shared: Callable[[], int] | None = None,
    ) -> None:
        self.study, self._first, self._ended = study, first, ended
        self._patience, self._n_shared = patience, n_shared
        self._ask = study.ask
        study.ask = self.ask  # type: ignore[method-assign]
        study.optimize = self.optimize  # type: ignore[method-assign, assignment]
        study.stop = self.stop  # type: ignore[method-assign]
        self._leases = Leases(study._storage)
        self._beginning: list[Values] = []
        self._held: list[int] = []
        self._is_stopped = False
        # How many trials the user has seen.
        self._start = 0

    def _begun(self) -> list[FrozenTrial]:
        states = (TrialState.RUNNING, TrialState.COMPLETE)
        return self.study.get_trials(deepcopy=False, states=states)

    def _points(self) -> list[Point | None]:
        complete = (TrialState.COMPLETE,)
        return [measured(item) for item in self.study.get_trials(deepcopy=False, states=complete)]

    def _is_exhausted(self) -> bool:
        found = self._points()
        since = min(trials_since_growth(found), len(found) - self._start)
        return self._patience is not None and since >= self._patience

    def stop(self) -> None:
        """In place of the study's: what Heretic asks for when a trial is interrupted."""

        self._is_stopped = True

    def ask(self, *args: Any, **options: Any) -> Trial:
        """In place of the study's: takes the first values that nobody has tried. Raises `Superfluous` when others make enough trials."""

        study = self.study
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        tried = [trial.system_attrs.get("fixed_params") for trial in [*self._begun(), *waiting]]
        untried = [values for values in self._beginning if values not in tried]
        if untried:
            study.enqueue_trial(untried[0])
        trial = self._ask(*args, **options)
        if self._n_shared is not None:
            self._held[:] = [trial._trial_id]
            self._leases.take(trial._trial_id)
            values = study._storage.get_trial(trial._trial_id).system_attrs.get("fixed_params")
            earlier = [other for other in self._begun() if other.number < trial.number]
            # Another process has asked for the same at the same moment.
            twice = values and values in [
                other.system_attrs.get("fixed_params") for other in earlier
            ]
            if twice or len(earlier) >= self._n_shared():
                study.tell(trial, state=TrialState.FAIL)
                raise Superfluous
        return trial

    def optimize(self, objective: Any, n_trials: int) -> None:
        """In place of the study's: makes trials until there are enough of them, or the front does not grow any more."""

        self._held.clear()
        self._is_stopped = False
        if self._patience is not None and self._start:
            self.study.set_user_attr(SEEN_KEY, self._start)
        # Another process may have been told to.
        self._start = self.study.user_attrs.get(SEEN_KEY, 0)
        self._beginning[:] = self._first()
        is_shared = self._n_shared is not None
        n_wanted = self._n_shared() if self._n_shared else len(self._begun()) + n_trials
        leases = self._leases
        with leases.working(), leases.renewed(self._held) if is_shared else nullcontext():
            self._make(objective, n_wanted)
        n_there = len(self.study.trials)
        if n_trials < 0 and not is_shared:
            # Heretic would call such a study interrupted.
            log(f"The study has [bold]{n_there}[/] trials already, and gets no more.")
            self._ended(n_there)
        elif self._is_exhausted():
            trials = "trial" if self._patience == 1 else "trials"
            log(
                f"The front has not grown for {self._patience} {trials}, so that the study ends after [bold]{len(self._points())}[/]."
            )
            self._ended(n_there)
        self._start = len(self._points())

    def _make(self, objective: Any, n_wanted: int) -> None:
        is_shared, waits = self._n_shared is not None, False
        while not self._is_stopped:
            if is_shared:
                give_back(self.study, self._leases)
            if len(self._begun()) < n_wanted and not self._is_exhausted():
                self._make_one(objective)
            elif is_shared and len(self._points()) < len(self._begun()):
                if not waits:
                    log("* Waiting for the trials of other processes...")
                waits = True
                time.sleep(0.5)
            else:
                return

    def _make_one(self, objective: Any) -> None:
        try:
            trial = self.ask()
        except Superfluous:
            return
        try:
            values = objective(trial)
        except (Exception, KeyboardInterrupt) as error:
            # An interrupted trial, which Heretic calls pruned, would teach the sampler something if it had not failed.
            told = self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            if GIVEN_UP not in told.user_attrs and not isinstance(error, TrialPruned):
                raise
        else:
            told = self.study.tell(trial, values, skip_if_finished=True)
        if GIVEN_UP in told.user_attrs:
            log("* Another process has given this trial up, and makes up for it.")


class Superfluous(Exception):
    """A trial that another process makes already."""


GIVEN_UP = "given up"
"""The user attribute of a trial that another process has marked as failed: who did it."""


def give_back(study: Study, leases: Leases) -> None:
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if leases.is_abandoned(trial):
            # Another process may do the same.
            with suppress(UpdateFinishedTrialError):
                study._storage.set_trial_user_attr(trial._trial_id, GIVEN_UP, leases.worker)
                study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
