# SPDX-License-Identifier: AGPL-3.0-or-later

"""In which order a study makes its trials, with whom it shares them, and when it ends, without a model."""

import math
import threading
import time
from contextlib import nullcontext
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from questionary import Choice

pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")

from heretic_contrast.errors import ContrastError
from heretic_contrast.hosts.evaluator import Dominated, Evaluator
from heretic_contrast.hosts.finalists import second_look
from heretic_contrast.hosts.guidance import GuidedStudy, give_back, measured
from heretic_contrast.leases import Leases, open_storage
from heretic_contrast.search.samplers import make_sampler
from heretic_contrast.settings import ContrastSettings


def guided_study(
    patience: int | None, first: list[dict[str, Any]], storage: Any = None
) -> tuple[Any, Any, list[int]]:
    """A study whose front grows at the trials 0, 1, 2 and 9, with its objective, and where it ended."""

    ended: list[int] = []
    study = GuidedStudy(
        optuna.create_study(
            study_name="heretic",
            storage=storage,
            directions=["minimize", "minimize"],
            load_if_exists=True,
        ),
        lambda: first,
        patience,
        ended.append,
    ).study

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        trial.suggest_float("x", 0, 1)
        point = {0: (3, 0.3), 1: (2, 0.4), 2: (4, 0.2), 9: (0, 0.1)}.get(trial.number, (4, 0.4))
        trial.set_user_attr("refusals", point[0])
        trial.set_user_attr("kl_divergence", point[1])
        return point

    return study, objective, ended


def test_patience() -> None:
    study, objective, ended = guided_study(4, [{"x": 0.25}, {"x": 0.5}])
    study.optimize(objective, n_trials=20)
    assert len(study.trials) == 7 and ended == [7]
    assert [trial.params["x"] for trial in study.trials[:2]] == [0.25, 0.5]
    # Whoever asks for more gets more, and just as much patience.
    study.optimize(objective, n_trials=2)
    assert len(study.trials) == 9 and ended == [7]
    study.optimize(objective, n_trials=20)
    assert len(study.trials) == 14 and ended == [7, 14]


def test_patience_of_a_study_that_another_process_goes_on_with() -> None:
    storage = optuna.storages.InMemoryStorage()
    study, objective, ended = guided_study(4, [], storage)
    study.optimize(objective, n_trials=3)
    # What was on the front, and what was not, counts as before.
    study, objective, ended = guided_study(4, [], storage)
    study.optimize(objective, n_trials=17)
    assert ended == [7]
    study.optimize(objective, n_trials=2)
    study, objective, ended = guided_study(4, [], storage)
    # As without it, since the user has asked for more.
    study.optimize(objective, n_trials=20)
    assert ended == [14]
    # Nobody has asked for any.
    study, objective, ended = guided_study(4, [], storage)
    study.optimize(objective, n_trials=20)
    assert ended == [14]


def test_first_values_are_asked_for_when_the_study_begins() -> None:
    asked: list[int] = []

    def first() -> list[dict[str, Any]]:
        asked.append(len(study.trials))
        return [{"x": 0.75}, {"x": 0.5}, {"x": 0.25}]

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        trial.set_user_attr("refusals", 0)
        trial.set_user_attr("kl_divergence", 0.0)
        return trial.suggest_float("x", 0, 1), 0.0

    study = optuna.create_study(directions=["minimize", "minimize"])
    GuidedStudy(study, first, None, lambda n_trials: None)
    # Heretic has yet to say what study it is, for other processes to compare with theirs.
    assert asked == []
    study.optimize(objective, n_trials=4)
    assert asked == [0] and [trial.params["x"] for trial in study.trials[:3]] == [0.75, 0.5, 0.25]
    study.optimize(objective, n_trials=2)
    assert len({trial.params["x"] for trial in study.trials}) == 6


def test_no_patience_and_fewer_trials_than_first_ones() -> None:
    study, objective, ended = guided_study(None, [{"x": index / 8} for index in range(5)])
    study.optimize(objective, n_trials=3)
    study.optimize(objective, n_trials=0)
    assert [trial.params["x"] for trial in study.trials] == [0.0, 0.125, 0.25] and not ended
    study.optimize(objective, n_trials=-1)
    assert len(study.trials) == 3 and ended == [3]
    study.optimize(objective, n_trials=20)
    assert [trial.params["x"] for trial in study.trials[3:5]] == [0.375, 0.5]
    assert len(study.trials) == 23


