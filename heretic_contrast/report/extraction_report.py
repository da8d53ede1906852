# SPDX-License-Identifier: AGPL-3.0-or-later

"""The report of an extraction: what a baseline does to the directions, before any model is changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.results import (
    MAX_RESPONSE_LENGTH,
    N_PROMPTS,
    Extracted,
    Extraction,
    LayerGeometry,
)
from . import plots
from .content import Column, Figure, Report, Section, Table, number, slug, text_column
from .sections import (
    capture_layers_table,
    capture_section,
    capture_table,
    comparison_section,
    compounding_section,
    magnitude_section,
    perturbation_section,
    shown_layer,
)
from .writing import say_what_is_missing, to_csv, to_json, to_rich, write_report


def write_extraction_report(
    extraction: Extraction, directory: Path, log: Callable[..., None]
) -> None:
    """
    Writes capture, geometry and activities as JSON, CSV, plots and `report.html`, and prints the main tables.

    Raises `ContrastError` when a file cannot be written.
    """

    capture, geometry = extraction.capture, extraction.geometry
    report = extraction_report(extraction)
    texts = {
        "capture.json": to_json(capture.to_dict()),
        "geometry.json": to_json(geometry.to_dict()),
        **{
            f"{table.name}.csv": to_csv(table)
            for table in (*report.tables(), capture_layers_table(capture))
        },
    }
    write_report(report, directory, texts)
    log(to_rich(configuration_table(extraction)))
    if capture.layers:
        log()
        log(to_rich(capture_table(capture)))
    if capture.left_out:
        log(
            f"* [yellow]{len(capture.left_out)} pairs are left out of the capture, since the model does not treat them as "
            "assumed.[/]"
        )
    if not geometry.activities:
        log(
            "* Occupancy and perturbation are left out: the experts of this model do not keep prompts apart."
        )
    say_what_is_missing(log)


def extraction_report(extraction: Extraction) -> Report:
    capture, geometry = extraction.capture, extraction.geometry
    names = list(extraction.directions)
    sections = [
        Section("Overview", tables=(configuration_table(extraction),)),
        capture_section(capture),
        magnitude_section(geometry),
        compounding_section(geometry),
    ]
    if geometry.comparisons:
        sections.append(comparison_section(geometry))
    if geometry.activities:
        sections.append(
            perturbation_section(
                geometry,
                f"The first {N_PROMPTS} prompts of the pools of harmful and of general harmless prompts for extraction; at most {MAX_RESPONSE_LENGTH} decoding steps.",
            )
        )
    layer = shown_layer(len(geometry.layers) // len(names), capture)
    sections.append(classes_section(extraction, layer))
    return Report(
        title=f"Refusal directions of {extraction.model}",
        subtitle=f"{len(names)} configurations: {', '.join(names)}",
        summary=summary(extraction),
        sections=tuple(sections),
    )


def summary(extraction: Extraction) -> tuple[str, ...]:
    sentences = []
    captured = {row[0]: row for row in capture_table(extraction.capture).rows}
    for name, directions in extraction.directions.items():
        strongest = max(extraction.geometry.of(name), key=lambda layer: layer.effective_weight)
        sentence = (
            f"{name}: {directions.n_directions} directions per layer, effective weight at weight 1 up to "
            f"{strongest.effective_weight:.2f} (layer {strongest.layer})"
        )
        row = captured.get(name)
        if row is not None and row[1] is not None:
            sentence += f"; their span captures {100 * row[1]:.1f} % on average and {100 * row[2]:.1f} % at layer {row[4]}"
        sentences.append(sentence + ".")
    return tuple(sentences)


def configuration_table(extraction: Extraction) -> Table:
    """Returns what each configuration's directions look like, averaged over layers."""

    def setting(name: str) -> Callable[[str], Any]:
        return lambda item: extraction.directions[item].settings.get(name)

    def average(attribute: str) -> Callable[[str], float | None]:
        def value(item: str) -> float | None:
            values = [getattr(layer, attribute) for layer in extraction.geometry.of(item)]
            known = [value for value in values if value is not None]
            return sum(known) / len(known) if known else None

        return value

    return Table.of(
        extraction.directions,
        "configurations",
        "Directions by configuration",
        text_column("Configuration", str),
        text_column("Baseline", setting("baseline"), essential=False),
        Column("Directions", lambda item: extraction.directions[item].n_directions),
        text_column("SVD", lambda item: "yes" if setting("svd")(item) else "no", essential=False),
        text_column("Scale", setting("scale"), essential=False),
        Column("Mean norm", average("mean_norm"), number(3)),
        Column("Mean cosine", average("mean_cosine"), number(3)),
        Column("Share of σ₁²", average("first_share"), number(3)),
        Column("Effective weight", average("effective_weight"), number(2)),
        note="Averages over layers; norm, cosine and share of the first squared singular value of the class directions as trained.",
    )


