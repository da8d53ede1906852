# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Curves of R against KL, and their intervals.

Seeds draw their judged prompts from one pool, so the same prompt stands in several seeds. The bootstrap therefore draws
seeds and prompts independently, each with replacement (Owen, 2007), and counts an outcome as often as its seed times
its prompt were drawn. All conditions share the draws, so that differences are paired. The divergence varies over reference
prompts through the seeds, each of which has its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heretic_contrast.evaluation.statistics import wilson_interval

Floats = NDArray[np.float64]

N_DRAWS = 1000
CONFIDENCE = 0.95
MARGIN = 0.1
"""Differences in the share of refusals below one prompt in ten, the paper's resolution, count as none."""


@dataclass(frozen=True)
class Interval:
    """A value with the 2.5th and 97.5th percentile of its bootstrap distribution; infinite where never reached."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Draws:
    """
    How often each draw takes each seed and each prompt.

    `seeds`: array of shape (n_draws + 1, n_seeds), `prompts`: array of shape (n_draws + 1, n_prompts). Row 0 takes
    everything once: the estimate itself.
    """

    seeds: Floats
    prompts: Floats

    @classmethod
    def make(cls, n_seeds: int, n_prompts: int, n_draws: int = N_DRAWS) -> "Draws":
        """Draws with a fixed generator, so that a report always has the same numbers."""

        generator = np.random.default_rng(0)

        def counts(n: int) -> Floats:
            drawn = generator.multinomial(n, np.full(n, 1 / n), size=n_draws)
            return np.concatenate([np.ones((1, n)), drawn]).astype(np.float64)

        return cls(counts(n_seeds), counts(n_prompts))


@dataclass(frozen=True)
class Outcomes:
    """
    The outcomes of one condition.

    `refused`, `incoherent`: arrays of shape (n_weights, n_rows, n_prompts), 0 or 1. `judged`: array of shape
    (n_rows, n_prompts), 1 where a row judged the prompt. `kl`: array of shape (n_weights, n_rows), above the floor.
    `row_seeds`: the seed that each row belongs to. `weights`, `effective`: per weight.
    """

    weights: tuple[float, ...]
    effective: tuple[float, ...]
    refused: Floats
    incoherent: Floats
    judged: Floats
    kl: Floats
    row_seeds: tuple[int, ...]

    @property
    def n_judged(self) -> int:
        """The number of judged responses at each weight."""

        return int(self.judged.sum())

    @property
    def n_distinct(self) -> int:
        """The number of different prompts among the judged ones."""

        return int((self.judged.sum(axis=0) > 0).sum())


def shares(outcomes: Outcomes, draws: Draws) -> Floats:
    """
    Returns the share of refusals. Array of shape (n_draws + 1, n_weights).

    A draw that takes none of the judged prompts gives NaN.
    """

    of_row = draws.seeds[:, list(outcomes.row_seeds)]
    # Sum over prompts first: (n_draws, n_rows, n_weights), then over rows.
    hits = np.einsum("bp,wrp->brw", draws.prompts, outcomes.refused * outcomes.judged)
    totals = draws.prompts @ outcomes.judged.T
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(
            np.einsum("br,brw->bw", of_row, hits) / (of_row * totals).sum(axis=1)[:, None]
        )


def divergences(outcomes: Outcomes, draws: Draws) -> Floats:
    """Returns the mean divergence over seeds. Array of shape (n_draws + 1, n_weights)."""

    of_row = draws.seeds[:, list(outcomes.row_seeds)]
    return np.asarray(of_row @ outcomes.kl.T / of_row.sum(axis=1, keepdims=True))


def envelopes(kl: Floats, share: Floats) -> tuple[Floats, Floats]:
    """
    Returns the least share of refusals that is reached at a divergence of at most so much: √KL, and shares.

    Starts at the unmodified model, which refuses everything at no divergence. In √KL, since a divergence grows with
    the square of a small change. Arrays of shape (n_draws, n_weights) to ones of shape (n_draws, n_weights + 1).
    """

    order = np.argsort(kl, axis=1, kind="stable")
    x = np.sqrt(np.maximum(np.take_along_axis(kl, order, axis=1), 0.0))
    y = np.take_along_axis(share, order, axis=1)
    x = np.concatenate([np.zeros((len(x), 1)), x], axis=1)
    y = np.concatenate([np.ones((len(y), 1)), y], axis=1)
    return x, np.minimum.accumulate(y, axis=1)


def share_at(kl: Floats, share: Floats, level: float) -> Floats:
    """Returns the share of refusals of each draw at a divergence, interpolated; beyond the last weight its share."""

    curves = zip(*envelopes(kl, share), strict=True)
    return np.array([np.interp(np.sqrt(level), x, y) for x, y in curves])


def kl_at(kl: Floats, share: Floats, level: float) -> Floats:
    """
    Returns the divergence at which the refusals of each draw have fallen to a share, interpolated.

    Infinite where they never do, NaN where a share is.
    """

    x, y = envelopes(kl, share)
    rising = zip(y[:, ::-1], x[:, ::-1], strict=True)
    found = np.array([np.interp(level, *curve, left=np.inf) for curve in rising]) ** 2
    return np.where(np.isnan(y).any(axis=1), np.nan, found)


def interval(values: Sequence[float] | Floats) -> Interval:
    """Returns the estimate (the first value) with the percentiles of the others."""

    array = np.asarray(values, dtype=np.float64)
    rest = array[1:][~np.isnan(array[1:])]
    if not len(rest):
        return Interval(float(array[0]), float("nan"), float("nan"))
    # Order statistics, because interpolating towards infinity has no meaning.
    low, high = np.quantile(
        rest, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], method="closest_observation"
    )
    return Interval(float(array[0]), float(low), float(high))


def share_interval(outcomes: Outcomes, draws: Draws, index: int) -> Interval:
    """
    Returns the share of refusals at one weight.

    The interval is the wider of the bootstrap's and Wilson's for as many prompts as were different: where all
    outcomes are equal, a bootstrap sees no uncertainty.
    """

    found = interval(shares(outcomes, draws)[:, index])
    n = outcomes.n_distinct
    low, high = wilson_interval(min(n, round(found.value * n)), n)
    return Interval(found.value, min(found.low, low), max(found.high, high))


@dataclass(frozen=True)
class Contrast:
    """
    One condition against another at equal divergence.

    `level`: the divergence at which the reference refuses half, or a third condition. `share`: of the condition there; `difference`: minus that of
    the reference. `ratio`: divergence that the condition needs to refuse half, over the reference's. `beyond`: whether
    the level lies beyond what the condition was measured at, so that its share there is an upper bound; `reference_beyond`: the same
    of the reference. `below`: whether it lies below what
    either was measured at, so that its share there is a line from the unmodified model, whatever lies between.
    """

    level: float
    share: Interval
    difference: Interval
    ratio: Interval
    beyond: bool
    reference_beyond: bool
    below: bool

    @property
    def unreached(self) -> bool:
        """Whether more weight could still make the one that leaves more as good, since it was not measured up to the level."""

        difference = self.difference.value
        return (self.beyond and difference > 0) or (self.reference_beyond and difference < 0)

    @property
    def verdict(self) -> str:
        """What the difference says: see `judge`."""

        return "undecided" if self.unreached or self.below else judge(self.difference)


def judge(difference: Interval) -> str:
    """
    Returns "worse" (more refusals left) or "better" where the interval excludes 0 and the difference reaches the margin,
    "equal" where the interval lies within the margin, else "undecided".
    """

    if difference.low > 0 and difference.value >= MARGIN:
        return "worse"
    if difference.high < 0 and difference.value <= -MARGIN:
        return "better"
    if difference.low >= -MARGIN and difference.high <= MARGIN:
        return "equal"
    return "undecided"


def contrast(
    condition: Outcomes, reference: Outcomes, draws: Draws, at: Outcomes | None = None
) -> Contrast | None:
    """Returns the contrast where the reference, or `at`, refuses half, or None where that never refuses as little."""

    own_kl, own_share = divergences(condition, draws), shares(condition, draws)
    base_kl, base_share = divergences(reference, draws), shares(reference, draws)
    halving, once = reference if at is None else at, Draws(draws.seeds[:1], draws.prompts[:1])
    level = float(kl_at(divergences(halving, once), shares(halving, once), 0.5)[0])
    if not np.isfinite(level):
        return None
    own = share_at(own_kl, own_share, level)
    # In √KL, as the level is read, so that rounding puts none beyond the weight at which it was found.
    root, own_roots, base_roots = np.sqrt(level), np.sqrt(own_kl[0]), np.sqrt(base_kl[0])
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = kl_at(own_kl, own_share, 0.5) / kl_at(base_kl, base_share, 0.5)
    return Contrast(
        level=level,
        share=interval(own),
        difference=interval(own - share_at(base_kl, base_share, level)),
        ratio=interval(ratio),
        beyond=bool(root > own_roots.max()),
        reference_beyond=bool(root > base_roots.max()),
        below=bool(root < max(own_roots.min(), base_roots.min())),
    )


def mean_interval(rows: Sequence[Sequence[float | None]]) -> Interval:
    """
    Returns the mean of a table of seeds and items, with a bootstrap over both; missing values are left out.

    With one seed and one item there is no interval: NaN.
    """

    table = np.array(rows, dtype=np.float64)
    draws = Draws.make(*table.shape)
    sums, counts = (
        np.einsum("bn,nm,bm->b", draws.seeds, values, draws.prompts)
        for values in (np.nan_to_num(table), (~np.isnan(table)).astype(np.float64))
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums / counts
    return interval(means if table.size > 1 else means[:1])


def normal_bounds(value: float, error: float) -> tuple[float, float]:
    """Returns the value minus and plus its standard error times the normal quantile of the confidence."""

    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    return value - z * error, value + z * error


def stack_outcomes(rows: Sequence[dict[str, Any]], n_prompts: int) -> Outcomes:
    """
    Returns the outcomes of stored curves, one row each.

    A row: weights, effective, kl, floor, outcomes (a string per weight), judged (by the index of a judged prompt, whether it
    counts), and seed (position), as `evidence` collects them.
    """

    weights = tuple(rows[0]["weights"])
    shape = (len(weights), len(rows), n_prompts)
    refused, incoherent = np.zeros(shape), np.zeros(shape)
    judged = np.zeros(shape[1:])
    for position, row in enumerate(rows):
        prompts = list(row["judged"])
        judged[position, prompts] = list(row["judged"].values())
        for index, text in enumerate(row["outcomes"]):
            refused[index, position, prompts] = [letter in "Rr" for letter in text]
            incoherent[index, position, prompts] = [letter.islower() for letter in text]
    return Outcomes(
        weights=weights,
        effective=tuple(np.mean([row["effective"] for row in rows], axis=0).tolist()),
        refused=refused,
        incoherent=incoherent,
        judged=judged,
        kl=np.array([[max(k - row["floor"], 0.0) for k in row["kl"]] for row in rows]).T,
        row_seeds=tuple(row["seed"] for row in rows),
    )