def test_the_menu_tells_of_the_second_look() -> None:
    def choice(number: int, refusals: int) -> Choice:
        attributes = {"index": number + 1, "refusals": refusals, "n_bad_prompts": 20}
        trial = optuna.trial.create_trial(values=[0, 0], user_attrs=attributes)
        trial.number = number
        return Choice(title=f"Trial {number + 1}", value=trial)

    others = [Choice(title="Exit program", value="")]
    trials = [choice(0, 1), choice(3, 1)]
    counts = {
        # After 24 tokens, as many as the first look judged, 4 of 40 do not differ from 1 of 20, whatever longer responses are.
        0: {24: 4, 30: 5, 50: 5, 100: 9, 150: 30},
        3: {24: 30, 30: 9, 50: 9, 100: 9, 150: 2},
    }
    found, table = second_look([*trials, *others], counts, 40, 24)
    # Wilson's intervals as statsmodels has them: proportion_confint(30, 40, method="wilson"), and of 2.
    assert [item.title for item in found] == [
        "Trial 1, fresh prompts: 30/40 (60–86 %)",
        "Trial 4, fresh prompts:  2/40 (1–17 %), which the first look does not agree with",
        "Exit program",
    ]
    headings = [str(column.header) for column in table.columns]
    assert headings[1:3] == ["24 tokens", "30 tokens"]
    assert headings[-1] == "First look, 24 tokens"
    assert [item.value for item in found[:2]] == [item.value for item in trials]
    assert table.row_count == 2
    # One refusal of 400 is not none, and one answer is not none.
    trials = [choice(0, 1), choice(1, 399)]
    for item in trials:
        item.value.user_attrs["n_bad_prompts"] = 400
    _, table = second_look(trials, {0: counts[0], 1: counts[0]}, 40, 24)
    assert list(table.columns[-1].cells) == ["0.25 %", "99.75 %"]


def test_what_broke_the_model_is_on_no_front() -> None:
    """Plain Heretic gives a divergence that is no number a finite score; the plugin's is infinite."""

    for divergence in (math.nan, math.inf):
        attributes = {"refusals": 0, "kl_divergence": divergence}
        assert measured(optuna.trial.create_trial(values=[0, 0], user_attrs=attributes)) is None
    attributes["kl_divergence"] = 0.5
    assert measured(optuna.trial.create_trial(values=[0, 0], user_attrs=attributes)) == (0, 0.5)


@pytest.mark.parametrize(
    ("n_refused", "n", "limit", "is_excluded"),
    [
        (29, 100, 0.29, False),
        (30, 100, 0.29, True),
        (57, 100, 0.57, False),
        (29, 50, 0.58, False),
        (30, 50, 0.58, True),
        (1, 3, 0.33, True),
    ],
)
def test_as_many_false_refusals_as_may_be_are_not_too_many(
    n_refused: int, n: int, limit: float, is_excluded: bool
) -> None:
    evaluator = Evaluator.__new__(Evaluator)
    evaluator.settings = SimpleNamespace(contrast=ContrastSettings(max_false_refusals=limit))
    evaluator.sensitive_prompts = [None] * n
    evaluator.false_refusals = n_refused
    evaluator.trial = optuna.create_study().ask()
    with pytest.raises(Dominated) if is_excluded else nullcontext():
        evaluator._keep_false_refusals()
    excess = evaluator.trial.user_attrs.get("excluded")
    assert (excess > 0) if is_excluded else (excess is None)


class Worker:
    """One of several processes that share a study of trials on x, as far as its objective is concerned."""

    def __init__(
        self, path: Path, n_trials: int, first: list[dict[str, Any]] | None = None
    ) -> None:
        self.study = GuidedStudy(
            optuna.create_study(
                study_name="heretic",
                storage=open_storage(str(path)),
                sampler=make_sampler("tpe", 3, 4, {}),
                directions=["minimize", "minimize"],
                load_if_exists=True,
            ),
            lambda: first or [],
            None,
            lambda n_trials: None,
            lambda: n_trials,
        ).study
        self.seen: list[int] = []

    def objective(self, trial: optuna.Trial) -> tuple[float, float]:
        self.seen.append(trial.number)
        # Long enough for the others to take part.
        time.sleep(0.01)
        x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
        point = round(10 * x), (x - y) ** 2
        trial.set_user_attr("refusals", point[0])
        trial.set_user_attr("kl_divergence", point[1])
        return point

    def run(self) -> None:
        self.study.optimize(self.objective, n_trials=0)

    def complete(self) -> list[dict[str, Any]]:
        states = (TrialState.COMPLETE,)
        return [trial.params for trial in self.study.get_trials(states=states)]


class Killed(BaseException):
    """Ends a worker as SIGKILL does: nothing is told to the storage."""


