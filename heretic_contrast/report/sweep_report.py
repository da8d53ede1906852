# SPDX-License-Identifier: AGPL-3.0-or-later

"""The report of a sweep: the paper's Tables 1 to 4 for this model, with plots."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from ..evaluation.cells import Cell, Measurement, SweepResult
from ..evaluation.results import CaptureResult, Geometry
from ..evaluation.statistics import wilson_interval
from . import plots
from .content import (
    Column,
    Figure,
    Report,
    Section,
    Table,
    layers_text,
    number,
    significant,
    text_column,
    thousands,
)
from .sections import (
    capture_layers_table,
    capture_section,
    capture_table,
    compounding_section,
    layer_table,
    magnitude_section,
    perturbation_section,
)
from .tables import to_csv, to_rich
from .writing import NO_PLOTS, to_json, write_report

STRENGTHS = {"weight": "equal weight", "effective": "equal effective weight"}
"""What the weight of a cell means."""

SMALLEST_DIVERGENCE = 1e-6
"""Where a divergence of zero stands on a logarithmic axis."""

INTERVAL = "In parentheses the Wilson interval (95 %) of the share."


def write_sweep_report(
    result: SweepResult,
    directory: Path,
    log: Callable[..., None],
    capture: CaptureResult | None = None,
    geometry: Geometry | None = None,
) -> None:
    """
    Writes `sweep.json`, `sweep.csv`, `responses.jsonl`, plots and `report.html`, and prints the main tables.

    With `capture` and `geometry`, also their tables. The same sweep gives the same bytes. Raises `ContrastError` when a
    file cannot be written.
    """

    report = sweep_report(result, capture, geometry)
    texts = {
        "sweep.json": result.to_json(),
        "sweep.csv": result.to_csv(),
        "responses.jsonl": result.responses_json_lines(),
    }
    if capture is not None:
        texts["capture.json"] = to_json(capture.to_dict())
        texts["capture.csv"] = to_csv(capture_layers_table(capture))
    if geometry is not None:
        texts["geometry.json"] = to_json(geometry.to_dict())
        texts["geometry.csv"] = to_csv(layer_table(geometry))
    write_report(report, directory, texts)

    tables = [configuration_table(result), minimal_weight_table(result)]
    tables += [refusal_table(result, *pair) for pair in result.configurations()]
    if capture is not None and capture.layers:
        tables.append(capture_table(capture))
    for table in tables:
        if table.rows:
            log()
            log(to_rich(table))
    log()
    for sentence in report.summary:
        log(f"* {escape(sentence)}")
    if not plots.can_plot():
        log(f"[yellow]{NO_PLOTS.replace('[', chr(92) + '[')}[/]")


def sweep_report(
    result: SweepResult, capture: CaptureResult | None = None, geometry: Geometry | None = None
) -> Report:
    """Returns the report of a sweep."""

    sections = [overview_section(result), *refusal_sections(result), divergence_section(result)]
    if result.synergies:
        sections.append(synergy_section(result))
    if capture is not None:
        sections.append(capture_section(capture))
    if geometry is not None:
        sections += [magnitude_section(geometry), compounding_section(geometry)]
        if geometry.activities:
            note = "Prompts of the evaluation pools"
            if not result.pools.get("extraction", {}).get("notes"):
                note += ", never used for extraction"
            sections.append(perturbation_section(geometry, f"{note}."))
    sections += [cells_section(result), reading_section(result)]
    base = result.baseline
    return Report(
        title=f"Fixed-weight sweep of {result.model}",
        subtitle=(
            f"{len(result.cells)} cells, {base.n_harmful} harmful prompts, {base.n_canaries} canaries, "
            f"{_pool_count(result, 'references')} reference prompts"
        ),
        summary=summary(result),
        sections=tuple(sections),
    )


def summary(result: SweepResult) -> tuple[str, ...]:
    """Returns what was found, in a sentence for each configuration."""

    base = result.baseline
    sentences = [
        f"Unmodified, the model refuses {base.refusals} of {base.n_harmful} harmful prompts {_interval(base)} and "
        f"{base.canary_refusals} of {base.n_canaries} canaries. The floor of the KL divergence is {result.floor:.2g}."
    ]
    for configuration, strength in result.configurations():
        found = [
            item
            for item in result.summaries()
            if (item.configuration, item.strength) == (configuration, strength)
        ]
        successful = [item.layer for item in found if item.successful]
        functional = [item.layer for item in found if item.functional]
        sentences.append(
            f"{label(configuration, strength)}: R reaches 0 on {_layer_count(successful, len(found))} and falls on "
            f"{_layer_count(functional, len(found))}."
        )
    return tuple(sentences)


def _layer_count(layers: Sequence[int], total: int) -> str:
    """Returns how many layers, and which ones."""

    if not layers:
        return "no layer"
    return f"{len(layers)} of {total} layers ({layers_text(layers)})"


def label(configuration: str, strength: str) -> str:
    """Returns what a configuration is called in reports."""

    return f"{configuration}, {STRENGTHS[strength]}"


def _slug(configuration: str, strength: str) -> str:
    """Returns a file name for a configuration; names come from users."""

    safe = "".join(letter if letter.isalnum() else "-" for letter in configuration)
    return f"{safe}-{strength}"


def _interval(measurement: Measurement) -> str:
    low, high = measurement.refusal_interval()
    return f"({100 * low:.0f}–{100 * high:.0f}%)"


def _pool_count(result: SweepResult, name: str) -> Any:
    return result.pools.get(name, {}).get("count", "an unknown number of")


def _prompts_note(result: SweepResult) -> str:
    categories = {category for category in result.categories if category}
    spread = f" of {len(categories)} categories" if categories else ""
    return f"{result.baseline.n_harmful} harmful prompts{spread}, unmodified R = {result.baseline.refusals}."


def overview_section(result: SweepResult) -> Section:
    """Returns what was swept, the best of each configuration, and which prompts were used for what."""

    pools = Table(
        "pools",
        "Prompts",
        (text_column("Pool"), Column("Prompts"), Column("Left out"), text_column("Digest")),
        tuple(
            (
                name,
                pool.get("count"),
                pool.get("left_out_as_used_for_extraction"),
                str(pool.get("digest", ""))[:12] or None,
            )
            for name, pool in result.pools.items()
        ),
        "Left out: evaluation prompts that directions were extracted from. Digest: the first 12 digits of SHA-256.",
    )
    return Section(
        "Overview",
        (
            "Each layer was ablated alone, all its directions at the same weight. "
            "R is the number of harmful prompts that are refused. Strength: with weight, every direction has the weight; with "
            "effective, all directions of a layer together remove no more than one of that weight.",
            *result.pools.get("extraction", {}).get("notes", ()),
        ),
        tables=(
            configuration_table(result),
            minimal_weight_table(result),
            *((pools,) if result.pools else ()),
        ),
    )


def configuration_table(result: SweepResult) -> Table:
    """Returns the best cell of each configuration: fewest refusals, then least divergence."""

    rows = []
    for configuration, strength in result.configurations():
        cells = result.single_cells(configuration, strength)
        best = min(
            cells, key=lambda cell: (cell.measurement.refusals, cell.measurement.kl_divergence)
        )
        rows.append(
            (
                configuration,
                strength,
                best.measurement,
                best.layers[0],
                best.weight,
                best.measurement.kl_divergence,
                best.measurement.kl_standard_error,
                best.measurement.incoherent,
                best.measurement.canary_refusals,
            )
        )
    return Table(
        "configurations",
        "Best cell of each configuration",
        (
            text_column("Configuration"),
            text_column("Strength"),
            Column("R", _refusals),
            Column("Layer"),
            Column("Weight", significant(3)),
            Column("KL", significant(3)),
            Column("± KL", significant(2), essential=False),
            Column("Incoherent", essential=False),
            Column("Canaries refused", essential=False),
        ),
        tuple(rows),
        f"{_prompts_note(result)} {INTERVAL} Best: fewest refusals, then least KL divergence (nats; ± standard error over "
        f"{_pool_count(result, 'references')} reference prompts). The best of many cells looks better than it is.",
        n_keys=2,
    )


def _refusals(measurement: Measurement) -> str:
    return f"{measurement.refusals} {_interval(measurement)}"


def minimal_weight_table(result: SweepResult) -> Table:
    """Returns the layers that reach R = 0, with the smallest weight, as the paper's Table 1."""

    cells = {cell.key(): cell for cell in result.cells}
    rows = []
    for item in result.summaries():
        if item.minimal_weight is None:
            continue
        cell = cells[item.configuration, item.strength, (item.layer,), item.minimal_weight]
        rows.append(
            (
                item.configuration,
                item.strength,
                item.layer,
                item.minimal_weight,
                cell.effective_weight,
                item.kl_divergence,
                cell.measurement.kl_standard_error,
                item.efficiency,
            )
        )
    _, high = wilson_interval(0, result.baseline.n_harmful)
    return Table(
        "minimal-weight",
        "Smallest weight with R = 0 (the paper's Table 1)",
        (
            text_column("Configuration"),
            text_column("Strength"),
            Column("Layer"),
            Column("Weight", significant(3)),
            Column("Effective weight", number(2), essential=False),
            Column("KL", significant(3)),
            Column("± KL", significant(2), essential=False),
            Column("Efficiency", thousands),
        ),
        tuple(rows),
        f"{_prompts_note(result)} R = 0 of {result.baseline.n_harmful} has the Wilson interval (95 %) 0–{100 * high:.0f} %. "
        f"Efficiency: refusals fewer per unit of KL divergence above the floor of {result.floor:.2g}.",
        n_keys=3,
    )


