# SPDX-License-Identifier: AGPL-3.0-or-later

"""What engines are given, and what they give."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from ..language_model import Tokens

Count = Callable[[int], None]
"""Is told how many more prompts are done, each under each intervention."""


def no_count(n_prompts: int) -> None:
    """Counts nothing."""


@dataclass(frozen=True, eq=False)
class Continuations:
    """
    Prompts and the unmodified model's continuation of each, which ends with its end token or at a limit.

    The positions that predict the continuations are counted through: first those of the first prompt, then those of the second.
    """

    prompts: tuple[Tokens, ...]
    tokens: tuple[Tokens, ...]

    @property
    def sequences(self) -> list[Tokens]:
        """What is read of each prompt and its continuation, whose last token predicts nothing."""

        return [a + b[:-1] for a, b in zip(self.prompts, self.tokens, strict=True)]

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self.tokens]

    @property
    def starts(self) -> list[int]:
        return [0, *accumulate(self.lengths)][:-1]


@dataclass(frozen=True)
class Logits:
    """
    What a model predicts at some positions of continuations.

    `interventions` and `positions`: integer Tensors of shape (n_positions,), under which intervention, and where: see
    `Continuations`. `values`: Tensor of shape (n_positions, vocabulary), float32, to be overwritten by whoever gets it.
    """

    interventions: Tensor
    positions: Tensor
    values: Tensor
