# SPDX-License-Identifier: AGPL-3.0-or-later

"""What a long benchmark has found so far: rows by section, in a file at any time, and as a table."""

import gc
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from heretic_contrast.files import write_text_atomically


class OutOfTime(BaseException):
    """A section took longer than it may, whoever would go on after an exception."""


class Record:
    """
    The rows of all sections. `path`: of the JSON file that is written after each. `minutes`: for all sections together.

    `content`: what the file has.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self._path = path
        self._started = time.monotonic()
        self.deadline = self._started + 60 * minutes
        self.content: dict[str, Any] = {"sections": {}}
        self.section: dict[str, Any] = {}

    def row(
        self,
        name: str,
        value: Any,
        unit: str = "",
        at_most: float | None = None,
        at_least: float | None = None,
        main: bool = False,
    ) -> None:
        """Records a figure, its bound or aim, and whether it belongs into a short table."""

        row: dict[str, Any] = {"name": name, "value": value, "unit": unit, "main": main}
        if at_most is not None:
            row |= {"aim": f"≤ {shown(at_most)}", "met": value <= at_most}
        if at_least is not None:
            row |= {"aim": f"≥ {shown(at_least)}", "met": value >= at_least}
        self.section["rows"].append(row)
        self.say("  ".join(cells_of(row)))
        self._write()

    def say(self, line: str) -> None:
        """Prints a line with the seconds since the start, whatever is kept from being printed."""

        seconds = time.monotonic() - self._started
        print(f"[{seconds:6.1f} s] {line}", file=sys.__stdout__, flush=True)

    def run(self, name: str, measure: Callable[[], None], least: float, most: float) -> None:
        """
        Runs a section, and records how it failed where it does.

        `least`: the seconds that have to be left for it. `most`: those that it may take.
        """

        started = time.monotonic()
        left = self.deadline - started
        self.section = self.content["sections"][name] = {"rows": []}
        self.say(f"--- {name}")

        def stop(number: int, frame: Any) -> None:
            raise OutOfTime("This took too long.")

        if left < least:
            self.section["skipped"] = f"{left:.0f} s were left, and it needs about {least} s."
        else:
            signal.signal(signal.SIGALRM, stop)
            try:
                signal.setitimer(signal.ITIMER_REAL, min(left, most))
                measure()
            except (Exception, OutOfTime):
                signal.setitimer(signal.ITIMER_REAL, 0)
                self.section["error"] = traceback.format_exc().splitlines()[-12:]
                self.say("\n".join(self.section["error"]))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        self.section["seconds"] = time.monotonic() - started
        self._write()
        gc.collect()

    def _write(self) -> None:
        write_text_atomically(self._path, json.dumps(self.content, indent=2) + "\n")


def shown(value: Any) -> str:
    """Returns a value with three digits that count."""

    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def cells_of(row: dict[str, Any]) -> list[str]:
    """Returns a row as texts: what, value, aim, whether it is met."""

    met = {True: "yes", False: "**no**", None: ""}[row.get("met")]
    return [row["name"], f"{shown(row['value'])} {row['unit']}".strip(), row.get("aim", ""), met]


def table(content: dict[str, Any], short: bool = False) -> str:
    """Returns what was recorded as a Markdown table. `short`: main figures, what was missed, and how many aims were met."""

    lines = ["| Section | What | Value | Aim | Met |", "| :------ | :--- | ----: | --: | :-- |"]
    for name, section in content["sections"].items():
        chosen = [
            row for row in section["rows"] if not short or row["main"] or row.get("met") is False
        ]
        rows = [cells_of(row) for row in chosen]
        met = [row["met"] for row in section["rows"] if "met" in row]
        if short and met:
            rows.append(["bounds and aims that are met", f"{sum(met)} of {len(met)}", "", ""])
        if "skipped" in section:
            rows.append([f"skipped: {section['skipped']}", "", "", ""])
        if "error" in section:
            rows.append([f"error: {section['error'][-1].replace('|', '/')}", "", "", ""])
        lines += [f"| {' | '.join(['' if i else name, *row])} |" for i, row in enumerate(rows)]
    return "\n".join(lines)
