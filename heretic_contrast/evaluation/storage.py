# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The state of a sweep in an Optuna study: one trial per cell.

Any number of processes, on any machines that reach the storage, work on one sweep. Each takes the waiting cells of
one group at a time, renews a lease while it computes them, and stores the results in the trials. The cells of a
process that died are taken over when its lease ends. Groups do not depend on the processes, and are computed whole,
so that computing one twice gives the same numbers to the last bit.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from pydantic import TypeAdapter

from ..errors import ContrastError
from ..files import digest
from ..identity import Identity, differences
from ..language_model import Progress
from ..leases import Leases, open_storage, readable, without_password
from .cells import Cell, CellKey

STUDY_NAME = "heretic-contrast sweep"

CELLS_PER_CLAIM = 60
"""
How many cells a process takes at a time: enough to fill batches, few enough to lose little of when it is killed, and whole
layers with five weights and up to four configurations.
"""

_CELL = TypeAdapter(Cell)

Evaluate = Callable[[Sequence[CellKey], Progress], list[Cell]]
"""Measures cells, and tells about how many of them are done while it does so."""


def group_cells(keys: Sequence[CellKey]) -> list[list[CellKey]]:
    """Returns the cells that are computed together: a limited number, from the lowest layer to the highest."""

    ordered = sorted(keys, key=lambda key: key.layers[0])
    return [
        ordered[start : start + CELLS_PER_CLAIM]
        for start in range(0, len(ordered), CELLS_PER_CLAIM)
    ]


OTHER_SWEEP = "The storage {} holds another sweep (other {}): give another output or storage, or remove that one."


def require_own_sweep(storage: str, known: Identity) -> None:
    """
    Raises `ContrastError` when a journal holds another sweep, as far as it can be said before a model is loaded.

    `known`: those parts of the sweep's identity that are known. Raises `ContrastError` as well when the storage cannot be read.
    """

    if "://" not in storage and not Path(storage).is_file():
        return
    with readable(storage, "away to start anew"):
        studies = open_storage(storage).get_all_studies()
    identities = (
        study.user_attrs.get("identity", {}) for study in studies if study.study_name == STUDY_NAME
    )
    stored: Identity = next(identities, {})
    different = differences(stored, json.loads(json.dumps(known)), list(known)) if stored else ""
    if different:
        raise ContrastError(OTHER_SWEEP.format(without_password(storage), different))