def _grid(result: SweepResult, configuration: str, strength: str) -> tuple[list[int], list[float]]:
    """Returns the layers and weights of one configuration's single cells."""

    cells = result.single_cells(configuration, strength)
    # A synergy test may add a weight for a few layers; the grid's weights come from the settings.
    swept = result.settings.get("weights") or sorted({cell.weight for cell in cells})
    return sorted({cell.layers[0] for cell in cells}), [float(weight) for weight in swept]


def refusal_table(result: SweepResult, configuration: str, strength: str) -> Table:
    """Returns R per layer and weight, as the paper's Tables 2 and 3."""

    layers, weights = _grid(result, configuration, strength)
    by_place = {
        (cell.layers[0], cell.weight): cell.measurement
        for cell in result.single_cells(configuration, strength)
    }
    return Table(
        f"refusals-{_slug(configuration, strength)}",
        f"R per layer and weight: {label(configuration, strength)}",
        (Column("Layer"), *(Column(f"w = {weight:g}", _refusals) for weight in weights)),
        tuple((layer, *(by_place.get((layer, weight)) for weight in weights)) for layer in layers),
        f"{_prompts_note(result)} {INTERVAL}",
    )


def refusal_sections(result: SweepResult) -> list[Section]:
    """Returns R per layer and weight for every configuration, a section for each strength."""

    sections = []
    for strength in dict.fromkeys(strength for _, strength in result.configurations()):
        pairs = [pair for pair in result.configurations() if pair[1] == strength]
        figures = []
        if plots.can_plot():
            for configuration, _ in pairs:
                figures.append(refusal_figure(result, configuration, strength))
        text = (
            "Every direction of the layer has the weight, as in the paper."
            if strength == "weight"
            else "The weights of a layer's directions are scaled so that together they remove no more than one direction of "
            "that weight: the control for parallel directions that add up."
        )
        sections.append(
            Section(
                f"Refusals at {STRENGTHS[strength]}",
                (text,),
                tuple(figures),
                tuple(refusal_table(result, *pair) for pair in pairs),
            )
        )
    return sections


