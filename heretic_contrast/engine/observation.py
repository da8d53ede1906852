# SPDX-License-Identifier: AGPL-3.0-or-later

"""What a model's layers write to the residual stream while it answers prompts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import LogitsProcessorList

from ..ablation.hooks import carries_samples, short_streams
from ..ablation.writers import some_tokens
from ..language_model import LanguageModel, Tokens, hooked, plain_settings
from ..vectors import exact_type, exactly, to_device

Observe = Callable[[Tensor, Tensor, Tensor], None]
"""Is given what a step shows of the prompts, and which of their responses have not ended: see `observe_decoding`."""

Components = tuple[str, ...] | None
"""Some components of a model, or None for all."""

SUM_TOLERANCE = 0.01
"""By which share of its length what a layer adds may differ from the sum of its writers' outputs: what 16 bits round."""


@dataclass(frozen=True)
class Passing:
    """What passes a layer beside its writers: `factor` times the stream, and a constant Tensor of shape (hidden_size,)."""

    factor: Tensor
    constant: Tensor


@torch.no_grad()
def passing_layers(model: LanguageModel) -> dict[int, Passing] | None:
    """
    Returns the layers that do not simply add the outputs of their writers to the stream, with what passes these.

    Numbers and gates may multiply these outputs, and the stream itself. What passes is seen while no writer adds anything; None
    where it is more than a multiple of the stream and a constant, as in Gemma 3n, which mixes several states of a token.
    """

    tokens = some_tokens(model).view(-1, 1)
    decoder = model.decoder()
    adds_up = carries_samples(model)
    with short_streams(model.layers):
        with _last_positions(model, len(tokens), adds_up) as seen:
            decoder(input_ids=tokens, use_cache=False)
        with _silent_writers(model), _last_positions(model, len(tokens), False) as silent:
            decoder(input_ids=tokens, use_cache=False)
    found = {}
    for layer, before in silent.entered.items():
        y = exactly(silent.states[layer])
        x = before.to(y)
        deviations = x - x.mean(dim=0)
        energy = (deviations * deviations).sum()
        factor = ((y - y.mean(dim=0)) * deviations).sum() / energy
        passing = Passing(factor, (y - factor * x).mean(dim=0))
        added = seen.added(layer, passing)
        limit = SUM_TOLERANCE * float(added.norm())
        if adds_up and float((exactly(seen.outputs[layer]) - added).norm()) <= limit:
            continue
        if float(silent.added(layer, passing).norm()) > limit:
            return None
        found[layer] = passing
    return found


@torch.no_grad()
def observe_decoding(
    model: LanguageModel,
    prompts: Sequence[Tokens],
    max_new_tokens: int,
    observe: Observe,
    passing: Mapping[int, Passing],
    components: Components = None,
) -> None:
    """
    Lets a model answer prompts, in one batch, by the most likely token, whatever its generation configuration asks for.

    `observe` is called for each step, of which the first is the last position of the prompt, with `rows`: which prompts go
    on, bool Tensor of shape (n_prompts,), `outputs`: what each layer's writers add to the stream, without biases that stay, and
    `states`: the output of each layer, both Tensors of shape (n_prompts, n_layers, hidden_size), float64 where the device has
    it. All are on the model's device, for which nothing here waits. What stands in them for prompts that have ended means nothing.

    `passing`: see `passing_layers`. `components`: whose writers count as such, None for all; see `can_be_told`.
    """

    with_sums = len(passing) < model.n_layers
    inputs = model.pad(prompts)
    length = inputs["input_ids"].shape[1]
    ends = to_device(torch.tensor(sorted(model.end_tokens()), dtype=torch.long), model.device)
    with (
        plain_settings(model.model),
        _last_positions(model, len(prompts), with_sums, components) as seen,
    ):

        def step(tokens: Tensor, logits: Tensor) -> Tensor:
            rows = ~torch.isin(tokens[:, length:], ends).any(dim=1)
            # Layers may lie on several devices, or not run.
            nothing = torch.zeros_like(next(iter(seen.states.values())))
            outputs = seen.outputs | {layer: seen.added(layer, at) for layer, at in passing.items()}
            found = [
                torch.stack(
                    [
                        kept.get(index, nothing).to(rows.device, exact_type(rows.device))
                        for index in range(model.n_layers)
                    ],
                    dim=1,
                )
                for kept in (outputs, seen.states)
            ]
            seen.outputs.clear()
            observe(rows, found[0], found[1])
            return logits

        model.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=model.pad_token_id(),
            logits_processor=LogitsProcessorList([step]),
        )


