# SPDX-License-Identifier: AGPL-3.0-or-later

"""
What the engine knows of transformers' insides, which a release may change: no other file of the package does.

| what                                        | seen in         | without it, or where it means something else              |
|---------------------------------------------|-----------------|-----------------------------------------------------------|
| layers of caches and their states           | 5.16 to 5.24    | the check of the fast engine fails, and the plain one runs |
| `past_key_values`, `cache` from 5.24 on     | 5.16 to 5.24    | the same                                                  |
| `use_gqa_in_sdpa`                           | 5.16 to 5.24    | keys and values are copied for each head: slower           |
| functions of linear attention by name       | 5.16 to 5.24    | transformers' own run: slower                             |
| `store_full_length_kv` (Gemma 4)            | 5.16 to 5.24    | the check fails for such models, and the plain engine runs |
| `rope_deltas` (Qwen with vision)            | 5.16 to 5.24    | nothing: what is not there need not be forgotten           |

Layers of a cache are those of the model, by index. No function changes a cache that it is given.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import fields
from inspect import signature
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.integrations import sdpa_attention

__all__ = ["Cache"]

CACHE = (
    "cache"
    if any(field.name == "cache" for field in fields(GenerateDecoderOnlyOutput))
    else "past_key_values"
)
"""What the installed transformers calls a cache in arguments and results."""


def new_cache(configuration: Any) -> Cache:
    """Returns a cache without tokens, to be filled by a pass."""

    return DynamicCache(config=configuration)


def select_rows(cache: Cache, rows: Tensor, layers: slice = slice(None)) -> Cache:
    """
    Returns a cache with some of the samples, which may be repeated.

    `rows`: integer Tensor of shape (n_rows,), on the model's device, or each layer would copy it there, and wait for it. Other
    layers than `layers` are left as they are, for passes that skip them.
    """

    copies = [_copied(layer) for layer in cache.layers]
    for layer in copies[layers]:
        layer.reorder_cache(rows)
    return _with_layers(cache, copies)


def join(below: Cache, above: Cache, layer: int) -> Cache:
    """Returns a cache with the layers below `layer` of one, and the others of the other."""

    layers = (*below.layers[:layer], *above.layers[layer:])
    return _with_layers(above, [_copied(item) for item in layers])


def keeps_every_token(cache: Cache, length: int) -> bool:
    """
    Returns whether a cache holds keys and values of each token and nothing else, so that tokens can be masked.

    `length`: the largest number of tokens that it is going to hold.
    """

    return all(
        type(layer) is DynamicLayer
        or (type(layer) is DynamicSlidingWindowLayer and length < layer.sliding_window)
        for layer in cache.layers
    )


def concatenate(caches: Sequence[Cache]) -> Cache:
    """
    Returns one cache with the samples of all, one after the other, padded on the right.

    All must keep every token: see `keeps_every_token`.
    """

    layers = []
    # Layers that attend to the keys and values of another one keep none themselves.
    kept: list[Any] = [item for cache in caches for item in cache.layers]
    kept = [layer for layer in kept if layer.is_initialized]
    longest = max((layer.keys.shape[2] for layer in kept), default=0)
    for parts in zip(*(cache.layers for cache in caches), strict=True):
        layer = _copied(parts[0])
        if layer.is_initialized:
            for name in ("keys", "values"):
                states = [getattr(part, name) for part in parts]
                padded = [pad(item, (0, 0, 0, longest - item.shape[2])) for item in states]
                setattr(layer, name, torch.cat(padded))
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = longest
        layers.append(layer)
    return _with_layers(caches[0], layers)


def _copied(layer: Any) -> Any:
    """Returns a layer that shares the tensors of another one. No cache changes tensors of attention in place."""

    result = copy.copy(layer)
    for name, value in vars(layer).items():
        # Recurrent layers keep their states in dictionaries.
        if isinstance(value, dict):
            setattr(result, name, dict(value))
    return result


def _with_layers(cache: Cache, layers: list[Any]) -> Cache:
    result = copy.copy(cache)
    result.layers = layers
    return result


def shares_its_cache(layer: Module) -> bool:
    """Returns whether layers above attend to the keys and values of a layer, as in Gemma 4."""

    return any(getattr(module, "store_full_length_kv", False) for module in layer.modules())


def forget_images(network: Module) -> None:
    """
    Makes a model with vision forget where the images of its last batch stood, which it takes for those of the next.

    Without any, the positions are those of the text, and the batch may have other samples.
    """

    for module in network.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None  # type: ignore[assignment]


def grouped_attention() -> AbstractContextManager[Any]:
    """
    Spares "sdpa" attention its copies of keys and values on a CPU, for as long as the context lasts.

    Where there is a mask, each key is copied once for every head that attends to it, although PyTorch's kernel for CPUs
    takes them as they are. From 5.24 on, TRANSFORMERS_SDPA_FORCE_GQA=1 does the same.
    """

    original: Any = getattr(sdpa_attention, "use_gqa_in_sdpa", None)
    if original is None:
        return nullcontext()

    def use_gqa(attention_mask: Tensor | None, key: Tensor, value: Tensor) -> bool:
        return key.device.type == "cpu" or original(attention_mask, key, value)

    return patch.object(sdpa_attention, "use_gqa_in_sdpa", use_gqa)


@contextmanager
def replaced_functions(
    layers: Sequence[Module], functions: Mapping[str, Callable[..., Any]]
) -> Iterator[None]:
    """
    Replaces functions by name in the files that define a model's layers, for as long as the context lasts.

    The originals go on to be used for tensors elsewhere than on a CPU, with gradients, and for packed sequences.
    """

    namespaces = {sys.modules[type(layer).__module__] for layer in layers}

    def choose(original: Callable[..., Any], replacement: Callable[..., Any]) -> Any:
        first_name = next(iter(signature(replacement).parameters))

        def run(*inputs: Any, **options: Any) -> Any:
            # Under some versions this is a library's function, whose arguments have other names.
            first = inputs[0] if inputs else options.get(first_name)
            is_packed = any(options.get(key) is not None for key in ("cu_seqlens", "seq_idx"))
            elsewhere = first is None or first.device.type != "cpu"
            leave = elsewhere or is_packed or torch.is_grad_enabled()
            return (original if leave else replacement)(*inputs, **options)

        return run

    with ExitStack() as stack:
        for namespace, name in product(namespaces, functions):
            original = getattr(namespace, name, None)
            # Some versions have None here where a library is not installed.
            if callable(original):
                function = choose(original, functions[name])
                stack.enter_context(patch.object(namespace, name, function))
        yield