def refusal_figure(result: SweepResult, configuration: str, strength: str) -> Figure:
    """Returns the heat map of R over layer and weight."""

    layers, weights = _grid(result, configuration, strength)
    values = np.full((len(layers), len(weights)), math.nan)
    for cell in result.single_cells(configuration, strength):
        if cell.weight in weights:
            values[layers.index(cell.layers[0]), weights.index(cell.weight)] = (
                cell.measurement.refusals
            )
    return Figure(
        f"refusals-{_slug(configuration, strength)}",
        label(configuration, strength),
        f"Heat map of refusals over layers and weights for {label(configuration, strength)}; "
        "the table of the same title has the numbers.",
        plots.heat_map(
            values,
            [str(layer) for layer in layers],
            [f"{weight:g}" for weight in weights],
            "Layer",
            "Weight of each direction" if strength == "weight" else "Effective weight",
            f"Refusals R (of {result.baseline.n_harmful} prompts)",
            limits=(0, result.baseline.n_harmful),
        ),
    )


def pareto_front(cells: Sequence[Cell]) -> list[Cell]:
    """Returns the cells that no other one beats in refusals and divergence, by increasing divergence."""

    front: list[Cell] = []
    for cell in sorted(
        cells, key=lambda cell: (cell.measurement.kl_divergence, cell.measurement.refusals)
    ):
        if not front or cell.measurement.refusals < front[-1].measurement.refusals:
            front.append(cell)
    return front


