# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Times the LoRA factors of one module against Heretic's single direction and against dense outer products.

    python benchmarks/ablation.py [--hidden 2048] [--inputs 6144] [--directions 9]

All ways run in one process on the same weight; the best of several repeats counts.
"""

import argparse
from collections.abc import Callable

import torch
import torch.linalg as LA
import torch.nn.functional as F
from measuring import best_time
from torch import Tensor

from heretic_contrast.ablation.lora import lora_factors
from heretic_contrast.ablation.operator import compose


def heretic_single(weight: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """The single-direction update without row normalization, by its formula: A = vᵀ W, B = −w v."""

    return (direction @ weight).view(1, -1), (-1.0 * direction).view(-1, 1)


def heretic_full(weight: Tensor, direction: Tensor, rank: int = 3) -> tuple[Tensor, Tensor]:
    """The single-direction update with full row normalization, by its formula: dense, then truncated."""

    norms = LA.vector_norm(weight, dim=1, keepdim=True)
    normalized = F.normalize(weight, p=2, dim=1)
    changed = F.normalize(normalized - torch.outer(direction, direction @ normalized), p=2, dim=1)
    torch.manual_seed(0)
    left, values, right = torch.svd_lowrank(changed * norms - weight, q=2 * rank + 4, niter=6)
    roots = values[:rank].sqrt()
    return roots[:, None] * right[:, :rank].T, left[:, :rank] * roots


def dense_sum(weight: Tensor, vectors: Tensor, rank: int = 3) -> tuple[Tensor, Tensor]:
    """Several directions as dense outer products, summed and truncated, as in Heretic's pull request 196."""

    change = torch.zeros_like(weight)
    for vector in vectors:
        change -= torch.outer(vector, vector) @ weight
    torch.manual_seed(0)
    left, values, right = torch.svd_lowrank(change, q=2 * rank + 4, niter=6)
    roots = values[:rank].sqrt()
    return roots[:, None] * right[:, :rank].T, left[:, :rank] * roots


@torch.no_grad()
def main() -> None:
    """Prints the table."""

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inputs", type=int, default=6144)
    parser.add_argument("--directions", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    weight = torch.randn(arguments.hidden, arguments.inputs) / arguments.inputs**0.5
    shared = torch.randn(arguments.hidden)
    noise = torch.randn(arguments.directions, arguments.hidden)
    vectors = F.normalize(shared + 0.25 * noise, dim=1)
    single = vectors[0]
    weights = torch.full((arguments.directions,), 0.5)
    one = torch.ones(1)

    ways: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], int]] = {
        "Heretic, 1 direction": (lambda: heretic_single(weight, single), arguments.repeats),
        "ours, all directions": (
            lambda: lora_factors(compose(vectors, weights), weight),
            arguments.repeats,
        ),
        "dense outer products": (lambda: dense_sum(weight, vectors), 2),
        "Heretic, full normalization": (lambda: heretic_full(weight, single), 3),
        "ours, full normalization": (
            lambda: lora_factors(compose(single[None], one), weight, "full", 3),
            3,
        ),
    }
    seconds = {name: best_time(run, repeats) for name, (run, repeats) in ways.items()}

    exact = -(vectors.T * weights) @ (vectors @ weight)
    factor_a, factor_b = ways["ours, all directions"][0]()
    dense_a, dense_b = dense_sum(weight, vectors * weights.sqrt()[:, None])
    norms = LA.vector_norm(weight, dim=1, keepdim=True)
    normalized = F.normalize(weight, dim=1)
    target = F.normalize(normalized - torch.outer(single, single @ normalized), dim=1) * norms
    target -= weight

    def error(factors: tuple[Tensor, Tensor], of: Tensor) -> float:
        return float((factors[1] @ factors[0] - of).norm() / of.norm())

    result = {
        "seconds": seconds,
        "ours / Heretic, 1 direction": seconds["ours, all directions"]
        / seconds["Heretic, 1 direction"],
        "dense / ours": seconds["dense outer products"] / seconds["ours, all directions"],
        "full: Heretic / ours": seconds["Heretic, full normalization"]
        / seconds["ours, full normalization"],
        "relative error of ours": error((factor_a, factor_b), exact),
        "relative error of dense, truncated to rank 3": error((dense_a, dense_b), exact),
        "full: relative error of Heretic": error(heretic_full(weight, single), target),
        "full: relative error of ours": error(ways["ours, full normalization"][0](), target),
    }
    for name, value in result.items():
        if isinstance(value, dict):
            for way, duration in value.items():
                print(f"{way:30} {1000 * duration:10.1f} ms")
        else:
            print(f"{name:48} {value:10.3g}")


if __name__ == "__main__":
    main()