def can_be_told(model: LanguageModel, layer: int, components: Components) -> bool:
    """Returns whether components write anything at a layer that shares no norm with what others write."""

    own, others = (
        {
            writer.norms[0] if writer.norms else writer.path
            for writer in model.writers[layer]
            if writer.is_among(components) == is_own
        }
        for is_own in (True, False)
    )
    return bool(own) and own.isdisjoint(others)


@dataclass(frozen=True)
class _Seen:
    """
    What layers take, add and return at the last position of the newest pass: Tensors of shape (n_samples, hidden_size) by layer.

    `outputs`: the sum of what their writers put out, which whoever reads it clears.
    """

    entered: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)

    def added(self, layer: int, passing: Passing) -> Tensor:
        """Returns what the writers of a layer added to the stream."""

        state = exactly(self.states[layer])
        # A layer may lie on another device than what it is given.
        return state - passing.factor * self.entered[layer].to(state) - passing.constant


def _writers(model: LanguageModel, components: Components = None) -> dict[Module, tuple[int, bool]]:
    """
    Returns the modules whose outputs a layer adds to the residual stream, with its number, and whether their biases are ablated.

    Behind norms it is the last of these, which several writers may share. What multiplies an output is left out.
    """

    return {
        model.layers[index].get_submodule(writer.norms[0]) if writer.norms else writer.module: (
            (index, writer.with_bias)
        )
        for index, writers in enumerate(model.writers)
        for writer in writers
        if writer.is_among(components)
    }


@contextmanager
def _last_positions(
    model: LanguageModel, n_samples: int, with_sums: bool, components: Components = None
) -> Iterator[_Seen]:
    """Collects what layers take, add and return for as long as the context lasts; what their writers put out `with_sums` alone."""

    seen = _Seen()
    layers = {layer: index for index, layer in enumerate(model.layers)}
    writers = _writers(model, components) if with_sums else {}

    def enter(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = model.stream(args[0] if args else kwargs["hidden_states"])
        seen.entered[layers[module]] = stream[:, -1].float()

    def add_output(module: Module, args: Any, output: Any) -> None:
        layer, with_bias = writers[module]
        output = output[0] if isinstance(output, tuple) else output
        bias = None if with_bias else getattr(module, "bias", None)
        # Experts give the tokens of all samples in one list.
        last = output.reshape(n_samples, -1, output.shape[-1])[:, -1]
        last = (last if bias is None else last - bias).float()
        seen.outputs[layer] = seen.outputs[layer] + last if layer in seen.outputs else last

    def keep_state(module: Module, args: Any, output: Any) -> None:
        seen.states[layers[module]] = model.stream(output)[:, -1].float()

    after = chain(
        [(layer, keep_state) for layer in layers], [(module, add_output) for module in writers]
    )
    with hooked([(layer, enter) for layer in layers], after):
        yield seen


@contextmanager
def _silent_writers(model: LanguageModel) -> Iterator[None]:
    """Lets writers put out nothing but biases that stay, for as long as the context lasts."""

    writers = _writers(model)

    def silence(module: Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        bias = None if writers[module][1] else getattr(module, "bias", None)
        nothing = torch.zeros_like(first) if bias is None else bias.expand_as(first)
        return (nothing, *output[1:]) if isinstance(output, tuple) else nothing

    with hooked(after=[(module, silence) for module in writers]):
        yield
