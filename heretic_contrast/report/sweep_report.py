# SPDX-License-Identifier: AGPL-3.0-or-later

"""The report of a sweep: the paper's Tables 1 to 4 for this model, with plots."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import permutations
from operator import attrgetter
from pathlib import Path

from rich.markup import escape

from ..errors import one_line
from ..evaluation.cells import Cell, CellKey, Measurement, SweepResult, Synergy
from ..evaluation.results import CaptureResult, Geometry
from ..evaluation.statistics import percents, wilson_interval
from ..search.stopping import front
from . import plots
from .content import (
    Column,
    Figure,
    Report,
    Section,
    Table,
    layers_text,
    plural,
    significant,
    slug,
    text_column,
    thousands,
)
from .opened import opened_cells
from .sections import (
    CONFIGURATION,
    capture_section,
    capture_table,
    compounding_section,
    magnitude_section,
    measured_texts,
    perturbation_section,
    say_what_is_missing,
)
from .writing import to_rich, write_report

STRENGTHS = {"weight": "equal weight", "effective": "equal effective weight"}
MEANINGS = {
    "weight": "Every direction of the layer has the weight, as in the paper.",
    "effective": "The weights of a layer's directions are scaled so that together they remove no more than one direction of "
    "that weight: the control for parallel directions that add up. One after the other (a sequential composition), they may remove "
    "less above a weight of 1; the effective weight of each cell is in the table of all cells.",
}
"""What the weight of a cell means."""

SMALLEST_DIVERGENCE = 1e-6
"""Where a divergence of zero stands on a logarithmic axis."""

INTERVAL = "In parentheses the Wilson interval (95 %) of the share."


def _interval(measurement: Measurement) -> str:
    return f"({percents(*measurement.refusal_interval())}%)"


def _refusals(cell: Cell) -> str:
    return f"{cell.measurement.refusals} {_interval(cell.measurement)}"


REFUSALS = attrgetter("measurement.refusals")

STRENGTH = text_column("Strength", "strength")
LAYER = Column("Layer", lambda cell: cell.layers[0])
LAYERS = Column("Layers", "layers", layers_text)
WEIGHT = Column("Weight", "weight", "{:g}".format)
# The value is the cell, which the page opens.
R = Column("R", lambda cell: cell, _refusals, plain=REFUSALS)
DIVERGENCE = (
    Column("KL", "measurement.kl_divergence", significant(3)),
    Column("± KL", "measurement.kl_standard_error", significant(2), essential=False),
)
"""What several tables show of a cell."""


def _efficiency(result: SweepResult) -> Column:
    return Column("Efficiency", result.efficiency, thousands)


def write_sweep_report(
    result: SweepResult,
    directory: Path,
    log: Callable[..., None],
    capture: CaptureResult,
    geometry: Geometry,
) -> None:
    """
    Writes `sweep.json`, `sweep.csv`, `responses.jsonl`, tables, plots and `report.html`, and prints the main tables.

    The same sweep gives the same bytes. Raises `ContrastError` when a file cannot be written.
    """

    report = sweep_report(result, capture, geometry)
    texts = {
        "sweep.json": result.to_json(),
        "sweep.csv": result.to_csv(),
        "responses.jsonl": result.responses_json_lines(),
        **measured_texts(capture, geometry),
    }
    write_report(report, directory, texts)

    tables = [configuration_table(result), minimal_weight_table(result)]
    tables += [refusal_table(result, *pair) for pair in result.configurations()]
    if capture.layers:
        tables.append(capture_table(capture))
    for table in tables:
        if table.rows:
            log()
            log(to_rich(table))
    log()
    for sentence in summary(result):
        log(f"* {escape(one_line(sentence))}")
    say_what_is_missing(log, capture, geometry)


def sweep_report(result: SweepResult, capture: CaptureResult, geometry: Geometry) -> Report:
    sections = [overview_section(result), *refusal_sections(result), divergence_section(result)]
    if result.synergies:
        sections.append(synergy_section(result))
    sections += [
        capture_section(capture),
        magnitude_section(geometry),
        compounding_section(geometry),
    ]
    note = "Prompts of the evaluation pools"
    if not result.pools.get("extraction", {}).get("notes"):
        note += ", never used for extraction"
    if result.settings.get("components"):
        note += (
            ". Only layers at which what the swept components add can be told from what others do"
        )
    sections.append(perturbation_section(geometry, f"{note}."))
    sections += [cells_section(result), reading_section(result)]
    base = result.baseline
    anchors, opened = opened_cells(result)
    return Report(
        title=f"Fixed-weight sweep of {result.model}",
        subtitle=(
            f"{len(result.cells)} cells, {base.n_harmful} harmful prompts, {base.n_canaries} canaries, "
            f"{result.pools['references']['count']} reference prompts"
        ),
        summary=(*summary(result), reading_note(result, len(anchors))),
        sections=tuple(sections),
        opened=tuple(opened),
        anchors=anchors,
    )


def summary(result: SweepResult) -> tuple[str, ...]:
    base = result.baseline
    sentences = [
        f"Unmodified, the model refuses {base.refusals} of {base.n_harmful} harmful prompts {_interval(base)} and "
        f"{base.canary_refusals} of {base.n_canaries} canaries. The floor of the KL divergence is {result.floor:.2g}."
    ]
    for configuration, strength in result.configurations():
        found = result.summaries_of(configuration, strength)
        successful = [item.layer for item in found if item.successful]
        functional = [item.layer for item in found if item.functional]
        sentences.append(
            f"{label(configuration, strength)}: R reaches 0 on {_layer_count(successful, len(found))} and falls on "
            f"{_layer_count(functional, len(found))}."
        )
    swept = result.settings.get("weights")
    others = {
        f"{cell.weight:g}"
        for cell in result.cells
        if swept and cell.weight not in swept and len(cell.layers) == 1
    }
    if others:
        sentences.append(
            f"Some single layers were measured at weight {', '.join(sorted(others))} for synergy alone: these cells are left out of "
            "what is said of layers, and of fronts."
        )
    return tuple(sentences)


def reading_note(result: SweepResult, n_opened: int) -> str:
    which = (
        "Every R"
        if n_opened == len(result.cells)
        else f"R of the best {n_opened} of {len(result.cells)} cells"
    )
    return f"{which} opens the responses that were counted, each with its tier and what decided it; all are in responses.jsonl."


def _layer_count(layers: Sequence[int], total: int) -> str:
    if not layers:
        return "no layer"
    return f"{len(layers)} of {total} layers ({layers_text(layers)})"


def label(configuration: str, strength: str) -> str:
    return f"{configuration}, {STRENGTHS[strength]}"


def _prompts_note(result: SweepResult) -> str:
    categories = {category for category in result.categories if category}
    spread = f" of {len(categories)} categories" if categories else ""
    return f"{result.baseline.n_harmful} harmful prompts{spread}, unmodified R = {result.baseline.refusals}."


def _parts(result: SweepResult) -> Iterator[str]:
    """Yields what else than all components of a layer was ablated."""

    components = result.settings.get("components")
    directions = result.settings.get("directions", {})
    embedded = [name for name, settings in directions.items() if settings.get("embeddings")]
    if components:
        yield f"Of its components, only these were ablated: {', '.join(components)}."
    elif embedded and any(0 in cell.layers for cell in result.cells):
        yield f"With layer 0 of {', '.join(embedded)}, the embeddings were ablated as well."


def overview_section(result: SweepResult) -> Section:
    """Returns what was swept, the best of each configuration, and which prompts were used for what."""

    pools = Table.of(
        result.pools.items(),
        "pools",
        "Prompts",
        text_column("Pool", lambda item: item[0]),
        Column("Prompts", lambda item: item[1].get("count")),
        Column("Left out", lambda item: item[1].get("left_out_as_used_for_extraction")),
        text_column("From", lambda item: item[1].get("source")),
        text_column("Digest", lambda item: str(item[1].get("digest", ""))[:12] or None),
        note="Left out: evaluation prompts that directions were extracted from. Digest: the first 12 digits of SHA-256.",
    )
    return Section(
        "Overview",
        (
            "Each layer was ablated alone, all its directions at the same weight. "
            "R is the number of harmful prompts that are refused. Strength: with weight, every direction has the weight; with "
            "effective, all directions of a layer together remove no more than one of that weight.",
            *_parts(result),
            *result.pools.get("extraction", {}).get("notes", ()),
        ),
        tables=(configuration_table(result), minimal_weight_table(result), pools),
    )


def configuration_table(result: SweepResult) -> Table:
    """Returns the best cell of each configuration: fewest refusals, then least divergence."""

    return Table.of(
        (min(result.single_cells(*pair), key=Cell.cost) for pair in result.configurations()),
        "configurations",
        "Best cell of each configuration",
        CONFIGURATION,
        STRENGTH,
        R,
        LAYER,
        WEIGHT,
        *DIVERGENCE,
        Column("Incoherent", "measurement.incoherent", essential=False),
        Column("Canaries refused", "measurement.canary_refusals", essential=False),
        note=f"{_prompts_note(result)} {INTERVAL} Best: fewest refusals, then least KL divergence (nats; ± standard error over "
        f"{result.pools['references']['count']} reference prompts). The best of many cells looks better than it is.",
        n_keys=2,
    )


def minimal_weight_table(result: SweepResult) -> Table:
    """Returns the layers that reach R = 0, with the smallest weight, as the paper's Table 1."""

    interval = percents(*wilson_interval(0, result.baseline.n_harmful))
    cells = {cell.key(): cell for cell in result.cells}
    return Table.of(
        (
            cells[CellKey(item.configuration, item.strength, (item.layer,), item.minimal_weight)]
            for item in result.summaries()
            if item.minimal_weight is not None
        ),
        "minimal-weight",
        "Smallest weight with R = 0 (the paper's Table 1)",
        CONFIGURATION,
        STRENGTH,
        LAYER,
        WEIGHT,
        Column("Effective weight", "effective_weight", significant(3), essential=False),
        *DIVERGENCE,
        _efficiency(result),
        note=f"{_prompts_note(result)} R = 0 of {result.baseline.n_harmful} has the Wilson interval (95 %) {interval} %. "
        f"Efficiency: refusals fewer per unit of KL divergence above the floor of {result.floor:.2g}.",
        n_keys=3,
    )


