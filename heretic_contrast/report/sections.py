# SPDX-License-Identifier: AGPL-3.0-or-later

"""Sections that the reports of a sweep and of an extraction share: capture, norms, compounding, perturbation."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from operator import attrgetter
from statistics import fmean
from typing import Any

from rich.markup import escape

from ..evaluation.results import Activity, CaptureResult, Geometry, LayerCapture
from ..outputs import json_text
from . import plots
from .content import Column, Figure, Section, Table, number, percentage, significant, text_column
from .writing import NO_PLOTS, to_csv

NO_ACTIVITIES = (
    "Occupancy and perturbation are left out: what the ablated components of this model add to its stream cannot be told from what "
    "others add or what passes."
)

CONFIGURATION = text_column("Configuration", "configuration")
LAYER = Column("Layer", "layer")


def over_layers(
    name: str,
    title: str,
    alternative: str,
    series: Mapping[str, Iterable[Any]],
    value: Callable[[Any], float | None],
    axis: str,
    **options: Any,
) -> Figure:
    """
    Returns a figure with a line over layers for each series.

    `alternative`: {names} stands for the series' names, {axis} for that of the axis. `value`: of an item at one layer.
    `options`: those of `plots.lines`.
    """

    points = {
        label: ([item.layer for item in items], [value(item) for item in items])
        for label, items in series.items()
    }
    alternative = alternative.format(names=", ".join(series), axis=axis)
    return Figure(name, title, alternative, partial(plots.lines, points, "Layer", axis, **options))


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
    tables = [capture_table(capture)] if capture.layers else []
    figures = [
        over_layers(
            f"capture-{name.replace('_', '-')}",
            title,
            "Line plot: share of the residual differences captured, over layers, for {names}. "
            "The table below has mean and peak.",
            {item: capture.of(item) for item in capture.configurations()},
            partial(_captured, name),
            "Captured share (%)",
            from_zero=True,
        )
        for name, title in (
            ("subspace", "Capture in the span of the directions"),
            ("max_cosine", "Capture by the nearest single direction"),
        )
        if capture.layers
    ]
    if not capture.layers:
        paragraphs.append("No pair is left, so capture could not be measured.")
    if capture.left_out:
        tables.append(
            Table.of(
                capture.left_out,
                "capture-left-out",
                "Pairs that are left out",
                text_column("Assumed to be refused", "pair.refused"),
                text_column("Its tier", "refused_tier"),
                text_column("Assumed to be answered", "pair.answered"),
                text_column("Tier of that", "answered_tier"),
                note="Tiers of the unmodified model's responses.",
            )
        )
    return Section("Capture", tuple(paragraphs), tuple(figures), tuple(tables))


def _captured(name: str, layer: LayerCapture) -> float | None:
    share = getattr(layer, name)
    return None if share is None else 100 * share


def _subspace(layer: LayerCapture) -> float:
    return layer.subspace or 0


def capture_table(capture: CaptureResult) -> Table:
    def row(configuration: str) -> tuple[Any, ...]:
        layers = [layer for layer in capture.of(configuration) if layer.subspace is not None]
        if not layers:
            return (configuration, *[None] * 8)
        peak = max(layers, key=_subspace)
        cosines = [layer.max_cosine or 0 for layer in layers]
        found = fmean(map(_subspace, layers)), peak.subspace, peak.subspace_error, peak.layer
        return configuration, *found, fmean(cosines), max(cosines), peak.rank, peak.random_subspace

    return Table(
        "capture",
        "Capture by configuration",
        (
            CONFIGURATION,
            Column("Subspace, mean over layers", form=percentage),
            Column("Subspace, peak", form=percentage),
            Column("± at peak", form=percentage, essential=False),
            Column("Peak layer"),
            Column("Maximal cosine, mean", form=percentage),
            Column("Maximal cosine, peak", form=percentage, essential=False),
            Column("Rank", essential=False),
            Column("Random subspace", form=percentage),
        ),
        tuple(map(row, capture.configurations())),
        f"{capture.n_pairs} pairs. Peak layer, rank and random subspace are those of the subspace's peak; "
        "random subspace: about what as many random directions would capture.",
    )


def measured_texts(capture: CaptureResult, geometry: Geometry) -> dict[str, str]:
    """Returns what is written of both beside the tables of the page, by file name."""

    columns = [Column(name, name) for name in LayerCapture.__dataclass_fields__]
    layers = Table.of(capture.layers, "capture-layers", "Capture per layer", *columns)
    return {
        "capture.json": json_text(capture),
        "geometry.json": json_text(geometry),
        "capture-layers.csv": to_csv(layers),
    }


def magnitude_section(geometry: Geometry) -> Section:
    """Returns norms per layer by configuration: the paper's explanation by magnitude."""

    return Section(
        "Magnitude",
        (
            "Lengths of the class directions as trained, before any scaling or decomposition. A direction's length matters "
            "only with scale = raw: unit directions are ablated alike whatever length they had.",
        ),
        (
            over_layers(
                "norms",
                "Length of the class directions",
                "Line plot on a logarithmic axis: mean norm of the class directions over layers, for {names}.",
                {name: geometry.of(name) for name in geometry.configurations()},
                attrgetter("mean_norm"),
                "Mean norm (units of the residual)",
                logarithmic=True,
            ),
        ),
        (layer_table(geometry),),
    )


