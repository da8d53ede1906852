# SPDX-License-Identifier: AGPL-3.0-or-later

"""
How the costs grow with layers, hidden size, prompts, classes and vocabulary, each with its fitted exponent.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --costs maps directions --json maps.json --plot maps.png

Writes docs/scaling.json and docs/images/scaling.png. Each size grows alone, the others stay as printed. Models are
random Llamas. Times are processor seconds of one thread, the best of several runs: other programs on the same machine
disturb them less than wall time. The exponent is the slope of the least-squares line
through all points in doubly logarithmic coordinates, with its standard error; beside it stands the slope between the two
largest sizes, where costs that do not grow matter least.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numba
import torch
from measuring import (
    LiveBytes,
    best_times,
    fitted_exponent,
    random_directions,
    random_language_model,
    resident_bytes,
)
from rich.console import Console
from rich.table import Table
from som import make_residuals, views

from heretic_contrast.ablation.lora import lora_factors
from heretic_contrast.ablation.operator import compose
from heretic_contrast.directions.baselines import Residuals
from heretic_contrast.directions.extraction import extract_directions
from heretic_contrast.directions.som import SomSettings, train_maps
from heretic_contrast.engine.fast.engine import FastEngine
from heretic_contrast.evaluation.cells import CellKey
from heretic_contrast.evaluation.plan import SweepOptions, plan_sweep
from heretic_contrast.evaluation.sweep import SweepEvaluator
from heretic_contrast.files import write_bytes_atomically, write_text_atomically
from heretic_contrast.prompts import Prompt
from heretic_contrast.report.plots import COLORS, MARKERS
from heretic_contrast.settings import ContrastSettings, RowNormalization
from heretic_contrast.tiers.responses import Tier

CHUNK = 256
"""Positions whose logits are a measure of memory."""

DOCS = Path(__file__).resolve().parents[1] / "docs"
VOCABULARY = 248_320
"""That of Qwen 3.5, the paper's model, at which memory is measured."""

ENOUGH_SECONDS = 1.0
"""A measurement is repeated at least twice, and as long as it took less than this in total, at most five times."""

STYLES = {
    "layers": 0,
    "hidden_size": 1,
    "prompts": 2,
    "classes": 3,
    "in_features": 3,
    "vocabulary": 4,
    "layers_above": 5,
    "directions": 6,
    "new_tokens": 6,
}
"""Color and marker of each size in the plot; those that share one never meet in a panel."""

console = Console()
Action = Callable[[], Any]


@dataclass(frozen=True)
class Cost:
    """
    A cost and the sizes that it grows with.

    `base`: the sizes that stay while another grows. `sweeps`: the values of each size that grows, smallest first.
    `prepare` makes ready what is timed, from sizes. `used_up`: whether an action leaves something behind that makes the
    next run cheaper, so that each needs its own preparation.
    """

    title: str
    base: Mapping[str, int]
    sweeps: Mapping[str, list[int]]
    prepare: Callable[..., Action]
    used_up: bool = False


def some_prompts(count: int) -> list[Prompt]:
    """Prompts of equal length."""

    return [Prompt(f"Item {index:03}", system="") for index in range(count)]


def residual_collection(layers: int, hidden_size: int, prompts: int, vocabulary: int) -> Action:
    model = random_language_model(layers, hidden_size, vocabulary, batch_size=prompts)
    pool = some_prompts(prompts)
    return lambda: model.residuals(pool)


def map_training(layers: int, hidden_size: int, prompts: int, classes: int) -> Action:
    samples = views(make_residuals(layers, classes, prompts, hidden_size), classes)
    return lambda: train_maps(samples, SomSettings())


def direction_extraction(layers: int, hidden_size: int, prompts: int, classes: int) -> Action:
    """Everything after the residuals but the maps: contrast, means, SVD, and the lengths of the unmatched baseline."""

    pools = [torch.from_numpy(make_residuals(layers, 1, prompts, hidden_size, i)) for i in range(3)]
    names = tuple(f"class {index % classes}" for index in range(prompts))
    residuals = Residuals(pools[0], names, pools[1], pools[2], names)
    settings = ContrastSettings(
        baseline="matched", method="mean", classes="category", svd=True, scale="unmatched"
    )
    return lambda: extract_directions(residuals, settings)


def factors(
    hidden_size: int, in_features: int, directions: int, normalization: RowNormalization
) -> Action:
    """The LoRA factors of one module."""

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(hidden_size, in_features, generator=generator)
    vectors = random_directions(0, directions, hidden_size).tensor[0]
    operator = compose(vectors, torch.full((directions,), 0.5))
    return lambda: lora_factors(operator, weight, normalization)


