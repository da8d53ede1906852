# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Measures a head on the last positions of a batch, as a slice (what transformers' `generate` hands it) and as a whole tensor.

    python benchmarks/head.py [--rows 40] [--vocabulary 49152] [--hidden-size 576]
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear


def seconds(states: Tensor, weight: Tensor, repeats: int) -> float:
    """Returns the median time of one product, after one that is not counted."""

    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        linear(states, weight)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main(command_line: Sequence[str] | None = None) -> None:
    """Prints both times and their ratio, by data type."""

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--length", type=int, default=40)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden-size", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(command_line)
    for dtype in (torch.float32, torch.bfloat16):
        shape = (arguments.rows, arguments.length, arguments.hidden_size)
        states = torch.randn(shape, dtype=dtype)[:, -1:, :]
        weight = torch.randn(arguments.vocabulary, arguments.hidden_size, dtype=dtype)
        sliced = seconds(states, weight, arguments.repeats)
        whole = seconds(states.contiguous(), weight, arguments.repeats)
        print(
            f"{dtype}: slice {sliced:.3f} s, whole {whole:.3f} s, ratio {sliced / whole:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
