# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Plots as PNG, in colors that color-blind readers can tell apart.

matplotlib is optional: where it is missing, `can_plot` says so. The same data give the same bytes with the same
version of matplotlib and the same fonts: nothing about time or software is written into the files.
"""

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

DOTS_PER_INCH = 144
"""Sharp on a screen with two dots per pixel, and in print."""

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette, whose colors differ for all common kinds of color vision."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""One more than colors, so that both together repeat only after 56 series."""

FALLBACK_FONTS = (
    "Noto Sans CJK SC, Microsoft YaHei, PingFang SC, WenQuanYi Micro Hei, Hiragino Sans, Malgun Gothic, Apple SD Gothic Neo, "
    "Noto Sans Arabic, Noto Sans Devanagari, Noto Sans Thai, Segoe UI, Arial Unicode MS, Noto Emoji, Segoe UI Emoji"
).split(", ")
"""Have the letters that matplotlib's own font lacks, where they are installed, as most systems have some of them."""

MAX_TICKS = 26
"""More labels on one axis would overlap."""

MAX_CHARACTERS = 26
"""Longer names would take the room of what is drawn, or overlap."""


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Any:
    """Returns an empty figure of matplotlib. `width`, `height`: in inches."""

    from matplotlib.figure import Figure

    # Made without pyplot, so that no window system and no global state is involved.
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def to_png(figure: Any) -> bytes:
    from matplotlib.font_manager import fontManager
    from matplotlib.text import Text

    # matplotlib warns of fonts that are not installed.
    installed = {font.name for font in fontManager.ttflist}
    for text in figure.findobj(Text):
        own = text.get_fontfamily()
        text.set_fontfamily([*own, *(name for name in FALLBACK_FONTS if name in installed)])
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Letters that no font has are boxes; the tables have them.
        warnings.filterwarnings("ignore", "Glyph |Matplotlib currently does not support")
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def literal(text: str) -> str:
    """Returns a user's text as matplotlib shows it literally: dollars begin mathematics, and an underscore what no legend has."""

    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _label_axis(axis: Any, labels: Sequence[str], **options: Any) -> None:
    """Labels the positions 0, 1, ... of an axis, only some of them where there are many. `options`: those of matplotlib's texts."""

    labels = [
        text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}…" for text in labels
    ]
    step = -(-len(labels) // MAX_TICKS)
    positions = range(0, len(labels), step)
    axis.set_ticks(list(positions), [literal(labels[index]) for index in positions], **options)


def _only_integers(axis: Any) -> None:
    """Puts the ticks of an axis at integers, one where there is room for no more."""

    axis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def heat_map(
    values: NDArray[Any],
    labels: tuple[Sequence[str], Sequence[str]],
    titles: tuple[str, str, str],
    limits: tuple[float, float],
    annotate: str = "{:.0f}",
) -> bytes:
    """
    Returns a heat map.

    `values`: array of shape (n_rows, n_columns); NaN leaves a cell blank. `labels`: those of rows and columns. `titles`: those of
    rows, columns and values. `limits`: the values at the ends of the color map. `annotate` formats the value that is written
    into each cell, where there is room; without decimals, values are counts.
    """

    n_rows, n_columns = values.shape
    rows, columns = labels
    row_title, column_title, value_title = titles
    figure = new_figure(
        max(4.4, min(8.0, 1.9 + 0.5 * n_columns)), max(2.8, min(11.0, 1.3 + 0.31 * n_rows))
    )
    axes = figure.subplots()
    low, high = limits
    image = axes.imshow(
        np.ma.masked_invalid(values), aspect="auto", cmap="cividis", vmin=low, vmax=high
    )
    tilted = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    _label_axis(axes.xaxis, columns, **(tilted if max(map(len, columns)) > 4 else {}))
    _label_axis(axes.yaxis, rows)
    axes.set_xlabel(column_title)
    axes.set_ylabel(row_title)
    longest = max((len(annotate.format(value)) for value in values[np.isfinite(values)]), default=0)
    if n_columns * (longest + 1) <= 80 and n_rows <= 64:
        write_values(axes, values, low, high, annotate)
    bar = figure.colorbar(image, ax=axes, label=value_title, fraction=0.06)
    if ".0f" in annotate:
        _only_integers(bar.ax.yaxis)
    return to_png(figure)


def matrix(
    values: Mapping[Any, float], rows: Sequence[Any], columns: Sequence[Any]
) -> NDArray[Any]:
    """Returns values by row and column as an array of shape (n_rows, n_columns), NaN where there is none."""

    found = [[values.get((row, column), np.nan) for column in columns] for row in rows]
    return np.array(found, dtype=np.float64)


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float | None]]],
    x_title: str,
    y_title: str,
    logarithmic: bool = False,
    from_zero: bool = False,
    level: tuple[float, str] | None = None,
) -> bytes:
    """
    Returns lines with markers, one for each series of x and y values; None breaks a line.

    A series without values is not shown, but keeps its color from others.
    `level`: a value that is drawn as a dashed horizontal line, and what it means.
    """

    from matplotlib.ticker import MaxNLocator

    figure = new_figure(6.0, 3.9)
    axes = figure.subplots()
    for index, (name, (x, y)) in enumerate(series.items()):
        if not len(y):
            continue
        axes.plot(
            x,
            [np.nan if value is None else value for value in y],
            label=literal(name),
            **_style(index),
            # Later lines are thinner, so that those below equal ones stay visible.
            markersize=max(3.0, 8.0 - 1.6 * index),
            linewidth=max(1.0, 2.6 - 0.5 * index),
        )
    if level is not None:
        axes.axhline(level[0], color="#555555", linestyle="--", linewidth=1, label=level[1])
    if logarithmic and any(
        value is not None and value > 0 for _, y in series.values() for value in y
    ):
        axes.set_yscale("log")
    else:
        low, high = axes.get_ylim()
        # Rounding noise is no curve: less than this share of the values is not spread over the whole height.
        least = (0.1 if from_zero else 0.01) * max(-low, high)
        margin = max(0.0, least - (high - low)) / 2
        axes.set_ylim(0 if from_zero else low - margin, high + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return _finished(figure, axes, x_title, y_title)


def fronts(
    series: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[bool]]],
    x_title: str,
    y_title: str,
    n_prompts: int,
) -> bytes:
    """
    Returns points, one color for each series, and a stepped line through those on its Pareto front.

    Each series: x values (positive, on a logarithmic axis), y values (counts of `n_prompts`), and whether each point is on the
    front. Infinite values, which broken models have, are left out of the picture.
    """

    figure = new_figure(6.0, 4.4)
    axes = figure.subplots()
    for index, (name, (x, y, on_front)) in enumerate(series.items()):
        style = _style(index)
        axes.scatter(
            x, y, s=16, color=style["color"], marker=style["marker"], alpha=0.35, linewidths=0
        )
        front = sorted((a, b) for a, b, chosen in zip(x, y, on_front, strict=True) if chosen)
        axes.plot(
            [a for a, _ in front],
            [b for _, b in front],
            drawstyle="steps-post",
            markersize=5,
            linewidth=1.4,
            label=literal(name),
            **style,
        )
    if any(np.isfinite(value) for x, _, _ in series.values() for value in x):
        axes.set_xscale("log")
        # Within one decade the small ticks have labels, too, which are long.
        axes.tick_params(axis="x", which="both", labelrotation=30)
    axes.set_ylim(-0.04 * n_prompts, 1.04 * n_prompts)
    _only_integers(axes.yaxis)
    return _finished(figure, axes, x_title, y_title)