def plain_factors(**sizes: int) -> Action:
    return factors(**sizes, normalization="none")


def normalized_factors(**sizes: int) -> Action:
    return factors(**sizes, normalization="full")


def make_evaluator(
    model: Any, harmful: int, references: int, options: SweepOptions, canaries: int = 1
) -> SweepEvaluator:
    """An evaluator that takes every response for a refusal, since a random model refuses nothing."""

    return SweepEvaluator(
        model,
        plan_sweep(
            {"random": random_directions(model.n_layers, 3, model.hidden_size)},
            some_prompts(harmful),
            some_prompts(canaries),
            some_prompts(references),
            options,
        ),
        classify=lambda prompt, response: Tier.REFUSE,
        engine=FastEngine(model),
    )


def divergence_cells(
    layers: int, layers_above: int, hidden_size: int, prompts: int, vocabulary: int
) -> Action:
    """The divergence of four weights at one layer, which the sweep measures together; responses of one token."""

    model = random_language_model(layers, hidden_size, vocabulary, batch_size=4 * prompts)
    options = SweepOptions(weights=(0.3, 0.5, 0.8, 1.0), max_new_tokens=1, kl_tokens=16)
    evaluator = make_evaluator(model, 1, prompts, options)
    keys = [CellKey("random", "weight", (layers - layers_above,), w) for w in options.weights]
    return lambda: evaluator.evaluate(keys)


def growing_divergence_cells(
    layers: int, hidden_size: int, prompts: int, vocabulary: int, layers_above: int | None = None
) -> Action:
    """As `divergence_cells`; the lowest layer is ablated where no number of layers above it is given."""

    above = layers if layers_above is None else layers_above
    return divergence_cells(max(layers, above), above, hidden_size, prompts, vocabulary)


def generated_cell(
    layers: int, hidden_size: int, prompts: int, vocabulary: int, new_tokens: int
) -> Action:
    """The responses of one cell, all of which depart from the unmodified model's."""

    model = random_language_model(layers, hidden_size, vocabulary, batch_size=prompts, spread=4)
    options = SweepOptions(weights=(10.0,), max_new_tokens=new_tokens, kl_tokens=1)
    evaluator = make_evaluator(model, prompts, 1, options)
    key = CellKey("random", "weight", (0,), 10.0)

    def run() -> None:
        (cell,) = evaluator.evaluate([key])
        departed = sum(
            a != b for a, b in zip(cell.responses, evaluator.base_responses, strict=True)
        )
        assert departed >= 0.9 * prompts, "The responses that are timed are not generated anew."

    return run


COSTS = {
    "residuals": Cost(
        "Residuals",
        {"layers": 4, "hidden_size": 512, "prompts": 32, "vocabulary": 2_048},
        {
            "layers": [2, 4, 8, 16],
            "hidden_size": [256, 512, 1_024, 2_048],
            "prompts": [16, 32, 64, 128],
            "vocabulary": [2_048, 4_096, 8_192, 16_384],
        },
        residual_collection,
    ),
    "maps": Cost(
        "Self-organizing maps",
        {"layers": 8, "hidden_size": 2_048, "prompts": 53, "classes": 4},
        {
            "layers": [4, 8, 16, 32],
            "hidden_size": [512, 1_024, 2_048, 4_096, 8_192],
            "prompts": [16, 32, 64, 128, 256],
            "classes": [1, 2, 4, 8, 16],
        },
        map_training,
    ),
    "directions": Cost(
        "Contrast, SVD and scale",
        {"layers": 8, "hidden_size": 2_048, "prompts": 256, "classes": 8},
        {
            "layers": [4, 8, 16, 32],
            "hidden_size": [1_024, 2_048, 4_096, 8_192],
            "prompts": [64, 128, 256, 512],
            "classes": [2, 4, 8, 16],
        },
        direction_extraction,
    ),
    "factors": Cost(
        "LoRA factors",
        {"hidden_size": 4_096, "in_features": 6_144, "directions": 9},
        {
            "hidden_size": [4_096, 6_144, 8_192, 12_288, 16_384],
            "in_features": [6_144, 8_192, 12_288, 16_384, 24_576],
            "directions": [4, 8, 16, 32],
        },
        plain_factors,
    ),
    "normalized": Cost(
        "LoRA factors, full row normalization",
        {"hidden_size": 1_024, "in_features": 3_072, "directions": 9},
        {
            "hidden_size": [512, 1_024, 2_048, 4_096],
            "in_features": [1_536, 3_072, 6_144, 12_288],
            "directions": [4, 8, 16, 32],
        },
        normalized_factors,
    ),
    "divergence": Cost(
        "Divergence",
        {"layers": 8, "hidden_size": 256, "prompts": 16, "vocabulary": 2_048},
        {
            "layers": [2, 4, 8, 16],
            "layers_above": [1, 2, 4, 8],
            "hidden_size": [128, 256, 512, 1_024],
            "prompts": [8, 16, 32, 64],
            "vocabulary": [8_192, 16_384, 32_768, 65_536, 131_072],
        },
        growing_divergence_cells,
    ),
    "generation": Cost(
        "Greedy generation",
        {"layers": 4, "hidden_size": 512, "prompts": 16, "vocabulary": 2_048, "new_tokens": 16},
        {
            "layers": [2, 4, 8, 16],
            "hidden_size": [256, 512, 1_024, 2_048],
            "prompts": [8, 16, 32, 64],
            "vocabulary": [16_384, 32_768, 65_536, 131_072],
            "new_tokens": [8, 16, 32, 64],
        },
        generated_cell,
        used_up=True,
    ),
}


