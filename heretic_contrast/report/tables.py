# SPDX-License-Identifier: AGPL-3.0-or-later

"""Tables in the terminal and as CSV."""

import csv
import io
from typing import Any

import rich.box
import rich.table
from rich.markup import escape

from .content import Table


def to_rich(table: Table) -> rich.table.Table:
    """Returns a table for the terminal, with its essential columns."""

    rendered = rich.table.Table(
        title=escape(table.title),
        caption=escape(table.note) or None,
        title_justify="left",
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    shown = [index for index, column in enumerate(table.columns) if column.essential]
    for index in shown:
        column = table.columns[index]
        rendered.add_column(
            escape(column.header),
            justify="right" if column.numeric else "left",
            no_wrap=index < table.n_keys,
        )
    for row in table.texts():
        rendered.add_row(*(escape(row[index]) for index in shown))
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
