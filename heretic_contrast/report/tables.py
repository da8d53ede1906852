# SPDX-License-Identifier: AGPL-3.0-or-later

"""Tables in the terminal and as CSV."""

import csv
import io
from typing import Any

import rich.table
from rich.markup import escape

from .content import Table


def to_rich(table: Table) -> rich.table.Table:
    """Returns a table for the terminal."""

    rendered = rich.table.Table(
        title=escape(table.title), caption=escape(table.note) or None, title_justify="left"
    )
    for column in table.columns:
        rendered.add_column(
            escape(column.header),
            justify="right" if column.numeric else "left",
            overflow="fold",
        )
    for row in table.texts():
        rendered.add_row(*map(escape, row))
    return rendered


def to_csv(table: Table) -> str:
    """Returns a table as CSV text with unrounded values; the same table gives the same bytes."""

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([column.header for column in table.columns])
    for row in table.rows:
        writer.writerow([_plain(value) for value in row])
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.8g}"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return value
