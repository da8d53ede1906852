# SPDX-License-Identifier: AGPL-3.0-or-later

"""Sections that the reports of a sweep and of an extraction share: capture, norms, compounding, perturbation."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ..evaluation.results import CaptureResult, Geometry
from . import plots
from .content import Column, Figure, Section, Table, number, percent, significant, text_column


def capture_section(capture: CaptureResult) -> Section:
    """Returns the paper's Table 4 for this model, with both definitions, and capture per layer."""

    n_pairs = capture.n_pairs + len(capture.left_out)
    paragraphs = [
        f"Residual differences of {capture.n_pairs} pairs of prompts on the same subject, one refused and one answered, "
        "against the directions of each layer. Subspace: the share of a difference's length that lies in the span of the "
        "directions. Maximal cosine: with the nearest single direction. Averages over pairs; ± is the standard error."
    ]
    if capture.left_out:
        paragraphs.append(
            f"{len(capture.left_out)} of {n_pairs} pairs are left out, since the model does not treat them as assumed."
        )
    tables = []
    figures: list[Figure] = []
    if capture.layers:
        tables.append(capture_table(capture))
        if plots.can_plot():
            for name, title in (
                ("subspace", "Capture in the span of the directions"),
                ("max_cosine", "Capture by the nearest single direction"),
            ):
                series = {
                    configuration: (
                        [layer.layer for layer in capture.of(configuration)],
                        [getattr(layer, name) for layer in capture.of(configuration)],
                    )
                    for configuration in capture.configurations()
                }
                figures.append(
                    Figure(
                        f"capture-{name.replace('_', '-')}",
                        title,
                        f"Line plot: share of the residual differences captured, over layers, for {', '.join(series)}. "
                        "The table below has mean and peak.",
                        plots.lines(series, "Layer", "Captured share (0 to 1)", from_zero=True),
                    )
                )
    else:
        paragraphs.append("No pair is left, so capture could not be measured.")
    if capture.left_out:
        tables.append(
            Table(
                "capture-left-out",
                "Pairs that are left out",
                (
                    text_column("Assumed to be refused"),
                    text_column("Response"),
                    text_column("Assumed to be answered"),
                    text_column("Response"),
                ),
                tuple(
                    (item.pair.refused, item.refused_tier, item.pair.answered, item.answered_tier)
                    for item in capture.left_out
                ),
                "Tiers of the unmodified model's responses.",
            )
        )
    return Section("Capture", tuple(paragraphs), tuple(figures), tuple(tables))


def capture_table(capture: CaptureResult) -> Table:
    """Returns mean and peak of capture by configuration."""

    rows: list[tuple[Any, ...]] = []
    for configuration in capture.configurations():
        layers = [layer for layer in capture.of(configuration) if layer.subspace is not None]
        if not layers:
            rows.append((configuration, *[None] * 8))
            continue
        peak = max(layers, key=lambda layer: layer.subspace or 0)
        rows.append(
            (
                configuration,
                fmean(layer.subspace or 0 for layer in layers),
                peak.subspace,
                peak.subspace_error,
                peak.layer,
                fmean(layer.max_cosine or 0 for layer in layers),
                max(layer.max_cosine or 0 for layer in layers),
                peak.rank,
                peak.random_subspace,
            )
        )
    return Table(
        "capture",
        "Capture by configuration",
        (
            text_column("Configuration"),
            Column("Subspace, mean over layers", percent),
            Column("Peak", percent),
            Column("± at peak", percent, essential=False),
            Column("Peak layer"),
            Column("Maximal cosine, mean", percent),
            Column("Peak", percent, essential=False),
            Column("Rank", essential=False),
            Column("Random subspace", percent),
        ),
        tuple(rows),
        f"{capture.n_pairs} pairs. Random subspace: about what as many random directions would capture.",
    )


def capture_layers_table(capture: CaptureResult) -> Table:
    """Returns capture per configuration and layer, for the CSV file."""

    return Table(
        "capture-layers",
        "Capture per layer",
        (
            text_column("configuration"),
            Column("layer"),
            Column("subspace"),
            Column("subspace_error"),
            Column("max_cosine"),
            Column("max_cosine_error"),
            Column("rank"),
            Column("random_subspace"),
        ),
        tuple(
            (
                layer.configuration,
                layer.layer,
                layer.subspace,
                layer.subspace_error,
                layer.max_cosine,
                layer.max_cosine_error,
                layer.rank,
                layer.random_subspace,
            )
            for layer in capture.layers
        ),
        n_keys=2,
    )


