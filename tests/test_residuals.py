# SPDX-License-Identifier: AGPL-3.0-or-later

"""Residuals are transformers' hidden states at the last position, to the last bit, without the language model's head."""

import hashlib
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch.nn import Module

from heretic_contrast.directions.file import content_digest
from heretic_contrast.directions.residuals import cached_residuals
from heretic_contrast.errors import ContrastWarning
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.language_model import LanguageModel, Tokens
from heretic_contrast.prompts import Prompt
from tests.architectures import FAMILIES
from tests.made_directions import make_directions, random_tensor

# Sorted by length, as they are read.
PROMPTS = [Prompt("Hi."), Prompt("Plant a tree."), Prompt("How do I bake some good bread?")]


@pytest.mark.parametrize(
    "name",
    ["Llama", "Llama, bfloat16", "Gemma 3", "GPT-2", "Qwen3 with vision", "Qwen3-Next"],
)
def test_residuals_are_hidden_states(name: str) -> None:
    family = FAMILIES[name]
    model = wrap(family.make_model(), family.make_tokenizer(), name=name)
    inputs = model.tokenize(PROMPTS)
    assert not inputs["attention_mask"].all()
    with torch.no_grad():
        states = model.model.generate(
            **inputs,
            max_new_tokens=1,
            do_sample=False,
            use_cache=False,
            output_hidden_states=True,
            return_dict_in_generate=True,
        ).hidden_states[0]
        places = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
        output = model.model(
            **inputs, position_ids=places, use_cache=False, output_hidden_states=True
        )
    decoder, passes = model.decoder(), []

    def note(module: Module, args: Any, output: Any) -> None:
        passes.append((module, len(output[0] if module is decoder else output)))

    modules = (decoder, model.model.get_output_embeddings())
    handles = [module.register_forward_hook(note) for module in modules]
    found = model.residuals(PROMPTS)
    # Two prompts tell whether they may share a batch.
    assert [module for module, n_rows in passes if n_rows > 2] == [decoder]
    for item in (states, output.hidden_states):
        assert torch.equal(found, torch.stack([layer[:, -1].float() for layer in item], dim=1))
    # Nothing of what ended the pass stays.
    for handle in handles:
        handle.remove()
    assert torch.equal(model.model(**inputs, position_ids=places).logits, output.logits)


def test_long_prompts_do_not_lengthen_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """One long prompt among short ones would take as many times the memory as there are prompts beside it."""

    family = FAMILIES["Llama"]
    model = wrap(family.make_model(), family.make_tokenizer(), name="Llama")
    prompts = [Prompt("How do I bake bread? " * 200), *PROMPTS, Prompt("Plant a tree. " * 400)]
    lengths = [len(tokens) for tokens in model.token_ids(prompts)]
    assert min(lengths[0], lengths[-1]) > 512
    shapes = []

    def pad(self: LanguageModel, sequences: Sequence[Tokens]) -> Any:
        inputs = original(self, sequences)
        shapes.append(tuple(inputs["input_ids"].shape))
        return inputs

    original = LanguageModel.pad
    monkeypatch.setattr(LanguageModel, "pad", pad)
    seen: list[tuple[int, int]] = []
    found = model.residuals(prompts, lambda *counts: seen.append(counts))
    # The shortest prompt is looked at beside the longest, and alone.
    assert shapes[:2] == [(2, max(lengths)), (1, min(lengths))]
    assert sorted(shapes[2:]) == [(2, max(lengths)), (3, max(lengths[1:-1]))]
    assert seen == [(3, 5), (5, 5)]
    alone = torch.cat([model.residuals([prompt]) for prompt in prompts])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_prompts_beyond_the_context_are_named() -> None:
    family = FAMILIES["Llama"]
    model = wrap(family.make_model(), family.make_tokenizer(), name="tiny")
    limit = model.model.config.max_position_embeddings
    long = Prompt("word " * limit)
    with pytest.warns(
        ContrastWarning, match=f"1 of {len(PROMPTS) + 1} prompts .* the {limit} that"
    ):
        assert len(model.token_ids([*PROMPTS, long])[-1]) > limit


def test_keeping_residuals_takes_no_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: LanguageModel
) -> None:
    """They may be gigabytes, of which bytes to hash or to write are copies."""

    expected = random_tensor(40_000, tiny_llama.n_layers + 1, tiny_llama.hidden_size)
    prompts = [Prompt(str(index)) for index in range(len(expected))]
    monkeypatch.setattr(LanguageModel, "residuals", lambda *_: expected)
    monkeypatch.setattr("heretic_contrast.directions.residuals.identify", lambda *_, **__: {})
    peaks = []
    for _ in ("written", "read"):
        tracemalloc.start()
        assert torch.equal(cached_residuals(tiny_llama, prompts, tmp_path), expected)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < expected.nbytes / 10
    (path,) = tmp_path.iterdir()
    # What safetensors itself writes.
    digest = hashlib.sha256(expected.numpy().tobytes()).hexdigest()
    assert path.read_bytes() == save({"residuals": expected}, {"digest": digest})
    tracemalloc.start()
    directions = make_directions(expected)
    tracemalloc.reset_peak()
    directions.digest(), content_digest({"": expected})
    assert tracemalloc.get_traced_memory()[1] < expected.nbytes / 10
    tracemalloc.stop()
