# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Self-organizing maps: the compiled trainer against a loop over MiniSom, in one run.

    NUMBA_NUM_THREADS=2 OMP_NUM_THREADS=1 python benchmarks/som.py
    NUMBA_NUM_THREADS=2 OMP_NUM_THREADS=1 python benchmarks/som.py --kinds --json som.json

The samples are synthetic: normal noise around a mean per layer and class. MiniSom is measured on a part of the maps
(`--reference-maps`, 0 for all) and its time multiplied up, as all maps cost it the same. Times are the best of several. Beside wall time stands processor time, the sum over
all threads, which other programs on the same machine disturb less.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import tracemalloc
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
from measuring import best_times, resident_bytes
from numpy.typing import NDArray
from reference_maps import train_minisom
from rich.console import Console
from rich.table import Table

from heretic_contrast.directions.som import Neighborhood, SomSettings, Topology, train_maps
from heretic_contrast.files import write_text_atomically

console = Console()


def make_residuals(
    layers: int, classes: int, prompts: int, hidden_size: int, seed: int = 0
) -> NDArray[np.float32]:
    """Array of shape (classes · prompts, layers, hidden_size), filled piece by piece so that making it needs no more memory."""

    generator = np.random.default_rng(seed)
    residuals = np.empty((classes * prompts, layers, hidden_size), dtype=np.float32)
    for layer in range(layers):
        for index in range(classes):
            rows = slice(index * prompts, (index + 1) * prompts)
            residuals[rows, layer] = generator.standard_normal(
                (prompts, hidden_size), dtype=np.float32
            )
            residuals[rows, layer] += 2 * generator.standard_normal(hidden_size, dtype=np.float32)
    return residuals


def views(residuals: NDArray[np.float32], classes: int) -> list[NDArray[np.float32]]:
    """The samples of each layer and class, without a copy."""

    prompts = len(residuals) // classes
    return [
        residuals[index * prompts : (index + 1) * prompts, layer]
        for layer in range(residuals.shape[1])
        for index in range(classes)
    ]