def hit_maps(hits: NDArray[Any], titles: Sequence[str]) -> bytes:
    """
    Returns maps of the prompts that each neuron wins, side by side, with counts in the cells where there is room.

    `hits`: array of shape (n_maps, rows, columns), integers.
    """

    n_columns = min(3, len(hits))
    n_rows = -(-len(hits) // n_columns)
    figure = new_figure(2.0 * n_columns + 0.4, 2.1 * n_rows)
    axes_grid = figure.subplots(n_rows, n_columns, squeeze=False)
    for axes in axes_grid.flat:
        axes.set_axis_off()
    for axes, counts, title in zip(axes_grid.flat, hits, titles, strict=False):
        axes.set_axis_on()
        high = max(1, int(counts.max()))
        axes.imshow(counts, cmap="cividis", vmin=0, vmax=high)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(literal(textwrap.fill(title, MAX_CHARACTERS)), fontsize=9)
        if max(counts.shape) * (len(str(high)) + 1) <= 30:
            write_values(axes, counts, 0, high, "{}")
    return to_png(figure)


def write_values(
    axes: Any, values: NDArray[Any], low: float, high: float, form: str, fontsize: int = 8
) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            # Black on the light half of the color map, white on the dark half.
            color = "black" if (value - low) / (high - low) > 0.55 else "white"
            place = {"ha": "center", "va": "center", "fontsize": fontsize, "color": color}
            axes.text(column, row, form.format(value), **place)


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": ("-", "--", ":", "-.")[index // len(COLORS) % 4],
    }


def _finished(figure: Any, axes: Any, x_title: str, y_title: str) -> bytes:
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        # Below the plot, where it hides nothing.
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=1 if max(map(len, labels)) > 34 else 2,
            fontsize=8,
            frameon=False,
        )
    return to_png(figure)