def _grid(
    result: SweepResult, configuration: str, strength: str
) -> tuple[list[int], list[float], dict[tuple[int, float], Cell]]:
    """Returns layers, weights, and the cells at both."""

    cells = result.single_cells(configuration, strength)
    by_place = {(cell.layers[0], cell.weight): cell for cell in cells}
    layers = sorted({cell.layers[0] for cell in cells})
    return layers, sorted({cell.weight for cell in cells}), by_place


def refusal_table(result: SweepResult, configuration: str, strength: str) -> Table:
    """Returns R per layer and weight, as the paper's Tables 2 and 3."""

    layers, weights, by_place = _grid(result, configuration, strength)
    return Table(
        f"refusals-{slug(configuration, strength)}",
        f"R per layer and weight: {label(configuration, strength)}",
        (
            Column("Layer"),
            *(replace(R, header=f"w = {weight:g}") for weight in weights),
        ),
        tuple((layer, *(by_place.get((layer, weight)) for weight in weights)) for layer in layers),
        f"{_prompts_note(result)} {INTERVAL}",
    )


def _by_strength(result: SweepResult) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for configuration, strength in result.configurations():
        found.setdefault(strength, []).append(configuration)
    return found


def refusal_sections(result: SweepResult) -> list[Section]:
    return [
        Section(
            f"Refusals at {STRENGTHS[strength]}",
            (MEANINGS[strength],),
            tuple(refusal_figure(result, name, strength) for name in names),
            tuple(refusal_table(result, name, strength) for name in names),
        )
        for strength, names in _by_strength(result).items()
    ]


