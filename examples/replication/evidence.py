# SPDX-License-Identifier: AGPL-3.0-or-later

"""Stored results, read for the report: conditions as outcomes, the sweep's cells, and what directions look like."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from heretic_contrast.errors import ContrastError

from .measurement import FORMAT
from .statistics import (
    Contrast,
    Draws,
    Interval,
    Outcomes,
    contrast,
    interval,
    mean_interval,
    share_interval,
    shares,
    stack_outcomes,
)

COMMON = "mean unmatched"
"""Where this halves refusals, what cannot be compared where its reference does is compared, since some references never do."""


class SweepCell(NamedTuple):
    """A cell of the paper's sweep; see `measurement.compact_sweep`."""

    configuration: str
    strength: str
    layers: list[int]
    weight: float
    effective: float
    refusals: int
    incoherent: int
    kl: float
    kl_error: float

    def key(self) -> tuple[str, str, tuple[int, ...], float]:
        return self.configuration, self.strength, tuple(self.layers), self.weight

    def rank(self) -> tuple[int, float, list[int], float]:
        """Puts the fewest refusals first, then the least divergence."""

        return self.refusals, self.kl, self.layers, self.weight


class Study:
    """The stored results of one model."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.name: str = data["name"]
        self.n_seeds = len(data["seeds"])
        self.n_cells = sum(
            len(curve["weights"]) for seed in data["seeds"] for curve in seed["curves"]
        )
        # The bootstrap's draws are shared by all conditions.
        self.draws = Draws.make(self.n_seeds, len(data["judged_categories"]))
        self.cells = [SweepCell(*cell) for cell in data["sweep"]["cells"]]
        # What the unmodified model does in the sweep.
        base = data["sweep"]["baseline"]
        self.sweep_base: int = base["refusals"]
        self.sweep_prompts: int = base["n_harmful"]
        self.sweep_floor: float = base["kl"]

    def in_16_bits(self) -> "Study | None":
        """Returns the study with the sweep in 16 bits, or None where there is none."""

        other = self.data.get("sweep_16_bits")
        return None if other is None else Study({**self.data, "sweep": other})

    def with_cells(self, cells: Sequence[SweepCell]) -> "Study":
        """Returns the study with these cells of its sweep, and no others."""

        return Study({**self.data, "sweep": {**self.data["sweep"], "cells": cells}})

    def single_cells(self, configuration: str, strength: str = "weight") -> list[SweepCell]:
        """Returns the sweep's cells of single layers."""

        of = (configuration, strength)
        return [cell for cell in self.cells if cell[:2] == of and len(cell.layers) == 1]

    def layer_cells(
        self, configuration: str, strength: str = "weight"
    ) -> dict[int, list[SweepCell]]:
        """Returns the cells of single layers by layer, in the order of their weights."""

        found: dict[int, list[SweepCell]] = {}
        for cell in sorted(self.single_cells(configuration, strength)):
            found.setdefault(cell.layers[0], []).append(cell)
        return found

    def _layers_below(self, refusals: int, configuration: str, strength: str) -> list[int]:
        return [
            layer
            for layer, cells in self.layer_cells(configuration, strength).items()
            if min(cell.refusals for cell in cells) < refusals
        ]

    def functional(self, configuration: str, strength: str = "weight") -> list[int]:
        """Returns the layers at which some weight leaves fewer refusals."""

        return self._layers_below(self.sweep_base, configuration, strength)

    def successful(self, configuration: str, strength: str = "weight") -> list[int]:
        """Returns the layers at which some weight leaves no refusal."""

        return self._layers_below(1, configuration, strength)

    def best_cell(self, configuration: str) -> SweepCell:
        """Returns the best of the sweep's cells at equal weight."""

        return min(self.single_cells(configuration), key=SweepCell.rank)

    def chosen_cell(self, configuration: str, condition: str) -> SweepCell | None:
        """Returns the best of the sweep's cells at which a condition was measured again, or None where there is none."""

        measured = {
            (curve["scope"], weight)
            for curve in self.data["seeds"][0]["curves"]
            if curve["condition"] == condition
            for weight in curve["weights"]
        }
        cells = self.single_cells(configuration)
        found = (cell for cell in cells if (str(cell.layers[0]), cell.weight) in measured)
        return min(found, key=SweepCell.rank, default=None)

    def outcomes(
        self, condition: str, scope: str = "all", like: str | None = None
    ) -> Outcomes | None:
        """
        Returns the outcomes of a condition, or None where it was not measured.

        A condition that leaves a category out is judged on that category. With `like`, a condition is judged on the
        same prompts as that other one, row by row.
        """

        categories = self.data["judged_categories"]
        rows = []
        for position, seed in enumerate(self.data["seeds"]):
            curves = [curve for curve in seed["curves"] if curve["scope"] == scope]
            for curve in curves:
                if curve["condition"] != condition:
                    continue
                judged_on = [curve["excluded"]]
                if like is not None:
                    judged_on = [item["excluded"] for item in curves if item["condition"] == like]
                for category in judged_on:
                    judged = {
                        index: category is None or categories[index] == category
                        for index in seed["judged"]
                    }
                    rows.append(
                        {**curve, "floor": seed["kl_floor"], "judged": judged, "seed": position}
                    )
        return stack_outcomes(rows, len(categories)) if rows else None

    def contrast(self, condition: str, reference: str, at: str | None = None) -> Contrast | None:
        """
        Returns one condition against another on all layers at equal divergence, or None where that is not possible.

        That is the divergence at which the reference halves refusals, or `at`, a third one. Where the condition leaves categories
        out, both are judged on these.
        """

        like = condition if condition.endswith(", left out") else None
        first, second = self.outcomes(condition), self.outcomes(reference, like=like)
        third = None if at is None else self.outcomes(at)
        if first is None or second is None or (at is not None and third is None):
            return None
        return contrast(first, second, self.draws, third)

    def common_contrast(self, condition: str, reference: str) -> Contrast | None:
        """As `contrast`; where the reference does not halve refusals, at the divergence at which `COMMON` does."""

        found = self.contrast(condition, reference)
        return self.contrast(condition, reference, COMMON) if found is None else found

    def share(self, condition: str, scope: str, weight: float) -> Interval | None:
        """Returns the share of refusals of a condition at a weight."""

        found = self.outcomes(condition, scope)
        if found is None or weight not in found.weights:
            return None
        return share_interval(found, self.draws, found.weights.index(weight))

    def share_difference(
        self, condition: str, reference: str, scope: str, weight: float
    ) -> Interval | None:
        """Returns the difference in the share of refusals at the same weight, paired."""

        drawn = []
        for name in (condition, reference):
            found = self.outcomes(name, scope)
            if found is None or weight not in found.weights:
                return None
            drawn.append(shares(found, self.draws)[:, found.weights.index(weight)])
        return interval(drawn[0] - drawn[1])

    def shape(
        self, directions: str, what: str, layers: list[int] | None = None
    ) -> list[list[float | None]] | None:
        """Returns a property of directions by seed and layer (or pair), or None where it was not recorded."""

        described = [seed["shape"].get(directions) for seed in self.data["seeds"]]
        if None in described:
            return None
        rows = [item[what] for item in described]
        return rows if layers is None else [[row[layer] for layer in layers] for row in rows]

    def shape_interval(
        self, directions: str, what: str, layers: list[int] | None = None
    ) -> Interval | None:
        """Returns the mean of a property over seeds and layers (or pairs), with a bootstrap over seeds and these."""

        rows = self.shape(directions, what, layers)
        return None if rows is None else mean_interval(rows)

    def shape_by_layer(self, directions: str, what: str) -> list[float | None]:
        """Returns the mean of a property over seeds, for each layer."""

        means: list[float | None] = []
        for column in zip(*(self.shape(directions, what) or []), strict=True):
            values = [value for value in column if value is not None]
            means.append(sum(values) / len(values) if values else None)
        return means

    def shape_difference(self, first: str, second: str, what: str) -> Interval | None:
        """Returns the mean difference of a property that is recorded per pair, paired over seeds and pairs."""

        a, b = self.shape(first, what), self.shape(second, what)
        if a is None or b is None:
            return None
        rows: list[list[float | None]] = [
            [None if x is None or y is None else x - y for x, y in zip(*pair, strict=True)]
            for pair in zip(a, b, strict=True)
        ]
        return mean_interval(rows)


def load_studies(directory: Path) -> list[Study]:
    """
    Returns the studies of a directory, the built-in refuser first.

    Raises `ContrastError` when there is none, or a file is not a result of `measure`.
    """

    studies = []
    for path in sorted(directory.glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ContrastError(f"{path} cannot be read as JSON: measure it again.") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ContrastError(
                f"{path} holds no results of this version of the measurement: measure it again, or move it away."
            )
        studies.append(Study(data))
    if not studies:
        raise ContrastError(f"There are no results in {directory}: run measure first.")
    return sorted(studies, key=lambda study: (study.name != "refuser", study.name))
