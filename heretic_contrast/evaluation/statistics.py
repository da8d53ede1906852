# SPDX-License-Identifier: AGPL-3.0-or-later

"""Uncertainty of counts, and how it is written."""

import math
from statistics import NormalDist


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """
    Wilson score interval (95 %) of a proportion, (low, high) in [0, 1].

    It is the set of proportions p with |successes / n - p| <= z sqrt(p (1 - p) / n) (Wilson, 1927), without
    continuity correction. Unlike the normal interval it keeps its coverage for small n and for 0 or n
    successes, which is where refusal counts lie. With n = 0 nothing is known: (0, 1).
    """

    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.975)
    proportion = successes / n
    denominator = 1.0 + z * z / n
    center = (proportion + z * z / (2 * n)) / denominator
    half_width = (
        z / denominator * math.sqrt(proportion * (1.0 - proportion) / n + z * z / (4 * n * n))
    )
    # At 0 and n successes one end is exact; rounding must not move it.
    low = 0.0 if successes == 0 else max(0.0, center - half_width)
    high = 1.0 if successes == n else min(1.0, center + half_width)
    return low, high


def percent(share: float, digits: int = 0) -> str:
    """Returns a share in percent, without the sign. What is near 0 or 100 % is not said to be that."""

    text = f"{100 * share:.{digits}f}"
    rest = min(share, 1 - share)
    # A millionth is what rounding to float32 leaves.
    if rest > 1e-6 and float(text) in (0, 100):
        text = f"{100 * share:.{1 - math.floor(math.log10(100 * rest))}f}"
    return text


def percents(low: float, high: float) -> str:
    """Returns an interval in [0, 1] in percent, without the sign; see `percent`."""

    return f"{percent(low)}–{percent(high)}"