def seconds_of(cost: Cost, sizes: Mapping[str, int]) -> float:
    """Processor seconds of the fastest of several runs."""

    action = cost.prepare(**sizes)
    times: list[float] = []
    while len(times) < 2 or (len(times) < 5 and sum(times) < ENOUGH_SECONDS):
        if cost.used_up and times:
            action = cost.prepare(**sizes)
        times.append(best_times(action, 1)[1])
    return min(times)


def warm_up(cost: Cost) -> None:
    """Does at the smallest sizes what is only done once, such as compiling the maps, and keeps to one thread."""

    smallest = {name: min(values) for name, values in cost.sweeps.items()}
    cost.prepare(**{**cost.base, **smallest})()
    # Numba shares the threads of PyTorch, and sets their number when it starts.
    torch.set_num_threads(1)


def measure(cost: Cost) -> dict[str, Any]:
    """Lets each size of a cost grow alone."""

    results = {}
    for name, values in cost.sweeps.items():
        seconds = [seconds_of(cost, {**cost.base, name: value}) for value in values]
        exponent, error = fitted_exponent(values, seconds)
        results[name] = {
            "fixed": {key: size for key, size in cost.base.items() if key != name},
            "values": values,
            "processor_seconds": seconds,
            "exponent": exponent,
            "standard_error": error,
            "last_exponent": math.log(seconds[-1] / seconds[-2])
            / math.log(values[-1] / values[-2]),
        }
    return {"title": cost.title, "sizes": results}


def measure_memory() -> dict[str, Any]:
    """The most bytes alive while one cell is measured at a large vocabulary, and growth of resident memory beside it."""

    chunk_bytes = CHUNK * VOCABULARY * torch.float32.itemsize
    kl_tokens = 32
    model = random_language_model(2, 64, VOCABULARY, batch_size=128)
    rows = []
    for prompts in (16, 32, 64):
        options = SweepOptions(weights=(1.0,), max_new_tokens=1, kl_tokens=kl_tokens)
        evaluator = make_evaluator(model, 1, prompts, options)
        keys = [CellKey("random", "weight", (1,), 1.0)]
        # The kernel then reports the highest resident memory from here on.
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_bytes()
        evaluator.evaluate(keys)
        with open("/proc/self/status", encoding="utf-8") as status:
            highest = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        with LiveBytes() as memory:
            evaluator.evaluate(keys)
        rows.append(
            {
                "prompts": prompts,
                "positions": prompts * kl_tokens,
                "live_bytes": memory.peak,
                "live_chunks": memory.peak / chunk_bytes,
                "resident_bytes": highest * 1024 - before,
                "dense_bytes": prompts * kl_tokens * VOCABULARY * torch.float32.itemsize,
            }
        )
    return {"vocabulary": VOCABULARY, "chunk_bytes": chunk_bytes, "rows": rows}