def refusal_figure(result: SweepResult, configuration: str, strength: str) -> Figure:
    layers, weights, by_place = _grid(result, configuration, strength)
    values = {place: cell.measurement.refusals for place, cell in by_place.items()}
    n_harmful = result.baseline.n_harmful
    weight_title = (
        "Weight of each direction" if strength == "weight" else "Effective weight, at most"
    )
    return Figure(
        f"refusals-{slug(configuration, strength)}",
        f"R per layer and weight: {label(configuration, strength)}",
        f"Heat map of refusals over layers and weights for {label(configuration, strength)}; "
        "the table of the same title has the numbers.",
        partial(
            plots.heat_map,
            plots.matrix(values, layers, weights),
            ([str(layer) for layer in layers], [f"{weight:g}" for weight in weights]),
            ("Layer", weight_title, f"Refusals R (of {plural(n_harmful, 'prompt')})"),
            limits=(0, n_harmful),
        ),
    )


def pareto_front(cells: Sequence[Cell]) -> list[Cell]:
    """Returns the cells that no other one beats in refusals and divergence, by increasing divergence."""

    points = {index: cell.cost() for index, cell in enumerate(cells)}
    return [cells[index] for index in reversed(front(points))]


def divergence_section(result: SweepResult) -> Section:
    on_fronts: list[Cell] = []
    figures = []
    n_harmful = result.baseline.n_harmful
    title = f"Refusals R (of {plural(n_harmful, 'prompt')})"
    for strength, names in _by_strength(result).items():
        series = {}
        for configuration in names:
            cells = result.single_cells(configuration, strength)
            best = pareto_front(cells)
            on_fronts += best
            series[configuration] = (
                [max(cell.measurement.kl_divergence, SMALLEST_DIVERGENCE) for cell in cells],
                [cell.measurement.refusals for cell in cells],
                [cell in best for cell in cells],
            )
        figures.append(
            Figure(
                f"divergence-{strength}",
                f"Refusals against KL divergence, {STRENGTHS[strength]}",
                f"Scatter plot of every cell's refusals against its KL divergence, with the Pareto fronts of "
                f"{', '.join(series)}; the table below lists the cells on the fronts.",
                partial(plots.fronts, series, "KL divergence (nats)", title, n_harmful),
            )
        )
    table = Table.of(
        on_fronts,
        "pareto",
        "Cells on the Pareto fronts",
        CONFIGURATION,
        STRENGTH,
        LAYER,
        WEIGHT,
        R,
        *DIVERGENCE,
        _efficiency(result),
        note=f"No other cell of the same configuration has fewer refusals at no more KL divergence. {_prompts_note(result)} "
        f"{INTERVAL}",
        n_keys=4,
    )
    return Section(
        "Refusals and divergence",
        (
            f"KL divergence from the unmodified model on {result.pools['references']['count']} harmless reference prompts, over the "
            f"tokens of its own responses, teacher-forced, at most {result.settings.get('kl_tokens', 'those of responses')} each; points "
            f"are cells, lines their Pareto fronts. Cells below {SMALLEST_DIVERGENCE:g} are drawn there, those of infinite KL not at all.",
        ),
        tuple(figures),
        (table,),
    )


