# SPDX-License-Identifier: AGPL-3.0-or-later

"""Writing a report to a directory: plots, tables, and one self-contained page."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from ..files import json_text, write_bytes_atomically, write_text_atomically
from .content import Report
from .plots import can_plot
from .tables import to_csv

NO_PLOTS = 'Plots are left out, since they need matplotlib: pip install "heretic-contrast[plot]"'

TEMPLATE = Path(__file__).parent / "page.html"


def to_html(report: Report) -> str:
    """Returns a report as one page that needs no other file, no script and no network."""

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode("ascii")
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, missing_plots="" if can_plot() else NO_PLOTS) + "\n"


def write_report(
    report: Report,
    directory: Path,
    texts: Mapping[str, str],
) -> None:
    """
    Writes figures as PNG, the given texts by file name, and last the page, `report.html`.

    Each file is whole or not there. Raises `ContrastError` when a file cannot be written.
    """

    for figure in report.figures():
        write_bytes_atomically(directory / f"{figure.name}.png", figure.png)
    for name, text in texts.items():
        write_text_atomically(directory / name, text)
    write_text_atomically(directory / "report.html", to_html(report))


def table_files(report: Report) -> dict[str, str]:
    """Returns every table as CSV text, by file name."""

    return {f"{table.name}.csv": to_csv(table) for table in report.tables()}


def to_json(value: Any) -> str:
    """Returns JSON text; the same value gives the same bytes."""

    return json_text(value) + "\n"
