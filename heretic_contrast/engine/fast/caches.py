# SPDX-License-Identifier: AGPL-3.0-or-later

"""
What a model keeps of tokens that it has read: transformers' caches, copied, joined and moved.

No function changes a cache that it is given. Layers of a cache are those of the model, by index.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)
from transformers.generation import GenerateDecoderOnlyOutput

CACHE = (
    "cache"
    if any(field.name == "cache" for field in fields(GenerateDecoderOnlyOutput))
    else "past_key_values"
)
"""What the installed transformers calls a cache in arguments and results: 5.24 has renamed it."""


@dataclass(frozen=True)
class Past:
    """
    Tokens that every sample of a batch has read already.

    `cache`: what the model keeps of them, which passes add to. `length`: their number; recurrent layers do not know it.
    """

    cache: Cache
    length: int

    def select(self, rows: Tensor, layers: slice = slice(None)) -> "Past":
        """Returns the past of some samples, in a new order: see `select_rows`."""

        return Past(select_rows(self.cache, rows, layers), self.length)


def select_rows(cache: Cache, rows: Tensor, layers: slice = slice(None)) -> Cache:
    """
    Returns a cache with some of the samples, which may be repeated.

    `rows`: integer Tensor of shape (n_rows,). Other layers than `layers` are left as they are, for passes that skip them.
    """

    copies = [_copied(layer) for layer in cache.layers]
    for layer in copies[layers]:
        layer.reorder_cache(rows)
    return _with_layers(cache, copies)


def join(below: Cache, above: Cache, layer: int) -> Cache:
    """Returns a cache with the layers below `layer` of one, and the others of the other."""

    return _with_layers(
        above, [_copied(item) for item in (*below.layers[:layer], *above.layers[layer:])]
    )


def keeps_every_token(cache: Cache, length: int) -> bool:
    """
    Returns whether a cache holds keys and values of each token and nothing else, so that tokens can be taken out.

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

    return _with_states(caches, _padded_together)


def can_be_joined(cache: Cache) -> bool:
    """Returns whether samples that have read different numbers of tokens may share a cache: see `side_by_side`."""

    return all(type(layer) in (DynamicLayer, LinearAttentionLayer) for layer in cache.layers)


def side_by_side(caches: Sequence[Cache]) -> Cache:
    """
    Returns one cache with the samples of all, one after the other, padded on the left.

    Recurrent states need no padding. All must allow it: see `can_be_joined`.
    """

    return _with_states(caches, partial(_padded_together, on_the_left=True))


def move_to_the_end(caches: Sequence[Cache], ends: Sequence[int], longest: int) -> Cache:
    """
    Returns one cache that ends with a given token of each sample, as if all had been padded on the left.

    `ends`: how many tokens of each sample stand before that place. `longest`: how many are kept. What stands before the
    first token of a shorter sample means nothing. All caches must keep every token: see `keeps_every_token`.
    """

    def moved(parts: Sequence[Tensor]) -> Tensor:
        # Layer by layer, so that no second copy of all layers exists.
        _, n_heads, _, head_dim = parts[0].shape
        found = parts[0].new_zeros(len(ends), n_heads, longest, head_dim)
        rest = iter(ends)
        for part, target in zip(parts, found.split([len(part) for part in parts]), strict=True):
            start = 0
            # Most samples of a batch end at the same place, and are moved together.
            for end, run in groupby(islice(rest, len(part))):
                rows = slice(start, start + len(list(run)))
                kept = part[rows, :, max(0, end - longest) : end]
                target[rows, :, longest - kept.shape[2] :] = kept
                start = rows.stop
        return found

    return _with_states(caches, moved)


@contextmanager
def with_room(cache: Cache, n_tokens: int, rows: Tensor) -> Iterator[Cache]:
    """
    Gives a cache with some of the samples and room for more tokens, for as long as the context lasts.

    Without room, all keys and values are copied whenever a token is added. Only layers that keep every token get it.
    `rows`: as in `select_rows`.
    """

    layers = [_copied(layer) for layer in cache.layers]
    roomy: list[Any] = []
    for layer in layers:
        if type(layer) is DynamicLayer and layer.is_initialized:
            roomy.append(layer)
            _give_room(layer, n_tokens, rows)
        else:
            layer.reorder_cache(rows)
    try:
        yield _with_layers(cache, layers)
    finally:
        for layer in roomy:
            # That of its class is found again.
            del layer.update


def _give_room(layer: Any, n_tokens: int, rows: Tensor) -> None:
    """Copies some samples' keys and values to where they have room."""

    length = layer.get_seq_length()

    def copied(states: Tensor) -> Tensor:
        _, n_heads, _, head_dim = states.shape
        room = states.new_empty(len(rows), n_heads, length + n_tokens, head_dim)
        torch.index_select(states, 0, rows.to(states.device), out=room[:, :, :length])
        return room

    keys, values = copied(layer.keys), copied(layer.values)
    layer.keys, layer.values = keys[:, :, :length], values[:, :, :length]
    layer.update = partial(_update_in_room, layer, keys, values)


def _update_in_room(
    layer: DynamicLayer,
    keys: Tensor,
    values: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Does what `DynamicLayer.update` does, in tensors that have room."""

    start = layer.get_seq_length()
    end = start + key_states.shape[2]
    keys[:, :, start:end] = key_states
    values[:, :, start:end] = value_states
    layer.keys, layer.values = keys[:, :, :end], values[:, :, :end]
    return layer.keys, layer.values


def _padded_together(parts: Sequence[Tensor], on_the_left: bool = False) -> Tensor:
    """Returns keys or values of several batches as one, Tensors of shape (batch, n_heads, length, head_dim)."""

    longest = max(part.shape[2] for part in parts)
    missing = [longest - part.shape[2] for part in parts]
    return torch.cat(
        [
            pad(part, (0, 0, n, 0) if on_the_left else (0, 0, 0, n))
            for part, n in zip(parts, missing, strict=True)
        ]
    )


def _with_states(caches: Sequence[Cache], states: Callable[[Sequence[Tensor]], Tensor]) -> Cache:
    """Returns one cache with the keys and the values of each layer made from those of all caches, and all recurrent states."""

    layers = []
    for parts in zip(*(cache.layers for cache in caches), strict=True):
        layer = _copied(parts[0])
        for name in ("conv_states", "recurrent_states"):
            if hasattr(layer, name):
                setattr(layer, name, _concatenated([getattr(part, name) for part in parts]))
        # Layers that attend to the keys and values of another one keep none themselves.
        if getattr(layer, "is_initialized", False):
            layer.keys = states([part.keys for part in parts])
            layer.values = states([part.values for part in parts])
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = layer.keys.shape[2]
        layers.append(layer)
    return _with_layers(caches[0], layers)


def _concatenated(states: Sequence[Any]) -> Any:
    """Returns recurrent states of several batches as one; layers may have several, by number, or none."""

    if isinstance(states[0], dict):
        return {key: _concatenated([part[key] for part in states]) for key in states[0]}
    return torch.cat(list(states)) if isinstance(states[0], Tensor) else states[0]


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