class SweepState:
    """A sweep's cells in a storage. `identity` says which sweep: processes must agree on it."""

    def __init__(self, storage: str | None, identity: Identity) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # As a storage gives it back.
        self._identity = identity = json.loads(json.dumps(identity))
        self._place, self._owner = without_password(storage), digest(identity)
        with readable(storage, "away to start anew"):
            self._study = optuna.create_study(
                study_name=STUDY_NAME,
                storage=open_storage(storage),
                # Never samples: every trial is enqueued with its parameters.
                sampler=optuna.samplers.RandomSampler(seed=0),
                directions=["minimize", "minimize"],
                load_if_exists=True,
            )
            self._leases = Leases(self._study._storage)
            if "identity" not in self._study.user_attrs and not self._study.get_trials(
                deepcopy=False
            ):
                self._study.set_user_attr("identity", identity)
            stored = self._study.user_attrs.get("identity", {})
        different = differences(stored, identity)
        if different:
            raise ContrastError(OTHER_SWEEP.format(self._place, different))

    def run(
        self, keys: Sequence[CellKey], evaluate: Evaluate, progress: Progress | None = None
    ) -> list[Cell]:
        """Returns the cells of all keys, computing those that no process has computed."""

        keys = list(dict.fromkeys(keys))
        if not keys:
            return []
        self._enqueue(keys)
        if self._study.user_attrs.get("identity") != self._identity:
            # Another sweep that began at once wrote last, and finds these cells.
            self._study.set_user_attr("identity", self._identity)
        with self._leases.working():
            return self._work(keys, evaluate, progress)

    def _work(
        self, keys: Sequence[CellKey], evaluate: Evaluate, progress: Progress | None
    ) -> list[Cell]:
        """Computes cells, or waits for other processes to compute them, until all are there."""

        groups = group_cells(keys)
        while True:
            done = self._done()
            missing = [key for key in keys if key not in done]
            n_done = len(keys) - len(missing)
            if progress is not None:
                progress(n_done, len(keys))
            if not missing:
                return [_CELL.validate_python(done[key]) for key in keys]
            group, trials = self._claim(groups, set(missing))
            if not trials:
                self._take_over(set(missing))
                time.sleep(0.5)
                continue
            part = _part(progress, n_done, len(trials), len(keys))
            try:
                with self._leases.renewed([trial._trial_id for trial in trials]):
                    # The whole group, so that rounding does not depend on who computed which part of it.
                    cells = dict(zip(group, evaluate(group, part), strict=True))
            except BaseException:
                # Given back at once, so that nobody waits for the lease to end.
                self._give_back(trials)
                raise
            for trial in trials:
                self._store(trial, cells[_key(trial)])

    def _store(self, trial: FrozenTrial, cell: Cell) -> None:
        """Stores a cell, unless another process took the trial over in the meantime."""

        with suppress(UpdateFinishedTrialError):
            self._study._storage.set_trial_user_attr(trial._trial_id, "cell", asdict(cell))
        self._study.tell(
            trial.number,
            [float(cell.measurement.refusals), cell.measurement.kl_divergence],
            skip_if_finished=True,
        )

    def _set_state(self, trial: FrozenTrial, state: TrialState) -> bool:
        try:
            return self._study._storage.set_trial_state_values(trial._trial_id, state)
        except UpdateFinishedTrialError:
            return False

    def _enqueue(self, keys: Sequence[CellKey]) -> None:
        present = {_key(trial) for trial in self._trials() if trial.state is not TrialState.FAIL}
        for key in keys:
            if key not in present:
                layers = " ".join(map(str, key.layers))
                self._study.enqueue_trial(
                    {**key._asdict(), "layers": layers}, user_attrs={"identity": self._owner}
                )

    def _trials(self) -> list[FrozenTrial]:
        """
        Returns all trials. Raises `ContrastError` when one is another sweep's.

        Two that begin on a new storage at once may both find it their own.
        """

        trials = self._study.get_trials(deepcopy=False)
        # Older journals do not say whose a trial is.
        if {trial.user_attrs.get("identity", self._owner) for trial in trials} - {self._owner}:
            raise ContrastError(OTHER_SWEEP.format(self._place, "model, prompts or options"))
        return trials

    def _done(self) -> dict[CellKey, Any]:
        """Returns the finished cells as they are stored; turning them into cells takes longer."""

        return {
            _key(trial): trial.user_attrs["cell"]
            for trial in reversed(self._trials())
            if trial.state is TrialState.COMPLETE and "cell" in trial.user_attrs
        }

    def _claim(
        self, groups: Sequence[list[CellKey]], missing: set[CellKey]
    ) -> tuple[list[CellKey], list[FrozenTrial]]:
        """Takes the missing cells of one group, unless another process has its first."""

        # Processes that begin at once each enqueue every cell: the first trial of a cell is the one that counts.
        first: dict[CellKey, FrozenTrial] = {}
        for trial in self._trials():
            if trial.state is not TrialState.FAIL:
                first.setdefault(_key(trial), trial)
        waiting = {key: trial for key, trial in first.items() if trial.state is TrialState.WAITING}
        for group in groups:
            claimed = []
            for key in (key for key in group if key in missing):
                if key in waiting and self._set_state(waiting[key], TrialState.RUNNING):
                    # Leased at once, so that the cells of a process that dies from here on are known to be nobody's.
                    self._leases.take(waiting[key]._trial_id)
                    claimed.append(waiting[key])
                elif not claimed:
                    # Exactly one process turns a waiting trial into a running one: who has the first has the group.
                    break
            if claimed:
                return group, claimed
        return [], []

    def _give_back(self, trials: Sequence[FrozenTrial]) -> None:
        """Marks running trials as failed, and enqueues their cells again."""

        for trial in trials:
            self._set_state(trial, TrialState.FAIL)
        self._enqueue([_key(trial) for trial in trials])

    def _take_over(self, missing: set[CellKey]) -> None:
        """Gives back the cells of processes that died, also of those that died while they gave cells back."""

        abandoned = [
            trial
            for trial in self._trials()
            if trial.state is TrialState.RUNNING
            and _key(trial) in missing
            and self._leases.is_abandoned(trial)
        ]
        self._give_back(abandoned)
        self._enqueue(sorted(missing))


def _part(progress: Progress | None, n_done: int, n_claimed: int, n_cells: int) -> Progress:
    def advance(done: int, total: int) -> None:
        if progress is not None:
            progress(n_done + n_claimed * done // total, n_cells)

    return advance


def _key(trial: FrozenTrial) -> CellKey:
    parameters = trial.system_attrs["fixed_params"]
    layers = tuple(map(int, parameters["layers"].split()))
    return CellKey(**{**parameters, "layers": layers})
