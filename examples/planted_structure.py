# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Compares the contrast baselines on synthetic residuals whose refusal direction is known.

    python examples/planted_structure.py --output docs

A harmful prompt of class c is refusal + ratio · topic_c + noise, a matched prompt ratio · topic_c + noise, a general
one noise, with refusal and topics of length 1 in 64 dimensions and noise of length 1. With a leak, that share of
the refusal also stands in the matched prompts, as in a model that over-refuses. Reported is the mean cosine of the class
directions (SOM of the paper) with the planted refusal, and their length relative to the unmatched baseline's.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heretic_contrast.directions.baselines import Residuals
from heretic_contrast.directions.extraction import extract_directions
from heretic_contrast.settings import BASELINES, ContrastSettings

HIDDEN = 64
N_CLASSES = 9
N_BULK = 400
RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)
PROMPTS_PER_CLASS = (10, 20, 50)
LEAKS = (0.0, 0.3)
SEEDS = (0, 1, 2, 3, 4)


def plant(ratio: float, prompts_per_class: int, leak: float, seed: int) -> tuple[Residuals, Tensor]:
    """Returns residuals of one layer, and the planted refusal direction of shape (hidden_size,)."""

    generator = torch.Generator().manual_seed(seed)
    refusal = F.normalize(torch.randn(HIDDEN, generator=generator), dim=0)
    topics = F.normalize(torch.randn(N_CLASSES, HIDDEN, generator=generator), dim=1)
    classes = [index % N_CLASSES for index in range(N_CLASSES * prompts_per_class)]
    names = tuple(f"class {index}" for index in classes)

    def noise(count: int) -> Tensor:
        return torch.randn(count, HIDDEN, generator=generator) / HIDDEN**0.5

    subject = ratio * topics[classes]
    residuals = Residuals(
        harmful=(refusal + subject + noise(len(classes)))[:, None],
        harmful_classes=names,
        bulk=noise(N_BULK)[:, None],
        matched=(leak * refusal + subject + noise(len(classes)))[:, None],
        matched_classes=names,
    )
    return residuals, refusal


def measure(baseline: str, ratio: float, prompts_per_class: int, leak: float) -> dict[str, Any]:
    """Returns the mean cosine with the planted refusal and the mean length, over classes and seeds."""

    cosines, lengths = [], []
    for seed in SEEDS:
        residuals, refusal = plant(ratio, prompts_per_class, leak, seed)
        settings = ContrastSettings(
            preset=["paper-unmatched"], baseline=baseline, scale="raw", small_classes="error"
        )
        vectors = extract_directions(residuals, settings).tensor[0]
        cosines.append(F.cosine_similarity(vectors, refusal[None], dim=1).mean())
        lengths.append(vectors.norm(dim=1).mean())
    return {
        "baseline": baseline,
        "ratio": ratio,
        "prompts_per_class": prompts_per_class,
        "leak": leak,
        "cosine": round(float(torch.stack(cosines).mean()), 4),
        "cosine_standard_error": round(float(torch.stack(cosines).std() / len(SEEDS) ** 0.5), 4),
        "length": round(float(torch.stack(lengths).mean()), 4),
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the cosine over the ratio, one panel per leak and number of prompts."""

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(LEAKS), len(PROMPTS_PER_CLASS), figsize=(11, 6), sharex=True, sharey=True
    )
    styles = dict(zip(BASELINES, ("o-", "s-", "^--", "v--", "D-"), strict=True))
    colors = dict(
        zip(
            BASELINES,
            ("#0072B2", "#D55E00", "#999999", "#CC79A7", "#009E73"),
            strict=True,
        )
    )
    for row, leak in enumerate(LEAKS):
        for column, count in enumerate(PROMPTS_PER_CLASS):
            axis = axes[row][column]
            for baseline in BASELINES:
                chosen = [
                    item
                    for item in rows
                    if (item["baseline"], item["leak"], item["prompts_per_class"])
                    == (baseline, leak, count)
                ]
                axis.plot(
                    [item["ratio"] for item in chosen],
                    [item["cosine"] for item in chosen],
                    styles[baseline],
                    color=colors[baseline],
                    label=baseline,
                )
            axis.set_xscale("log", base=2)
            axis.set_ylim(0, 1.02)
            axis.grid(alpha=0.3)
            axis.set_title(f"{count} prompts per class, leak {leak:g}", fontsize=10)
    figure.supxlabel("Length of the topic relative to the refusal")
    figure.supylabel("Cosine with the planted refusal")
    axes[0][0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    """Writes planted.json and planted.png, and prints the table."""

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output", type=Path, default=Path("docs"))
    output = parser.parse_args().output
    rows = [
        measure(baseline, ratio, count, leak)
        for leak in LEAKS
        for count in PROMPTS_PER_CLASS
        for ratio in RATIOS
        for baseline in BASELINES
    ]
    output.mkdir(parents=True, exist_ok=True)
    (output / "planted.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    draw(rows, output / "planted.png")
    print(f"| leak | prompts per class | ratio | {' | '.join(BASELINES)} |")
    print("| ---: | ---: | ---: |" + " ---: |" * len(BASELINES))
    for start in range(0, len(rows), len(BASELINES)):
        group = rows[start : start + len(BASELINES)]
        best = max(row["cosine"] for row in group)
        cells = " | ".join(
            f"**{row['cosine']:.3f}**" if row["cosine"] == best else f"{row['cosine']:.3f}"
            for row in group
        )
        first = group[0]
        print(
            f"| {first['leak']:g} | {first['prompts_per_class']} | {first['ratio']:g} | {cells} |"
        )


if __name__ == "__main__":
    main()
