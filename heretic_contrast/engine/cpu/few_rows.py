# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Products of a few rows with a large matrix, as in each step of generation, faster on a CPU.

PyTorch's libraries keep several threads less busy with one such product than with several, each of which gives a part
of the outputs. The result differs by rounding at most.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import gcd

import torch
from torch import Tensor
from torch.nn import Linear
from torch.nn.functional import linear

from ...language_model import LanguageModel
from ..fast.replaced_forwards import replaced_forwards

MOST_ROWS = 128
"""With more rows, small matrices may be slower in parts, and large ones are little faster: see `benchmarks/generation.py`."""

LEAST_WIDTH = 128
"""Outputs of a part, of which fewer would be slower."""

LEAST_WEIGHTS = 2**18
"""Elements of a matrix, of which fewer would be slower."""


def n_parts(weight: Tensor) -> int:
    """Returns how many parts the outputs of a matrix, Tensor of shape (out_features, in_features), are worth; 1 for none."""

    n_threads = torch.get_num_threads()
    if (
        n_threads == 1
        or weight.device.type != "cpu"
        or weight.dtype != torch.float32
        or weight.numel() < LEAST_WEIGHTS
        or not weight.is_contiguous()
    ):
        return 1
    parts = gcd(len(weight), 2 * n_threads)
    return parts if len(weight) >= parts * LEAST_WIDTH else 1


def linear_of_few_rows(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """
    As `torch.nn.functional.linear`, in parts of the outputs where that is faster.

    Tensor of shape (..., in_features) to one of shape (..., out_features).
    """

    n_features = states.shape[-1]
    n_rows = states.numel() // n_features
    parts = n_parts(weight) if n_rows <= MOST_ROWS else 1
    if parts == 1:
        return linear(states, weight, bias)
    outputs = torch.matmul(
        states.reshape(1, n_rows, n_features), weight.view(parts, -1, n_features).transpose(1, 2)
    )
    outputs = outputs.transpose(0, 1).reshape(*states.shape[:-1], len(weight))
    return outputs if bias is None else outputs + bias


@contextmanager
def fast_with_few_rows(model: LanguageModel) -> Iterator[None]:
    """Makes the linear layers of a model faster with few rows, for as long as the context lasts; on a CPU only."""

    modules = [
        module
        for module in model.model.modules()
        # Subclasses do other things, and libraries that move weights put a method of their own in front.
        if type(module) is Linear and "forward" not in vars(module) and n_parts(module.weight) > 1
    ]
    with replaced_forwards([(module, partial(_forward, module)) for module in modules]):
        yield


def _forward(module: Linear, states: Tensor) -> Tensor:
    return linear_of_few_rows(states, module.weight, module.bias)
