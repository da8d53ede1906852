# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Times the sweep against the reference loop: change the weights, generate, measure the full-vocabulary divergence.

    python benchmarks/sweep.py [--reference-cells 8] [--random-llama | --model PATH] [--preset NAME]... [--operations]

Both ways judge the same cells on the same model in one process. The reference runs on some cells and is scaled
linearly, since its cost does not depend on the cell. It takes turns with the sweep, after every group of cells, so that a
machine that becomes slower for a while slows down both. Responses must be the same, and the divergence a lower bound.

`--operations` counts the floating-point operations of matrix products instead of seconds. Where arithmetic is the limit,
their ratio is how much faster the sweep can be.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module
from torch.utils.flop_counter import FlopCounterMode

from heretic_contrast.ablation.hooks import output_projections
from heretic_contrast.ablation.operator import Operator
from heretic_contrast.builtin import DATA, refuser_pool
from heretic_contrast.directions.directions import Directions
from heretic_contrast.directions.extraction import extract
from heretic_contrast.directions.pools import Pools
from heretic_contrast.engine.fast.generation import generate_tokens
from heretic_contrast.engine.fast.head import Head
from heretic_contrast.evaluation.cells import Cell, CellKey
from heretic_contrast.evaluation.plan import SweepOptions, plan_sweep
from heretic_contrast.evaluation.sweep import SweepEvaluator, run_cells
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.language_model import LanguageModel, Progress, batches
from heretic_contrast.prompts import Prompt, load_pool
from heretic_contrast.prompts.sampling import stratified_sample
from heretic_contrast.settings import ContrastSettings
from heretic_contrast.tiers.responses import Tier

Clock = Callable[[], float]
"""Returns what has passed so far: seconds, or operations."""


class ForwardCost:
    """Adds up what is spent inside the model's forward passes."""

    def __init__(self, module: Module, clock: Clock) -> None:
        self.total = 0.0
        self._clock = clock
        self._depth = 0
        self._started = 0.0
        for child in (module, *module.modules()):
            if child is module or type(child).__name__.endswith("Model"):
                child.register_forward_pre_hook(self._enter)
                child.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: Module, args: Any) -> None:
        if self._depth == 0:
            self._started = self._clock()
        self._depth += 1

    def _leave(self, module: Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.total += self._clock() - self._started


class Stopwatch:
    """Adds up what is spent in a function."""

    def __init__(self, function: Callable[..., Any], clock: Clock) -> None:
        self.total = 0.0
        self._clock = clock
        self._function = function

    def __call__(self, *args: Any) -> Any:
        started = self._clock()
        try:
            return self._function(*args)
        finally:
            self.total += self._clock() - started


@contextmanager
def changed_weights(model: LanguageModel, layer: int, operator: Operator) -> Iterator[None]:
    """Changes the weights of a layer to W − C W, and restores them."""

    modules = output_projections(model, layer, None)
    originals = [module.weight.data for module in modules]
    try:
        for module, original in zip(modules, originals, strict=True):
            factor_a, factor_b = operator.lora_factors(original)
            module.weight.data = original + factor_b @ factor_a
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.weight.data = original


@torch.no_grad()
def log_probabilities(
    model: LanguageModel, prompts: list[tuple[int, ...]], continuations: list[tuple[int, ...]]
) -> list[torch.Tensor]:
    """Returns the full distributions at the positions that predict the continuations, per prompt."""

    found = []
    for part in batches(len(prompts), model.batch_size):
        sequences = [a + b for a, b in zip(prompts[part], continuations[part], strict=True)]
        length = max(map(len, sequences))
        ids = torch.full((len(sequences), length), model.pad_token_id())
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        logits = model.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, (prompt, continuation) in enumerate(
            zip(prompts[part], continuations[part], strict=True)
        ):
            positions = slice(len(prompt) - 1, len(prompt) - 1 + len(continuation))
            found.append(logits[row, positions].float().log_softmax(-1))
    return found


def build(
    arguments: argparse.Namespace,
) -> tuple[LanguageModel, dict[str, Directions], list[list[Prompt]]]:
    """Returns the model, its directions by preset, and harmful, canary and reference prompts."""

    from transformers import AutoModelForCausalLM, AutoTokenizer

    pools = {
        (name, split): load_pool(refuser_pool(name, split), name)
        for name in ("harmful", "harmless", "matched")
        for split in ("train", "test")
    }
    folder = arguments.model or DATA / "refuser"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if arguments.random_llama:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        network = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32_000,
                hidden_size=768,
                intermediate_size=2_048,
                num_hidden_layers=12,
                num_attention_heads=12,
                num_key_value_heads=12,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
            )
        ).eval()
    else:
        network = AutoModelForCausalLM.from_pretrained(folder)
    network.requires_grad_(False)
    model = wrap(network, tokenizer, name="benchmark", batch_size=arguments.batch_size)
    training = Pools(
        tuple(pools["harmful", "train"][:180]),
        tuple(pools["harmless", "train"][:100]),
        tuple(pools["matched", "train"]),
    )
    directions = {
        preset: extract(
            model,
            training,
            ContrastSettings(preset=[preset]),
            lambda line: None,
        )
        for preset in arguments.preset or ["paper-unmatched"]
    }
    harmless = pools["harmless", "test"]
    return (
        model,
        directions,
        [
            stratified_sample(pools["harmful", "test"], 10, 0),
            harmless[:10],
            harmless[10 : 10 + arguments.references],
        ],
    )