def synergy_figures(result: SweepResult) -> Iterable[Figure]:
    """Yields a matrix of the synergies of layer pairs for each configuration that has any."""

    most = max(1, *(abs(item.synergy) for item in result.synergies))
    by_pair: dict[tuple[str, str], list[Synergy]] = {}
    for item in result.synergies:
        if len(item.layers) == 2:
            by_pair.setdefault((item.configuration, item.strength), []).append(item)
    for pair, own in by_pair.items():
        layers = sorted({layer for item in own for layer in item.layers})
        values = {place: item.synergy for item in own for place in permutations(item.layers)}
        names = [str(layer) for layer in layers]
        yield Figure(
            f"synergy-{slug(*pair)}",
            f"Synergy of pairs at w = {own[0].weight:g}: {label(*pair)}",
            f"Matrix of synergies of layer pairs for {label(*pair)}; the table of sets of layers has the numbers.",
            partial(
                plots.heat_map,
                plots.matrix(values, layers, layers),
                (names, names),
                ("Layer", "Layer", "Synergy (refusals)"),
                limits=(-most, most),
                annotate="{:+.0f}",
            ),
        )


def synergy_section(result: SweepResult) -> Section:
    cells = {cell.key(): cell for cell in result.cells}

    def cell_of(item: Synergy) -> Cell:
        return cells[CellKey(item.configuration, item.strength, item.layers, item.weight)]

    table = Table.of(
        result.synergies,
        "synergy",
        "Sets of layers",
        CONFIGURATION,
        STRENGTH,
        LAYERS,
        WEIGHT,
        replace(R, value=cell_of),
        Column("Synergy", "synergy", "{:+d}".format),
        Column("KL", "kl_divergence", significant(3)),
        note=f"{_prompts_note(result)} Each layer of the set at the given weight.",
        n_keys=3,
    )
    return Section(
        "Synergy",
        (
            "Synergy: how many refusals fewer a set of layers leaves than its best layer alone, at the same weight. The sets "
            "are made of each configuration's best layers.",
        ),
        tuple(synergy_figures(result)),
        (table,),
    )


