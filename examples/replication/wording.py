# SPDX-License-Identifier: AGPL-3.0-or-later

"""How numbers stand in the report."""

import math
from collections.abc import Sequence

from .statistics import Contrast, Interval

NONE = "–"

UNMATCHED, MATCHED, SVD = "paper-unmatched", "paper-matched", "paper-matched-svd"

LABELS = {
    "raw unmatched": "unmatched, own length",
    "raw matched": "matched, own length",
    "lengthened matched": "matched, unmatched length",
    "som unmatched, equal weight": "unmatched, length 1",
    "som matched, equal weight": "matched, length 1",
    "svd matched": "matched, SVD",
    "svd1 matched": "matched, first singular vector",
    "som random": "random",
}


def label(condition: str) -> str:
    """Returns what a condition is called in the report."""

    return LABELS.get(condition, condition.replace("som ", "").replace("mean ", "mean, "))


def number(value: float | None, digits: int = 2) -> str:
    """Returns a number with so many decimals; a dash for none, a sign for infinity."""

    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "never"
    text = f"{value:.{digits}f}"
    return text[1:] if float(text) == 0 and text.startswith("-") else text


def small(value: float | None) -> str:
    """Returns a positive number with three significant digits."""

    if value is None or not math.isfinite(value):
        return number(value)
    if value == 0:
        return "0"
    if value >= 1000:
        return f"{value:.0f}"
    if value >= 1e-4:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def percent(found: Interval | None) -> str:
    """Returns a share in percent with its interval."""

    if found is None:
        return NONE
    return f"{100 * found.value:.0f} % ({_bounds(100 * found.low, 100 * found.high, 0)})"


def signed(found: Interval | None) -> str:
    """Returns a difference of shares in percentage points with its interval."""

    if found is None:
        return NONE
    value, low, high = (_points(100 * x) for x in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})"


def _points(value: float) -> str:
    text = f"{value:+.0f}"
    return "0" if text in ("+0", "-0") else text


def plain(found: Interval | None, digits: int = 2) -> str:
    """Returns a value with its interval."""

    if found is None:
        return NONE
    return f"{number(found.value, digits)} ({_bounds(found.low, found.high, digits)})"


def ratio(found: Interval) -> str:
    """Returns a ratio with its interval."""

    return f"{times(found.value)} ({times(found.low)} to {times(found.high)})"


def times(value: float) -> str:
    """Returns a factor."""

    if math.isnan(value):
        return NONE
    return "∞" if math.isinf(value) else f"{value:.2g}×" if value < 100 else f"{value:.0f}×"


def at_equal(found: Contrast | None) -> str:
    """Returns what a contrast at equal divergence says."""

    if found is None:
        return "not comparable"
    return f"{signed(found.difference)} points at KL {small(found.level)}: {reading(found)}"


def reading(found: Contrast) -> str:
    """Returns the verdict of a contrast, and whether it is open because so much, or so little, was not measured."""

    if found.below:
        return f"{found.verdict}, not measured that low"
    return f"{found.verdict}, not measured that far" if found.unreached else found.verdict


def layer_list(layers: Sequence[int]) -> str:
    """Returns layers, or none."""

    return ", ".join(map(str, layers)) or "none"


def _bounds(low: float, high: float, digits: int) -> str:
    if math.isnan(low) or math.isnan(high):
        return "no interval"
    return f"{number(low, digits)} to {number(high, digits)}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Returns a Markdown table; the columns named in `right` are aligned to the right."""

    marks = ["---:" if index in right else ":---" for index in range(len(header))]
    lines = [header, marks, *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
