# SPDX-License-Identifier: AGPL-3.0-or-later

"""
What is compared: conditions that differ in one thing at a time, and the directions that each of them needs.

A condition is a name, settings of the extraction, and what a weight means ("weight" of every direction, or
"effective": of their strongest shared component).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from heretic_contrast.directions.baselines import Residuals
from heretic_contrast.directions.directions import Directions
from heretic_contrast.directions.extraction import extract_directions
from heretic_contrast.errors import ContrastError
from heretic_contrast.settings import PRESETS, ContrastSettings

from .pools import MATCHED, SENSITIVE, Draw, StudyPools

BASELINES = ("unmatched", "matched", "sensitive", "mixed", "nearest", "residualized")
"""The contrast baselines; "sensitive" is `matched` with the second matched pool."""

METHODS = ("mean", "som")
"""One mean direction, or one direction per class from self-organizing maps."""

_LINEAGE = ("som_rows", "som_columns", "som_sigma", "som_learning_rate", "som_topology")

MAPS: dict[str, dict[str, Any]] = {
    "small": {"som_rows": 2, "som_columns": 2},
    "large": {"som_rows": 4, "som_columns": 4},
    "slower": {"som_learning_rate": 0.1},
    "slow": {"som_learning_rate": 0.01},
    "narrower": {"som_sigma": 0.5},
    "narrow": {"som_sigma": 0.33},
    "hexagonal": {"som_topology": "hexagonal"},
    "short": {"som_iterations": 1_000},
    "long": {"som_iterations": 100_000},
    "three": {"winners": 3},
    "means": {"method": "mean"},
    "piras": {name: PRESETS["som-sequential"][name] for name in _LINEAGE},
}
"""Other settings of the maps, which the paper leaves open: each differs from MiniSom's defaults in one thing, is that of Piras et al., or is no map: the class's mean."""

SHUFFLED = "shuffled"
"""The control whose labels mean nothing: harmful and general harmless prompts are mixed before they are contrasted."""

SETTINGS: dict[str, dict[str, Any]] = {
    **MAPS,
    "mean": {"method": "mean", "classes": "single"},
    "svd": {"svd": True},
    "svd1": {"svd": True, "svd_rank": 1},
    "raw": {"scale": "raw"},
    "lengthened": {"scale": "unmatched"},
    SENSITIVE: {"baseline": "matched"},
    "random": {"baseline": "unmatched", "control": "random"},
    SHUFFLED: {"baseline": "unmatched"},
}
"""What methods other than "som", and baselines that are not called so, set."""


@dataclass(frozen=True)
class Condition:
    """
    One condition.

    `directions`: the name of its directions (see `DirectionsMaker`). `grid`: which weights it is measured at: "main",
    "control", "equal" on all layers, "paper" or "strong" on single ones. `excluded`: the category that was left out.
    """

    name: str
    directions: str
    strength: str
    grid: str
    excluded: str | None = None


def _named(names: Iterable[str], strength: str, grid: str) -> list[Condition]:
    """Returns conditions that are called what their directions are."""

    return [Condition(name, name, strength, grid) for name in names]


def all_layer_conditions(pools: StudyPools, left_out: list[str]) -> list[Condition]:
    """Returns the conditions that are measured on all layers at once."""

    baselines = [name for name in BASELINES if name != SENSITIVE or SENSITIVE in pools.matched]
    names = [f"{method} {baseline}" for method in METHODS for baseline in baselines]
    conditions = _named(names, "effective", "main")
    for name in ("unmatched", "matched"):
        conditions += _named([f"svd {name}", f"svd1 {name}"], "effective", "main")
        conditions.append(Condition(f"som {name}, equal weight", f"som {name}", "weight", "equal"))
        conditions += _named([f"raw {name}"], "weight", "equal")
    conditions += _named(["lengthened matched"], "weight", "equal")
    conditions += _named([f"{name} unmatched" for name in MAPS], "effective", "main")
    for method in METHODS:
        names = [
            f"{method} {name}"
            for name in ("matched, filtered", "unmatched, filtered", "random", SHUFFLED)
        ]
        conditions += _named(names, "effective", "control")
    return conditions + [
        Condition(
            f"som {name}, left out",
            f"som {name} without {category}",
            "effective",
            "control",
            category,
        )
        for category in left_out
        for name in ("unmatched", "matched")
    ]


def single_layer_conditions() -> list[Condition]:
    """Returns the conditions that are measured on single layers: the paper's three at its weights, and controls."""

    paper = ("som unmatched", "som matched", "svd matched", "raw matched", "raw unmatched")
    strong = ("mean unmatched", "mean matched", "svd matched", "svd1 matched")
    conditions = [Condition(f"{name}, equal weight", name, "weight", "paper") for name in paper]
    return conditions + _named(strong, "effective", "strong")