def main() -> None:
    """Prints times, their ratio, and the agreement."""

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--reference-cells", type=int, default=8)
    parser.add_argument("--references", type=int, default=100)
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument(
        "--random-llama", action="store_true", help="a random model of 134 M parameters"
    )
    parser.add_argument("--model", type=Path, help="a folder; the built-in refuser by default")
    parser.add_argument("--preset", action="append", help="paper-unmatched by default")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--operations", action="store_true", help="count instead of timing")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    counter = FlopCounterMode(display=False)
    with counter if arguments.operations else nullcontext():
        if arguments.operations:
            result = compare(arguments, lambda: float(counter.get_total_flops()), "operations")
        else:
            result = compare(arguments, time.perf_counter, "seconds")
    print(json.dumps(result, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


class ReferenceLoop:
    """Measures cells by changed weights, generation and the full-vocabulary divergence, and compares."""

    def __init__(
        self,
        model: LanguageModel,
        harmful: list[Prompt],
        canaries: list[Prompt],
        references: list[Prompt],
        options: SweepOptions,
        clock: Clock,
    ) -> None:
        self._model, self._harmful, self._canaries = model, harmful, canaries
        self._options, self._clock = options, clock
        started = clock()
        # Needed once: the unmodified model's responses, its continuations and its distributions there.
        self._respond()
        self._prompts = model.token_ids(references)
        limits = [options.kl_tokens] * len(references)
        head = Head(model)
        self._continuations = [
            item
            for part in batches(len(references), model.batch_size)
            for item in generate_tokens(head, self._prompts[part], limits[part])
        ]
        self._base = log_probabilities(model, self._prompts, self._continuations)
        self.preparation = clock() - started
        self.n_cells, self.n_same = 0, 0
        self.responses, self.divergence, self.excess = 0.0, 0.0, 0.0

    def compare(self, cell: Cell, operator: Operator) -> None:
        """Measures a cell of one layer, and prints how what the sweep found compares."""

        layer = cell.layers[0]
        started = self._clock()
        with changed_weights(self._model, layer, operator):
            responses = self._respond()
            generated = self._clock()
            modified = log_probabilities(self._model, self._prompts, self._continuations)
        total = sum(
            float((p.exp() * (p - q)).sum()) for p, q in zip(self._base, modified, strict=True)
        )
        self.responses += generated - started
        self.divergence += self._clock() - generated
        full = total / sum(map(len, self._continuations))
        same = responses == [*cell.responses, *cell.canary_responses]
        self.n_cells += 1
        self.n_same += same
        self.excess = max(self.excess, cell.measurement.kl_divergence - full)
        print(
            f"{cell.configuration} layer {layer:2} w {cell.weight:.1f}: KL {cell.measurement.kl_divergence:.6f} "
            f"of {full:.6f}, responses {'same' if same else 'DIFFER'}",
            flush=True,
        )

    def _respond(self) -> list[str]:
        n_tokens = self._options.max_new_tokens
        return [
            *self._model.generate(self._harmful, n_tokens),
            *self._model.generate(self._canaries, n_tokens),
        ]


def compare(arguments: argparse.Namespace, clock: Clock, unit: str) -> dict[str, float]:
    """Returns what both ways cost, their ratio, and the agreement. Prints a line per compared cell."""

    model, directions, (harmful, canaries, references) = build(arguments)
    options = SweepOptions(
        layers=None if not arguments.layers else tuple(arguments.layers), synergy_size=0
    )
    reference = ReferenceLoop(model, harmful, canaries, references, options, clock)
    forward = ForwardCost(model.model, clock)

    started = clock()
    evaluator = SweepEvaluator(
        model,
        plan_sweep(directions, harmful, canaries, references, options),
        # What a response is called does not matter for its time, and a random model refuses nothing.
        classify=lambda prompt, response: Tier.REFUSE,
    )
    preparation = clock() - started
    divergence = Stopwatch(evaluator._references.measure, clock)
    evaluator._references.measure = divergence  # type: ignore[method-assign]
    keys = evaluator.grid()
    chosen = set(random.Random(0).sample(keys, min(arguments.reference_cells, len(keys))))
    evaluate = evaluator.evaluate
    # What passes while the sweep waits for the reference, altogether and in forward passes.
    waited, waited_in_forward = 0.0, 0.0

    def take_turns(group: Sequence[CellKey], progress: Progress | None = None) -> list[Cell]:
        nonlocal waited, waited_in_forward
        cells = evaluate(group, progress)
        before, before_in_forward = clock(), forward.total
        for key, cell in zip(group, cells, strict=True):
            if key in chosen:
                operator = evaluator.configurations[key.configuration].operator(
                    key.layers[0], key.weight, key.strength
                )
                reference.compare(cell, operator)
        waited += clock() - before
        waited_in_forward += forward.total - before_in_forward
        return cells

    evaluator.evaluate = take_turns  # type: ignore[method-assign]
    cells = run_cells(evaluator, None, None)
    spent = clock() - started - waited
    in_forward = forward.total - waited_in_forward
    per_cell = (reference.responses + reference.divergence) / reference.n_cells
    reference_total = reference.preparation + per_cell * len(cells)
    return {
        "cells": len(cells),
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        unit: spent,
        f"reference {unit}, scaled": reference_total,
        "reference / ours": reference_total / spent,
        f"{unit} of preparation": preparation,
        f"reference {unit} of preparation": reference.preparation,
        f"{unit} per cell, divergence": divergence.total / len(cells),
        f"{unit} per cell, responses": (spent - preparation - divergence.total) / len(cells),
        f"reference {unit} per cell, divergence": reference.divergence / reference.n_cells,
        f"reference {unit} per cell, responses": reference.responses / reference.n_cells,
        f"share of {unit} in forward passes": in_forward / spent,
        "reference cells": reference.n_cells,
        "reference cells with the same responses": reference.n_same,
        "largest excess of KL over the full one": reference.excess,
        "bytes of base statistics per position": evaluator._references.n_bytes()
        / sum(evaluator._references.counts),
    }


if __name__ == "__main__":
    main()
