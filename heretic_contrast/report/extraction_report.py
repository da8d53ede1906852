# SPDX-License-Identifier: AGPL-3.0-or-later

"""The report of an extraction: what a baseline does to the directions, before any model is changed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..evaluation.results import (
    MAX_RESPONSE_LENGTH,
    N_PROMPTS,
    Extracted,
    Extraction,
    LayerGeometry,
)
from . import plots
from .content import Column, Figure, Report, Section, Table, number, text_column
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
from .tables import to_csv, to_rich
from .writing import NO_PLOTS, table_files, to_json, write_report


def write_extraction_report(
    extraction: Extraction, directory: Path, log: Callable[..., None]
) -> None:
    """
    Writes capture, geometry and activities as JSON, CSV, plots and `report.html`, and prints the main tables.

    Raises `ContrastError` when a file cannot be written.
    """

    capture, geometry = extraction.capture, extraction.geometry
    report = extraction_report(extraction)
    write_report(
        report,
        directory,
        {
            "capture.json": to_json(capture.to_dict()),
            "geometry.json": to_json(geometry.to_dict()),
            **table_files(report),
            "capture-layers.csv": to_csv(capture_layers_table(capture)),
        },
    )
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
    if not plots.can_plot():
        log(f"[yellow]{NO_PLOTS.replace('[', chr(92) + '[')}[/]")


def extraction_report(extraction: Extraction) -> Report:
    """Returns the report of an extraction."""

    capture, geometry = extraction.capture, extraction.geometry
    names = list(extraction.directions)
    layer = shown_layer(len(geometry.layers) // len(names), capture)
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
    sections.append(classes_section(extraction, layer))
    return Report(
        title=f"Refusal directions of {extraction.model}",
        subtitle=f"{len(names)} configurations: {', '.join(names)}",
        summary=summary(extraction),
        sections=tuple(sections),
    )


def summary(extraction: Extraction) -> tuple[str, ...]:
    """Returns what was found, in a sentence for each configuration."""

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

    rows = []
    for name, directions in extraction.directions.items():
        settings = directions.settings
        layers = extraction.geometry.of(name)
        cosines = [layer.mean_cosine for layer in layers if layer.mean_cosine is not None]
        shares = [layer.first_share for layer in layers if layer.first_share is not None]
        rows.append(
            (
                name,
                settings.get("baseline"),
                directions.n_directions,
                "yes" if settings.get("svd") else "no",
                settings.get("scale"),
                sum(layer.mean_norm for layer in layers) / len(layers),
                sum(cosines) / len(cosines) if cosines else None,
                sum(shares) / len(shares) if shares else None,
                sum(layer.effective_weight for layer in layers) / len(layers),
            )
        )
    return Table(
        "configurations",
        "Directions by configuration",
        (
            text_column("Configuration"),
            text_column("Baseline", essential=False),
            Column("Directions"),
            text_column("SVD", essential=False),
            text_column("Scale", essential=False),
            Column("Mean norm", number(3)),
            Column("Mean cosine", number(3)),
            Column("Share of σ₁²", number(3)),
            Column("Effective weight", number(2)),
        ),
        tuple(rows),
        "Averages over layers; norm, cosine and share of the first squared singular value of the class directions as trained.",
    )


def classes_section(extraction: Extraction, layer: int) -> Section:
    """Returns the classes of each configuration at one layer: cosines, singular values, and maps."""

    geometry = extraction.geometry
    names = dict(geometry.class_names)
    measured = {
        name: next(item for item in geometry.of(name) if item.layer == layer) for name in names
    }
    figures: list[Figure] = []
    if plots.can_plot():
        spectra = {}
        for name, item in measured.items():
            first = item.singular_values[0]
            spectra[name] = (
                list(range(1, len(item.singular_values) + 1)),
                [value / first if first else None for value in item.singular_values],
            )
        figures.append(
            Figure(
                "singular-values",
                f"Singular values of the class directions, layer {layer}",
                f"Line plot: singular values relative to the first one, for {', '.join(spectra)}.",
                plots.lines(spectra, "Index", "Singular value / first one", from_zero=True),
            )
        )
        for name, directions in extraction.directions.items():
            if directions.repeated:
                continue
            if len(names[name]) > 1:
                figures.append(cosine_figure(name, names[name], measured[name]))
            if directions.hits.size and directions.settings.get("control") != "random":
                figures.append(hits_figure(name, directions, layer))
    rows = tuple(
        (
            name,
            class_name,
            norm,
            *_densest(directions, index * len(directions.class_names) // len(names[name]), layer),
        )
        for name, directions in extraction.directions.items()
        for index, (class_name, norm) in enumerate(
            zip(names[name], measured[name].norms, strict=True)
        )
    )
    table = Table(
        "classes",
        f"Classes at layer {layer}",
        (
            text_column("Configuration"),
            text_column("Class"),
            Column("Norm", number(3)),
            Column("Prompts"),
            Column("Won by the densest neuron"),
        ),
        rows,
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
    """Returns the heat map of cosines between classes."""

    return Figure(
        f"class-cosines-{_safe(name)}",
        f"Cosines between classes: {name}, layer {measured.layer}",
        f"Heat map of the cosines between the directions of {', '.join(classes)}; on average {measured.mean_cosine:.2f}.",
        plots.heat_map(
            np.array(measured.cosines),
            classes,
            classes,
            "Class",
            "Class",
            "Cosine",
            limits=(-1, 1),
            annotate="{:.2f}",
        ),
    )


def hits_figure(name: str, directions: Extracted, layer: int) -> Figure:
    """Returns the maps of prompts won by each neuron."""

    rows = directions.settings.get("som_rows", 1)
    shape = (rows, directions.hits.shape[2] // rows)
    return Figure(
        f"som-hits-{_safe(name)}",
        f"Prompts won by each neuron: {name}, layer {layer}",
        f"Self-organizing maps of {shape[0]} by {shape[1]} neurons with the number of prompts that each neuron wins, "
        f"one for each of {', '.join(directions.class_names)}.",
        plots.hit_maps(
            [hits.reshape(shape) for hits in directions.hits[layer]],
            directions.class_names,
        ),
    )


def _densest(directions: Extracted, index: int, layer: int) -> tuple[int | None, int | None]:
    """Returns the number of prompts of a class, and how many of them the densest neuron wins."""

    if not directions.hits.size:
        return None, None
    hits = directions.hits[layer, index]
    return int(hits.sum()), int(hits.max())


def _safe(name: str) -> str:
    """Returns a name that is safe in file names."""

    return "".join(letter if letter.isalnum() else "-" for letter in name)
