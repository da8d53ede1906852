# SPDX-License-Identifier: AGPL-3.0-or-later

"""What property-based tests draw: directions, residuals and texts with everything in them that can go wrong."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from heretic_contrast.directions.baselines import Residuals

CLASSES = ("drugs", "fraud", "hacking", "weapons")

seeds = st.integers(0, 2**31 - 1)


def fewer(divisor: int) -> Callable[[Any], Any]:
    """Divides the number of examples of a test that takes its time."""

    return settings(max_examples=max(3, settings.default.max_examples // divisor))


def normal(*shape: int, seed: int) -> Tensor:
    """Returns independent normal numbers, float32."""

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def direction_sets(
    draw: st.DrawFn, lowest: int = 0, highest: int = 0, most: int = 64, hidden: int = 80
) -> Tensor:
    """
    Draws directions: parallel or not, some of them zero, equal, or opposite.

    Tensor of shape (n_directions, hidden_size), float32, of 1 to `most` directions and up to `hidden` dimensions, so that
    there may be more directions than dimensions. Lengths are 10^e, each with its own e between `lowest` and `highest`.
    """

    n, size, seed = draw(st.integers(1, most)), draw(st.integers(1, hidden)), draw(seeds)
    vectors = normal(n, size, seed=seed).double()
    # Class directions are nearly parallel.
    vectors = vectors * draw(st.sampled_from([1.0, 0.3, 0.01])) + normal(size, seed=seed + 1)
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    row = st.integers(0, n - 1)
    for target, source in draw(st.lists(st.tuples(row, row), max_size=4)):
        vectors[target] = vectors[source] * draw(st.sampled_from([1.0, -1.0]))
    for target in draw(st.lists(row, max_size=3)):
        vectors[target] = 0
    if (lowest, highest) != (0, 0):
        exponents = draw(st.lists(st.integers(lowest, highest), min_size=n, max_size=n))
        vectors = vectors * torch.tensor([10.0**e for e in exponents], dtype=torch.float64)[:, None]
    return vectors.float()


@st.composite
def weights_for(draw: st.DrawFn, vectors: Tensor, highest: float = 1.5) -> Tensor:
    """Draws a weight for each direction, from 0 to `highest`. Tensor of shape (n_directions,), float64."""

    if draw(st.booleans()):
        return torch.full((len(vectors),), draw(st.floats(0, highest)), dtype=torch.float64)
    weights = highest * torch.rand(
        len(vectors), generator=torch.Generator().manual_seed(draw(seeds)), dtype=torch.float64
    )
    weights[draw(st.integers(0, len(vectors) - 1))] = 0
    return weights


@st.composite
def pools(draw: st.DrawFn, layers: int = 1, whole: bool = False) -> Residuals:
    """
    Draws residuals of all pools, from one prompt per class and pool up, some of them equal.

    Tensors of shape (n_prompts, layers, hidden_size). With `whole`, all numbers are small integers, which float32 adds
    exactly.
    """

    seed, hidden = draw(seeds), draw(st.integers(2, 24))
    names = CLASSES[: draw(st.integers(1, len(CLASSES)))]
    counts = st.integers(1, 12)
    classes = {
        pool: [name for name in names for _ in range(draw(counts))]
        for pool in ("harmful", "matched")
    }
    sizes = {**{pool: len(found) for pool, found in classes.items()}, "bulk": draw(counts)}
    residuals = {}
    for offset, (pool, size) in enumerate(sorted(sizes.items())):
        values = 3 * normal(size, layers, hidden, seed=seed + offset)
        if whole:
            values = (10 * values).round()
        row = st.integers(0, size - 1)
        for target, source in draw(st.lists(st.tuples(row, row), max_size=2)):
            values[target] = values[source]
        residuals[pool] = values
    return Residuals(
        harmful=residuals["harmful"],
        harmful_classes=tuple(classes["harmful"]),
        bulk=residuals["bulk"],
        matched=residuals["matched"],
        matched_classes=tuple(classes["matched"]),
    )


def changed(residuals: Residuals, change: Callable[[Tensor], Tensor]) -> Residuals:
    """Returns residuals with the same change made to every pool."""

    return Residuals(
        harmful=change(residuals.harmful),
        harmful_classes=residuals.harmful_classes,
        bulk=change(residuals.bulk),
        matched=change(residuals.matched),
        matched_classes=residuals.matched_classes,
    )


def shuffled(layer: Residuals, seed: int) -> tuple[Residuals, Tensor]:
    """Returns every pool in another order, and the order of the harmful one."""

    generator = torch.Generator().manual_seed(seed)
    a, b, c = (
        torch.randperm(len(pool), generator=generator)
        for pool in (layer.harmful, layer.bulk, layer.matched)
    )
    return (
        Residuals(
            harmful=layer.harmful[a],
            harmful_classes=tuple(layer.harmful_classes[int(index)] for index in a),
            bulk=layer.bulk[b],
            matched=layer.matched[c],
            matched_classes=tuple(layer.matched_classes[int(index)] for index in c),
        ),
        a,
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
"""Anything that JSON can hold."""
