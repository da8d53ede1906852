# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Making a checkpoint fit to resume.

A study that was killed leaves an unfinished trial, perhaps half a line, and perhaps a lock. Heretic counts
unfinished trials as done. They are taken out here, so that the resumed study runs them again.
"""

import os
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.trial import TrialState

from ..errors import ContrastError
from ..journal import CheckedJournal, remove_locks

STUDY_NAME = "heretic"


def repair_checkpoint(path: Path) -> None:
    """
    Takes unfinished trials and a stale lock out of one checkpoint; the journal itself copes with half a last line.

    Raises `ContrastError` when it is damaged beyond its last line; it is left as it is.
    """

    remove_locks(path)
    try:
        storage = JournalStorage(CheckedJournal(str(path)))
        is_there = any(study.study_name == STUDY_NAME for study in storage.get_all_studies())
        study = optuna.load_study(study_name=STUDY_NAME, storage=storage) if is_there else None
        trials = study.get_trials(deepcopy=False) if study else []
    except ContrastError:
        raise
    except Exception as error:
        # Optuna raises whatever its decoding runs into.
        raise ContrastError(
            f"The checkpoint {path} is damaged and cannot be resumed: move it away to start from scratch."
        ) from error
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    if study is None or not complete:
        # Nothing is lost, and Heretic expects a study that was set up to its end.
        path.unlink()
        return
    if len(complete) == len(trials):
        return
    temporary = path.with_name(f".{path.name}.repaired")
    temporary.unlink(missing_ok=True)
    remove_locks(temporary)
    repaired = optuna.create_study(
        study_name=STUDY_NAME,
        storage=JournalStorage(CheckedJournal(str(temporary))),
        directions=study.directions,
    )
    for name, value in study.user_attrs.items():
        repaired.set_user_attr(name, value)
    for trial in complete:
        repaired.add_trial(trial)
    os.replace(temporary, path)
