# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Times the sweep with the fast engine against the plain one: hooks, `generate`, whole forward passes.

    python benchmarks/sweep.py [--reference-cells 8] [--random-llama | --smollm2-shape | --model PATH] [--preset NAME]...

Both ways judge the same cells on the same model in one process. The plain engine runs some cells and is scaled linearly, since
its cost does not depend on the cell. It takes turns with the fast one, after every group of cells, so that a machine that
becomes slower for a while slows down both. Responses must be the same, and the divergence but for rounding.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import random_language_model

from heretic_contrast.builtin import DATA, refuser_pool
from heretic_contrast.directions.directions import Directions
from heretic_contrast.directions.extraction import extract
from heretic_contrast.directions.pools import Pools
from heretic_contrast.engine.plain import PlainEngine
from heretic_contrast.evaluation.cells import Cell, CellKey
from heretic_contrast.evaluation.plan import SweepOptions, plan_sweep
from heretic_contrast.evaluation.sweep import SweepEvaluator, run_cells
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.language_model import LanguageModel, Progress
from heretic_contrast.prompts import Prompt, load_pool
from heretic_contrast.prompts.sampling import stratified_sample
from heretic_contrast.settings import ContrastSettings
from heretic_contrast.tiers.responses import Tier

SMOLLM2: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1_536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
"""The shape of SmolLM2-135M."""

N_JUDGED = 10
"""Harmful prompts, and as many canaries."""


def make_model(arguments: argparse.Namespace) -> LanguageModel:
    """Returns the model that is asked for."""

    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if arguments.random_llama:
        found: LanguageModel = random_language_model(12, 768, 32_000, arguments.batch_size)
        return found
    folder = arguments.model or DATA / "refuser"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if arguments.smollm2_shape:
        torch.manual_seed(0)
        ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
        network = LlamaForCausalLM(LlamaConfig(**SMOLLM2, **ends)).eval()
    else:
        network = AutoModelForCausalLM.from_pretrained(folder)
    network.requires_grad_(False)
    return wrap(network, tokenizer, name="benchmark", batch_size=arguments.batch_size)


def prepare(
    model: LanguageModel, presets: Sequence[str], n_references: int
) -> tuple[dict[str, Directions], list[list[Prompt]]]:
    """Returns directions by preset, and harmful, canary and reference prompts."""

    pools = {
        (name, split): load_pool(refuser_pool(name, split), name)
        for name in ("harmful", "harmless", "matched")
        for split in ("train", "test")
    }
    training = Pools(
        tuple(pools["harmful", "train"][:180]),
        tuple(pools["harmless", "train"][:100]),
        tuple(pools["matched", "train"]),
    )
    directions = {
        preset: extract(model, training, ContrastSettings(preset=[preset]), lambda line: None)
        for preset in presets
    }
    harmless = pools["harmless", "test"]
    harmful = stratified_sample(pools["harmful", "test"], N_JUDGED, 0)
    return directions, [
        harmful,
        harmless[:N_JUDGED],
        harmless[N_JUDGED : N_JUDGED + n_references],
    ]


def compare(arguments: argparse.Namespace) -> dict[str, float]:
    """Returns the seconds of both ways, their ratio, and the agreement. Prints a line per compared cell."""

    model = make_model(arguments)
    presets = arguments.preset or ["paper-unmatched"]
    directions, prompts = prepare(model, presets, arguments.references)
    options = SweepOptions(
        layers=None if not arguments.layers else tuple(arguments.layers), synergy_size=0
    )
    plan = plan_sweep(directions, *prompts, options)
    evaluators, seconds = [], []
    for engine in (PlainEngine(model), None):
        started = time.perf_counter()
        # What a response is called does not matter for its time, and a random model refuses nothing.
        evaluators.append(SweepEvaluator(model, plan, lambda prompt, response: Tier.REFUSE, engine))
        seconds.append(time.perf_counter() - started)
    plain, fast = evaluators
    keys = fast.grid()
    chosen = set(random.Random(0).sample(keys, min(arguments.reference_cells, len(keys))))
    evaluate = fast.evaluate
    waited, n_same, largest = 0.0, 0, 0.0

    def take_turns(group: Sequence[CellKey], progress: Progress | None = None) -> list[Cell]:
        nonlocal waited, n_same, largest
        cells = evaluate(group, progress)
        for key, cell in zip(group, cells, strict=True):
            if key not in chosen:
                continue
            started = time.perf_counter()
            (expected,) = plain.evaluate([key])
            waited += time.perf_counter() - started
            responses = [(*item.responses, *item.canary_responses) for item in (cell, expected)]
            n_same += responses[0] == responses[1]
            kl, right = (item.measurement.kl_divergence for item in (cell, expected))
            largest = max(largest, abs(kl - right) / max(right, 1e-9))
            print(
                f"{key.configuration} layer {key.layers[0]:2} w {key.weight:.1f}: KL {kl:.6f} of {right:.6f}, responses "
                f"{'same' if responses[0] == responses[1] else 'DIFFER'}",
                flush=True,
            )
        return cells

    fast.evaluate = take_turns  # type: ignore[method-assign]
    started = time.perf_counter()
    cells = run_cells(fast, None, None)
    spent = time.perf_counter() - started - waited
    plain_total = seconds[0] + waited / len(chosen) * len(cells)
    base = fast.references.base
    return {
        "cells": len(cells),
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "plain / fast": plain_total / (seconds[1] + spent),
        "seconds, fast": seconds[1] + spent,
        "seconds, plain, scaled": plain_total,
        "seconds of preparation, fast": seconds[1],
        "seconds of preparation, plain": seconds[0],
        "seconds per cell, fast": spent / len(cells),
        "seconds per cell, plain": waited / len(chosen),
        "compared cells": len(chosen),
        "compared cells with the same responses": n_same,
        "largest relative difference of KL": largest,
        "bytes of base statistics per position": sum(
            tensor.nbytes for tensor in (base.tokens, base.values, base.tails)
        )
        / sum(fast.references.known.lengths),
    }


def main() -> None:
    """Prints times, their ratio, and the agreement."""

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--reference-cells", type=int, default=8)
    parser.add_argument("--references", type=int, default=100)
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--random-llama", action="store_true", help="of 134 M parameters")
    parser.add_argument("--smollm2-shape", action="store_true", help="a random model of that shape")
    parser.add_argument("--model", type=Path, help="a folder; the built-in refuser by default")
    parser.add_argument("--preset", action="append", help="paper-unmatched by default")
    parser.add_argument("--batch-size", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    print(json.dumps(compare(arguments), indent=2))


if __name__ == "__main__":
    main()