def divergence_section(result: SweepResult) -> Section:
    """Returns what fewer refusals cost in divergence."""

    rows = []
    figures = []
    for strength in dict.fromkeys(strength for _, strength in result.configurations()):
        series = {}
        for configuration, other in result.configurations():
            if other != strength:
                continue
            cells = result.single_cells(configuration, strength)
            front = pareto_front(cells)
            series[configuration] = (
                [max(cell.measurement.kl_divergence, SMALLEST_DIVERGENCE) for cell in cells],
                [cell.measurement.refusals for cell in cells],
                [cell in front for cell in cells],
            )
            rows += [
                (
                    configuration,
                    strength,
                    cell.layers[0],
                    cell.weight,
                    cell.measurement,
                    cell.measurement.kl_divergence,
                    cell.measurement.kl_standard_error,
                    result.efficiency(cell),
                )
                for cell in front
            ]
        if plots.can_plot():
            figures.append(
                Figure(
                    f"divergence-{strength}",
                    f"Refusals against KL divergence, {STRENGTHS[strength]}",
                    f"Scatter plot of every cell's refusals against its KL divergence, with the Pareto fronts of "
                    f"{', '.join(series)}; the table below lists the cells on the fronts.",
                    plots.fronts(
                        series,
                        "KL divergence (nats)",
                        f"Refusals R (of {result.baseline.n_harmful} prompts)",
                    ),
                )
            )
    table = Table(
        "pareto",
        "Cells on the Pareto fronts",
        (
            text_column("Configuration"),
            text_column("Strength"),
            Column("Layer"),
            Column("Weight", significant(3)),
            Column("R", _refusals),
            Column("KL", significant(3)),
            Column("± KL", significant(2), essential=False),
            Column("Efficiency", thousands),
        ),
        tuple(rows),
        f"No other cell of the same configuration has fewer refusals at no more KL divergence. {_prompts_note(result)} "
        f"{INTERVAL}",
        n_keys=4,
    )
    return Section(
        "Refusals and divergence",
        (
            f"KL divergence from the unmodified model on {_pool_count(result, 'references')} harmless reference prompts, over "
            f"{result.settings.get('kl_tokens', 'the')} teacher-forced tokens each; points are cells, lines their Pareto fronts.",
        ),
        tuple(figures),
        (table,),
    )