def print_growth(results: Mapping[str, Any]) -> None:
    table = Table(
        "Cost",
        "Size",
        "Values",
        "Processor seconds",
        "Exponent",
        "Last two",
        title="Growth of processor time",
    )
    for result in results.values():
        for number, (name, row) in enumerate(result["sizes"].items()):
            table.add_row(
                result["title"] if number == 0 else "",
                name.replace("_", " "),
                " … ".join(f"{row['values'][index]:,}" for index in (0, -1)),
                " … ".join(f"{row['processor_seconds'][index]:.3g}" for index in (0, -1)),
                f"{row['exponent']:.2f} ± {row['standard_error']:.2f}",
                f"{row['last_exponent']:.2f}",
                end_section=number == len(result["sizes"]) - 1,
            )
    console.print(table)


def print_memory(memory: Mapping[str, Any]) -> None:
    table = Table(
        "Prompts",
        "Positions",
        "Live tensors",
        "in chunks",
        "Resident",
        "All logits would take",
        title=f"Memory of a divergence at a vocabulary of {memory['vocabulary']:,}, in MiB",
    )
    for row in memory["rows"]:
        table.add_row(
            str(row["prompts"]),
            str(row["positions"]),
            f"{row['live_bytes'] / 2**20:.0f}",
            f"{row['live_chunks']:.2f}",
            f"{row['resident_bytes'] / 2**20:.0f}",
            f"{row['dense_bytes'] / 2**20:.0f}",
        )
    console.print(table)


def plot(results: Mapping[str, Any], memory: Mapping[str, Any] | None) -> bytes:
    """One doubly logarithmic panel per cost, a line per size; a last panel for memory."""

    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    n_panels = len(results) + (memory is not None)
    n_rows = -(-n_panels // 2)
    figure = Figure(figsize=(12.8, 3.5 * n_rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(n_rows, 2, squeeze=False).flat)
    for axes, result in zip(panels, results.values(), strict=False):
        for name, row in result["sizes"].items():
            relative = [value / row["values"][0] for value in row["values"]]
            label = f"{name.replace('_', ' ')}: {row['exponent']:.2f} ± {row['standard_error']:.2f}"
            axes.plot(
                relative,
                row["processor_seconds"],
                color=COLORS[STYLES[name]],
                marker=MARKERS[STYLES[name]],
                label=label,
            )
        axes.set_title(result["title"])
        axes.set_xlabel("size, relative to the smallest")
        axes.set_ylabel("processor seconds")
    if memory is not None:
        axes = panels[len(results)]
        prompts = [row["prompts"] for row in memory["rows"]]
        # Resident memory may grow by nothing, which has no place on a logarithmic scale.
        for label, key, index in (
            ("all logits would take", "dense_bytes", 1),
            ("live tensors", "live_bytes", 0),
        ):
            axes.plot(
                [value / prompts[0] for value in prompts],
                [row[key] / 2**20 for row in memory["rows"]],
                color=COLORS[index],
                marker=MARKERS[index],
                label=label,
            )
        axes.set_title(f"Memory of a divergence, vocabulary {memory['vocabulary']:,}")
        axes.set_xlabel("prompts, relative to the fewest")
        axes.set_ylabel("MiB")
    for axes in panels[:n_panels]:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(True, which="major", color="#dddddd")
        # Outside, where it hides no point.
        axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    for axes in panels[n_panels:]:
        axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


@torch.no_grad()
def main() -> None:
    """Measures, prints, and writes the figures and their plot."""

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--costs", nargs="*", choices=[*COSTS, "memory"], help="only these")
    parser.add_argument("--json", type=Path, default=DOCS / "scaling.json")
    parser.add_argument("--plot", type=Path, default=DOCS / "images" / "scaling.png")
    arguments = parser.parse_args()
    numba.set_num_threads(1)
    torch.set_num_threads(1)
    chosen = arguments.costs or [*COSTS, "memory"]

    started = time.perf_counter()
    results = {}
    for name, cost in COSTS.items():
        if name in chosen:
            began = time.perf_counter(), time.process_time()
            warm_up(cost)
            results[name] = measure(cost)
            console.print(
                f"{cost.title}: measured in {time.perf_counter() - began[0]:.0f} s, "
                f"of which processor {time.process_time() - began[1]:.0f} s"
            )
    memory = measure_memory() if "memory" in chosen else None
    print_growth(results)
    if memory is not None:
        print_memory(memory)
    console.print(f"Finished in {time.perf_counter() - started:.0f} s.")
    figures = {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("numba", "numpy", "torch", "transformers")},
        },
        "costs": results,
        "memory": memory,
    }
    write_text_atomically(arguments.json, json.dumps(figures, indent=2) + "\n")
    write_bytes_atomically(arguments.plot, plot(results, memory))


if __name__ == "__main__":
    main()
