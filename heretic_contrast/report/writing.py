# SPDX-License-Identifier: AGPL-3.0-or-later

"""The forms that a report takes: tables in the terminal and as CSV, plots, and one self-contained page."""

import base64
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import rich.box
import rich.table
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape

from ..errors import one_line
from ..files import write_bytes_atomically, write_text_atomically
from ..outputs import csv_text
from .content import Column, Report, Table
from .plots import can_plot

NO_PLOTS = 'Plots are left out, since they need matplotlib: pip install "heretic-contrast[plot]"'

READABLE = 8
"""Characters of a name in one line of the terminal, at least."""

TEMPLATE = Path(__file__).parent / "page.html"


def to_rich(table: Table) -> RenderableType:
    """Returns a table for the terminal, with its essential columns. Numbers are never cut; long names are folded."""

    return _Fitted(
        _chosen(table, [i for i, column in enumerate(table.columns) if column.essential])
    )


@dataclass(frozen=True)
class _Fitted:
    """A table that takes the form that the terminal has room for: in full, with folded values, or as several tables."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table, n_columns = self.table, len(self.table.columns)
        for is_tight in (False, True):
            rendered = _rich_table(table, is_tight)
            least = sum(column.width or column.min_width or 0 for column in rendered.columns)
            if least + 2 * n_columns < options.max_width:
                yield rendered
                return
        keys, rest = range(table.n_keys), range(table.n_keys, n_columns)
        if len(rest) < 2:
            yield rendered
            return
        half = len(rest) // 2
        yield _Fitted(replace(_chosen(table, [*keys, *rest[:half]]), note=""))
        yield _Fitted(replace(_chosen(table, [*keys, *rest[half:]]), title=""))


def _chosen(table: Table, indices: Sequence[int]) -> Table:
    """Returns a table with some of its columns."""

    rows = tuple(tuple(row[index] for index in indices) for row in table.rows)
    return replace(table, columns=tuple(table.columns[index] for index in indices), rows=rows)


def _rich_table(table: Table, is_tight: bool) -> rich.table.Table:
    rendered = rich.table.Table(
        title=_shown(table.title),
        caption=_shown(table.note) or None,
        title_justify="left",
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    texts = table.texts()
    for index, column in enumerate(table.columns):
        parts = [column.header, *(row[index] for row in texts)]
        if is_tight:
            # Headers are folded between words, and intervals below their numbers.
            parts = column.header.split() + re.split(r"\n| (?=\()", "\n".join(parts[1:]))
        width = max(map(len, parts))
        rendered.add_column(
            _shown(column.header),
            justify="right" if column.numeric else "left",
            overflow="fold",
            width=width if column.numeric else None,
            min_width=min(width, READABLE),
        )
    for row in texts:
        rendered.add_row(*map(_shown, row))
    return rendered


def _shown(text: str) -> str:
    return escape(one_line(text))


def to_csv(table: Table) -> str:
    """Returns a table as CSV text with unrounded values; the same table gives the same bytes."""

    header = [column.header for column in table.columns]
    rows = [map(_plain, table.columns, row) for row in table.rows]
    return csv_text([header, *rows])


def _plain(column: Column, value: Any) -> Any:
    value = None if value is None else column.plain(value)
    if isinstance(value, float):
        return f"{value:.8g}"
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def to_html(report: Report) -> str:
    """Returns a report as one page that needs no other file, no script and no network."""

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode("ascii")
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, missing_plots="" if can_plot() else NO_PLOTS) + "\n"


def write_report(report: Report, directory: Path, texts: Mapping[str, str]) -> None:
    """
    Writes figures as PNG, tables as CSV, the given texts by file name, and last the page, `report.html`.

    A text takes the place of the table of the same name. Each file is whole or not there. What the report that lay there has and
    this one has not is removed. Raises `ContrastError` when a file cannot be written.
    """

    for name in earlier_files(directory).difference(report.files(), texts):
        # It would seem to belong to this report.
        with suppress(OSError):
            (directory / name).unlink()
    for figure in report.figures():
        write_bytes_atomically(directory / f"{figure.name}.png", figure.png)
    tables = {f"{table.name}.csv": to_csv(table) for table in report.tables()}
    for name, text in {**tables, **texts}.items():
        write_text_atomically(directory / name, text)
    write_text_atomically(directory / "report.html", to_html(report))


def earlier_files(directory: Path) -> set[str]:
    """Returns the figures and tables of the report that lies in a directory, as its page names them."""

    try:
        page = (directory / "report.html").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return set()
    found = re.search(r'<meta name="files" content="([^"]*)">', page)
    # No other folder is touched, whatever a page says.
    return set(re.findall(r"(?<!\S)[\w-]+\.(?:csv|png)(?!\S)", found[1])) if found else set()
