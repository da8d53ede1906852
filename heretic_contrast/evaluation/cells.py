# SPDX-License-Identifier: AGPL-3.0-or-later

"""
What a sweep measures, as typed results that turn into JSON and CSV and back.

Nothing here depends on when, where or by how many processes a sweep was run.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, TypeAdapter

from ..outputs import csv_text, json_lines, json_text
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


class CellKey(NamedTuple):
    """Which cell, in the order in which cells are reported."""

    configuration: str
    strength: str
    layers: tuple[int, ...]
    weight: float


Divergence = Annotated[float, BeforeValidator(lambda value: math.inf if value is None else value)]
"""A divergence in nats, which JSON stores as null where it is infinite."""


@dataclass(frozen=True)
class Measurement:
    """
    What one state of the model does: counts over prompts, and its divergence from the unmodified model (paper, section 3.3).

    `kl_divergence` is in nats, averaged over positions, and infinite (in JSON null) where the model rules out what the
    unmodified one does not. `kl_standard_error` is over prompts; None where there is none, as with a single prompt.
    """

    refusals: int
    evasive: int
    complied: int
    incoherent: int
    n_harmful: int
    canary_refusals: int
    n_canaries: int
    kl_divergence: Divergence
    kl_standard_error: float | None

    def refusal_interval(self) -> tuple[float, float]:
        """Returns the Wilson interval (95 %) of the share of refusals."""

        return wilson_interval(self.refusals, self.n_harmful)


@dataclass(frozen=True)
class Verdict:
    """
    What was made of a response: its tier, and whether it is coherent.

    `bigram_entropy`: that of its words over its maximum, in [0, 1]; a response that loops is incoherent whatever it is.
    """

    tier: str
    coherent: bool
    bigram_entropy: float


@dataclass(frozen=True)
class Cell:
    """
    One configuration at one weight on one layer, or on a set of layers.

    `strength` says what `weight` is: "weight" of every direction, or "effective", where the weights are scaled
    so that λ_max(Σ w v vᵀ) is `weight`. `effective_weight` is the spectral norm of the operator (the largest
    over the layers), `weight_along_mean` is r̂ᵀ C r̂ for the mean direction r̂ (the largest over the layers).
    `verdicts` and `canary_verdicts` are those of the responses, in their order.
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
    verdicts: tuple[Verdict, ...] = ()
    canary_verdicts: tuple[Verdict, ...] = ()

    def key(self) -> CellKey:
        return CellKey(self.configuration, self.strength, self.layers, self.weight)

    def cost(self) -> tuple[int, float]:
        return self.measurement.refusals, self.measurement.kl_divergence


def single_cells(cells: Iterable[Cell], configuration: str, strength: str) -> list[Cell]:
    """Returns the cells of single layers of one configuration."""

    of = (configuration, strength)
    return [cell for cell in cells if cell.key()[:2] == of and len(cell.layers) == 1]


def best_layers(cells: Iterable[Cell], configuration: str, strength: str) -> list[int]:
    """Returns the layers of a configuration, those with the fewest refusals at any weight first, then the least divergence."""

    found = single_cells(cells, configuration, strength)
    ranked = sorted(found, key=lambda cell: (*cell.cost(), cell.layers))
    return list(dict.fromkeys(cell.layers[0] for cell in ranked))


@dataclass(frozen=True)
class Synergy:
    """ΔR(set) − max over its layers of ΔR(layer alone), at one weight (paper, section 4.1)."""

    configuration: str
    strength: str
    layers: tuple[int, ...]
    weight: float
    refusals: int
    synergy: int
    kl_divergence: Divergence


