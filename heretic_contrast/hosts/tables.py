# SPDX-License-Identifier: AGPL-3.0-or-later

"""Settings of plugins in `config.toml`, as Heretic 2.0 reads them: validation, and complaints."""

import logging
import sys
from functools import cache
from types import TracebackType
from typing import Any, ClassVar

from pydantic import BaseModel, ValidationError
from rich.markup import escape

from ..errors import ContrastError, one_line, show_warnings_as_sentences
from ..settings import error_path, validation_error
from .surface import log
from .unused import (
    NAMESPACES,
    ONLY_UNDER_14,
    PLUGINS,
    Unused,
    config_file,
    holds,
    named_plugins,
    own_place,
    without_shipped,
)


class PluginTables:
    """
    What the plugins of this package share: their tables are looked at before Heretic 2.0 filters them.

    `settings_class`: the class of the plugin's settings, whose table is named after the plugin's class.
    """

    settings_class: ClassVar[type[BaseModel]]
    heretic_settings: Any

    def __init_subclass__(cls, **options: Any) -> None:
        """What is made from a plugin of this package has a table of its own, beside that one's."""

        super().__init_subclass__(**options)
        known = [PLUGINS[item.__name__] for item in cls.__mro__ if item.__name__ in PLUGINS]
        PLUGINS.update({cls.__name__: known[0]} if known else {})

    @classmethod
    def get_settings_raw(
        cls, model_extra: dict[str, Any] | None, top_namespace: str, instance_name: str | None
    ) -> Any:
        """
        Returns what Heretic 2.0 reads.

        Raises `ContrastError` when a table is none, which Heretic meets with a traceback, or a value in that of the instance does
        not work: whoever validates what both hold together knows no instance.
        """

        below = (model_extra or {}).get(top_namespace)
        for name in (cls.__name__, f"{cls.__name__}_{instance_name}"):
            if isinstance(below, dict) and not isinstance(below.get(name, {}), dict):
                show_errors_as_sentences()
                raise ContrastError(
                    f"[{top_namespace}.{name}] in config.toml must be a table of settings, and is written with one pair of "
                    "brackets: correct it."
                )
        # The bases for Heretic 1.4 have none.
        base: Any = super()
        raw = base.get_settings_raw(model_extra, top_namespace, instance_name)
        name = f"{cls.__name__}_{instance_name}"
        own = below.get(name) if isinstance(below, dict) and instance_name is not None else None
        try:
            if own:
                cls.settings_class.model_validate(raw)
        except ValidationError as error:
            path = error_path(error)
            if path and holds(own, path):
                show_errors_as_sentences()
                raise validation_error(error, f"[{top_namespace}.{name}]") from error
        return raw

    @classmethod
    def validate_settings(cls, raw_namespace: dict[str, Any] | None) -> Any:
        """Validates the plugin's table, for Heretic 2.0. Raises `ContrastError` with the first complaint."""

        try:
            return cls.settings_class.model_validate(raw_namespace or {})
        except ValidationError as error:
            show_errors_as_sentences()
            raise validation_error(error, own_place(cls.__name__)) from error

    def check_tables(self) -> None:
        """
        Looks for what is meant for the plugin, or for another one of this package, and has no effect.

        Heretic 2.0 keeps unknown tables in its settings' `model_extra`; there is none where the host for Heretic 1.4 has looked at
        `config.toml` itself. Raises `ContrastError` with the first complaint.
        """

        show_errors_as_sentences()
        extra = self.heretic_settings.model_extra
        if extra is None:
            return
        plugin = type(self).__name__
        known = getattr(type(self.heretic_settings), "model_fields", {})
        named = {
            where: named_plugins(getattr(self.heretic_settings, name, None))
            for where, name in NAMESPACES.items()
        }
        named[PLUGINS[plugin]].add((plugin, None))
        # What the command line overrides is no longer among Heretic's settings.
        configs, shipped = zip(
            *(without_shipped(whole, known) for whole in (extra, config_file())), strict=True
        )
        for sentence in filter(None, shipped):
            notice(f"* {sentence}")
        idle = ONLY_UNDER_14 if PLUGINS[plugin] == "modifier" else ()
        unused = Unused(plugin, self.settings_class.model_fields, known, named, idle)
        unused.require_none(*configs)
        for other, where in PLUGINS.items():
            loaded = {name for name, _ in named[where]}
            if other not in loaded and other in (extra.get(where) or {}):
                notice(
                    f"* [{where}.{other}] in config.toml is not used: {NAMESPACES[where]} names no {other}"
                )


@cache
def notice(text: str) -> None:
    log(escape(text))


def show_errors_as_sentences() -> None:
    """Lets a `ContrastError` that ends Heretic 2.0, which a plugin cannot otherwise end, appear as its sentence."""

    previous = sys.excepthook
    if getattr(previous, "shows_contrast_errors", False):
        return
    show_warnings_as_sentences()

    def show(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ContrastError):
            log(f"[red]Error:[/] {escape(one_line(str(error)))}")
            raise SystemExit(2)
        previous(kind, error, traceback)

    show.shows_contrast_errors = True  # type: ignore[attr-defined]
    sys.excepthook = show
    # Optuna logs what ends a trial with its traceback, before the sentence is shown.
    logging.getLogger("optuna.study._optimize").addFilter(
        lambda record: not (record.exc_info and isinstance(record.exc_info[1], ContrastError))
    )
