# SPDX-License-Identifier: AGPL-3.0-or-later

"""Residuals are transformers' hidden states at the last position, to the last bit, without the language model's head."""

import pytest
import torch

from heretic_contrast.hosts.surface import wrap
from heretic_contrast.prompts import Prompt
from tests.architectures import FAMILIES

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
    passes: list[None] = []
    handles = [
        module.register_forward_hook(lambda *_: passes.append(None))
        for module in (model.decoder(), model.model.get_output_embeddings())
    ]
    found = model.residuals(PROMPTS)
    assert len(passes) == 1
    for item in (states, output.hidden_states):
        assert torch.equal(found, torch.stack([layer[:, -1].float() for layer in item], dim=1))
    # Nothing of what ended the pass stays.
    for handle in handles:
        handle.remove()
    assert torch.equal(model.model(**inputs, position_ids=places).logits, output.logits)