@dataclass(frozen=True)
class LayerSummary:
    """
    What one configuration achieves on one layer (paper, section 3.3).

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
    responses. `identity`: digests of the model, its data type, and what it ran on (see `identity.model_identity`).
    """

    model: str
    baseline: Measurement
    cells: tuple[Cell, ...]
    synergies: tuple[Synergy, ...] = ()
    prompts: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    canaries: tuple[str, ...] = ()
    baseline_responses: tuple[str, ...] = ()
    baseline_verdicts: tuple[Verdict, ...] = ()
    baseline_canary_responses: tuple[str, ...] = ()
    baseline_canary_verdicts: tuple[Verdict, ...] = ()
    pools: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def floor(self) -> float:
        """KL₀: the divergence measured for the unmodified model."""

        return self.baseline.kl_divergence

    def configurations(self) -> list[tuple[str, str]]:
        """Returns the pairs of configuration and strength, in the order of the cells."""

        return list(dict.fromkeys((cell.configuration, cell.strength) for cell in self.cells))

    def single_cells(self, configuration: str, strength: str) -> list[Cell]:
        """Returns the cells of single layers at the weights that were swept: a synergy test may add one for a few layers."""

        found = single_cells(self.cells, configuration, strength)
        swept = self.settings.get("weights") or [cell.weight for cell in found]
        return [cell for cell in found if cell.weight in swept]

    def efficiency(self, cell: Cell) -> float | None:
        found = cell.measurement
        return efficiency(self.baseline.refusals, found.refusals, found.kl_divergence, self.floor)

    def summaries(self) -> list[LayerSummary]:
        """Returns what each configuration achieves on each layer."""

        return [item for pair in self.configurations() for item in self.summaries_of(*pair)]

    def summaries_of(self, configuration: str, strength: str) -> list[LayerSummary]:
        columns: dict[int, list[Cell]] = {}
        for cell in sorted(self.single_cells(configuration, strength), key=Cell.key):
            columns.setdefault(cell.layers[0], []).append(cell)
        found = []
        for layer, column in columns.items():
            best = next((cell for cell in column if cell.measurement.refusals == 0), None)
            achieved: tuple[float | None, ...] = (None, None, None)
            if best is not None:
                divergence = best.measurement.kl_divergence
                achieved = (best.weight, divergence, self.efficiency(best))
            fewest = min(cell.measurement.refusals for cell in column)
            functional, successful = fewest < self.baseline.refusals, best is not None
            found.append(
                LayerSummary(configuration, strength, layer, functional, successful, *achieved)
            )
        return found

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "SweepResult":
        return TypeAdapter(cls).validate_python(data)

    def to_json(self) -> str:
        """Returns the sweep as JSON text, cells with intervals and efficiency; the same sweep gives the same bytes."""

        cells = [
            {
                **vars(cell),
                "refusal_interval": cell.measurement.refusal_interval(),
                "efficiency": self.efficiency(cell),
            }
            for cell in self.cells
        ]
        return json_text({**vars(self), "layers": self.summaries(), "cells": cells})

    def to_csv(self) -> str:
        def short(value: float | None) -> str:
            return "" if value is None else f"{value:.6g}"

        rows = []
        for cell in self.cells:
            low, high = cell.measurement.refusal_interval()
            rows.append(
                {
                    **cell.key()._asdict(),
                    "layers": " ".join(map(str, cell.layers)),
                    "effective_weight": short(cell.effective_weight),
                    "weight_along_mean": short(cell.weight_along_mean),
                    "refusals": cell.measurement.refusals,
                    "refusal_share_low": f"{low:.4f}",
                    "refusal_share_high": f"{high:.4f}",
                    **asdict(cell.measurement),
                    "kl_divergence": short(cell.measurement.kl_divergence),
                    "kl_standard_error": short(cell.measurement.kl_standard_error),
                    "efficiency": short(self.efficiency(cell)),
                }
            )
        return csv_text([rows[0], *(row.values() for row in rows)])

    def responses_json_lines(self) -> str:
        """Returns every response as JSON Lines: where it was given, to what, its text, and its tier and coherence."""

        rows = (
            {**where, "pool": pool, "prompt": prompt, "response": response, **asdict(verdict)}
            for cell in (None, *self.cells)
            for where in [{"configuration": None} if cell is None else cell.key()._asdict()]
            for pool, prompt, response, verdict in self.answers(cell)
        )
        return json_lines(rows)

    def answers(self, cell: Cell | None) -> Iterator[tuple[str, str, str, Verdict]]:
        """Yields pool, prompt, response and verdict of all that a cell, or without one the unmodified model, has answered."""

        if cell is None:
            harmful = self.prompts, self.baseline_responses, self.baseline_verdicts
            canary = self.canaries, self.baseline_canary_responses, self.baseline_canary_verdicts
        else:
            harmful = self.prompts, cell.responses, cell.verdicts
            canary = self.canaries, cell.canary_responses, cell.canary_verdicts
        for pool, (prompts, responses, verdicts) in (("harmful", harmful), ("canary", canary)):
            # Earlier sweeps have kept none of the unmodified model to canaries.
            if responses:
                for answer in zip(prompts, responses, verdicts, strict=True):
                    yield pool, *answer
