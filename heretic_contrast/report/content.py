# SPDX-License-Identifier: AGPL-3.0-or-later

"""What a report consists of: sections with text, tables and figures, before they take any form."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MISSING = "–"
"""Stands where there is no value."""

Formatter = Callable[[Any], str]


def number(digits: int) -> Formatter:
    """Returns a formatter to a fixed number of decimals."""

    return lambda value: f"{value:.{digits}f}"


def significant(digits: int) -> Formatter:
    """Returns a formatter to a number of significant digits."""

    def form(value: float) -> str:
        if math.isinf(value):
            return "∞"
        text = f"{value:.{digits}g}"
        return text if "e" not in text else f"{value:.{digits - 1}e}"

    return form


def thousands(value: float) -> str:
    """Formats a large number without decimals."""

    return f"{value:,.0f}"


def percent(value: float) -> str:
    """Formats a share in percent."""

    return f"{100 * value:.1f} %"


def layers_text(layers: Any) -> str:
    """Formats layer indices, runs of them as ranges."""

    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts) or "none"


@dataclass(frozen=True)
class Column:
    """
    A column: its header, how its values are shown, and whether they are numbers.

    A column that is not `essential` is left out in the terminal, where room is short.
    """

    header: str
    form: Formatter = str
    numeric: bool = True
    essential: bool = True

    def text(self, value: Any) -> str:
        """Returns how a value is shown."""

        return MISSING if value is None else self.form(value)


def text_column(header: str, essential: bool = True) -> Column:
    """Returns a column of text."""

    return Column(header, numeric=False, essential=essential)


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

    def texts(self) -> list[list[str]]:
        """Returns all values as they are shown."""

        return [
            [column.text(value) for column, value in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]


@dataclass(frozen=True)
class Figure:
    """A plot as PNG. `name` becomes the name of its file; `alternative` says in words what it shows."""

    name: str
    title: str
    alternative: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """A part of a report under one heading."""

    title: str
    paragraphs: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Report:
    """A whole report. `summary` is what a reader should take away, in a few sentences."""

    title: str
    subtitle: str
    summary: tuple[str, ...]
    sections: tuple[Section, ...] = field(default=())

    def figures(self) -> list[Figure]:
        """Returns all figures."""

        return [figure for section in self.sections for figure in section.figures]

    def tables(self) -> list[Table]:
        """Returns all tables."""

        return [table for section in self.sections for table in section.tables]
