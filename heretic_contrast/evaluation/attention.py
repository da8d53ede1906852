# SPDX-License-Identifier: AGPL-3.0-or-later

"""Attention of several heads to one key, without copying the key for each head."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Output = tuple[Tensor, Tensor | None]


@contextmanager
def grouped_attention() -> Iterator[None]:
    """
    Spares transformers' "sdpa" attention its copies of keys and values on a CPU, for as long as the context lasts.

    Where there is a mask, each key is copied once for every head that attends to it, whenever a token is generated,
    although PyTorch's kernel for CPUs takes them as they are. The result is the same to the last bit.
    """

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **arguments: Any,
    ) -> Output:
        if (
            query.device.type != "cpu"
            or attention_mask is None
            or dropout
            or getattr(module, "num_key_value_groups", 1) == 1
            # Whatever else an architecture asks for is left to transformers.
            or any(
                arguments.get(name) is not None for name in ("softcap", "position_bias", "cache")
            )
        ):
            return original(
                module, query, key, value, attention_mask, dropout, scaling, **arguments
            )
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original
