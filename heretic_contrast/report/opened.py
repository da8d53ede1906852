# SPDX-License-Identifier: AGPL-3.0-or-later

"""What was counted, to be read: the responses of a cell, each with its tier and what decided it."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any

from ..evaluation.cells import Cell, CellKey, SweepResult
from ..tiers.responses import explain_response
from .content import Table, layers_text, text_column

MAXIMUM_CHARACTERS = 3_000_000
"""Of all responses on a page, so that a browser opens it; `responses.jsonl` has the rest."""

SHOWN_CHARACTERS = 600
"""Of one response."""

Row = tuple[str, ...]


def short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _reason(settings: Mapping[str, Any]) -> Callable[[str, str], str]:
    for name in {"text_classifier", "judge_model"} & set(settings):
        return lambda prompt, response: f"{name.replace('_', ' ')} {settings[name]}"
    # The same response stands in many cells.
    return lru_cache(maxsize=None)(
        lambda prompt, response: explain_response(prompt, response).summary
    )


def opened_cells(result: SweepResult) -> tuple[dict[CellKey, str], list[tuple[str, Table]]]:
    """
    Returns the parts of the page that show responses, and which part shows which cell.

    The unmodified model's come first. When `MAXIMUM_CHARACTERS` are used up, the cells with the most refusals of each
    configuration are left out.
    """

    reason = _reason(result.settings)

    def rows(cell: Cell | None) -> list[Row]:
        return [
            (
                verdict.tier if verdict.coherent else f"{verdict.tier}, incoherent",
                short(f"Canary: {prompt}" if pool == "canary" else prompt),
                short(response),
                reason(prompt, response),
            )
            for pool, prompt, response, verdict in result.answers(cell)
        ]

    columns = tuple(map(text_column, ("Tier", "Prompt", "Response", "Decided by")))
    base = rows(None)
    title = "Responses of the unmodified model"
    parts = [("unmodified", Table("unmodified", title, columns, tuple(base)))]
    left = MAXIMUM_CHARACTERS - _length(base)
    anchors: dict[CellKey, str] = {}
    for number, cell in enumerate(_ranked(result)):
        shown = rows(cell)
        left -= _length(shown)
        if left < 0:
            break
        anchor = anchors[cell.key()] = f"cell-{number}"
        name = f"{cell.configuration}, layers {layers_text(cell.layers)}, {cell.strength} {cell.weight:g}"
        parts.append((anchor, Table(anchor, f"Responses: {name}", columns, tuple(shown))))
    return anchors, parts


def _ranked(result: SweepResult) -> list[Cell]:
    """Returns all cells: the best of each configuration, then the second best ones, and so on."""

    ranked = [
        sorted(
            (cell for cell in result.cells if cell.key()[:2] == pair),
            key=lambda cell: (*cell.cost(), cell.key()),
        )
        for pair in result.configurations()
    ]
    return [cell for cells in zip_longest(*ranked) for cell in cells if cell is not None]


def _length(rows: Sequence[Sequence[str]]) -> int:
    return sum(len(text) for row in rows for text in row)