def magnitude_section(geometry: Geometry) -> Section:
    """Returns norms per layer by configuration: the paper's explanation by magnitude."""

    names = geometry.configurations()
    figures = []
    if plots.can_plot():
        figures.append(
            Figure(
                "norms",
                "Length of the class directions",
                f"Line plot on a logarithmic axis: mean norm of the class directions over layers, for {', '.join(names)}.",
                plots.lines(
                    {
                        name: (
                            [layer.layer for layer in geometry.of(name)],
                            [layer.mean_norm for layer in geometry.of(name)],
                        )
                        for name in names
                    },
                    "Layer",
                    "Mean norm (units of the residual)",
                    logarithmic=True,
                ),
            )
        )
    return Section(
        "Magnitude",
        (
            "Lengths of the class directions as trained, before any scaling or decomposition. A direction's length matters "
            "only with scale = raw: unit directions are ablated alike whatever length they had.",
        ),
        tuple(figures),
        (layer_table(geometry),),
    )


def layer_table(geometry: Geometry) -> Table:
    """Returns what is measured of each configuration's directions at each layer."""

    return Table(
        "geometry",
        "Directions per layer",
        (
            text_column("Configuration"),
            Column("Layer"),
            Column("Mean norm", significant(3)),
            Column("Smallest norm", significant(3)),
            Column("Largest norm", significant(3)),
            Column("Mean cosine", number(3)),
            Column("Share of σ₁²", percent),
            Column("Effective weight", number(3)),
            Column("Along mean", number(3)),
        ),
        tuple(
            (
                layer.configuration,
                layer.layer,
                layer.mean_norm,
                min(layer.norms),
                max(layer.norms),
                layer.mean_cosine,
                layer.first_share,
                layer.effective_weight,
                layer.weight_along_mean,
            )
            for layer in geometry.layers
        ),
        "Norms, mean pairwise cosine and share of the first squared singular value: of the class directions as trained. "
        "Effective weight: the largest eigenvalue of Σ v vᵀ of the directions as ablated, at weight 1; along mean: the part "
        "of the mean direction that is removed at weight 1.",
        n_keys=2,
    )


def compounding_section(geometry: Geometry) -> Section:
    """Returns how much parallel directions add up."""

    figures = []
    names = geometry.configurations()
    if plots.can_plot():
        for name, title, attribute, axis in (
            ("cosines", "Cosine between classes", "mean_cosine", "Mean pairwise cosine"),
            (
                "effective-weight",
                "Effective weight",
                "effective_weight",
                "Largest eigenvalue of Σ v vᵀ at weight 1",
            ),
        ):
            series = {
                item: (
                    [layer.layer for layer in geometry.of(item)],
                    [getattr(layer, attribute) for layer in geometry.of(item)],
                )
                for item in names
                if any(getattr(layer, attribute) is not None for layer in geometry.of(item))
            }
            if series:
                figures.append(
                    Figure(
                        name,
                        title,
                        f"Line plot: {axis} over layers, for {', '.join(series)}.",
                        plots.lines(series, "Layer", axis),
                    )
                )
    return Section(
        "Compounding",
        (
            "Directions of classes are often nearly parallel. Ablated as a sum with the same weight each, they remove their "
            "shared part several times; orthogonal directions do not. The effective weight says how often.",
        ),
        tuple(figures),
    )


