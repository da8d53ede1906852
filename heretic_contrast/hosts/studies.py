# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Where a study is kept: a checkpoint of its own, or a storage that several processes share.

A study that was killed leaves an unfinished trial, perhaps half a line, and perhaps a lock. Heretic counts unfinished trials as
done. They are taken out here, so that the resumed study runs them again. Whether a storage holds this study is said before its
first trial.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.study import Study
from optuna.trial import TrialState
from rich.markup import escape

from ..builtin import model_name
from ..errors import ContrastError
from ..files import replace
from ..identity import Identity, differences
from ..journal import CheckedJournal, remove_locks
from ..leases import open_storage, readable, without_password
from ..processes import alone_in
from .guidance import SCREENED_KEY
from .settings import HostSettings, deciding
from .surface import log

STUDY_NAME = "heretic"

IDENTITY_KEY = "identity"
"""The user attribute of a trial, or of a shared study, that says what decided its numbers."""


@contextmanager
def own_checkpoints(settings: HostSettings) -> Iterator[None]:
    """
    Keeps a study's checkpoints to this process for as long as the context lasts; they are removed or repaired at its start.

    Raises `ContrastError` when another process has them, or one is damaged.
    """

    if settings.contrast.storage is not None or settings.evaluate_model is not None:
        yield
        return
    folder, action = Path(settings.study_checkpoint_dir), settings.checkpoint_action
    with alone_in(folder, "give both the same --contrast.storage"):
        for path in sorted(folder.glob("*.jsonl")):
            if action == "restart":
                path.unlink()
                remove_locks(path)
            else:
                repair_checkpoint(path)
        if action == "continue" and not any(folder.glob("*.jsonl")):
            log(
                "[yellow]* There is no study of this model, these settings and these prompts in "
                f"{folder.parent}: a new one begins.[/]"
            )
        yield


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
    if study is None or not (complete or SCREENED_KEY in study.user_attrs):
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
    for number, trial in enumerate(complete, start=1):
        # Heretic counts on from how many there are, and would give the number of a later one once more.
        if "index" in trial.user_attrs:
            trial.set_user_attr("index", number)
    repaired.add_trials(complete)
    replace(temporary, path)


def open_shared(settings: HostSettings) -> BaseStorage | None:
    """Returns the storage of a shared study, alone in it for Heretic. Raises `ContrastError` when it is another study."""

    source = settings.contrast.storage
    if source is None:
        return None
    with readable(source, "away"):
        storage = open_storage(source)
        get_all_studies = storage.get_all_studies
        studies = get_all_studies()
    for study in studies:
        if study.study_name == STUDY_NAME:
            if settings.checkpoint_action == "restart":
                raise ContrastError(
                    f"The study in {without_password(source)} may be that of other processes, and is not removed: give another --contrast.storage, or "
                    "leave --checkpoint-action restart out."
                )
            require_same_settings(study.user_attrs, settings)
    if settings.checkpoint_action == "continue" and not any(
        study.study_name == STUDY_NAME for study in studies
    ):
        shown = escape(without_password(source))
        log(f"[yellow]* There is no study in {shown}: a new one begins.[/]")

    def own_studies() -> list[Any]:
        # Heretic looks at the first, and at what it has written to it itself.
        return [
            study
            for study in get_all_studies()
            if study.study_name == STUDY_NAME and {"settings", "finished"} <= set(study.user_attrs)
        ]

    storage.get_all_studies = own_studies  # type: ignore[method-assign]
    return storage


def require_same_settings(attributes: Mapping[str, Any], settings: HostSettings) -> None:
    """Raises `ContrastError` when a study was begun for another model, or with other settings that decide trials."""

    if "settings" not in attributes:
        return
    stored = json.loads(attributes["settings"])
    ours = json.loads(settings.model_dump_json())
    names = []
    if model_name(stored.get("model", "")) != model_name(settings.model):
        names.append("model")
    mine, theirs = deciding(ours), deciding(stored)
    names += [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    if settings.seed is None and "seed" in names:
        # Whoever leaves it open goes on with that of the study.
        names.remove("seed")
    if names:
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise ContrastError(
            f"The storage {without_password(settings.contrast.storage)} holds a study with another {listed}: give another "
            "--contrast.storage, or the settings of that study."
        )


def require_same_identity(study: Study, settings: HostSettings, identity: Identity) -> None:
    """Writes down what decides the numbers of a new study; raises `ContrastError` when it is something else in one that goes on."""

    require_same_settings(study.user_attrs, settings)
    if IDENTITY_KEY not in study.user_attrs and not study.get_trials(deepcopy=False):
        study.set_user_attr(IDENTITY_KEY, identity)
    different = differences(study.user_attrs.get(IDENTITY_KEY, {}), identity)
    if different:
        raise ContrastError(
            f"The storage {without_password(settings.contrast.storage)} holds a study with other {different}: give another "
            "--contrast.storage."
        )
