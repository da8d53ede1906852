# SPDX-License-Identifier: AGPL-3.0-or-later

"""
What a sweep measures, as typed results that turn into JSON and CSV and back.

Nothing here depends on when, where or by how many processes a sweep was run.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .statistics import wilson_interval


def efficiency(
    base_refusals: int, refusals: int, kl_divergence: float, floor: float
) -> float | None:
    """
    Returns (R_base − R) / (KL − KL₀), the refusal reduction per unit of KL divergence (paper, section 3.3).

    None where the divergence does not exceed the floor, or nothing was reduced.
    """

    if kl_divergence <= floor or refusals >= base_refusals:
        return None
    return (base_refusals - refusals) / (kl_divergence - floor)


@dataclass(frozen=True)
class Measurement:
    """
    What one state of the model does: counts over prompts, and its divergence from the unmodified model.

    `kl_divergence` is in nats, averaged over positions; `kl_standard_error` is over prompts.
    """

    refusals: int
    evasive: int
    complied: int
    incoherent: int
    n_harmful: int
    canary_refusals: int
    n_canaries: int
    kl_divergence: float
    kl_standard_error: float

    def refusal_interval(self) -> tuple[float, float]:
        """Returns the Wilson interval (95 %) of the share of refusals."""

        return wilson_interval(self.refusals, self.n_harmful)


@dataclass(frozen=True)
class Cell:
    """
    One configuration at one weight on one layer, or on a set of layers.

    `strength` says what `weight` is: "weight" of every direction, or "effective", where the weights are scaled
    so that λ_max(Σ w v vᵀ) is `weight`. `effective_weight` is the spectral norm of the operator (the largest
    over the layers), `weight_along_mean` is r̂ᵀ C r̂ for the mean direction r̂ (the largest over the layers).
    """

    configuration: str
    strength: str
    layers: tuple[int, ...]
    weight: float
    effective_weight: float
    weight_along_mean: float
    measurement: Measurement
    responses: tuple[str, ...] = ()
    canary_responses: tuple[str, ...] = ()

    def key(self) -> tuple[str, str, tuple[int, ...], float]:
        """Returns what tells the cell from others, in the order in which cells are reported."""

        return (self.configuration, self.strength, self.layers, self.weight)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values."""

        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Cell":
        """Restores a cell."""

        return cls(
            **{
                **data,
                "layers": tuple(data["layers"]),
                "measurement": Measurement(**data["measurement"]),
                "responses": tuple(data["responses"]),
                "canary_responses": tuple(data["canary_responses"]),
            }
        )


@dataclass(frozen=True)
class Synergy:
    """ΔR(set) − max over its layers of ΔR(layer alone), at one weight (paper, section 4.1)."""

    configuration: str
    strength: str
    layers: tuple[int, ...]
    weight: float
    refusals: int
    synergy: int
    kl_divergence: float


@dataclass(frozen=True)
class LayerSummary:
    """
    What one configuration achieves on one layer.

    `functional`: R falls below its baseline at some weight. `successful`: R reaches 0. `minimal_weight` is the
    smallest weight with R = 0, with its divergence and efficiency.
    """

    configuration: str
    strength: str
    layer: int
    functional: bool
    successful: bool
    minimal_weight: float | None
    kl_divergence: float | None
    efficiency: float | None


