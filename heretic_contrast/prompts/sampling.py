# SPDX-License-Identifier: AGPL-3.0-or-later

"""Stratified samples of prompts."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TypeVar

from ..errors import ContrastError
from . import Prompt

Item = TypeVar("Item")


def draw_evenly(
    strata: Mapping[str, list[Item]], count: int, generator: random.Random
) -> list[Item]:
    """Returns `count` items, or all, in rounds over the strata; shuffles these."""

    order = sorted(strata)
    for name in order:
        generator.shuffle(strata[name])
    # Who comes first in the last, partial round is drawn too.
    generator.shuffle(order)
    rounds = zip_longest(*(reversed(strata[name]) for name in order))
    return [item for turn in rounds for item in turn if item is not None][:count]


def stratified_sample(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """
    Returns `count` prompts that cover all categories as evenly as the pool allows (paper, section 3.3).

    Deterministic for a seed, and independent of the order of the pool.

    Raises `ContrastError` when there are fewer prompts than asked for, or fewer are asked for than there are
    categories.
    """

    if len(prompts) < count:
        raise ContrastError(
            f"{count} prompts are asked for, but the pool has {len(prompts)} that directions were not extracted from: ask for "
            "fewer, or give a larger pool."
        )
    strata: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in sorted(prompts, key=lambda prompt: (prompt.category or "", prompt.text)):
        strata[prompt.category or ""].append(prompt)
    if count < len(strata):
        raise ContrastError(
            f"{count} prompts cannot cover {len(strata)} categories: ask for at least {len(strata)}."
        )
    chosen = draw_evenly(strata, count, random.Random(seed))
    return sorted(chosen, key=lambda prompt: (prompt.category or "", prompt.text))


def split_harmless(
    prompts: Sequence[Prompt], n_canaries: int, n_references: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """
    Returns canaries, and the reference prompts of the divergence, drawn from one pool.

    Raises `ContrastError` when the pool has fewer prompts than both need.
    """

    needed = n_canaries + n_references
    if len(prompts) < needed:
        raise ContrastError(
            f"{n_canaries} canaries and {n_references} reference prompts are asked for, but the harmless "
            f"evaluation pool has {len(prompts)} prompts: ask for fewer, or give a larger pool."
        )
    harmless = stratified_sample(prompts, needed, seed)
    # At equal distances, so that canaries and references are alike.
    chosen = {index * needed // n_canaries for index in range(n_canaries)}
    return (
        [prompt for index, prompt in enumerate(harmless) if index in chosen],
        [prompt for index, prompt in enumerate(harmless) if index not in chosen],
    )
