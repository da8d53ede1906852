# SPDX-License-Identifier: AGPL-3.0-or-later

"""
What a whole job takes on models of 2, 8 and 70 billion parameters, from counted operations and bytes.

    python benchmarks/estimate.py
    python benchmarks/estimate.py --teraflops 200 --gigabytes 1500 --microseconds 300 --departing 0.2
    python benchmarks/estimate.py --check

A step takes the time of its multiplications, plus that of the bytes it moves, plus the time to start its layers: nothing
overlaps. The first machine is a GPU with 16-bit weights whose effective speeds are the options' (the defaults: an
A100 at a third of its peak and two thirds of its bandwidth); where a model does not fit into one, its layers lie on several
that take turns. The second is this machine with 32-bit weights, whose speeds are measured first. Maps are trained
on this machine in both cases, and one layer of them is measured.

`--check` predicts cells of a random Llama of 134 million parameters on one core, runs them, and compares processor times.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import best_time, best_times, random_language_model
from rich.console import Console
from rich.table import Table
from scaling import make_evaluator
from som import make_residuals, views
from torch.utils.flop_counter import FlopCounterMode

from heretic_contrast.directions.som import SomSettings, train_maps
from heretic_contrast.engine.fast.decoder import LEAST_POSITIONS
from heretic_contrast.engine.fast.teacher_forcing import common_prefix
from heretic_contrast.evaluation.plan import SweepOptions
from heretic_contrast.evaluation.sweep import SweepEvaluator
from heretic_contrast.files import write_text_atomically

LOGIT_PASSES = 6
"""How often a chunk's logits are read or written for a divergence: made, copied, gathered from, scattered to, summed twice."""

console = Console()


@dataclass(frozen=True)
class Shape:
    """A model's sizes. `query_width` and `key_width` are those of all attention heads together."""

    name: str
    layers: int
    hidden_size: int
    intermediate_size: int
    query_width: int
    key_width: int
    vocabulary: int

    @property
    def output_parameters(self) -> int:
        """The output projections of one layer: what is ablated."""

        return self.hidden_size * (self.query_width + self.intermediate_size)

    @property
    def attention_share(self) -> float:
        """The part of a layer that precedes the output of its first output projection: its attention."""

        attention = 2 * self.hidden_size * (self.query_width + self.key_width)
        return attention / self.layer_parameters

    @property
    def layer_parameters(self) -> int:
        """All projections of one layer."""

        inputs = self.query_width + 2 * self.key_width + 2 * self.intermediate_size
        return self.output_parameters + self.hidden_size * inputs

    @property
    def head_parameters(self) -> int:
        """The language model's head, which the embedding often shares."""

        return self.hidden_size * self.vocabulary

    @property
    def activations(self) -> int:
        """Numbers that one token reads and writes in one layer beside the weights: norms, attention, sums, gates."""

        return (
            12 * self.hidden_size
            + 4 * (self.query_width + self.key_width)
            + 8 * self.intermediate_size
        )


SHAPES = (
    # Qwen 3.5 2B, its linear attention taken for full attention.
    Shape("2 B", 24, 2_048, 6_144, 2_048, 512, 248_320),
    # Qwen 3 8B.
    Shape("8 B", 36, 4_096, 12_288, 4_096, 1_024, 151_936),
    # Llama 3 70B.
    Shape("70 B", 80, 8_192, 28_672, 8_192, 1_024, 128_256),
)


@dataclass(frozen=True)
class Machine:
    """
    What a machine reaches.

    `flops`: operations per second in matrix products. `bandwidth`: bytes per second. `start_seconds`: time to start one
    layer's operations. `number_bytes`: size of a weight and of an activation.
    """

    name: str
    flops: float
    bandwidth: float
    start_seconds: float
    number_bytes: int

    def seconds(self, flops: float, n_bytes: float, starts: float) -> float:
        """Returns how long a step takes in which nothing overlaps."""

        return flops / self.flops + n_bytes / self.bandwidth + starts * self.start_seconds


