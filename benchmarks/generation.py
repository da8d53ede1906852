# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Times steps of greedy generation on a CPU, against plain linear layers and caches that are copied for every token.

    python benchmarks/generation.py [--repeats 7]

First the products of a few rows with matrices of several shapes, as many of them as do not fit into the processor's
cache; then whole steps of a random Llama of 141 million parameters. All ways take turns in one process, and the best of
several repeats of each counts.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from measuring import best_times_in_turns, random_language_model
from torch import Tensor
from torch.nn.functional import linear
from transformers.cache_utils import Cache

from heretic_contrast.engine.cpu import few_rows
from heretic_contrast.engine.fast import generation
from heretic_contrast.engine.fast.caches import select_rows, with_room
from heretic_contrast.engine.fast.generation import Running
from heretic_contrast.engine.fast.head import Head

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048), (6144, 2048), (2048, 6144))
"""Outputs and inputs of a matrix."""

ROWS = (8, 32, 64, 128, 256)

MOST_ROWS = few_rows.MOST_ROWS
"""What is taken apart in steps; products are, whatever their rows."""

ELEMENTS = 10_000_000
"""Elements of all matrices of one shape together."""

WAYS = {
    "plain": (False, False),
    "parts of the outputs": (True, False),
    "room for keys and values": (False, True),
    "both": (True, True),
}
"""Whether linear layers are taken apart, and whether caches have room."""


@contextmanager
def no_room(cache: Cache, n_tokens: int, rows: Tensor) -> Iterator[Cache]:
    """Stands for `with_room`, and gives a cache that copies everything for each token."""

    yield select_rows(cache, rows)


def products(rows: int, outputs: int, inputs: int, repeats: int) -> list[float]:
    """Returns the seconds of plain products, and of those in parts."""

    states = torch.randn(rows, inputs)
    weights = [torch.randn(outputs, inputs) for _ in range(1 + ELEMENTS // (outputs * inputs))]

    def run(product: Any) -> None:
        for weight in weights:
            product(states, weight)

    few_rows.MOST_ROWS = max(ROWS)
    ways = [partial(run, linear), partial(run, few_rows.linear_of_few_rows)]
    return best_times_in_turns(ways, repeats)


def advance(head: Head, running: Running, way: tuple[bool, bool]) -> Any:
    """Generates a few tokens of each row, and returns them."""

    in_parts, has_room = way
    few_rows.MOST_ROWS = MOST_ROWS if in_parts else 0
    generation.with_room = with_room if has_room else no_room
    return running.advance(head, generation.CPU_STRIDE, None)[0]


@torch.no_grad()
def main() -> None:
    """Prints a line for each shape, and for each way and number of rows."""

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print("times as fast in parts, for rows:   " + "".join(f"{rows:8}" for rows in ROWS))
    for outputs, inputs in SHAPES:
        ratios = [products(rows, outputs, inputs, arguments.repeats) for rows in ROWS]
        line = "".join(f"{plain / in_parts:8.2f}" for plain, in_parts in ratios)
        print(f"{outputs:5} outputs of {inputs:4} inputs:        {line}", flush=True)
    model = random_language_model(12, 768, 32_000, 128)
    head = Head(model)
    for rows in (8, 64, 120):
        prompts = [tuple(torch.randint(5, 1000, (60,)).tolist()) for _ in range(rows)]
        running = Running.start(head, prompts).advance(head, 1, None)[1]
        runs = [partial(advance, head, running, way) for way in WAYS.values()]
        tokens = [run() for run in runs]
        same = all(found == tokens[0] for found in tokens)
        seconds = best_times_in_turns(runs, arguments.repeats)
        for name, taken in zip(WAYS, seconds, strict=True):
            print(
                f"{rows:4} rows, {name:24} {1000 * taken / generation.CPU_STRIDE:7.1f} ms a step, "
                f"{seconds[0] / taken:5.2f} times as fast, tokens {'same' if same else 'DIFFER'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