def cells_section(result: SweepResult) -> Section:
    table = Table.of(
        result.cells,
        "sweep",
        "Every cell",
        CONFIGURATION,
        STRENGTH,
        LAYERS,
        WEIGHT,
        Column("Effective", "effective_weight", significant(3)),
        Column("Along mean", "weight_along_mean", significant(3)),
        R,
        Column("Evasive", "measurement.evasive"),
        Column("Complied", "measurement.complied"),
        Column("Incoherent", "measurement.incoherent"),
        Column("Canaries refused", "measurement.canary_refusals"),
        *DIVERGENCE,
        _efficiency(result),
        note=f"{_prompts_note(result)} {result.baseline.n_canaries} canaries. {INTERVAL} Effective: the largest share of any "
        "direction that is removed; along mean: the share of the mean direction. The same is in sweep.csv.",
        n_keys=4,
    )
    return Section("All cells", tables=(table,))


def reading_section(result: SweepResult) -> Section:
    identity = result.identity
    versions = ", ".join(f"{name} {version}" for name, version in identity["versions"].items())
    judges = [result.settings.get(name) for name in ("judge_model", "text_classifier")]
    judged = next((f"as {name} has judged it" for name in judges if name), "from its form")
    return Section(
        "How to read this",
        (
            f"Refused, evasive, complied: the tier of a response, {judged}. Incoherent: a response that loops or repeats "
            "itself, whatever its tier. Canaries: harmless prompts, whose refusals are false ones.",
            f"The KL divergence keeps the unmodified model's {result.settings.get('top_k', 'most likely')} most likely tokens at "
            "each position and one bucket for the rest, so it is a lower bound of the divergence over the whole vocabulary.",
            "Intervals are those of one cell. Whoever picks the best of many cells picks luck with it: confirm it with other "
            "prompts and seeds. Random directions, where they were swept, have the lengths and cosines of the first configuration, and are "
            "the floor of what compounds as it does.",
            f"Measured with weights of digest {identity['weights'][:16]} in {identity['dtype']} on {identity['device'][0]}: {versions}.",
        ),
    )
