# SPDX-License-Identifier: AGPL-3.0-or-later

"""Stored results, read for the report: conditions as outcomes, the sweep's cells, and what directions look like."""

import json
from dataclasses import dataclass, field
from functools import cached_property
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


@dataclass(frozen=True)
class Study:
    """The stored results of one model."""

    data: dict[str, Any]
    _found: dict[tuple[str, str, str | None], Outcomes | None] = field(default_factory=dict)
    _contrasts: dict[tuple[str, str, str, str | None], Contrast | None] = field(
        default_factory=dict
    )

    @property
    def name(self) -> str:
        """What the model is called."""

        return str(self.data["name"])

    @property
    def n_seeds(self) -> int:
        """The number of seeds."""

        return len(self.data["seeds"])

    @property
    def n_cells(self) -> int:
        """The number of cells of all seeds."""

        return sum(len(curve["weights"]) for seed in self.data["seeds"] for curve in seed["curves"])

    @cached_property
    def draws(self) -> Draws:
        """The bootstrap's draws, shared by all conditions."""

        return Draws.make(self.n_seeds, len(self.data["judged_categories"]))

    @cached_property
    def cells(self) -> list[SweepCell]:
        """The sweep's cells."""

        return [SweepCell(*cell) for cell in self.data["sweep"]["cells"]]

    @property
    def sweep_floor(self) -> float:
        """The divergence of the unmodified model in the sweep."""

        return float(self.data["sweep"]["baseline"]["kl"])

    @property
    def sweep_base(self) -> int:
        """The refusals of the unmodified model in the sweep."""

        return int(self.data["sweep"]["baseline"]["refusals"])

    @property
    def sweep_prompts(self) -> int:
        """How many prompts the sweep judged."""

        return int(self.data["sweep"]["baseline"]["n_harmful"])

    def single_cells(self, configuration: str, strength: str = "weight") -> list[SweepCell]:
        """Returns the sweep's cells of single layers."""

        return [
            cell
            for cell in self.cells
            if (cell.configuration, cell.strength) == (configuration, strength)
            and len(cell.layers) == 1
        ]

    def layer_cells(
        self, configuration: str, strength: str = "weight"
    ) -> dict[int, list[SweepCell]]:
        """Returns the cells of single layers by layer, in the order of their weights."""

        found: dict[int, list[SweepCell]] = {}
        for cell in sorted(
            self.single_cells(configuration, strength),
            key=lambda cell: (cell.layers[0], cell.weight),
        ):
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
        """Returns the sweep's cell with the fewest refusals, then the least divergence, at equal weight."""

        return min(self.single_cells(configuration), key=_rank)

    def chosen_cell(self, configuration: str, condition: str) -> SweepCell | None:
        """Returns the best of the sweep's cells at which a condition was measured again, or None where there is none."""

        measured = {
            (curve["scope"], weight)
            for curve in self.data["seeds"][0]["curves"]
            if curve["condition"] == condition
            for weight in curve["weights"]
        }
        cells = [
            cell
            for cell in self.single_cells(configuration)
            if (str(cell.layers[0]), cell.weight) in measured
        ]
        return min(cells, key=_rank) if cells else None

    def outcomes(
        self, condition: str, scope: str = "all", like: str | None = None
    ) -> Outcomes | None:
        """
        Returns the outcomes of a condition, or None where it was not measured.

        A condition that leaves a category out is judged on that category. With `like`, a condition is judged on the
        same prompts as that other one, row by row.
        """

        key = (condition, scope, like)
        if key not in self._found:
            self._found[key] = _outcomes(self, condition, scope, like)
        return self._found[key]

    def contrast(
        self, condition: str, reference: str, scope: str = "all", like: str | None = None
    ) -> Contrast | None:
        """Returns one condition against another at equal divergence, or None where that is not possible."""

        key = (condition, reference, scope, like)
        if key not in self._contrasts:
            first = self.outcomes(condition, scope)
            second = self.outcomes(reference, scope, like)
            self._contrasts[key] = (
                None if first is None or second is None else contrast(first, second, self.draws)
            )
        return self._contrasts[key]

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

        first, second = self.outcomes(condition, scope), self.outcomes(reference, scope)
        if first is None or second is None or not {weight} <= {*first.weights} & {*second.weights}:
            return None
        a = shares(first, self.draws)[:, first.weights.index(weight)]
        b = shares(second, self.draws)[:, second.weights.index(weight)]
        return interval(a - b)

    def shape(
        self, directions: str, what: str, layers: list[int] | None = None
    ) -> list[list[float | None]] | None:
        """Returns a property of directions by seed and layer (or pair), or None where it was not recorded."""

        rows = []
        for seed in self.data["seeds"]:
            described = seed["shape"].get(directions)
            if described is None:
                return None
            values = described[what]
            rows.append(values if layers is None else [values[layer] for layer in layers])
        return rows

    def shape_interval(
        self, directions: str, what: str, layers: list[int] | None = None
    ) -> Interval | None:
        """Returns the mean of a property over seeds and layers (or pairs), with a bootstrap over seeds and these."""

        rows = self.shape(directions, what, layers)
        return None if rows is None else mean_interval(rows)

    def shape_by_layer(self, directions: str, what: str) -> list[float | None]:
        """Returns the mean of a property over seeds, for each layer."""

        rows = self.shape(directions, what) or []
        means: list[float | None] = []
        for column in zip(*rows, strict=True):
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


def _rank(cell: SweepCell) -> tuple[int, float, list[int], float]:
    return cell.refusals, cell.kl, cell.layers, cell.weight


def _outcomes(study: Study, condition: str, scope: str, like: str | None) -> Outcomes | None:
    """Collects the rows of a condition over the seeds."""

    categories = study.data["judged_categories"]
    rows = []
    for position, seed in enumerate(study.data["seeds"]):
        curves = [curve for curve in seed["curves"] if curve["scope"] == scope]
        own = [curve for curve in curves if curve["condition"] == condition]
        excluded = [
            curve["excluded"] for curve in curves if curve["condition"] == (like or condition)
        ]
        for curve, category in (
            zip(own, excluded, strict=True)
            if like is None
            else [(curve, category) for curve in own for category in excluded]
        ):
            counted = [
                category is None or categories[index] == category for index in seed["judged"]
            ]
            rows.append(
                {
                    **curve,
                    "floor": seed["kl_floor"],
                    "judged": seed["judged"],
                    "counted": counted,
                    "seed": position,
                }
            )
    return stack_outcomes(rows, len(categories)) if rows else None


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
