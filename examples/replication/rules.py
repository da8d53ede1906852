# SPDX-License-Identifier: AGPL-3.0-or-later

"""What claims are decided with: cells that the sweep chose, judged on fresh prompts, and what counts as sure."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .evidence import Study, SweepCell
from .statistics import MARGIN, Interval
from .wording import layer_list

APPEARS = "appears"
ABSENT = "does not appear"
OPEN = "cannot be decided here"

UNMATCHED, MATCHED, SVD = "paper-unmatched", "paper-matched", "paper-matched-svd"


class Finding(NamedTuple):
    """What was measured, in words, and what the rule makes of it."""

    measured: str
    verdict: str


@dataclass(frozen=True)
class Claim:
    """A claim: where it stands, what it says, how it is decided, and the function that does."""

    key: str
    title: str
    says: str
    rule: str
    decide: Callable[[Study], Finding]


def fresh_share(
    study: Study, preset: str, condition: str
) -> tuple[SweepCell | None, Interval | None]:
    """Returns the best cell of a preset, and the share of refusals there with other directions and prompts drawn anew."""

    cell = study.chosen_cell(preset, condition)
    if cell is None:
        return None, None
    return cell, study.share(condition, str(cell.layers[0]), cell.weight)


def where(cell: SweepCell | None) -> str:
    return "no layer" if cell is None else f"layer {cell.layers[0]}, w = {cell.weight}"


def sweep_counts(study: Study, preset: str, strength: str = "weight") -> str:
    layers = study.layer_cells(preset, strength)
    return (
        f"{len(study.functional(preset, strength))} of {len(layers)} layers functional, "
        f"{len(study.successful(preset, strength))} with R = 0 ({layer_list(study.successful(preset, strength))})"
    )


def reduces(share: Interval | None) -> bool | None:
    """Returns whether refusals fall by more than the margin: yes, no, or None where the interval allows both."""

    if share is None:
        return None
    if share.high < 1 - MARGIN:
        return True
    return False if share.low >= 1 - MARGIN else None


def eliminates(share: Interval | None) -> bool | None:
    """Returns whether fewer refusals than the margin are left: yes, no, or None where the interval allows both."""

    if share is None:
        return None
    if share.high <= MARGIN:
        return True
    return False if share.low > MARGIN else None