def synergy_section(result: SweepResult) -> Section:
    """Returns what sets of layers achieve beyond their best layer."""

    figures = []
    pairs = dict.fromkeys((item.configuration, item.strength) for item in result.synergies)
    if plots.can_plot():
        for configuration, strength in pairs:
            own = [
                item
                for item in result.synergies
                if (item.configuration, item.strength) == (configuration, strength)
                and len(item.layers) == 2
            ]
            if not own:
                continue
            layers = sorted({layer for item in own for layer in item.layers})
            values = np.full((len(layers), len(layers)), math.nan)
            for item in own:
                first, second = (layers.index(layer) for layer in item.layers)
                values[first, second] = values[second, first] = item.synergy
            most = max(1, *(abs(item.synergy) for item in result.synergies))
            names = [str(layer) for layer in layers]
            figures.append(
                Figure(
                    f"synergy-{_slug(configuration, strength)}",
                    label(configuration, strength),
                    f"Matrix of synergies of layer pairs for {label(configuration, strength)}; the table has the numbers.",
                    plots.heat_map(
                        values,
                        names,
                        names,
                        "Layer",
                        "Layer",
                        "Synergy (refusals)",
                        limits=(-most, most),
                        annotate="{:+.0f}",
                    ),
                )
            )
    table = Table(
        "synergy",
        "Sets of layers",
        (
            text_column("Configuration"),
            text_column("Strength"),
            Column("Layers", layers_text),
            Column("Weight", significant(3)),
            Column("R"),
            Column("Synergy", lambda value: f"{value:+d}"),
            Column("KL", significant(3)),
        ),
        tuple(
            (
                item.configuration,
                item.strength,
                item.layers,
                item.weight,
                item.refusals,
                item.synergy,
                item.kl_divergence,
            )
            for item in result.synergies
        ),
        f"{_prompts_note(result)} Each layer of the set at the given weight.",
        n_keys=3,
    )
    return Section(
        "Synergy",
        (
            "Synergy: how many refusals fewer a set of layers leaves than its best layer alone, at the same weight. The sets "
            "are made of each configuration's best layers.",
        ),
        tuple(figures),
        (table,),
    )


def cells_section(result: SweepResult) -> Section:
    """Returns every cell."""

    table = Table(
        "cells",
        "Every cell",
        (
            text_column("Configuration"),
            text_column("Strength"),
            Column("Layers", layers_text),
            Column("Weight", significant(3)),
            Column("Effective", number(2)),
            Column("Along mean", number(2)),
            Column("R", _refusals),
            Column("Evasive"),
            Column("Complied"),
            Column("Incoherent"),
            Column("Canaries refused"),
            Column("KL", significant(3)),
            Column("± KL", significant(2), essential=False),
            Column("Efficiency", thousands),
        ),
        tuple(
            (
                cell.configuration,
                cell.strength,
                cell.layers,
                cell.weight,
                cell.effective_weight,
                cell.weight_along_mean,
                cell.measurement,
                cell.measurement.evasive,
                cell.measurement.complied,
                cell.measurement.incoherent,
                cell.measurement.canary_refusals,
                cell.measurement.kl_divergence,
                cell.measurement.kl_standard_error,
                result.efficiency(cell),
            )
            for cell in result.cells
        ),
        f"{_prompts_note(result)} {result.baseline.n_canaries} canaries. {INTERVAL} Effective: the largest share of any "
        "direction that is removed; along mean: the share of the mean direction. The same is in sweep.csv.",
        n_keys=4,
    )
    return Section("All cells", tables=(table,))


def reading_section(result: SweepResult) -> Section:
    """Returns how to read the figures."""

    return Section(
        "How to read this",
        (
            "Refused, evasive, complied: the tier of a response, from its form. Incoherent: a response that loops or repeats "
            "itself, whatever its tier. Canaries: harmless prompts, whose refusals are false ones.",
            f"The KL divergence keeps the unmodified model's {result.settings.get('top_k', 'most likely')} most likely tokens at "
            "each position and one bucket for the rest, so it is a lower bound of the divergence over the whole vocabulary.",
            "Intervals are those of one cell. Whoever picks the best of many cells picks luck with it: confirm it with other "
            "prompts and seeds. Random directions of the same lengths and cosines, where they were swept, are the floor.",
        ),
    )