def layer_table(geometry: Geometry) -> Table:
    return Table.of(
        geometry.layers,
        "geometry",
        "Directions per layer",
        CONFIGURATION,
        LAYER,
        Column("Mean norm", "mean_norm", significant(3)),
        Column("Smallest norm", lambda layer: min(layer.norms), significant(3)),
        Column("Largest norm", lambda layer: max(layer.norms), significant(3)),
        Column("Mean cosine", "mean_cosine", number(3)),
        Column("Share of σ₁²", "first_share", percentage),
        Column("Effective weight", "effective_weight", significant(3)),
        Column("Along mean", "weight_along_mean", significant(3)),
        note="Norms, mean pairwise cosine and share of the first squared singular value: of the class directions as trained. "
        "Effective weight: the largest share of any direction that is removed at weight 1, as the configuration composes its "
        "directions (of a sum, the largest eigenvalue of Σ v vᵀ); along mean: the share of the mean direction.",
        n_keys=2,
    )


def compounding_section(geometry: Geometry) -> Section:
    figures = []
    eigenvalue = "Effective weight at weight 1"
    for name, title, attribute, axis, from_zero in (
        (
            "cosines",
            "Cosine between class directions",
            "mean_cosine",
            "Mean pairwise cosine",
            False,
        ),
        ("effective-weight", "Effective weight", "effective_weight", eigenvalue, True),
    ):
        value = attrgetter(attribute)
        layers = {item: geometry.of(item) for item in geometry.configurations()}
        known = {
            item: own for item, own in layers.items() if any(value(x) is not None for x in own)
        }
        if known:
            alternative = "Line plot: {axis} over layers, for {names}."
            figures.append(
                over_layers(name, title, alternative, known, value, axis, from_zero=from_zero)
            )
    return Section(
        "Compounding",
        (
            "Directions of classes are often nearly parallel. Ablated as a sum with the same weight each, they remove their "
            "shared part several times; orthogonal directions do not. The effective weight says how often.",
        ),
        tuple(figures),
    )


def _perturbation(index: int, activity: Activity) -> float | None:
    return activity.perturbations[index][1]


