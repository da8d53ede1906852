# SPDX-License-Identifier: AGPL-3.0-or-later

"""The report of an extraction: what a baseline does to the directions, before any model is changed."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation.results import (
    MAX_RESPONSE_LENGTH,
    N_PROMPTS,
    CaptureResult,
    Geometry,
    LayerGeometry,
)
from . import plots
from .content import (
    Column,
    Figure,
    Report,
    Section,
    Table,
    number,
    percentage,
    plural,
    significant,
    slug,
    text_column,
)
from .sections import (
    capture_section,
    capture_table,
    comparison_section,
    compounding_section,
    magnitude_section,
    measured_texts,
    perturbation_section,
    say_what_is_missing,
    shown_layer,
)
from .writing import to_rich, write_report

if TYPE_CHECKING:
    from ..directions.directions import Directions

    Extracted = Mapping[str, Directions]
    """The directions of each configuration."""


def write_extraction_report(
    model: str,
    extracted: "Extracted",
    directory: Path,
    log: Callable[..., None],
    capture: CaptureResult,
    geometry: Geometry,
) -> None:
    """
    Writes capture, geometry and activities as JSON, CSV, plots and `report.html`, and prints the main tables.

    Raises `ContrastError` when a file cannot be written.
    """

    report = extraction_report(model, extracted, capture, geometry)
    write_report(report, directory, measured_texts(capture, geometry))
    log(to_rich(configuration_table(extracted, geometry)))
    if capture.layers:
        log()
        log(to_rich(capture_table(capture)))
    say_what_is_missing(log, capture, geometry)


def extraction_report(
    model: str, extracted: "Extracted", capture: CaptureResult, geometry: Geometry
) -> Report:
    sections = [
        Section("Overview", tables=(configuration_table(extracted, geometry),)),
        capture_section(capture),
        magnitude_section(geometry),
        compounding_section(geometry),
    ]
    if geometry.comparisons:
        sections.append(comparison_section(geometry))
    pools = f"At most the first {N_PROMPTS} prompts of the pools of harmful and of general harmless prompts for extraction"
    note = f"{pools}; at most {MAX_RESPONSE_LENGTH} decoding steps."
    sections.append(perturbation_section(geometry, note))
    layer = shown_layer(len(geometry.layers) // len(extracted), capture)
    sections.append(classes_section(extracted, geometry, layer))
    return Report(
        title=f"Refusal directions of {model}",
        subtitle=f"{plural(len(extracted), 'configuration')}: {', '.join(extracted)}",
        summary=summary(extracted, capture, geometry),
        sections=tuple(sections),
    )


def summary(extracted: "Extracted", capture: CaptureResult, geometry: Geometry) -> tuple[str, ...]:
    sentences = []
    captured = {row[0]: row for row in capture_table(capture).rows}
    for name, directions in extracted.items():
        strongest = max(geometry.of(name), key=lambda layer: layer.effective_weight)
        sentence = (
            f"{name}: {plural(directions.n_directions, 'direction')} per layer, effective weight at weight 1 up to "
            f"{strongest.effective_weight:.3g}"
        )
        # Where all look equal, rounding noise has chosen the layer.
        if len({f"{layer.effective_weight:.3g}" for layer in geometry.of(name)}) > 1:
            sentence += f" (layer {strongest.layer})"
        row = captured.get(name)
        if row is not None and row[1] is not None:
            sentence += f"; their span captures {percentage(row[1])} on average and {percentage(row[2])} at layer {row[4]}"
        sentences.append(sentence + ".")
    return tuple(sentences)


def configuration_table(extracted: "Extracted", geometry: Geometry) -> Table:
    """Returns what each configuration's directions look like, averaged over layers."""

    def setting(name: str) -> Callable[[str], Any]:
        return lambda item: extracted[item].settings.get(name)

    def average(item: str, attribute: str) -> float | None:
        values = [getattr(layer, attribute) for layer in geometry.of(item)]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return Table.of(
        extracted,
        "configurations",
        "Directions by configuration",
        text_column("Configuration", str),
        text_column("Baseline", setting("baseline"), essential=False),
        Column("Directions", lambda item: extracted[item].n_directions),
        text_column("SVD", lambda item: "yes" if setting("svd")(item) else "no", essential=False),
        text_column("Scale", setting("scale"), essential=False),
        Column("Mean norm", partial(average, attribute="mean_norm"), significant(3)),
        Column("Mean cosine", partial(average, attribute="mean_cosine"), number(3)),
        Column("Share of σ₁²", partial(average, attribute="first_share"), percentage),
        Column("Effective weight", partial(average, attribute="effective_weight"), significant(3)),
        text_column(
            "Prompts from",
            lambda item: ", ".join(extracted[item].provenance.get("sources", ())) or None,
            essential=False,
        ),
        note="Averages over layers; norm, cosine and share of the first squared singular value of the class directions as trained.",
    )


