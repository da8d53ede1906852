# SPDX-License-Identifier: AGPL-3.0-or-later

"""When a trial, or a study, cannot find anything any more."""

from collections.abc import Mapping, Sequence

Point = tuple[float, ...]
"""Refusals, divergence and whatever else is minimized of a trial, or what they are at least."""


def dominates(point: Point, other: Point) -> bool:
    """Returns whether a finished trial is as good in everything as another, which only grows, and leaves it no place on the front."""

    return all(a <= b for a, b in zip(point, other, strict=True))


def front(points: Mapping[int, Point]) -> list[int]:
    """Returns the keys of the points that no other one dominates, those with the fewest refusals first; of equal ones the first."""

    found: list[int] = []
    for key in sorted(points, key=lambda key: (*points[key], key)):
        if not any(dominates(points[other], points[key]) for other in found):
            found.append(key)
    return found


def trials_since_growth(points: Sequence[Point | None]) -> int:
    """Returns how many trials there were after the last one that was on the front when it was finished; None is on none."""

    last = 0
    finished: list[Point] = []
    for number, point in enumerate(points, 1):
        if point is not None and not any(dominates(other, point) for other in finished):
            finished.append(point)
            last = number
    return len(points) - last