def perturbation_section(geometry: Geometry, pools: str) -> Section:
    """Returns occupancy, and the size of the perturbation against the model's natural variation, where they are known."""

    if not geometry.activities:
        return Section("Perturbation", (NO_ACTIVITIES,))
    weights = [weight for weight, _ in geometry.activities[0].perturbations]
    table = Table.of(
        geometry.activities,
        "perturbation",
        "Occupancy and perturbation",
        CONFIGURATION,
        LAYER,
        Column("Occupancy, harmful", lambda x: max(x.occupancy_harmful, default=None), percentage),
        Column(
            "Occupancy, harmless", lambda x: max(x.occupancy_harmless, default=None), percentage
        ),
        Column("Natural variation", "natural_variation", significant(3)),
        *(
            Column(f"w = {weight:g}", partial(_perturbation, index), significant(3))
            for index, weight in enumerate(weights)
        ),
        note=f"{pools} Occupancy: the largest over directions. Columns of weights: the perturbation, as a multiple of the natural "
        "variation, by all directions, each at this weight; together at it where they are only ablated at equal effective weight.",
        n_keys=2,
    )
    weight = 1.0 if 1.0 in weights else weights[-1]
    series = {
        name: [activity for activity in geometry.activities if activity.configuration == name]
        for name in geometry.configurations()
    }
    return Section(
        "Perturbation",
        (
            "y is what a layer's output projections add to the residual stream, those that are ablated. Occupancy: how much of y lies along a direction "
            "at all. Perturbation: what the ablation C y takes from the stream at one layer, against the natural variation of "
            "that layer's output over decoding steps, the paper's noise floor. Both as root mean squares.",
        ),
        (
            over_layers(
                "perturbation",
                f"Perturbation at w = {weight:g}",
                "Line plot on a logarithmic axis: size of the perturbation over layers as a multiple of the natural "
                "variation, for {names}; a dashed line marks 1.",
                series,
                lambda activity: dict(activity.perturbations)[weight],
                "Perturbation / natural variation",
                logarithmic=True,
                level=(1.0, "natural variation"),
            ),
            over_layers(
                "occupancy",
                "Occupancy of the best direction, harmful prompts",
                "Line plot: share of the layer's output that lies along a direction, over layers, for {names}.",
                series,
                lambda activity: max(activity.occupancy_harmful),
                "Root mean square of v·y over ‖y‖",
                from_zero=True,
            ),
        ),
        (table,),
    )


def comparison_section(geometry: Geometry) -> Section:
    table = Table.of(
        geometry.comparisons,
        "comparison",
        "Configurations compared",
        text_column("First", "first"),
        text_column("Second", "second"),
        LAYER,
        Column("Norm ratio", "norm_ratio", significant(3)),
        Column("Angle per class, mean", "mean_class_angle", number(1)),
        Column(
            "Smallest principal angle", lambda x: min(x.principal_angles, default=None), number(1)
        ),
        Column(
            "Largest principal angle", lambda x: max(x.principal_angles, default=None), number(1)
        ),
        note="Norm ratio: mean norm of the class directions as trained, second over first, of classes that both have. Angles in "
        "degrees: between the directions of the same class as trained, and between the spans of the directions as ablated.",
        n_keys=3,
    )
    angle = "Angle between directions of the same class"
    series: dict[str, list[Any]] = {}
    for item in geometry.comparisons:
        series.setdefault(f"{item.second} / {item.first}", []).append(item)
    figures = [
        over_layers(
            name,
            title,
            f"Line plot over layers: {title.lower()} ({axis.lower()}), for {{names}}.",
            series,
            attrgetter(attribute),
            axis,
            level=level,
        )
        for name, title, attribute, axis, level in (
            ("norm-ratio", "Ratio of norms", "norm_ratio", "Second / first", (1.0, "equal")),
            ("class-angle", angle, "mean_class_angle", "Degrees", None),
        )
    ]
    return Section("Between configurations", (), tuple(figures), (table,))


def shown_layer(n_layers: int, capture: CaptureResult) -> int:
    """Returns the layer that is shown where only one can be: the best captured one, else the middle one."""

    return max(capture.layers, key=_subspace).layer if capture.layers else n_layers // 2


def say_what_is_missing(
    log: Callable[..., None], capture: CaptureResult, geometry: Geometry
) -> None:
    """Says in the terminal what a report lacks: pairs, what could not be measured, plots."""

    if capture.left_out:
        log(
            f"* [yellow]{len(capture.left_out)} pairs are left out of the capture, since the model does not treat them as "
            "assumed.[/]"
        )
    if not geometry.activities:
        log(f"* {NO_ACTIVITIES}")
    if not plots.can_plot():
        log(f"[yellow]{escape(NO_PLOTS)}[/]")