def classes_section(extracted: "Extracted", geometry: Geometry, layer: int) -> Section:
    """Returns the classes of each configuration at one layer: cosines, singular values, and maps."""

    measured = {item.configuration: item for item in geometry.layers if item.layer == layer}
    spectra = {
        name: (
            range(1, len(item.singular_values) + 1),
            [value / first if first else None for value in item.singular_values],
        )
        for name, item in measured.items()
        for first in item.singular_values[:1]
    }
    figures = []
    if any(len(index) > 1 for index, _ in spectra.values()):
        title = f"Singular values of the class directions, layer {layer}"
        alternative = (
            f"Line plot: singular values relative to the first one, for {', '.join(spectra)}."
        )
        axes = "Index", "Singular value / first one"
        draw = partial(plots.lines, spectra, *axes, from_zero=True)
        figures.append(Figure("singular-values", title, alternative, draw))
    rows = []
    drawn: list[Directions] = []
    for name, directions in extracted.items():
        classes = directions.class_direction_names
        # Random directions keep the maps of those that they replace.
        has_maps = directions.hits.numel() and directions.settings.get("control") != "random"
        # SVD and scale change nothing about the classes themselves.
        if not any(directions.class_directions.equal(other.class_directions) for other in drawn):
            if len(classes) > 1:
                figures.append(cosine_figure(name, classes, measured[name]))
            if has_maps:
                figures.append(hits_figure(name, directions, layer))
        drawn.append(directions)
        # Several neurons of a class follow each other.
        winners = len(classes) // len(directions.class_names)
        for index, norm in enumerate(measured[name].norms):
            counts: tuple[int | None, int | None] = (None, None)
            if has_maps:
                hits = sorted(directions.hits[layer + 1, index // winners].tolist(), reverse=True)
                counts = sum(hits), hits[index % winners]
            rows.append((name, classes[index], norm, *counts))
    table = Table(
        "classes",
        f"Classes at layer {layer}",
        (
            text_column("Configuration"),
            text_column("Class"),
            Column("Norm", form=significant(3)),
            Column("Prompts"),
            Column("Won by its neuron"),
        ),
        tuple(rows),
        "Norm of the class direction as trained. Prompts of the class, and how many of them are won by the neuron that the direction is.",
        n_keys=2,
    )
    return Section(
        "Classes",
        (
            f"Shown for layer {layer}, whose directions capture most of the pairs' differences; where nothing could be captured, "
            "the middle layer. Configurations with the same class directions are drawn once.",
        ),
        tuple(figures),
        (table,),
    )


def cosine_figure(name: str, classes: tuple[str, ...], measured: LayerGeometry) -> Figure:
    # Directions of classes are often nearly parallel.
    lowest = min(0.9, math.floor(10 * np.min(measured.cosines)) / 10)
    return Figure(
        f"class-cosines-{slug(name)}",
        f"Cosines between classes: {name}, layer {measured.layer}",
        f"Heat map of the cosines between the directions of {', '.join(classes)}; on average {measured.mean_cosine:.2f}.",
        partial(
            plots.heat_map,
            np.array(measured.cosines),
            (classes, classes),
            ("Class", "Class", "Cosine"),
            limits=(lowest, 1),
            annotate="{:.2f}",
        ),
    )


def hits_figure(name: str, directions: "Directions", layer: int) -> Figure:
    rows = directions.settings.get("som_rows", 1)
    maps = directions.hits[layer + 1].numpy().reshape(len(directions.class_names), rows, -1)
    return Figure(
        f"som-hits-{slug(name)}",
        f"Prompts won by each neuron: {name}, layer {layer}",
        f"Self-organizing maps of {rows} by {maps.shape[2]} neurons with the number of prompts that each neuron wins, "
        f"one for each of {', '.join(directions.class_names)}.",
        partial(plots.hit_maps, maps, directions.class_names),
    )
