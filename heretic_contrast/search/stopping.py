# SPDX-License-Identifier: AGPL-3.0-or-later

"""When a trial, or a study, cannot find anything any more."""

Point = tuple[float, float]
"""Refusals and divergence of a trial, or what they are at least."""


def dominates(point: Point, other: Point) -> bool:
    """
    Returns whether a finished trial leaves another one no place on the front: it is as good in both.

    That holds for whatever refusals and divergence `other` may still get, since neither becomes smaller.
    """

    return point[0] <= other[0] and point[1] <= other[1]
