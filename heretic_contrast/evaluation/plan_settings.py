# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The settings of a sweep, with one description per field, for whatever sweeps.

This module imports no PyTorch, so that `--help` stays fast.
"""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveInt, field_validator

from ..errors import ContrastError
from ..settings import Categories, Described, TextClassifierSettings

WEIGHTS = (0.3, 0.5, 0.8, 1.0, 1.2)
"""The paper's weights (paper, section 3.3)."""


def parse_layers(text: str) -> tuple[int, ...] | None:
    """Returns the layers that a text names, or None for all. Raises `ContrastError` when the text does not name layers."""

    if text.strip() == "all":
        return None
    layers: set[int] = set()
    for part in text.split(","):
        # No model has more than four digits of layers, and a range of more would take all memory.
        match = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part)
        if match is None:
            raise ContrastError(
                f'The layers "{text}" do not work: give "all", or indices and ranges such as "3,7,10-14".'
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise ContrastError(
                f"The range of layers {part.strip()} runs backwards: write {last}-{first}."
            )
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def check_weights(weights: Sequence[float]) -> Sequence[float]:
    """Returns the weights. Raises `ContrastError` when they cannot be swept."""

    if (
        not weights
        or not all(0 <= weight < math.inf for weight in weights)
        or any(a >= b for a, b in pairwise(weights))
    ):
        raise ContrastError(
            f"The weights {list(weights)} do not work: give increasing weights that are not negative."
        )
    return weights


class PairsSettings(Described):
    """The setting of whatever measures capture."""

    pairs: str | None = None
    """
    File of prompt pairs for the capture analysis, with columns refused and answered (JSON Lines, CSV, Parquet); unset for the
    shipped ones.
    """


class SweepPlanSettings(PairsSettings, TextClassifierSettings):
    """Settings of a fixed-weight sweep, which the command and the scorer share."""

    layers: str = "all"
    """Decoder layers to test: "all", or indices and ranges such as "3,7,10-14"."""

    weights: Annotated[list[float], AfterValidator(check_weights)] = Field(list(WEIGHTS))
    """Weights to test, increasing (the paper's by default)."""

    components: list[str] | None = None
    """Components to ablate, such as "attn.o_proj", or modules such as "linear_attn.out_proj"; unset for all that the model has."""

    strength: Literal["weight", "effective", "both"] = "both"
    """
    What a weight means. Options: "weight" (of each direction, as in the paper), "effective" (of the largest shared component,
    so that parallel directions do not add up), "both". Configurations with equal_effective_weight are swept at effective
    weights alone.
    """

    random_control: bool = True
    """Whether to sweep random directions of the same norms and cosines beside the first configuration."""

    n_harmful: PositiveInt = 10
    """Number of harmful prompts to judge, stratified over categories (the paper: 10). Unless given, it fits itself to the pool."""

    n_canaries: PositiveInt = 10
    """Number of harmless prompts whose false refusals are counted. Unless given, it fits itself to the pool."""

    n_references: PositiveInt = 100
    """
    Number of harmless prompts that the KL divergence is measured on (the paper: 100). Unless given, it fits itself to the
    pool.
    """

    kl_tokens: PositiveInt = 50
    """Number of teacher-forced tokens per reference prompt (the paper: 50)."""

    kl_top_k: PositiveInt = 100
    """Number of log-probabilities kept per position (the paper: 100)."""

    sweep_response_length: PositiveInt = 50
    """Maximum number of tokens of a judged response."""

    evaluate_categories: Categories = Field([])
    """
    Harm categories to judge on, or none for all. With exclude_categories of the directions this is the control for topic:
    directions fitted without a category, judged on it.
    """

    synergy_size: int = Field(2, ge=0)
    """Number of layers in the sets that are tested for synergy (0 = none)."""

    synergy_weight: float = Field(0.3, gt=0, allow_inf_nan=False)
    """Weight of the synergy test (the paper: 0.3)."""

    synergy_layers: PositiveInt = 4
    """Number of best layers that sets are made of."""

    storage: str | None = None
    """
    URL of an Optuna storage, or path of a journal file, that several processes may share; unset for sweep.journal in the
    output directory.
    """

    sweep_batch_size: PositiveInt | None = None
    """
    Largest number of samples in one pass of the sweep, which several cells share: fewer with long prompts, and halved when memory
    is exhausted. Unset for Heretic's batch_size, or its max_batch_size where that is 0.
    """

    @field_validator("layers", mode="before")
    @classmethod
    def join_layers(cls, value: Any) -> Any:
        """Accepts a list of indices, as config.toml may hold."""

        if isinstance(value, list | tuple):
            if not value:
                raise ContrastError(
                    "No layer is given to sweep: leave the layers out for all of them."
                )
            return ",".join(map(str, value))
        return "all" if value is None else value

    @field_validator("layers")
    @classmethod
    def check_layers(cls, value: str) -> str:
        parse_layers(value)
        return value
