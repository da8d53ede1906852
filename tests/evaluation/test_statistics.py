# SPDX-License-Identifier: AGPL-3.0-or-later

"""Intervals against SciPy, and against their definitions."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from heretic_contrast.evaluation.statistics import wilson_interval


@pytest.mark.parametrize("n", [1, 2, 10, 12, 100, 450])
def test_wilson_interval_is_that_of_scipy(n: int) -> None:
    for successes in sorted({0, 1, n // 3, n // 2, n - 1, n}):
        reference = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
        assert wilson_interval(successes, n) == pytest.approx(
            (reference.low, reference.high), abs=1e-12
        )


@settings(deadline=None)
@given(st.integers(1, 2000), st.data())
def test_wilson_interval_solves_its_equation(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    low, high = wilson_interval(successes, n)
    assert 0.0 <= low <= successes / n <= high <= 1.0
    z = stats.norm.ppf(0.975)
    for end in (low, high):
        # Both ends are the proportions from which the observed one is z standard errors away.
        distance = (successes / n - end) ** 2
        assert distance == pytest.approx(z * z * end * (1 - end) / n, abs=1e-9)


@settings(deadline=None)
@given(st.integers(0, 500), st.data())
def test_wilson_interval_mirrors_failures(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    low, high = wilson_interval(successes, n)
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_interval_reaches_the_ends_exactly() -> None:
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)
