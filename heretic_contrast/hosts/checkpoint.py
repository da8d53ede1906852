# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Making a checkpoint fit to resume.

A study that was killed leaves an unfinished trial, perhaps half a line, and perhaps a lock. Heretic counts
unfinished trials as done. They are taken out here, so that the resumed study runs them again.
"""

import json
import os
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ..errors import ContrastError

STUDY_NAME = "heretic"


def repair_checkpoints(directory: Path) -> None:
    """
    Makes every checkpoint in a directory fit to resume.

    Raises `ContrastError` when a checkpoint is damaged beyond its last line; it is left as it is.
    """

    if not directory.is_dir():
        return
    for path in sorted(directory.glob("*.jsonl")):
        repair_checkpoint(path)


def repair_checkpoint(path: Path) -> None:
    """Takes unfinished trials, half a last line and a stale lock out of one checkpoint."""

    for lock in path.parent.glob(f"{path.name}.lock*"):
        lock.unlink(missing_ok=True)
    _drop_partial_line(path)
    try:
        storage = JournalStorage(JournalFileBackend(str(path)))
        studies = storage.get_all_studies()
        study = (
            optuna.load_study(study_name=STUDY_NAME, storage=storage)
            if any(study.study_name == STUDY_NAME for study in studies)
            else None
        )
        trials = [] if study is None else study.get_trials(deepcopy=False)
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
    repaired = optuna.create_study(
        study_name=STUDY_NAME,
        storage=JournalStorage(JournalFileBackend(str(temporary))),
        directions=study.directions,
    )
    for name, value in study.user_attrs.items():
        repaired.set_user_attr(name, value)
    for trial in complete:
        repaired.add_trial(trial)
    os.replace(temporary, path)


def _drop_partial_line(path: Path) -> None:
    """Cuts off a last line that a killed process did not finish."""

    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    last = content[end:]
    if last:
        try:
            json.loads(last)
        except ValueError:
            path.write_bytes(content[:end])
        else:
            path.write_bytes(content + b"\n")
