# SPDX-License-Identifier: AGPL-3.0-or-later

"""
KL divergence of ablated models from the unmodified one, over teacher-forced continuations (paper, section 3.3).

The unmodified model's own greedy continuation of each reference prompt is fed to the ablated model. Per position,
only the unmodified model's largest log-probabilities and one bucket for the rest are kept, so that the result
is a lower bound of the full divergence, by the log-sum inequality; with all of the vocabulary kept it is equal.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ablation.hooks import Intervention
from ..engine.interface import Continuations, Count, no_count
from ..engine.plain import PlainEngine
from ..errors import ContrastError
from ..vectors import exact_type, exactly


class SparseLogProbabilities(NamedTuple):
    """
    The largest log-probabilities of each position, and the log-probability of all others together.

    `tokens`: int32 tensor of shape (n_positions, top_k). `values`: float32 tensor of the same shape.
    `tails`: float32 tensor of shape (n_positions,), −∞ where nothing is left.
    """

    tokens: Tensor
    values: Tensor
    tails: Tensor

    def at(self, positions: Tensor) -> "SparseLogProbabilities":
        """Returns what is kept of some positions, in a new order. `positions`: integer Tensor of shape (n_positions,)."""

        return SparseLogProbabilities(*(item[positions] for item in self))


def _keep(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """
    Returns the log-probabilities of `tokens`, and that of all others together. Overwrites the logits.

    The others are summed by themselves, since 1 − Σ p would cancel.
    """

    kept = logits.gather(1, tokens)
    rest = _logsumexp_in_place(logits.scatter_(1, tokens, -math.inf))
    total = torch.logaddexp(kept.logsumexp(dim=1), rest)
    return kept - total[:, None], rest - total


def _logsumexp_in_place(logits: Tensor) -> Tensor:
    """Returns the logarithm of Σ exp of each row. Overwrites the logits, so that nothing else of their size is made."""

    # A row without any finite logit has no probability, which is not a NaN.
    largest = logits.amax(dim=1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    return logits.sub_(largest).exp_().sum(dim=1).log_().add_(largest[:, 0])


def base_statistics(logits: Tensor, top_k: int) -> SparseLogProbabilities:
    """
    Returns what is kept of the unmodified model's distributions. Overwrites the logits.

    `logits`: Tensor of shape (n_positions, vocabulary), float32. Raises `ContrastError` when the unmodified model gives no
    probabilities, because its outputs are infinite or not numbers.
    """

    tokens = logits.topk(min(top_k, logits.shape[1]), dim=1).indices
    values, tails = _keep(logits, tokens)
    if bool(values.isnan().any()):
        raise ContrastError(
            "The outputs of the unmodified model are infinite or not numbers, so nothing can be measured: load the model "
            "with another dtype, for example --dtypes float32."
        )
    return SparseLogProbabilities(tokens.int(), values, tails)


def divergences(base: SparseLogProbabilities, logits: Tensor) -> Tensor:
    """
    Returns the KL divergence at each position, in nats: Σ p (log p − log q) over the kept tokens and the tail (paper, section 3.3).

    `logits`: of the ablated model, Tensor of shape (n_positions, vocabulary), float32, which are overwritten.
    Tensor of shape (n_positions,), float64 where the device has it; infinite where the ablated model rules out what the unmodified one does not, or
    where it is so broken that its outputs are no numbers.
    """

    modified, modified_tails = _keep(logits, base.tokens.long())
    values = _terms(exactly(base.values), exactly(modified)).sum(dim=1)
    values += _terms(exactly(base.tails), exactly(modified_tails))
    return values.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)


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


class References:
    """
    Reference prompts with the unmodified model's continuations, and what is kept of its distributions.

    `engine`: runs the unmodified model, and is not kept. `top_k`: how many log-probabilities are kept of each position.
    """

    def __init__(self, engine: PlainEngine, known: Continuations, top_k: int) -> None:
        self.known = known
        chunks = []
        for chunk in engine.logits(known):
            chunks.append((chunk.positions, base_statistics(chunk.values, top_k)))
            # Not to be held beside the next one.
            del chunk
        positions, statistics = zip(*chunks, strict=True)
        columns = map(torch.cat, zip(*statistics, strict=True))
        self.base = SparseLogProbabilities(*columns).at(torch.cat(positions).argsort())

    def measure(
        self,
        engine: PlainEngine,
        interventions: Sequence[Intervention] | None = None,
        count: Count = no_count,
    ) -> list[tuple[float, float]]:
        """
        Returns the KL divergence and its standard error under each intervention.

        Without interventions, that of the engine's model as it is at this moment. `count`: told of each prompt.
        """

        lengths = self.known.lengths
        shape = (1 if interventions is None else len(interventions), sum(lengths))
        device = self.base.tails.device
        found = torch.zeros(shape, dtype=exact_type(device), device=device)
        for chunk in engine.logits(self.known, interventions, count):
            values = divergences(self.base.at(chunk.positions), chunk.values)
            found[chunk.interventions, chunk.positions] = values
            # Not to be held beside the next one.
            del chunk
        return [
            # A divergence is never below 0, but for rounding.
            mean_with_standard_error(
                [max(float(part.sum()), 0.0) for part in row.split(lengths)], lengths
            )
            for row in found.cpu().double()
        ]