def measure_memory(samples: list[NDArray[np.float32]], settings: SomSettings) -> dict[str, float]:
    """
    Peak memory of training and of one vector per map, as a multiple of the samples.

    `peak_ratio` compares the process's highest resident memory with its resident memory before, so it counts what the compiled
    code allocates too. `traced_ratio` counts what Python and numpy allocate.
    """

    sample_bytes = sum(array.nbytes for array in samples)
    before = resident_bytes()
    maps = train_maps(samples, settings)
    for trained in maps:
        trained.vectors(trained.densest(1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    tracemalloc.start()
    maps = train_maps(samples, settings)
    for trained in maps:
        trained.vectors(trained.densest(1))
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "sample_megabytes": sample_bytes / 2**20,
        "peak_ratio": 1 + max(0, peak - before) / sample_bytes,
        "traced_ratio": 1 + traced / sample_bytes,
    }


def measure_start() -> dict[str, float]:
    """Seconds until a first small map is trained in a new process, with an empty cache of compiled code and with a full one."""

    program = (
        "import time\n"
        "import numpy as np\n"
        "from heretic_contrast.directions.som import SomSettings, train_maps\n"
        "start = time.perf_counter()\n"
        "train_maps([np.ones((4, 16), dtype=np.float32)], SomSettings(iterations=10))\n"
        "print(time.perf_counter() - start)\n"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"NUMBA_CACHE_DIR": cache}
        cold, warm = (
            float(
                subprocess.run(
                    [sys.executable, "-c", program],
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
            )
            for _ in range(2)
        )
    return {"cold_seconds": cold, "warm_seconds": warm}


def compare(
    samples: list[NDArray[np.float32]], settings: SomSettings, n_reference: int, repeats: int
) -> dict[str, float]:
    """Times both ways, and compares their weights on the maps that MiniSom trained."""

    chosen = np.unique(np.linspace(0, len(samples) - 1, n_reference or len(samples)).astype(int))
    references = []
    reference_times = []
    before = best_times(lambda: train_maps(samples, settings), repeats)
    for index in chosen:
        reference_times.append(
            best_times(
                lambda index=index: references.append(  # type: ignore[misc]
                    train_minisom(samples[index], settings)
                ),
                1,
            )
        )
    after = best_times(lambda: train_maps(samples, settings), repeats)
    wall, processor = np.minimum(before, after)
    # The fastest reference map stands for all of them, as the fastest run stands for the compiled trainer.
    reference_wall, reference_processor = np.min(reference_times, axis=0) * len(samples)

    maps = train_maps(samples, settings)
    neurons = range(settings.n_neurons)
    difference = 0.0
    relative_difference = 0.0
    same_hits = True
    for index, reference in zip(chosen, references, strict=True):
        expected = reference.get_weights().reshape(settings.n_neurons, -1)
        errors = np.abs(maps[index].vectors(neurons) - expected).max(axis=1)
        difference = max(difference, float(errors.max()))
        relative = errors / np.abs(expected).max(axis=1)
        relative_difference = max(relative_difference, float(relative.max()))
        hits = reference.activation_response(samples[index]).reshape(-1)
        same_hits &= bool((maps[index].hits == hits).all())
    return {
        "maps": len(samples),
        "minisom_maps_measured": len(chosen),
        "minisom_seconds": float(reference_wall),
        "numba_seconds": float(wall),
        "ratio": float(reference_wall / wall),
        "minisom_processor_seconds": float(reference_processor),
        "numba_processor_seconds": float(processor),
        "processor_ratio": float(reference_processor / processor),
        "max_difference": difference,
        "max_relative_difference": relative_difference,
        "same_hits": same_hits,
    }


def compare_kinds(
    samples: list[NDArray[np.float32]], settings: SomSettings, repeats: int
) -> list[dict[str, Any]]:
    """The comparison on one MiniSom map for every topology and neighborhood, all with the same samples."""

    rows = []
    for topology in get_args(Topology):
        for neighborhood in get_args(Neighborhood):
            # MiniSom itself overflows with "mexican_hat" and its own learning rate of 0.5.
            kind = replace(
                settings, topology=topology, neighborhood=neighborhood, learning_rate=0.1
            )
            rows.append(
                {"topology": topology, "neighborhood": neighborhood}
                | compare(samples, kind, 1, repeats)
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=25)
    parser.add_argument("--classes", type=int, default=9)
    parser.add_argument("--prompts", type=int, default=53, help="prompts per class")
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument(
        "--reference-maps", type=int, default=9, help="maps that MiniSom trains too, 0 for all"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--kinds", action="store_true", help="also compare every topology and neighborhood"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the figures to this file"
    )
    arguments = parser.parse_args()

    import numba

    settings = SomSettings(iterations=arguments.iterations)
    console.print(
        f"{arguments.layers} layers × {arguments.classes} classes × {arguments.prompts} prompts × "
        f"{arguments.hidden_size} dimensions, {settings.rows} × {settings.columns} neurons, {settings.iterations:,} iterations, "
        f"{numba.get_num_threads()} threads"
    )
    train_maps([np.ones((4, 16), dtype=np.float32)], SomSettings(iterations=10))
    sizes = (arguments.layers, arguments.classes, arguments.prompts, arguments.hidden_size)
    samples = views(make_residuals(*sizes), arguments.classes)
    figures: dict[str, Any] = {
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "threads": numba.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("minisom", "numba", "numpy")},
        },
        "memory": measure_memory(samples, settings),
        "comparison": compare(samples, settings, arguments.reference_maps, arguments.repeats),
        "start": measure_start(),
    }

    comparison = figures["comparison"]
    memory, start = figures["memory"], figures["start"]
    measured = comparison["minisom_maps_measured"]
    scaled = f" (scaled up from the fastest of {measured} maps)" if measured < len(samples) else ""
    rows = {
        "MiniSom, loop over maps": f"{comparison['minisom_seconds']:.1f} s{scaled}",
        f"Numba, {len(samples)} maps": f"{comparison['numba_seconds']:.3f} s",
        "Ratio": f"{comparison['ratio']:.0f}",
        "Processor time, MiniSom": f"{comparison['minisom_processor_seconds']:.1f} s",
        "Processor time, Numba": f"{comparison['numba_processor_seconds']:.3f} s",
        "Ratio of processor times": f"{comparison['processor_ratio']:.0f}",
        "Largest difference of weights": f"{comparison['max_difference']:.1e}",
        "… relative to the neuron's largest weight": f"{comparison['max_relative_difference']:.1e}",
        "Same prompts won": str(comparison["same_hits"]),
        "Peak memory / samples, resident": f"{memory['peak_ratio']:.2f}",
        "Peak memory / samples, traced": f"{memory['traced_ratio']:.2f}",
        "First map of a process, nothing compiled": f"{start['cold_seconds']:.1f} s",
        "First map of a process, compiled code cached": f"{start['warm_seconds']:.2f} s",
    }
    table = Table("Figure", "Value", title="Self-organizing maps")
    for row in rows.items():
        table.add_row(*row)
    console.print(table)

    if arguments.kinds:
        figures["kinds"] = compare_kinds(samples, settings, arguments.repeats)
        table = Table(
            "Topology", "Neighborhood", "Ratio", "Relative difference", title="One MiniSom map each"
        )
        for row in figures["kinds"]:
            table.add_row(
                row["topology"],
                row["neighborhood"],
                f"{row['ratio']:.0f}",
                f"{row['max_relative_difference']:.1e}",
            )
        console.print(table)

    if arguments.json is not None:
        write_text_atomically(arguments.json, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
