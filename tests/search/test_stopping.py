# SPDX-License-Identifier: AGPL-3.0-or-later

"""Fronts against the definition, and when one has grown."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from heretic_contrast.search.stopping import Point, front, trials_since_growth

points = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.1, 0.2, 0.3])), max_size=9)


def undominated(points: list[Point]) -> set[Point]:
    return {a for a in points if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in points)}


@given(points)
def test_front_is_what_nothing_dominates(points: list[Point]) -> None:
    found = front(dict(enumerate(points)))
    assert {points[key] for key in found} == undominated(points)
    assert all(points.index(points[key]) == key for key in found)
    assert all(points[a] < points[b] for a, b in pairwise(found))


@given(points)
def test_a_front_grows_where_it_changes(points: list[Point]) -> None:
    last = 0
    for n in range(1, len(points) + 1):
        if undominated(points[:n]) != undominated(points[: n - 1]):
            last = n
    assert trials_since_growth(points) == len(points) - last
    assert trials_since_growth([*points, None, None]) == len(points) - last + 2
