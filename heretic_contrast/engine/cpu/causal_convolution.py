# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The causal convolution of linear attention, which mixes each channel of a token with those of a few tokens before.

PyTorch's general convolution spends most of its time on CPUs on rearranging what it reads. With the few taps that there are,
it is several times faster to add up shifted copies.
"""

from typing import Any

import torch
from torch import Tensor

from ..compat import ACT2FN


def causal_convolution(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """
    Returns the convolution of every channel with its taps, zeros before the first token, and the activation of that.

    `hidden_states`: Tensor of shape (batch, n_channels, length), and the result has its shape and dtype. `weight`: Tensor
    of shape (n_channels, n_taps), the last tap for the token itself. `bias`: Tensor of shape (n_channels,). The
    computation is in float32. Names and order of the arguments are transformers', whose others make no difference.
    """

    output = _shifted_sums(hidden_states, weight, hidden_states.shape[2])
    return _activated(output, bias, activation).to(hidden_states.dtype)


def next_causal_convolution(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """
    As `causal_convolution`, for tokens that follow others.

    `conv_state`: Tensor of shape (batch, n_channels, n_kept), the last tokens that were read, which become those of now.
    """

    both = torch.cat([conv_state, hidden_states], dim=2)
    conv_state.copy_(both[:, :, -conv_state.shape[2] :])
    output = _shifted_sums(both, weight, hidden_states.shape[2])
    return _activated(output, bias, activation).to(hidden_states.dtype)


def _shifted_sums(inputs: Tensor, weight: Tensor, length: int) -> Tensor:
    """Returns the convolution for the last `length` tokens, zeros before the first of all."""

    inputs, taps = inputs.float(), weight.float()
    end = inputs.shape[2]
    start = end - length
    output = inputs[:, :, start:] * taps[:, -1:]
    for lag in range(1, taps.shape[1]):
        # The first tokens have none so far before them.
        missing = min(max(0, lag - start), length)
        before = inputs[:, :, start + missing - lag : end - lag]
        output[:, :, missing:].addcmul_(before, taps[:, -1 - lag, None])
    return output


def _activated(output: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    if bias is not None:
        output = output + bias.float()[:, None]
    return output if activation is None else ACT2FN[activation](output)