def classes_section(extraction: Extraction, layer: int) -> Section:
    """Returns the classes of each configuration at one layer: cosines, singular values, and maps."""

    names = dict(extraction.geometry.class_names)
    measured = {
        item.configuration: item for item in extraction.geometry.layers if item.layer == layer
    }
    spectra = {
        name: (
            range(1, len(item.singular_values) + 1),
            [value / first if first else None for value in item.singular_values],
        )
        for name, item in measured.items()
        for first in item.singular_values[:1]
    }
    figures = [
        Figure.of(
            "singular-values",
            f"Singular values of the class directions, layer {layer}",
            f"Line plot: singular values relative to the first one, for {', '.join(spectra)}.",
            plots.lines,
            spectra,
            "Index",
            "Singular value / first one",
            from_zero=True,
        )
    ]
    rows = []
    for name, directions in extraction.directions.items():
        if not directions.repeated:
            if len(names[name]) > 1:
                figures.append(cosine_figure(name, names[name], measured[name]))
            if directions.hits.size and directions.settings.get("control") != "random":
                figures.append(hits_figure(name, directions, layer))
        # Several neurons of a class follow each other.
        winners = len(names[name]) // len(directions.class_names)
        for index, norm in enumerate(measured[name].norms):
            counts: tuple[int | None, int | None] = (None, None)
            if directions.hits.size:
                hits = directions.hits[layer, index // winners]
                counts = int(hits.sum()), int(hits.max())
            rows.append((name, names[name][index], norm, *counts))
    table = Table(
        "classes",
        f"Classes at layer {layer}",
        (
            text_column("Configuration"),
            text_column("Class"),
            Column("Norm", form=number(3)),
            Column("Prompts"),
            Column("Won by the densest neuron"),
        ),
        tuple(rows),
        "Norm of the class direction as trained. Prompts of the class, and how many of them its map's densest neuron wins.",
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
    return Figure.of(
        f"class-cosines-{slug(name)}",
        f"Cosines between classes: {name}, layer {measured.layer}",
        f"Heat map of the cosines between the directions of {', '.join(classes)}; on average {measured.mean_cosine:.2f}.",
        plots.heat_map,
        np.array(measured.cosines),
        classes,
        classes,
        "Class",
        "Class",
        "Cosine",
        limits=(-1, 1),
        annotate="{:.2f}",
    )


def hits_figure(name: str, directions: Extracted, layer: int) -> Figure:
    """Returns the maps of prompts won by each neuron."""

    rows = directions.settings.get("som_rows", 1)
    maps = directions.hits[layer].reshape(len(directions.class_names), rows, -1)
    return Figure.of(
        f"som-hits-{slug(name)}",
        f"Prompts won by each neuron: {name}, layer {layer}",
        f"Self-organizing maps of {rows} by {maps.shape[2]} neurons with the number of prompts that each neuron wins, "
        f"one for each of {', '.join(directions.class_names)}.",
        plots.hit_maps,
        maps,
        directions.class_names,
    )