def perturbation_section(geometry: Geometry, pools: str) -> Section:
    """Returns occupancy, and the size of the perturbation against the model's natural variation."""

    rows = []
    for activity in geometry.activities:
        rows.append(
            (
                activity.configuration,
                activity.layer,
                max(activity.occupancy_harmful, default=None),
                max(activity.occupancy_harmless, default=None),
                activity.natural_variation,
                *(value for _, value in activity.perturbations),
            )
        )
    weights = [weight for weight, _ in geometry.activities[0].perturbations]
    table = Table(
        "perturbation",
        "Occupancy and perturbation",
        (
            text_column("Configuration"),
            Column("Layer"),
            Column("Occupancy, harmful", percent),
            Column("Occupancy, harmless", percent),
            Column("Natural variation", significant(3)),
            *(Column(f"w = {weight:g}", significant(3)) for weight in weights),
        ),
        tuple(rows),
        f"{pools} Occupancy: the largest over directions. Columns of weights: the perturbation, as a multiple of the natural "
        "variation.",
        n_keys=2,
    )
    figures = []
    if plots.can_plot():
        weight = 1.0 if 1.0 in weights else weights[-1]
        series: dict[str, tuple[Sequence[float], Sequence[float | None]]] = {}
        harmful: dict[str, tuple[Sequence[float], Sequence[float | None]]] = {}
        for name in geometry.configurations():
            own = [activity for activity in geometry.activities if activity.configuration == name]
            layers = [activity.layer for activity in own]
            series[name] = (layers, [dict(activity.perturbations)[weight] for activity in own])
            harmful[name] = (layers, [max(activity.occupancy_harmful) for activity in own])
        figures = [
            Figure(
                "perturbation",
                f"Perturbation at w = {weight:g}",
                "Line plot on a logarithmic axis: size of the perturbation over layers as a multiple of the natural "
                f"variation, for {', '.join(series)}; a dashed line marks 1.",
                plots.lines(
                    series,
                    "Layer",
                    "Perturbation / natural variation",
                    logarithmic=True,
                    level=(1.0, "natural variation"),
                ),
            ),
            Figure(
                "occupancy",
                "Occupancy of the best direction, harmful prompts",
                f"Line plot: share of the layer's output that lies along a direction, over layers, for {', '.join(harmful)}.",
                plots.lines(harmful, "Layer", "Root mean square of v·y over ‖y‖", from_zero=True),
            ),
        ]
    return Section(
        "Perturbation",
        (
            "y is what a layer's output projections add to the residual stream. Occupancy: how much of y lies along a direction "
            "at all. Perturbation: what the ablation C y takes from the stream at one layer, against the natural variation of "
            "that layer's output over decoding steps, the paper's noise floor. Both as root mean squares.",
        ),
        tuple(figures),
        (table,),
    )


def comparison_section(geometry: Geometry) -> Section:
    """Returns norms and angles of configurations against each other."""

    table = Table(
        "comparison",
        "Configurations compared",
        (
            text_column("First"),
            text_column("Second"),
            Column("Layer"),
            Column("Norm ratio", number(3)),
            Column("Angle per class, mean", number(1)),
            Column("Smallest principal angle", number(1)),
            Column("Largest principal angle", number(1)),
        ),
        tuple(
            (
                item.first,
                item.second,
                item.layer,
                item.norm_ratio,
                item.mean_class_angle,
                item.principal_angles[0] if item.principal_angles else None,
                item.principal_angles[-1] if item.principal_angles else None,
            )
            for item in geometry.comparisons
        ),
        "Norm ratio: mean norm of the class directions as trained, second over first. Angles in degrees: between the "
        "directions of the same class as trained, and between the spans of the directions as ablated.",
        n_keys=3,
    )
    figures = []
    if plots.can_plot():
        pairs = list(dict.fromkeys((item.first, item.second) for item in geometry.comparisons))
        for name, title, attribute, axis, level in (
            ("norm-ratio", "Ratio of norms", "norm_ratio", "Second / first", (1.0, "equal")),
            (
                "class-angle",
                "Angle between directions of the same class",
                "mean_class_angle",
                "Degrees",
                None,
            ),
        ):
            series = {
                f"{second} / {first}": (
                    [
                        item.layer
                        for item in geometry.comparisons
                        if (item.first, item.second) == (first, second)
                    ],
                    [
                        getattr(item, attribute)
                        for item in geometry.comparisons
                        if (item.first, item.second) == (first, second)
                    ],
                )
                for first, second in pairs
            }
            figures.append(
                Figure(
                    name,
                    title,
                    f"Line plot over layers: {title.lower()} ({axis.lower()}), for {', '.join(series)}.",
                    plots.lines(series, "Layer", axis, level=level),
                )
            )
    return Section("Between configurations", (), tuple(figures), (table,))


def shown_layer(n_layers: int, capture: CaptureResult | None) -> int:
    """Returns the layer that is shown where only one can be: the best captured one, else the middle one."""

    if capture is not None and capture.layers:
        return max(capture.layers, key=lambda layer: layer.subspace or 0).layer
    return n_layers // 2
