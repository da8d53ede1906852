# SPDX-License-Identifier: AGPL-3.0-or-later

"""What a model's layers write to the residual stream while it answers prompts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import LogitsProcessorList

from ..ablation.hooks import contributions
from ..language_model import LanguageModel, Tokens, hooked, plain_settings
from ..vectors import to_device

Observe = Callable[[Tensor, Tensor, Tensor], None]
"""Is given what a step shows of the prompts, and which of their responses have not ended: see `observe_decoding`."""


@torch.no_grad()
def observe_decoding(
    model: LanguageModel, prompts: Sequence[Tokens], max_new_tokens: int, observe: Observe
) -> None:
    """
    Lets a model answer prompts, in one batch, by the most likely token, whatever its generation configuration asks for.

    `observe` is called for each step, of which the first is the last position of the prompt, with `rows`: which prompts go
    on, bool Tensor of shape (n_prompts,), `outputs`: the sum of the outputs of each layer's projections without biases, and
    `states`: the output of each layer, both Tensors of shape (n_prompts, n_layers, hidden_size), float64. All are on the model's
    device, for which nothing here waits. What stands in them for prompts that have ended means nothing.
    """

    inputs = model.pad(prompts)
    length = inputs["input_ids"].shape[1]
    ends = to_device(torch.tensor(sorted(model.end_tokens()), dtype=torch.long), model.device)
    with plain_settings(model.model), _last_positions(model, len(prompts)) as (outputs, states):

        def step(tokens: Tensor, logits: Tensor) -> Tensor:
            rows = ~torch.isin(tokens[:, length:], ends).any(dim=1)
            # Layers may lie on several devices, or not run.
            nothing = torch.zeros_like(next(iter(states.values())))
            found = [
                torch.stack(
                    [kept.get(index, nothing).to(rows.device) for index in range(model.n_layers)],
                    dim=1,
                )
                for kept in (outputs, states)
            ]
            outputs.clear()
            observe(rows, found[0].double(), found[1].double())
            return logits

        model.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=model.pad_token_id(),
            logits_processor=LogitsProcessorList([step]),
        )


@contextmanager
def _last_positions(
    model: LanguageModel, n_samples: int
) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """
    Collects, by layer, the sum of what its writers contribute, and the layer's own output.

    Tensors of shape (batch, hidden_size), at the last position of the newest pass. Whoever reads the outputs clears
    them, since the projections of one layer add up.
    """

    outputs: dict[int, Tensor] = {}
    states: dict[int, Tensor] = {}

    layers = {layer: index for index, layer in enumerate(model.layers)}
    writers = {
        module: (index, with_bias)
        for index in range(model.n_layers)
        for module, with_bias in contributions(model, index).items()
    }

    def add_output(module: Module, args: Any, output: Any) -> None:
        layer, with_bias = writers[module]
        output = output[0] if isinstance(output, tuple) else output
        bias = None if with_bias else getattr(module, "bias", None)
        # Experts give the tokens of all samples in one list.
        last = output.reshape(n_samples, -1, output.shape[-1])[:, -1]
        last = (last if bias is None else last - bias).float()
        outputs[layer] = outputs[layer] + last if layer in outputs else last

    def keep_state(module: Module, args: Any, output: Any) -> None:
        states[layers[module]] = model.stream(output)[:, -1].float()

    hooks = [(layer, keep_state) for layer in layers], [(module, add_output) for module in writers]
    with hooked(after=chain(*hooks)):
        yield outputs, states
