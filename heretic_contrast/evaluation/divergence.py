# SPDX-License-Identifier: AGPL-3.0-or-later

"""
KL divergence of ablated models from the unmodified one, over teacher-forced continuations (paper, section 3.3).

The unmodified model's own greedy continuation of each reference prompt is fed to the ablated model. Per position,
only the unmodified model's largest log-probabilities and one bucket for the rest are kept, so that the result
is a lower bound of the full divergence, by the log-sum inequality; with all of the vocabulary kept it is equal.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ContrastError
from .interventions import TeacherForcing

CHUNK = 256
"""Positions whose logits are held at the same time."""


@dataclass(frozen=True)
class SparseLogProbabilities:
    """
    The largest log-probabilities of each position, and the log-probability of all others together.

    `tokens`: int32 tensor of shape (n_positions, top_k). `values`: float32 tensor of the same shape.
    `tails`: float32 tensor of shape (n_positions,), −∞ where nothing is left.
    """

    tokens: Tensor
    values: Tensor
    tails: Tensor

    def n_bytes(self) -> int:
        """Returns the memory that the tensors take."""

        return sum(
            tensor.numel() * tensor.element_size()
            for tensor in (self.tokens, self.values, self.tails)
        )

    def select(self, positions: Tensor) -> "SparseLogProbabilities":
        """Returns some positions, in a new order."""

        return SparseLogProbabilities(
            self.tokens[positions], self.values[positions], self.tails[positions]
        )


def _tail(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Returns the log-probability of everything but `tokens`: exact, where 1 − Σ p would cancel."""

    if tokens.shape[1] == log_probabilities.shape[1]:
        return torch.full_like(log_probabilities[:, 0], -math.inf)
    return log_probabilities.scatter(1, tokens, -math.inf).logsumexp(dim=1)


def base_statistics(
    forcing: TeacherForcing, hidden_states: Tensor, top_k: int, chunk: int = CHUNK
) -> SparseLogProbabilities:
    """
    Returns what is kept of the unmodified model's distributions.

    `hidden_states`: final hidden states, Tensor of shape (n_positions, hidden_size). No more than `chunk` positions'
    logits exist at the same time.

    Raises `ContrastError` when the unmodified model gives no probabilities, because its outputs are infinite or not numbers.
    """

    parts = []
    for start in range(0, len(hidden_states), chunk):
        log_probabilities = forcing.logits(hidden_states[start : start + chunk]).log_softmax(dim=1)
        if bool(log_probabilities.isnan().any()):
            raise ContrastError(
                "The outputs of the unmodified model are infinite or not numbers, so nothing can be measured: load the model "
                "with another dtype, for example --dtypes float32."
            )
        values, tokens = log_probabilities.topk(min(top_k, log_probabilities.shape[1]), dim=1)
        parts.append((tokens.int(), values, _tail(log_probabilities, tokens)))
    tokens, values, tails = (torch.cat(column) for column in zip(*parts, strict=True))
    return SparseLogProbabilities(tokens, values, tails)


def divergences(
    forcing: TeacherForcing,
    base: SparseLogProbabilities,
    hidden_states: Tensor,
    chunk: int = CHUNK,
) -> Tensor:
    """
    Returns the KL divergence at each position, in nats: Σ p (log p − log q) over the kept tokens and the tail.

    `hidden_states`: final hidden states of the ablated model, Tensor of shape (n_positions, hidden_size).
    Tensor of shape (n_positions,), float64; infinite where the ablated model rules out what the unmodified one does not, or
    where it is so broken that its outputs are no numbers.
    """

    parts = []
    for start in range(0, len(hidden_states), chunk):
        part = base.select(torch.arange(start, min(start + chunk, len(hidden_states))))
        log_probabilities = forcing.logits(hidden_states[start : start + chunk]).log_softmax(dim=1)
        tokens = part.tokens.long()
        modified = log_probabilities.gather(1, tokens).double()
        values, tails = part.values.double(), part.tails.double()
        modified_tails = _tail(log_probabilities, tokens).double()
        parts.append(_terms(values, modified).sum(dim=1) + _terms(tails, modified_tails))
    return torch.cat(parts).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)


def _terms(base: Tensor, modified: Tensor) -> Tensor:
    """Returns p (log p − log q) from log p and log q; what the unmodified model rules out (p = 0) adds nothing."""

    return torch.where(base > -math.inf, base.exp() * (base - modified), torch.zeros_like(base))


def mean_with_standard_error(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """
    Returns the mean over all positions, and its standard error over prompts.

    `sums` and `counts` are per prompt. The standard error is that of a ratio of sums, since the prompts have
    different numbers of positions.
    """

    total = sum(counts)
    n_prompts = len(sums)
    mean = math.fsum(sums) / total
    if n_prompts < 2:
        return mean, math.nan
    squares = math.fsum(
        (value - mean * count) ** 2 for value, count in zip(sums, counts, strict=True)
    )
    return mean, math.sqrt(n_prompts / (n_prompts - 1) * squares) / total