def killed(worker: Worker, number: int) -> None:
    """Runs a worker until it dies in the middle of a trial."""

    objective = worker.objective

    def dying(trial: optuna.Trial) -> tuple[float, float]:
        trial.suggest_float("x", 0, 1)
        if trial.number == number:
            raise Killed
        return objective(trial)

    with pytest.raises(Killed):
        worker.study.optimize(dying, n_trials=0)


def test_a_worker_that_died_loses_nothing(tmp_path: Path) -> None:
    first = [{"x": 0.25, "y": 0.5}, {"x": 0.5, "y": 0.5}]
    whole = Worker(tmp_path / "whole.journal", 9, first)
    whole.run()
    expected = whole.complete()
    assert len(expected) == 9 and expected[:2] == first
    # As without sharing.
    alone = optuna.create_study(
        sampler=make_sampler("tpe", 3, 4, {}), directions=["minimize", "minimize"]
    )
    GuidedStudy(alone, lambda: first, None, lambda n_trials: None).optimize(
        whole.objective, n_trials=9
    )
    assert [trial.params for trial in alone.trials] == expected

    path = tmp_path / "study.journal"
    # The second of the first trials, and one that is sampled; then one that the next worker makes up for.
    for number in (1, 5, 6):
        killed(Worker(path, 9, first), number)
    last = Worker(path, 9, first)
    last.run()
    assert last.complete() == expected
    states = [trial.state for trial in last.study.trials]
    assert states.count(TrialState.FAIL) == 3 and len(states) == 12
    # Who comes later has nothing to do.
    late = Worker(path, 9, first)
    late.run()
    assert late.seen == [] and late.complete() == expected


def test_an_interrupted_trial_is_made_up_for_by_the_same_one(tmp_path: Path) -> None:
    whole = Worker(tmp_path / "whole.journal", 9)
    whole.run()
    path = tmp_path / "study.journal"
    # One that is drawn at random, and two that the sampler chooses by those before it.
    for number in (2, 6, 9):
        worker = Worker(path, 9)

        def interrupted(trial: optuna.Trial) -> tuple[float, float]:
            trial.suggest_float("x", 0, 1)
            if trial.number == number:  # noqa: B023
                # As Heretic's own objective on Ctrl+C.
                trial.study.stop()
                raise optuna.TrialPruned
            return worker.objective(trial)  # noqa: B023

        worker.study.optimize(interrupted, n_trials=0)
        assert len(worker.study.trials) == number + 1
    last = Worker(path, 9)
    last.run()
    assert last.complete() == whole.complete()


def test_several_workers_make_as_many_trials_as_were_asked_for(tmp_path: Path) -> None:
    first = [{"x": index / 8, "y": 0.5} for index in range(4)]
    workers = [Worker(tmp_path / "study.journal", 24, first) for _ in range(3)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    found = workers[0].complete()
    assert len(found) == 24
    assert sorted(number for worker in workers for number in worker.seen) == sorted(
        trial.number for trial in workers[0].study.get_trials(states=(TrialState.COMPLETE,))
    )
    # None of the first ones twice.
    assert all(found.count(values) == 1 for values in first)
    assert sum(bool(worker.seen) for worker in workers) > 1


def test_a_trial_that_another_process_gave_up_is_made_up_for(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    slow, other = Worker(path, 3), Worker(path, 3)
    objective = slow.objective

    def paused(trial: optuna.Trial) -> tuple[float, float]:
        found = objective(trial)
        if trial.number == 0:
            # It was asleep for longer than its lease.
            lease = {"worker": "elsewhere 1 x", "until": time.time() - 1}
            slow.study._storage.set_trial_user_attr(trial._trial_id, "lease", lease)
            give_back(other.study, Leases(other.study._storage))
        return found

    slow.study.optimize(paused, n_trials=0)
    assert len(slow.complete()) == 3
    assert slow.study.trials[0].state is TrialState.FAIL


def test_an_error_in_a_shared_trial_ends_the_worker(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "study.journal", 3)

    def broken(trial: optuna.Trial) -> tuple[float, float]:
        raise ContrastError("It does not work.")

    with pytest.raises(ContrastError, match="does not work"):
        worker.study.optimize(broken, n_trials=0)
    assert [trial.state for trial in worker.study.trials] == [TrialState.FAIL]


def test_a_trial_that_takes_long_to_draw_is_left_alone() -> None:
    """Before its lease is there, finished trials are drawn once more, which takes seconds for hundreds of them."""

    leases = Leases(open_storage(None))
    for age, is_abandoned in ((30, False), (61, True)):
        trial = optuna.trial.create_trial(state=TrialState.RUNNING)
        trial.datetime_start = datetime.now() - timedelta(seconds=age)
        assert leases.is_abandoned(trial) == is_abandoned