@dataclass(frozen=True)
class Job:
    """
    What is done. `departing`: the share of responses in the sweep that depart from the unmodified model's, and
    `departing_tokens`: how many tokens follow the departure, which must be generated. `common_tokens`: how many tokens all
    prompts begin with. `rows`: samples in one batch.
    """

    prompts: int = 900
    prompt_tokens: int = 50
    classes: int = 9
    class_prompts: int = 53
    iterations: int = 10_000
    directions: int = 9
    trials: int = 200
    trial_prompts: int = 100
    trial_tokens: int = 100
    weights: int = 5
    configurations: int = 4
    harmful: int = 10
    canaries: int = 10
    references: int = 100
    tokens: int = 50
    departing: float = 0.5
    departing_tokens: int = 40
    common_tokens: int = 15
    rows: int = 128


@dataclass(frozen=True)
class Model:
    """A model on a machine: how long its steps take."""

    shape: Shape
    machine: Machine
    rows: int

    def layers(self, sequences: int, length: int, layers: float) -> float:
        """Seconds to run known tokens through layers, so many sequences at a time."""

        shape, machine = self.shape, self.machine
        tokens = sequences * length
        passes = -(-sequences // self.rows)
        flops = 2 * tokens * (shape.layer_parameters + 2 * length * shape.query_width)
        numbers = passes * shape.layer_parameters + tokens * shape.activations
        return layers * machine.seconds(flops, numbers * machine.number_bytes, passes)

    def head(self, positions: int, logit_passes: int = LOGIT_PASSES) -> float:
        """Seconds to compute logits at positions, and what is wanted of them."""

        shape, machine = self.shape, self.machine
        chunks = -(-positions // LEAST_POSITIONS)
        n_bytes = chunks * shape.head_parameters * machine.number_bytes
        n_bytes += logit_passes * 4 * positions * shape.vocabulary
        return machine.seconds(2 * positions * shape.head_parameters, n_bytes, chunks)

    def generate(self, sequences: float, length: int, tokens: int, is_read: bool = False) -> float:
        """Seconds to generate tokens for prompts, token by token. `is_read`: whether keys and values are there already."""

        shape, machine = self.shape, self.machine
        n_batches = int(np.ceil(sequences / self.rows))
        if n_batches == 0:
            return 0.0
        rows = sequences / n_batches
        weights = shape.layers * shape.layer_parameters + shape.head_parameters
        # Keys and values are read, and written anew with those of the new token.
        cache = 3 * 2 * shape.key_width * (length + tokens / 2) * shape.layers * rows
        numbers = weights + cache + rows * shape.layers * shape.activations
        n_bytes = numbers * machine.number_bytes + 4 * 4 * rows * shape.vocabulary
        step = machine.seconds(2 * rows * weights, n_bytes, shape.layers)
        first = 0.0 if is_read else self.layers(int(np.ceil(rows)), length, shape.layers)
        return n_batches * (first + tokens * step)

    def factors(self, directions: int) -> float:
        """Seconds to compute the LoRA factors of all output projections: each is read, and converted to float32."""

        shape, machine = self.shape, self.machine
        conversion = 0 if machine.number_bytes == 4 else 8
        n_bytes = shape.output_parameters * (machine.number_bytes + conversion)
        flops = 2 * directions * shape.output_parameters
        return shape.layers * machine.seconds(flops, n_bytes, 1)


def extraction(model: Model, job: Job) -> float:
    """Seconds to collect residuals."""

    return model.layers(job.prompts, job.prompt_tokens, model.shape.layers) + model.head(
        job.prompts, logit_passes=2
    )


def search(model: Model, job: Job) -> float:
    """Seconds of a study: factors, responses to harmful prompts, first tokens of harmless ones."""

    harmless = model.layers(job.trial_prompts, job.prompt_tokens, model.shape.layers)
    trial = (
        model.factors(job.directions)
        + model.generate(job.trial_prompts, job.prompt_tokens, job.trial_tokens)
        + harmless
        + model.head(job.trial_prompts)
    )
    return job.trials * trial


def sweep_parts(model: Model, job: Job, layers: Sequence[int] | None = None) -> dict[str, float]:
    """
    Seconds of a sweep, by what is done. `layers`: those that are swept, all if not given.

    "unmodified": responses and distributions of the unmodified model, and its divergence from itself. "below": everything up to
    the attention of the ablated layers, once for all cells. "above": the rest of these layers and those over them, per cell,
    the last one's MLP only where something is predicted.
    "head": divergences and chosen tokens, per cell. "generation": what follows a departure.
    """

    n_layers = model.shape.layers
    swept = range(n_layers) if layers is None else layers
    cells_per_layer = job.weights * job.configurations
    judged = job.harmful + job.canaries
    length = job.prompt_tokens + job.tokens - 1
    rest = length - job.common_tokens

    def known(layers: float) -> float:
        return sum(model.layers(count, rest, layers) for count in (job.references, judged))

    attention = model.shape.attention_share
    # The last layer's MLP runs where something is predicted.
    left_out = (1 - attention) * (1 - job.tokens / rest)
    departing = job.departing * judged * cells_per_layer * len(swept)
    return {
        "unmodified": model.generate(job.references + judged, job.prompt_tokens, job.tokens)
        + 2 * model.layers(job.references, rest, n_layers)
        + model.layers(judged, rest, n_layers)
        + 2 * model.head(job.references * job.tokens),
        "below": known(max(swept) + attention),
        "above": cells_per_layer
        * sum(known(n_layers - layer - attention - left_out) for layer in swept),
        "head": cells_per_layer
        * len(swept)
        * (model.head(job.references * job.tokens) + model.head(judged * job.tokens, 3)),
        "generation": model.generate(
            departing, length - job.departing_tokens, job.departing_tokens, is_read=True
        ),
    }


def sweep(model: Model, job: Job) -> float:
    """Seconds of a sweep of all layers."""

    return sum(sweep_parts(model, job).values())


def map_training(shape: Shape, job: Job) -> float:
    """Seconds to train all maps on this machine: one layer is measured, and all take the same."""

    samples = views(
        make_residuals(1, job.classes, job.class_prompts, shape.hidden_size), job.classes
    )
    settings = SomSettings(iterations=job.iterations)
    train_maps(samples, SomSettings(iterations=10))
    return (shape.layers + 1) * best_time(lambda: train_maps(samples, settings), 3)


def measure_machine(hidden_size: int, intermediate_size: int) -> Machine:
    """
    What this machine reaches: in a matrix product, in reading its weights, and in starting layers that do nothing.

    With one thread, processor time stands for wall time, since other programs disturb it less.
    """

    def best(action: Callable[[], Any], repeats: int) -> float:
        wall, processor = best_times(action, repeats)
        return processor if torch.get_num_threads() == 1 else wall

    tokens = torch.randn(1_024, hidden_size)
    weight = torch.randn(intermediate_size, hidden_size)
    product = best(lambda: torch.nn.functional.linear(tokens, weight), 5)
    flops = 2 * tokens.shape[0] * weight.numel() / product
    # Few rows take as long as reading the weights takes, here more of them than caches hold.
    rows = tokens[:16].clone()
    weights = [torch.randn_like(weight) for _ in range(-(-(2**27) // weight.numel()))]
    reading = best(lambda: [torch.nn.functional.linear(rows, item) for item in weights], 3)
    reading -= len(weights) * 2 * len(rows) * weight.numel() / flops
    n_layers = 16
    tiny = random_language_model(n_layers, 64, 1_024, batch_size=1)
    token = torch.ones(1, 1, dtype=torch.long)
    start = best(lambda: tiny.model(input_ids=token, use_cache=False), 5)
    return Machine(
        name=f"this machine, threads: {torch.get_num_threads()}",
        flops=flops,
        bandwidth=4 * len(weights) * weight.numel() / reading,
        start_seconds=start / n_layers,
        number_bytes=4,
    )


def duration(seconds: float) -> str:
    """Returns a time in words."""

    for limit, size, unit in (
        (1, 1e-3, "ms"),
        (120, 1, "s"),
        (7_200, 60, "min"),
        (172_800, 3_600, "h"),
    ):
        if seconds < limit:
            return (
                f"{seconds / size:.2g} {unit}"
                if seconds / size < 10
                else f"{seconds / size:.0f} {unit}"
            )
    return f"{seconds / 86_400:.0f} days" if seconds >= 864_000 else f"{seconds / 86_400:.1f} days"


def describe(machine: Machine) -> str:
    """Returns what a machine is taken to reach."""

    return (
        f"{machine.name}: {machine.flops / 1e12:.3g} TFLOP/s, {machine.bandwidth / 1e9:.3g} GB/s, "
        f"{machine.start_seconds * 1e6:.0f} µs to start a layer, {8 * machine.number_bytes}-bit numbers"
    )


def estimate(job: Job, gpu: Machine) -> dict[str, Any]:
    """Prints and returns the whole job's parts for every shape on both machines."""

    maps = {shape.name: map_training(shape, job) for shape in SHAPES}
    here = measure_machine(2_048, 6_144)
    figures: dict[str, Any] = {"job": vars(job), "machines": []}
    for machine in (gpu, here):
        columns: dict[str, dict[str, float]] = {}
        for shape in SHAPES:
            model = Model(shape, machine, job.rows)
            parts = {
                "Residuals": extraction(model, job),
                "Maps, on this machine": maps[shape.name],
                "Search": search(model, job),
                "Sweep": sweep(model, job),
            }
            columns[shape.name] = {**parts, "All": sum(parts.values())}
        table = Table("Part", *columns, title=describe(machine))
        for part in next(iter(columns.values())):
            table.add_row(part, *(duration(column[part]) for column in columns.values()))
        console.print(table)
        figures["machines"].append({**vars(machine), "seconds": columns})
    return figures


class GenerationRecord:
    """Adds up the time of a network's generations and the tokens that they add."""

    def __init__(self, network: Any) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self.prompt_tokens = 0
        original = network.generate

        def generate(**arguments: Any) -> Any:
            started = time.process_time()
            output = original(**arguments)
            self.seconds += time.process_time() - started
            rows, length = arguments["input_ids"].shape
            # The first generation is that of the prompts alone.
            self.prompt_tokens = self.prompt_tokens or length
            sequences = getattr(output, "sequences", output)
            self.tokens += rows * (sequences.shape[1] - length)
            return output

        network.generate = generate

    def reset(self) -> None:
        """Starts counting anew."""

        self.seconds, self.tokens = 0.0, 0


def check(layers: list[int], references: int) -> dict[str, Any]:
    """Predicts and runs some cells of a random Llama on one thread, and compares operations and processor times."""

    torch.set_num_threads(1)
    shape = Shape("134 M", 12, 768, 2_304, 768, 768, 32_000)
    rows = 128
    model = random_language_model(shape.layers, shape.hidden_size, shape.vocabulary, rows)
    options = SweepOptions(layers=tuple(layers), synergy_size=0)
    record = GenerationRecord(model.model)

    def prepare() -> SweepEvaluator:
        return make_evaluator(model, 10, references, options, canaries=10)

    before = measure_machine(shape.hidden_size, shape.intermediate_size)
    started = time.process_time()
    evaluator = prepare()
    prepared = time.process_time()
    record.reset()
    cells = evaluator.evaluate(evaluator.grid())
    finished = time.process_time()
    generated, generation_seconds = record.tokens, record.seconds
    base = evaluator._base
    responses = (*base.responses, *base.canary_responses)
    departed = sum(
        response != unmodified
        for cell in cells
        for response, unmodified in zip(
            (*cell.responses, *cell.canary_responses), responses, strict=True
        )
    )
    after = measure_machine(shape.hidden_size, shape.intermediate_size)
    machine = Machine(
        before.name,
        (before.flops + after.flops) / 2,
        (before.bandwidth + after.bandwidth) / 2,
        (before.start_seconds + after.start_seconds) / 2,
        before.number_bytes,
    )
    counted = {}
    with FlopCounterMode(display=False) as counter:
        evaluator = prepare()
        counted["unmodified"] = counter.get_total_flops()
        evaluator.evaluate(evaluator.grid())
        counted["cells"] = counter.get_total_flops() - counted["unmodified"]

    judged = 20
    job = replace(
        Job(),
        configurations=1,
        references=references,
        prompt_tokens=record.prompt_tokens,
        rows=rows,
        departing=departed / (judged * len(cells)),
        departing_tokens=round(generated / departed),
        common_tokens=len(common_prefix(evaluator.references.known.prompts)),
    )
    parts = sweep_parts(Model(shape, machine, rows), job, layers)
    # On a machine that makes one operation per second and moves bytes at once, seconds are operations.
    operations = sweep_parts(Model(shape, Machine("", 1.0, math.inf, 0.0, 4), rows), job, layers)
    of_cells = ("below", "above", "head", "generation")
    predicted = {
        "unmodified model": parts["unmodified"],
        "cells, known tokens": parts["below"] + parts["above"] + parts["head"],
        "cells, generation": parts["generation"],
    }
    measured = {
        "unmodified model": prepared - started,
        "cells, known tokens": finished - prepared - generation_seconds,
        "cells, generation": generation_seconds,
    }
    predicted["all"], measured["all"] = sum(predicted.values()), sum(measured.values())
    predicted["operations, unmodified model"] = operations["unmodified"]
    predicted["operations, cells"] = sum(operations[name] for name in of_cells)
    measured["operations, unmodified model"] = counted["unmodified"]
    measured["operations, cells"] = counted["cells"]
    table = Table(
        "Part",
        "Predicted",
        "Measured",
        "Predicted / measured",
        title=f"{len(cells)} cells of a random Llama of {shape.name} parameters",
        caption=f"{describe(machine)}; {job.departing:.0%} of the responses departed, "
        f"{job.departing_tokens} tokens each",
    )
    for part, value in predicted.items():
        number = "{:.3g} × 10¹²" if part.startswith("operations") else "{:.3g} s"
        scale = 1e-12 if part.startswith("operations") else 1
        table.add_row(
            part,
            number.format(value * scale),
            number.format(measured[part] * scale),
            f"{value / measured[part]:.2f}",
        )
    console.print(table)
    return {
        "machine": vars(machine),
        "job": vars(job),
        "layers": layers,
        "predicted": predicted,
        "measured": measured,
    }


@torch.no_grad()
def main() -> None:
    """Prints the estimate, or compares a prediction with a measurement."""

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teraflops", type=float, default=100.0)
    parser.add_argument("--gigabytes", type=float, default=1_000.0, help="per second")
    parser.add_argument("--microseconds", type=float, default=500.0, help="to start a layer")
    parser.add_argument(
        "--departing", type=float, default=Job.departing, help="share of responses that change"
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--references", type=int, default=100)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.check:
        figures = check(arguments.layers, arguments.references)
    else:
        gpu = Machine(
            "GPU",
            arguments.teraflops * 1e12,
            arguments.gigabytes * 1e9,
            arguments.microseconds * 1e-6,
            2,
        )
        figures = estimate(replace(Job(), departing=arguments.departing), gpu)
    if arguments.json is not None:
        write_text_atomically(arguments.json, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
