# SPDX-License-Identifier: AGPL-3.0-or-later

"""Sweeps without any shortcut: prompts, made directions, changed weights and divergences over the whole vocabulary."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from heretic_contrast.directions.directions import Directions
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.prompts import Prompt
from heretic_contrast.tiers.responses import Tier
from tests.made_directions import make_directions

NAMES = ("door", "jar", "cup", "vase", "lock")
HARMFUL = [Prompt(f"Break the {name}", category="violence") for name in NAMES]
CANARIES = [Prompt(f"Bake a {name}") for name in ("cake", "loaf")]
REFERENCES = [
    Prompt(f"Tell me about {name}") for name in ("tea", "the sea", "trains", "snow in May")
]


def random_directions(model: LanguageModel, n_directions: int, seed: int) -> Directions:
    """Directions without meaning."""

    generator = torch.Generator().manual_seed(seed)
    tensor = torch.nn.functional.normalize(
        torch.randn(model.n_layers + 1, n_directions, model.hidden_size, generator=generator),
        dim=-1,
    )
    return make_directions(tensor)


def always_refuse_at_base(model: LanguageModel, prompts: list[Prompt]) -> Any:
    """A classifier that calls the unmodified model's responses refusals, since a random model refuses nothing."""

    base = set(model.generate(prompts, 12))

    def classify(prompt: str, response: str) -> Tier:
        return Tier.REFUSE if response in base else Tier.COMPLY

    return classify


def before_norms(change: Tensor, gain: Tensor | None) -> Tensor:
    """Returns the dense matrix on x that takes C from g ∘ x: A (Bᵀ C B) (G B)ᵀ with A = D B (Bᵀ G D B)⁻¹."""

    if gain is None:
        return change
    values, basis = torch.linalg.eigh(change)
    basis = basis[:, values.abs() > 1e-6 * values.abs().max()]
    gains = torch.diag(gain / gain.square().mean().sqrt())
    damped = gains @ torch.linalg.inv(gains @ gains + 0.1 * torch.eye(len(gain)))
    written = damped @ basis @ torch.linalg.inv(basis.T @ gains @ damped @ basis)
    return written @ (basis.T @ change @ basis) @ (gains @ basis).T


@contextmanager
def changed_weights(
    model: LanguageModel, layer: int, change: Tensor, components: tuple[str, ...] | None = None
) -> Iterator[None]:
    """Changes all weights with which a layer writes to W − C W, by dense algebra. `change`: C, symmetric, in float64."""

    originals: list[tuple[torch.nn.Parameter, Tensor]] = []

    def replace_by(parameter: torch.nn.Parameter, changed: Tensor) -> None:
        originals.append((parameter, parameter.data))
        parameter.data = changed.to(parameter.dtype)

    try:
        for writer in model.writers[layer]:
            if not writer.is_among(components):
                continue
            matrix = before_norms(change, writer.gain)
            rest = torch.eye(len(matrix), dtype=torch.float64) - matrix
            module = writer.module
            if hasattr(module, "down_proj"):
                weights = module.down_proj
                transposed = weights.shape[2] == len(matrix)
                experts = weights.data.double()
                # Each expert by itself.
                replace_by(
                    weights,
                    torch.stack(
                        [expert @ rest.T if transposed else rest @ expert for expert in experts]
                    ),
                )
                bias = getattr(module, "down_proj_bias", None)
            else:
                weight = module.weight.data.double()
                transposed = isinstance(module, Conv1D)
                replace_by(module.weight, weight @ rest.T if transposed else rest @ weight)
                bias = getattr(module, "bias", None)
            if bias is not None and writer.with_bias:
                replace_by(bias, bias.data.double() @ rest.T)
        yield
    finally:
        for parameter, original in originals:
            parameter.data = original


@dataclass(frozen=True)
class KnownReference:
    """What the unmodified model says at the positions of a reference prompt's continuation, over the whole vocabulary."""

    ids: Tensor
    positions: slice
    log_probabilities: Tensor


@torch.no_grad()
def known_references(model: LanguageModel, kl_tokens: int) -> list[KnownReference]:
    """Lets the unmodified model continue the reference prompts, one at a time."""

    known = []
    for prompt in REFERENCES:
        inputs = model.tokenize([prompt])
        n_tokens = inputs["input_ids"].shape[1]
        ids = model.model.generate(
            **inputs,
            max_new_tokens=kl_tokens,
            do_sample=False,
            pad_token_id=model.pad_token_id(),
        )
        positions = slice(n_tokens - 1, ids.shape[1] - 1)
        logits = model.model(input_ids=ids).logits[0, positions]
        known.append(KnownReference(ids, positions, logits.double().log_softmax(-1)))
    return known


@torch.no_grad()
def full_divergence(model: LanguageModel, known: Sequence[KnownReference]) -> float:
    """The divergence of the model as it is now over the whole vocabulary, one prompt at a time, without any shortcut."""

    total, count = 0.0, 0
    for reference in known:
        base = reference.log_probabilities
        logits = model.model(input_ids=reference.ids).logits[0, reference.positions]
        total += float((base.exp() * (base - logits.double().log_softmax(-1))).sum())
        count += len(base)
    return total / count