@dataclass(frozen=True)
class SweepResult:
    """
    A whole sweep.

    `baseline`: the unmodified model; its divergence is the floor KL₀. `pools`: which prompts were used for what, by
    name: count and digest. `settings`: what was swept. `prompts`, `canaries`: the texts, in the order of the
    responses.
    """

    model: str
    baseline: Measurement
    cells: tuple[Cell, ...]
    synergies: tuple[Synergy, ...] = ()
    prompts: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    canaries: tuple[str, ...] = ()
    baseline_responses: tuple[str, ...] = ()
    pools: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def floor(self) -> float:
        """KL₀: the divergence measured for the unmodified model."""

        return self.baseline.kl_divergence

    def configurations(self) -> list[tuple[str, str]]:
        """Returns the pairs of configuration and strength, in the order of the cells."""

        return list(dict.fromkeys((cell.configuration, cell.strength) for cell in self.cells))

    def single_cells(self, configuration: str, strength: str) -> list[Cell]:
        """Returns the cells of single layers of one configuration."""

        return [
            cell
            for cell in self.cells
            if (cell.configuration, cell.strength) == (configuration, strength)
            and len(cell.layers) == 1
        ]

    def efficiency(self, cell: Cell) -> float | None:
        """Returns the efficiency of a cell."""

        return efficiency(
            self.baseline.refusals,
            cell.measurement.refusals,
            cell.measurement.kl_divergence,
            self.floor,
        )

    def summaries(self) -> list[LayerSummary]:
        """Returns what each configuration achieves on each layer."""

        found = []
        for configuration, strength in self.configurations():
            cells = self.single_cells(configuration, strength)
            for layer in sorted({cell.layers[0] for cell in cells}):
                column = sorted(
                    (cell for cell in cells if cell.layers[0] == layer),
                    key=lambda cell: cell.weight,
                )
                best = next((cell for cell in column if cell.measurement.refusals == 0), None)
                found.append(
                    LayerSummary(
                        configuration=configuration,
                        strength=strength,
                        layer=layer,
                        functional=any(
                            cell.measurement.refusals < self.baseline.refusals for cell in column
                        ),
                        successful=best is not None,
                        minimal_weight=None if best is None else best.weight,
                        kl_divergence=None if best is None else best.measurement.kl_divergence,
                        efficiency=None if best is None else self.efficiency(best),
                    )
                )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values: cells with intervals and efficiency, and what follows from them."""

        cells = []
        for cell in self.cells:
            low, high = cell.measurement.refusal_interval()
            cells.append(
                {
                    **cell.to_dict(),
                    "refusal_interval": [low, high],
                    "efficiency": self.efficiency(cell),
                }
            )
        return {
            "model": self.model,
            "baseline": asdict(self.baseline),
            "settings": self.settings,
            "pools": self.pools,
            "prompts": list(self.prompts),
            "categories": list(self.categories),
            "canaries": list(self.canaries),
            "baseline_responses": list(self.baseline_responses),
            "layers": [asdict(summary) for summary in self.summaries()],
            "synergies": [asdict(synergy) for synergy in self.synergies],
            "cells": cells,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "SweepResult":
        """Restores a sweep from what `to_dict` returned."""

        derived = {"refusal_interval", "efficiency"}
        return cls(
            model=data["model"],
            baseline=Measurement(**data["baseline"]),
            cells=tuple(
                Cell.from_dict({name: cell[name] for name in cell if name not in derived})
                for cell in data["cells"]
            ),
            synergies=tuple(
                Synergy(**{**synergy, "layers": tuple(synergy["layers"])})
                for synergy in data["synergies"]
            ),
            prompts=tuple(data["prompts"]),
            categories=tuple(data["categories"]),
            canaries=tuple(data["canaries"]),
            baseline_responses=tuple(data["baseline_responses"]),
            pools=data["pools"],
            settings=data["settings"],
        )

    def to_json(self) -> str:
        """Returns the sweep as JSON text; the same sweep gives the same bytes."""

        return json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        """Returns one row per cell as CSV text."""

        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for cell in self.cells:
            measurement = cell.measurement
            low, high = measurement.refusal_interval()
            ratio = self.efficiency(cell)
            writer.writerow(
                [
                    cell.configuration,
                    cell.strength,
                    " ".join(map(str, cell.layers)),
                    cell.weight,
                    f"{cell.effective_weight:.6g}",
                    f"{cell.weight_along_mean:.6g}",
                    measurement.refusals,
                    f"{low:.4f}",
                    f"{high:.4f}",
                    measurement.evasive,
                    measurement.complied,
                    measurement.incoherent,
                    measurement.n_harmful,
                    measurement.canary_refusals,
                    measurement.n_canaries,
                    f"{measurement.kl_divergence:.6g}",
                    f"{measurement.kl_standard_error:.6g}",
                    "" if ratio is None else f"{ratio:.6g}",
                ]
            )
        return buffer.getvalue()

    def responses_json_lines(self) -> str:
        """Returns every response as JSON Lines: where it was given, to what, and its text."""

        lines = []
        for pool, prompts, responses in _response_rows(self):
            for prompt, (where, response) in zip(prompts, responses, strict=True):
                lines.append(
                    json.dumps(
                        {**where, "pool": pool, "prompt": prompt, "response": response},
                        ensure_ascii=False,
                    )
                )
        return "".join(f"{line}\n" for line in lines)


CSV_COLUMNS = (
    "configuration",
    "strength",
    "layers",
    "weight",
    "effective_weight",
    "weight_along_mean",
    "refusals",
    "refusal_share_low",
    "refusal_share_high",
    "evasive",
    "complied",
    "incoherent",
    "n_harmful",
    "canary_refusals",
    "n_canaries",
    "kl_divergence",
    "kl_standard_error",
    "efficiency",
)


def _response_rows(
    result: SweepResult,
) -> list[tuple[str, Sequence[str], list[tuple[dict[str, Any], str]]]]:
    """Returns pool, prompts, and the place and text of each response, for every cell."""

    rows: list[tuple[str, Sequence[str], list[tuple[dict[str, Any], str]]]] = []
    if result.baseline_responses:
        base: dict[str, Any] = {"configuration": None}
        rows.append(
            ("harmful", result.prompts, [(base, text) for text in result.baseline_responses])
        )
    for cell in result.cells:
        where = {
            "configuration": cell.configuration,
            "strength": cell.strength,
            "layers": list(cell.layers),
            "weight": cell.weight,
        }
        if cell.responses:
            rows.append(("harmful", result.prompts, [(where, text) for text in cell.responses]))
        if cell.canary_responses:
            rows.append(
                ("canary", result.canaries, [(where, text) for text in cell.canary_responses])
            )
    return rows
