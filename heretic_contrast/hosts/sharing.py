# SPDX-License-Identifier: AGPL-3.0-or-later

"""The storage of a study that several processes share: whether it holds this one, which is said before its first trial."""

import json
from collections.abc import Mapping
from typing import Any

from optuna.storages import BaseStorage
from optuna.study import Study

from ..builtin import model_name
from ..errors import ContrastError
from ..identity import Identity, differences
from ..leases import open_storage, without_password
from .checkpoint import STUDY_NAME
from .settings import HostSettings, deciding

IDENTITY_KEY = "identity"
"""The user attribute of a trial, or of a shared study, that says what decided its numbers."""


def open_shared(settings: HostSettings) -> BaseStorage | None:
    """Returns the storage of a shared study, alone in it for Heretic. Raises `ContrastError` when it is another study."""

    source = settings.contrast.storage
    if source is None:
        return None
    place = without_password(source)
    try:
        storage = open_storage(source)
        get_all_studies = storage.get_all_studies
        studies = get_all_studies()
    except ContrastError:
        raise
    except Exception as error:
        # Database drivers and the journal raise errors of their own.
        reason = without_password(" ".join(str(error).split())) or type(error).__name__
        raise ContrastError(
            f"The storage {place} cannot be read ({reason[:200]}): correct its URL, or move a damaged file away."
        ) from error
    for study in studies:
        if study.study_name == STUDY_NAME:
            if settings.checkpoint_action == "restart":
                raise ContrastError(
                    f"The study in {place} may be that of other processes, and is not removed: give another --contrast.storage, or "
                    "leave --checkpoint-action restart out."
                )
            require_same_settings(study.user_attrs, settings)

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
