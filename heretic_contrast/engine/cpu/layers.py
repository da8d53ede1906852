# SPDX-License-Identifier: AGPL-3.0-or-later

"""Faster ways through the layers of transformers' models on a CPU, which change rounding at most."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from itertools import product
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...language_model import LanguageModel
from .causal_convolution import causal_convolution, next_causal_convolution
from .gated_delta_rule import gated_delta_rule

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": gated_delta_rule,
    "torch_recurrent_gated_delta_rule": gated_delta_rule,
    "causal_conv1d_fn": causal_convolution,
    "causal_conv1d_update": next_causal_convolution,
}
"""What replaces transformers' functions for CPUs, for many tokens and for one."""


@contextmanager
def fast_on_cpu(model: LanguageModel) -> Iterator[None]:
    """Makes attention and linear attention of a model faster, for as long as the context lasts; on a CPU only."""

    if model.device.type != "cpu":
        yield
        return
    with grouped_attention(), fast_linear_attention(model):
        yield


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
    ) -> tuple[Tensor, Tensor | None]:
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


@contextmanager
def fast_linear_attention(model: LanguageModel) -> Iterator[None]:
    """
    Replaces transformers' gated delta rule and causal convolution in the modules that define the model's layers.

    They go on to be used for tensors elsewhere than on a CPU, with gradients, and for packed sequences.
    """

    namespaces = {sys.modules[type(layer).__module__] for layer in model.layers}
    with ExitStack() as stack:
        for namespace, name in product(namespaces, FUNCTIONS):
            # Some versions of transformers have None here where a library is not installed.
            if callable(getattr(namespace, name, None)):
                stack.enter_context(_replaced(namespace, name))
        yield


@contextmanager
def _replaced(namespace: ModuleType, name: str) -> Iterator[None]:
    original: Callable[..., Any] = getattr(namespace, name)
    replacement = FUNCTIONS[name]
    first_name = next(iter(signature(replacement).parameters))

    def run(*inputs: Any, **options: Any) -> Any:
        # Under some versions of transformers this is a library's function, whose arguments have other names.
        first = inputs[0] if inputs else options.get(first_name)
        is_packed = any(options.get(key) is not None for key in ("cu_seqlens", "seq_idx"))
        elsewhere = first is None or first.device.type != "cpu"
        leave = elsewhere or is_packed or torch.is_grad_enabled()
        return (original if leave else replacement)(*inputs, **options)

    setattr(namespace, name, run)
    try:
        yield
    finally:
        setattr(namespace, name, original)
