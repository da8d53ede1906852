# SPDX-License-Identifier: AGPL-3.0-or-later

"""Faster ways through the layers of transformers' models on a CPU, which change rounding at most."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from ...language_model import LanguageModel, contiguous_head
from ..compat import grouped_attention, replaced_functions


def delta_rule(query: Tensor, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """See `gated_delta_rule`, which needs Numba and some time to be imported."""

    from .gated_delta_rule import gated_delta_rule

    return gated_delta_rule(query, *inputs, **options)


FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""What replaces transformers' functions for CPUs, for many tokens and for one."""

if find_spec("numba") is not None:
    FUNCTIONS["torch_chunk_gated_delta_rule"] = delta_rule
    FUNCTIONS["torch_recurrent_gated_delta_rule"] = delta_rule


@contextmanager
def fast_on_cpu(model: LanguageModel) -> Iterator[None]:
    """Makes attention, linear attention and the head of a model faster, for as long as the context lasts; on a CPU only."""

    if model.device.type != "cpu":
        yield
        return
    with (
        contiguous_head(model.model),
        grouped_attention(),
        replaced_functions(model.layers, FUNCTIONS),
    ):
        yield
