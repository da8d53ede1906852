# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Times the compiled gated delta rule against transformers' implementation in PyTorch.

    python benchmarks/delta_rule.py [--repeats 10]

Both run in one process on the same inputs; the best of several repeats counts.
"""

import argparse
from functools import partial

import torch
from measuring import best_time
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from heretic_contrast.engine.cpu.gated_delta_rule import gated_delta_rule

SHAPES = (
    ("a pass of the built-in refuser", 32, 43, 4, 32),
    ("a pass of a larger model", 16, 64, 16, 128),
    ("a long prompt", 2, 512, 16, 128),
    ("one token, built-in refuser", 128, 1, 4, 32),
    ("one token, larger model", 64, 1, 16, 128),
)
"""What is run: batch, length, heads, and dimensions of a head."""


@torch.no_grad()
def main() -> None:
    """Prints a line for each shape."""

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for name, batch, length, n_heads, size in SHAPES:
        inputs = {key: torch.randn(batch, length, n_heads, size) for key in ("query", "key")}
        inputs["value"] = torch.randn(batch, length, n_heads, size)
        inputs["g"] = -torch.rand(batch, length, n_heads)
        inputs["beta"] = torch.rand(batch, length, n_heads)
        options = {
            "initial_state": torch.randn(batch, n_heads, size, size),
            "output_final_state": True,
            "use_qk_l2norm_in_kernel": True,
        }
        reference = (
            torch_recurrent_gated_delta_rule if length == 1 else torch_chunk_gated_delta_rule
        )
        runs = [partial(rule, **inputs, **options) for rule in (gated_delta_rule, reference)]
        difference = runs[0]()[0] - runs[1]()[0]
        ours, theirs = (best_time(run, arguments.repeats) for run in runs)
        print(
            f"{name:32} {1000 * theirs:8.2f} ms {1000 * ours:8.2f} ms {theirs / ours:6.1f} times "
            f"as fast, largest difference {float(difference.abs().max()):.0e}"
        )


if __name__ == "__main__":
    main()
