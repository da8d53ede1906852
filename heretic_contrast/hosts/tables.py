# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Settings of plugins in `config.toml`, as Heretic 2.0 reads them.

Heretic drops keys that a plugin does not know, and tables that no plugin reads, without a word. What was
misspelled is therefore looked up in the raw tables, which Heretic keeps in its settings' `model_extra`.
"""

import difflib
import sys
from types import TracebackType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from rich.markup import escape

from ..errors import ContrastError, one_line, show_warnings_as_sentences
from ..settings import complaint
from .surface import log

SettingsType = TypeVar("SettingsType", bound=BaseModel)


def nearest(name: str, known: list[str]) -> str:
    """Returns the known name that is most like a name."""

    return difflib.get_close_matches(name, known, n=1, cutoff=0)[0]


def check_tables(
    heretic_settings: Any, namespace: str, plugin: str, settings_class: type[BaseModel]
) -> None:
    """
    Checks the raw tables of a plugin: `[namespace.Plugin]`, and `[namespace.Plugin_<instance>]`.

    `namespace`: "modifier" or "scorer". Raises `ContrastError` when a key is unknown, or a table's name is
    a misspelling of the plugin's.
    """

    tables = (getattr(heretic_settings, "model_extra", None) or {}).get(namespace)
    if not isinstance(tables, dict):
        return
    for name, table in tables.items():
        where = f"[{namespace}.{name}]"
        if name != plugin and not name.startswith(f"{plugin}_"):
            if difflib.SequenceMatcher(None, name.lower(), plugin.lower()).ratio() > 0.85:
                raise ContrastError(
                    f"config.toml has a table {where}, which no plugin reads: did you mean [{namespace}.{plugin}]?"
                )
            continue
        if not isinstance(table, dict):
            raise ContrastError(f"{where} in config.toml must be a table of settings: correct it.")
        for key in table:
            if key not in settings_class.model_fields:
                close = nearest(str(key), list(settings_class.model_fields))
                raise ContrastError(
                    f'There is no setting "{key}" in {where}: did you mean "{close}"?'
                )


def validated(
    settings_class: type[SettingsType], raw: dict[str, Any] | None, where: str
) -> SettingsType:
    """
    Returns validated settings of a plugin; `where` names its table.

    Raises `ContrastError` with the first complaint.
    """

    try:
        return settings_class.model_validate(raw or {})
    except ValidationError as error:
        show_errors_as_sentences()
        raise validation_error(error, where) from error


def validation_error(error: ValidationError, where: str) -> ContrastError:
    """Returns the first complaint of a validation error as one sentence; `where` names the table."""

    details = error.errors()[0]
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, ContrastError):
        return cause
    name = ".".join(str(part) for part in details["loc"])
    subject = f'The setting "{name}" in {where} does' if name else f"The settings in {where} do"
    return ContrastError(f"{subject} not work ({complaint(details)}): correct it.")


def show_errors_as_sentences() -> None:
    """
    Lets a `ContrastError` that ends Heretic appear as its sentence, without a traceback.

    Heretic 2.0 has no way for a plugin to end a run because of its settings.
    """

    previous = sys.excepthook
    if getattr(previous, "shows_contrast_errors", False):
        return
    show_warnings_as_sentences()

    def show(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ContrastError):
            log(f"[red]Error:[/] {escape(one_line(str(error)))}")
        else:
            previous(kind, error, traceback)

    show.shows_contrast_errors = True  # type: ignore[attr-defined]
    sys.excepthook = show
