# SPDX-License-Identifier: AGPL-3.0-or-later

"""The report's plots: R against KL with bands, R by layer and weight, lengths and capture by layer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from heretic_contrast.files import write_bytes_atomically
from heretic_contrast.report.plots import COLORS, MARKERS, lines, new_figure, to_png, write_values

from .claims import MATCHED, SVD, UNMATCHED
from .evidence import Study
from .statistics import divergences, share_at, shares
from .wording import label

# What both panels show has one place in both, and so one color and marker.
CURVES = {
    "one mean direction": [
        f"mean {name}"
        for name in ("unmatched", "matched", "sensitive", "residualized", "nearest", "random")
    ],
    "class directions": [
        *("som unmatched", "som matched", "svd matched", "som residualized"),
        *("svd1 matched", "som random"),
    ],
}


def curves(study: Study) -> bytes | None:
    """
    Returns the share of refusals against divergence on all layers, as points and envelopes with bands, or None.

    A band holds the 2.5th to 97.5th percentile of the envelope in the bootstrap.
    """

    panels = [
        (title, {name: found for name in names if (found := study.outcomes(name)) is not None})
        for title, names in CURVES.items()
    ]
    panels = [(title, measured) for title, measured in panels if measured]
    if not panels:
        return None
    figure = new_figure(5.2 * len(panels) + 0.4, 4.8)
    axes_list = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, measured) in zip(axes_list, panels, strict=True):
        smallest = np.inf
        for name, outcomes in measured.items():
            index = CURVES[title].index(name)
            kl, share = divergences(outcomes, study.draws), shares(outcomes, study.draws)
            color = COLORS[index % len(COLORS)]
            positive = kl[0][kl[0] > 1e-7]
            if not len(positive):
                continue
            smallest = min(smallest, float(positive.min()))
            levels = np.geomspace(positive.min(), positive.max(), 60)
            rows = np.stack([share_at(kl, share, level) for level in levels], axis=1)
            axes.fill_between(
                levels,
                np.nanquantile(rows[1:], 0.025, axis=0),
                np.nanquantile(rows[1:], 0.975, axis=0),
                color=color,
                alpha=0.15,
                linewidth=0,
            )
            axes.plot(
                levels,
                rows[0],
                color=color,
                linewidth=1.5,
                linestyle=("-", "--", ":", "-.")[index % 4],
            )
            axes.plot(
                kl[0],
                share[0],
                color=color,
                marker=MARKERS[index % len(MARKERS)],
                markersize=5,
                linestyle="none",
                label=label(name),
            )
        axes.set_xscale("log")
        if np.isfinite(smallest):
            axes.set_xlim(left=max(smallest / 2, 1e-7))
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("KL divergence, nats per token")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, frameon=False)
    axes_list[0].set_ylabel("share refused")
    return to_png(figure)


def heat_maps(study: Study) -> bytes:
    """Returns R by layer and weight on the paper's sweep: presets (columns) at equal and equal effective weight (rows)."""

    presets = [*(UNMATCHED, MATCHED, SVD), "random"]
    present = [name for name in presets if study.layer_cells(name)]
    strengths = [s for s in ("weight", "effective") if study.layer_cells(present[0], s)]
    n_layers = int(study.data["n_layers"])
    figure = new_figure(2.5 * len(present) + 0.8, (1.3 + 0.19 * n_layers) * len(strengths))
    grid = figure.subplots(len(strengths), len(present), squeeze=False, sharey=True)
    for row, strength in enumerate(strengths):
        for column, preset in enumerate(present):
            axes = grid[row][column]
            by_layer = study.layer_cells(preset, strength)
            layers = sorted(by_layer)
            weights = [cell.weight for cell in by_layer[layers[0]]]
            values = np.array([[cell.refusals for cell in by_layer[layer]] for layer in layers])
            # An ablation may raise refusals above those of the unmodified model.
            most = study.sweep_prompts
            image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=0, vmax=most)
            write_values(axes, values, 0, most, "{}", fontsize=6)
            axes.set_xticks(range(len(weights)), [f"{w:g}" for w in weights], fontsize=7)
            axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=6)
            kind = "equal weight" if strength == "weight" else "equal effective weight"
            axes.set_title(f"{preset}\n{kind}", fontsize=8)
            if column == 0:
                axes.set_ylabel("layer")
            if row == len(strengths) - 1:
                axes.set_xlabel("weight", fontsize=8)
    figure.colorbar(image, ax=grid, label=f"R of {study.sweep_prompts}", fraction=0.03)
    return to_png(figure)


def lengths(study: Study) -> bytes:
    """Returns the length of class directions over that of the unmatched ones, by layer."""

    names = ("", "som matched", "som sensitive", "som residualized", "som nearest", "", "som mixed")
    return _by_layer(study, names, "norm_ratio", "length over unmatched", (1.0, "unmatched"))


def captures(study: Study) -> bytes:
    """Returns the subspace capture by layer."""

    names = ("som unmatched", "som matched", "", "", "svd1 matched", "som random")
    return _by_layer(study, names, "capture", "capture (subspace), mean over pairs", None)


def _by_layer(
    study: Study,
    names: Sequence[str],
    what: str,
    title: str,
    level: tuple[float, str] | None,
) -> bytes:
    """Draws the `names` at the places, and so in the colors, of `curves`; what is missing or named "" keeps its place."""

    layers = list(map(float, range(study.data["n_layers"])))
    series: dict[str, tuple[list[float], list[float | None]]] = {
        label(name) or str(place): (layers, study.shape_by_layer(name, what))
        for place, name in enumerate(names)
    }
    return lines(series, "layer", title, from_zero=True, level=level)


def write_figures(study: Study, directory: Path) -> dict[str, str]:
    """Writes the plots of a study, and returns their file names by what they show."""

    made = {
        "curves": curves(study),
        "sweep": heat_maps(study),
        "lengths": lengths(study),
        "capture": captures(study),
    }
    names = {}
    for what, png in made.items():
        if png is not None:
            names[what] = f"replication-{study.name}-{what}.png"
            write_bytes_atomically(directory / names[what], png)
    return names