def require_conditions(pools: StudyPools, names: Iterable[str]) -> None:
    """Raises `ContrastError` when a condition does not exist."""

    conditions = [*all_layer_conditions(pools, [""]), *single_layer_conditions()]
    known = list(dict.fromkeys(condition.name for condition in conditions))
    for name in names:
        if name not in known:
            raise ContrastError(
                f'There is no condition "{name}": give some of {", ".join(map(repr, known))}.'
            )


@dataclass(frozen=True)
class DirectionsMaker:
    """
    Makes the directions of a seed by name, each once.

    Names: METHOD BASELINE, with the methods "mean", "som", "svd" (of the som directions), "svd1" (its first vector alone), and
    those of `MAPS` (som directions of other maps); "raw BASELINE" and "lengthened matched" are som directions whose length counts; "METHOD BASELINE, filtered" only
    uses prompts that the model treats as assumed; "METHOD random"; "METHOD shuffled"; "som BASELINE without CATEGORY".
    """

    pools: StudyPools
    residuals: Mapping[str, Tensor]
    refused: Mapping[str, list[bool]]
    draw: Draw
    provenance: Mapping[str, Any]
    _made: dict[str, Directions] = field(default_factory=dict)

    def make(self, name: str) -> Directions:
        """Returns the directions of that name."""

        if name not in self._made:
            self._made[name] = self._extract(name)
        return self._made[name]

    def _extract(self, name: str) -> Directions:
        base, _, excluded = name.partition(" without ")
        base, filtered = base.removesuffix(", filtered"), base.endswith(", filtered")
        method, baseline = base.split(" ")
        settings: dict[str, Any] = {
            "method": "som",
            "classes": "category",
            "baseline": baseline,
            "orthogonalize_direction": False,
            "exclude_categories": [excluded] if excluded else [],
            "seed": self.draw.seed,
            **SETTINGS.get(method, {}),
            **SETTINGS.get(baseline, {}),
        }
        pool = SENSITIVE if baseline == SENSITIVE else MATCHED
        residuals = self._residuals_of(pool, filtered)
        if baseline == SHUFFLED:
            residuals = shuffled(residuals, self.draw.seed)
        directions = extract_directions(residuals, ContrastSettings(**settings), self.provenance)
        return self._relative(directions) if method in ("raw", "lengthened") else directions

    def _relative(self, directions: Directions) -> Directions:
        """
        Measures lengths in units of the unmatched baseline's mean length in the same layer.

        Residuals grow with depth; without a common unit per layer, the late layers would decide everything.
        """

        units = self.make("som unmatched").class_directions.norm(dim=-1).mean(dim=1)
        units = torch.where(units > 0, units, torch.ones_like(units))
        return replace(directions, tensor=(directions.tensor / units[:, None, None]).contiguous())

    def _residuals_of(self, pool: str, filtered: bool) -> Residuals:
        """Returns the residuals of the drawn prompts, with the matched pool of that name."""

        def chosen(name: str, should_refuse: bool) -> list[int]:
            return [
                index
                for index in self.draw.fitted[name]
                if not filtered or self.refused[name][index] == should_refuse
            ]

        harmful, bulk = chosen("harmful", True), chosen("bulk", False)
        matched = chosen(pool, False)
        classes = [self.pools.harmful[index].category or "" for index in harmful]
        if pool == SENSITIVE:
            # One reference for all classes, since this pool does not cover each of them.
            names = sorted(set(classes))
            matched_classes = [name for name in names for _ in matched]
            matched = matched * len(names)
        else:
            matched_classes = [self.pools.matched[pool][index].category or "" for index in matched]
        return Residuals(
            harmful=self.residuals["harmful"][harmful],
            harmful_classes=tuple(classes),
            bulk=self.residuals["bulk"][bulk],
            matched=self.residuals[pool][matched],
            matched_classes=tuple(matched_classes),
        )


def shuffled(residuals: Residuals, seed: int) -> Residuals:
    """Returns residuals whose harmful and general harmless prompts have changed places at random; their numbers stay."""

    both = torch.cat([residuals.harmful, residuals.bulk])
    both = both[torch.randperm(len(both), generator=torch.Generator().manual_seed(seed))]
    n_harmful = len(residuals.harmful)
    return replace(residuals, harmful=both[:n_harmful], bulk=both[n_harmful:])


def distinct(
    names: list[str], make: Callable[[str], Directions]
) -> tuple[dict[str, Directions], dict[str, str]]:
    """
    Returns the different directions among those of some names, and for each name the one that stands for it.

    Where a filter drops nothing, for example, two names mean the same directions, which need measuring only once.
    """

    first: dict[str, str] = {}
    stands_for = {name: first.setdefault(make(name).digest(), name) for name in names}
    return {name: make(name) for name in first.values()}, stands_for
