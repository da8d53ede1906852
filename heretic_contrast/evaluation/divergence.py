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

from ..engine.fast.head import Head
from ..errors import ContrastError


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

    def split(self, lengths: Sequence[int]) -> list["SparseLogProbabilities"]:
        """Returns runs of positions of the given lengths, one after the other."""

        columns = (tensor.split(list(lengths)) for tensor in (self.tokens, self.values, self.tails))
        return [SparseLogProbabilities(*parts) for parts in zip(*columns, strict=True)]


def _keep(head: Head, hidden_states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """
    Returns the log-probabilities of `tokens`, and that of all others together.

    The others are summed by themselves, since 1 − Σ p would cancel.
    """

    parts = head.parts(len(tokens))
    if len(parts) == 1:
        # Nothing to be sorted by part, for which a device would have to be waited for.
        logits = head.logits(hidden_states)
        kept = logits.gather(1, tokens)
        rest = _logsumexp_in_place(logits.scatter_(1, tokens, -math.inf))
    else:
        kept, rest = _keep_by_part(head, hidden_states, tokens, parts)
    total = torch.logaddexp(kept.logsumexp(dim=1), rest)
    return kept - total[:, None], rest - total


def _keep_by_part(
    head: Head, hidden_states: Tensor, tokens: Tensor, parts: Sequence[slice]
) -> tuple[Tensor, Tensor]:
    """Returns the logits of `tokens`, and the logarithm of Σ exp of all others. All parts but the last have the same size."""

    flat = tokens.flatten()
    numbers = flat // parts[0].stop
    places = numbers.argsort(stable=True).split(numbers.bincount(minlength=len(parts)).tolist())
    kept = torch.empty(flat.shape, device=flat.device)
    rest = torch.full((len(tokens),), -math.inf, device=flat.device)
    for part, inside in zip(parts, places, strict=True):
        logits = head.logits(hidden_states, part).contiguous()
        rows, columns = inside // tokens.shape[1], flat[inside] - part.start
        indices = rows * logits.shape[1] + columns
        kept[inside] = logits.take(indices)
        logits.view(-1).index_fill_(0, indices, -math.inf)
        rest = torch.logaddexp(rest, _logsumexp_in_place(logits))
    return kept.view(tokens.shape), rest


def _logsumexp_in_place(logits: Tensor) -> Tensor:
    """Returns the logarithm of Σ exp of each row. Overwrites the logits, so that nothing else of their size is made."""

    # A row without any finite logit has no probability, which is not a NaN.
    largest = logits.amax(dim=1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    return logits.sub_(largest).exp_().sum(dim=1).log_().add_(largest[:, 0])


def base_statistics(
    head: Head, hidden_states: Tensor, top_k: int, chunk: int | None = None
) -> SparseLogProbabilities:
    """
    Returns what is kept of the unmodified model's distributions.

    `hidden_states`: final hidden states, Tensor of shape (n_positions, hidden_size). No more than `chunk` positions'
    logits exist at the same time, by default as many as the head says.

    Raises `ContrastError` when the unmodified model gives no probabilities, because its outputs are infinite or not numbers.
    """

    parts = []
    for piece in hidden_states.split(chunk or head.n_positions):
        tokens = head.largest(piece, top_k)
        values, tails = _keep(head, piece, tokens)
        if bool(values.isnan().any()):
            raise ContrastError(
                "The outputs of the unmodified model are infinite or not numbers, so nothing can be measured: load the model "
                "with another dtype, for example --dtypes float32."
            )
        parts.append((tokens.int(), values, tails))
    tokens, values, tails = (torch.cat(column) for column in zip(*parts, strict=True))
    return SparseLogProbabilities(tokens, values, tails)


def divergences(
    head: Head, base: SparseLogProbabilities, hidden_states: Tensor, chunk: int | None = None
) -> Tensor:
    """
    Returns the KL divergence at each position, in nats: Σ p (log p − log q) over the kept tokens and the tail (paper, section 3.3).

    `hidden_states`: final hidden states of the ablated model, Tensor of shape (n_positions, hidden_size).
    Tensor of shape (n_positions,), float64; infinite where the ablated model rules out what the unmodified one does not, or
    where it is so broken that its outputs are no numbers.
    """

    pieces = hidden_states.split(chunk or head.n_positions)
    tokens = base.tokens.long().split([len(piece) for piece in pieces])
    kept = [_keep(head, piece, part) for piece, part in zip(pieces, tokens, strict=True)]
    modified, modified_tails = (torch.cat(part).double() for part in zip(*kept, strict=True))
    values = _terms(base.values.double(), modified).sum(dim=1)
    values += _terms(base.tails.double(), modified_tails)
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
