# SPDX-License-Identifier: AGPL-3.0-or-later

"""What a report consists of: sections with text, tables and figures, before they take any form."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from operator import attrgetter
from typing import Any

from ..evaluation.statistics import percent
from .plots import can_plot

MISSING = "–"
"""Stands where there is no value."""

Formatter = Callable[[Any], str]


def number(digits: int) -> Formatter:
    return lambda value: f"{value:.{digits}f}"


def significant(digits: int) -> Formatter:
    def form(value: float) -> str:
        if math.isinf(value):
            return "∞"
        text = f"{value:.{digits}g}"
        return text if "e" not in text else f"{value:.{digits - 1}e}"

    return form


def thousands(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 or not value else f"{value:.2g}"


def percentage(share: float) -> str:
    return f"{percent(share, 1)} %"


def plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def layers_text(layers: Any) -> str:
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts) or "none"


def slug(*names: str) -> str:
    """Returns a part of a file name; names come from users."""

    return re.sub(r"[\W_]", "-", "-".join(names))


@dataclass(frozen=True)
class Column:
    """
    A column: its header, what it shows of an item, how, and whether its values are numbers.

    `value`: the name of an attribute of the item, with dots in it or not, or a function of the item. `plain`: what of the value
    stands in a file. A column that is not `essential` is left out in the terminal, where room is short.
    """

    header: str
    value: str | Callable[[Any], Any] = ""
    form: Formatter = str
    numeric: bool = True
    essential: bool = True
    plain: Callable[[Any], Any] = lambda value: value

    def text(self, value: Any) -> str:
        return MISSING if value is None else self.form(value)


text_column = partial(Column, numeric=False)
"""A column of text."""


@dataclass(frozen=True)
class Table:
    """
    A table. `name` becomes the name of its file; the note says what it was measured on.

    The first `n_keys` columns say what a row is about.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""
    n_keys: int = 1

    @classmethod
    def of(
        cls,
        items: Iterable[Any],
        name: str,
        title: str,
        *columns: Column,
        note: str = "",
        n_keys: int = 1,
    ) -> "Table":
        values = [
            attrgetter(column.value) if isinstance(column.value, str) else column.value
            for column in columns
        ]
        rows = tuple(tuple(value(item) for value in values) for item in items)
        return cls(name, title, columns, rows, note, n_keys)

    def texts(self) -> list[list[str]]:
        return [
            [column.text(value) for column, value in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]


@dataclass(frozen=True)
class Figure:
    """A plot. `name` becomes the name of its file; `alternative` says in words what `draw`, which gives a PNG, shows."""

    name: str
    title: str
    alternative: str
    draw: Callable[[], bytes]

    @cached_property
    def png(self) -> bytes:
        return self.draw()


@dataclass(frozen=True)
class Section:
    """A part of a report under one heading. It has no figures where nothing can be drawn."""

    title: str
    paragraphs: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()

    def __post_init__(self) -> None:
        if not can_plot():
            object.__setattr__(self, "figures", ())


@dataclass(frozen=True)
class Report:
    """
    A whole report. `summary` is what a reader should take away, in a few sentences.

    `opened`: tables that are shown when they are asked for, with the name that a link leads to. `anchors`: those names, by the
    `key()` of the value in a table that leads there.
    """

    title: str
    subtitle: str
    summary: tuple[str, ...]
    sections: tuple[Section, ...] = ()
    opened: tuple[tuple[str, Table], ...] = ()
    anchors: Mapping[Any, str] = field(default_factory=dict)

    def anchor(self, value: Any) -> str | None:
        key = getattr(value, "key", None)
        return self.anchors.get(key()) if callable(key) else None

    def figures(self) -> list[Figure]:
        return [figure for section in self.sections for figure in section.figures]

    def tables(self) -> list[Table]:
        return [table for section in self.sections for table in section.tables]

    def files(self) -> list[str]:
        """Returns the names of the files of all figures and tables."""

        figures = [f"{figure.name}.png" for figure in self.figures()]
        return [*figures, *(f"{table.name}.csv" for table in self.tables())]
