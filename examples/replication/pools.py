# SPDX-License-Identifier: AGPL-3.0-or-later

"""Which prompts directions are fitted to, which are judged, and the subsets that a seed draws."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from heretic_contrast.builtin import matched_pool, refuser_pool
from heretic_contrast.errors import ContrastError
from heretic_contrast.evaluation.capture import load_pairs
from heretic_contrast.evaluation.plan_settings import WEIGHTS
from heretic_contrast.evaluation.results import Pair
from heretic_contrast.prompts import Prompt, is_text, load_pool
from heretic_contrast.prompts.categories import MISCELLANEOUS, assign
from heretic_contrast.prompts.formats import read_file
from heretic_contrast.prompts.sampling import draw_evenly

MATCHED = "matched"
"""The matched pool of the model, or the one shipped with the package."""

SENSITIVE = "sensitive"
"""A second matched pool: harmless prompts on sensitive subjects (XSTest's safe ones), one reference for all classes."""

SMALLEST_CLASS = 9
"""The neurons of the paper's map: a class with fewer prompts gets no direction of its own."""


@dataclass(frozen=True)
class StudyOptions:
    """How much is measured. Grids are weights by the name of a condition's grid."""

    seeds: int = 5
    share: float = 2 / 3
    n_judged: int = 40
    n_references: int = 40
    n_canaries: int = 5
    n_left_out: int = 3
    single_layers: int = 3
    tokens: int = 50
    main_weights: tuple[float, ...] = (0.15, 0.3, 0.5, 0.7, 1.0)
    control_weights: tuple[float, ...] = (0.3, 0.5, 0.7, 1.0)
    equal_weights: tuple[float, ...] = (0.03, 0.06, 0.12, 0.3, 1.0)
    paper_weights: tuple[float, ...] = WEIGHTS
    strong_weights: tuple[float, ...] = (1.0, 2.0, 4.0)
    conditions: tuple[str, ...] = ()

    def weights(self, grid: str) -> tuple[float, ...]:
        found: tuple[float, ...] = getattr(self, f"{grid}_weights")
        return found


@dataclass(frozen=True)
class StudyPools:
    """
    All prompts of a study.

    `harmful`, `bulk`, `matched`: what directions are fitted to. `judged`: harmful prompts that may be judged.
    `references`: general harmless prompts for the divergence. No judged or reference prompt is fitted to.
    """

    harmful: tuple[Prompt, ...]
    bulk: tuple[Prompt, ...]
    matched: dict[str, tuple[Prompt, ...]]
    judged: tuple[Prompt, ...]
    references: tuple[Prompt, ...]
    pairs: tuple[Pair, ...]

    def fitted(self) -> dict[str, tuple[Prompt, ...]]:
        """Returns the pools that directions are fitted to, by name."""

        return {"harmful": self.harmful, "bulk": self.bulk, **self.matched}


def builtin_pools() -> StudyPools:
    """Returns the pools of the built-in refuser."""

    def read(pool: str, split: str) -> tuple[Prompt, ...]:
        return tuple(load_pool(refuser_pool(pool, split), pool))

    return StudyPools(
        harmful=read("harmful", "train"),
        bulk=read("harmless", "train"),
        matched={MATCHED: read("matched", "train")},
        judged=read("harmful", "test"),
        references=read("harmless", "test"),
        pairs=tuple(load_pairs(None, "builtin:refuser")),
    )


def file_pools(path: Path) -> StudyPools:
    """
    Returns pools from a JSON Lines file of objects with text, label, split and source.

    Labels are "harmful" and "harmless", splits "train" and "test"; harmless prompts of the source XSTest make the pool
    of sensitive subjects. Categories are those of the shipped lexicon.

    Raises `ContrastError` when the file cannot be read, a line lacks a field, or a pool is empty.
    """

    rows: dict[tuple[str, str, bool], list[Prompt]] = defaultdict(list)
    columns = ("text", "label", "split", "source")
    for row in read_file(path, columns).rows:
        text, label, split, source = cells = [row.cells.get(column) for column in columns]
        if not all(map(is_text, cells)):
            raise ContrastError(
                f"{row.place} is not a row with text, label, split and source: correct it."
            )
        rows[label, split, "XSTest" in source].append(Prompt(text, category=assign(text)))
    matched = {MATCHED: tuple(load_pool(matched_pool(), MATCHED))}
    sensitive = tuple(rows["harmless", "train", True])
    if sensitive:
        matched[SENSITIVE] = sensitive
    pools = StudyPools(
        harmful=tuple(rows["harmful", "train", False] + rows["harmful", "train", True]),
        bulk=tuple(rows["harmless", "train", False]),
        matched=matched,
        judged=tuple(rows["harmful", "test", False] + rows["harmful", "test", True]),
        references=tuple(rows["harmless", "test", False]),
        pairs=tuple(load_pairs()),
    )
    for name, prompts in (
        ("harmful train", pools.harmful),
        ("harmless train", pools.bulk),
        ("harmful test", pools.judged),
        ("harmless test", pools.references),
    ):
        if not prompts:
            raise ContrastError(f"{path} holds no {name} prompts (outside XSTest, if harmless).")
    used = {prompt.text for prompts in pools.fitted().values() for prompt in prompts}
    return replace(
        pools,
        judged=tuple(prompt for prompt in pools.judged if prompt.text not in used),
        references=tuple(prompt for prompt in pools.references if prompt.text not in used),
    )


def by_category(prompts: Sequence[Prompt], indices: Iterable[int]) -> dict[str, list[int]]:
    """Returns indices of prompts by category."""

    found: dict[str, list[int]] = defaultdict(list)
    for index in indices:
        found[prompts[index].category or ""].append(index)
    return dict(found)


def draw_share(prompts: Sequence[Prompt], share: float, generator: random.Random) -> list[int]:
    """Returns the sorted indices of a random share of the prompts of each category, rounded up."""

    chosen: list[int] = []
    for _, indices in sorted(by_category(prompts, range(len(prompts))).items()):
        chosen += generator.sample(indices, -int(-len(indices) * share // 1))
    return sorted(chosen)


@dataclass(frozen=True)
class Draw:
    """What one seed draws, as indices into the pools. `left_out` are the categories that it leaves out in turn."""

    seed: int
    fitted: dict[str, list[int]]
    judged: list[int]
    references: list[int]
    left_out: list[str]


def draw(pools: StudyPools, refused: Sequence[int], seed: int, options: StudyOptions) -> Draw:
    """
    Returns the subsets of a seed; each seed has its own.

    `refused`: indices of the judged pool that the unmodified model refuses. Categories that are left out take turns
    over the seeds: named ones with at least `SMALLEST_CLASS` drawn harmful prompts and 3 refused prompts.
    """

    generator = random.Random(f"replication {seed}")
    fitted = {
        name: draw_share(prompts, options.share, generator)
        for name, prompts in pools.fitted().items()
    }
    refused_by_category = by_category(pools.judged, refused)
    n_references = min(options.n_references, len(pools.references))
    fitted_by_category = by_category(pools.harmful, fitted["harmful"])
    candidates = [
        name
        for name, indices in sorted(fitted_by_category.items())
        if name not in ("", MISCELLANEOUS)
        and len(indices) >= SMALLEST_CLASS
        and len(refused_by_category.get(name, ())) >= 3
    ]
    n_left_out = options.n_left_out
    turns = [(seed * n_left_out + offset) for offset in range(min(n_left_out, len(candidates)))]
    return Draw(
        seed=seed,
        fitted=fitted,
        judged=sorted(draw_evenly(refused_by_category, options.n_judged, generator)),
        references=sorted(generator.sample(range(len(pools.references)), n_references)),
        left_out=[candidates[turn % len(candidates)] for turn in turns],
    )
