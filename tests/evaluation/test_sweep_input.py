# SPDX-License-Identifier: AGPL-3.0-or-later

"""What a sweep refuses, and how its prompts are sampled."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch

from heretic_contrast.ablation.hooks import Intervention
from heretic_contrast.ablation.operator import Operator
from heretic_contrast.errors import ContrastError
from heretic_contrast.evaluation.plan import SweepOptions, plan_sweep
from heretic_contrast.evaluation.sweep import check_plan, sweep, swept_layers
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.prompts import Prompt
from heretic_contrast.prompts.sampling import stratified_sample
from heretic_contrast.tiers import Tier
from tests.ablation.test_writers import model_of
from tests.plain_sweeps import CANARIES, HARMFUL, REFERENCES, random_directions

POOL = [
    Prompt(f"Break the {index}th thing", category=("drugs", "fraud", "hacking")[index % 3])
    for index in range(30)
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (4,)}, "Layer 4 is out of range"),
        ({"layers": (-1,)}, "Layer -1 is out of range"),
        ({"layers": ()}, "No layer"),
        ({"weights": (0.5, 0.3)}, "increasing"),
        ({"weights": (0.5, 0.5)}, "increasing"),
        ({"weights": (-0.1, 0.3)}, "not negative"),
        ({"weights": ()}, "increasing"),
        ({"strengths": ("power",)}, 'no strength "power"'),
        ({"components": ("attn.q_proj",)}, 'no component "attn.q_proj"'),
    ],
)
def test_options(tiny_llama: LanguageModel, changes: dict[str, Any], message: str) -> None:
    options = dataclasses.replace(SweepOptions(), **changes)
    plan = plan_sweep(
        {"one": random_directions(tiny_llama, 1, 0)}, HARMFUL, CANARIES, REFERENCES, options
    )
    with pytest.raises(ContrastError, match=message):
        check_plan(tiny_llama, plan)


def test_layers_that_have_what_is_ablated() -> None:
    hybrid, with_vision = map(model_of, ("Qwen3.5", "Llama 3.2 with vision"))
    found = {
        name: swept_layers(hybrid, SweepOptions(components=(name,)))
        for name in ("attn.o_proj", "linear_attn.out_proj", "self_attn.o_proj")
    }
    assert list(found.values()) == [[0, 1, 2, 3], [0, 1, 2], [3]]
    # The module of a path alone.
    operator = Operator(torch.eye(1, hybrid.hidden_size), torch.ones(1, 1))
    intervention = Intervention(dict.fromkeys(range(4), operator), ("linear_attn.out_proj",))
    taken = [
        writer.path
        for layer, writers in enumerate(hybrid.writers)
        for writer in writers
        if intervention.operator(layer, writer) is not None
    ]
    assert taken == ["linear_attn.out_proj"] * 3
    assert swept_layers(with_vision, SweepOptions()) == [0, 2, 3]
    directions = {"one": random_directions(with_vision, 1, 0)}
    plan = plan_sweep(directions, HARMFUL, CANARIES, REFERENCES, SweepOptions(layers=(1,)))
    with pytest.raises(ContrastError, match="has nothing that could be ablated: leave the layer"):
        check_plan(with_vision, plan)


def test_model_that_refuses_nothing(tiny_llama: LanguageModel) -> None:
    with pytest.raises(ContrastError, match="refuses none of the 5 harmful prompts"):
        sweep(
            tiny_llama,
            {"one": random_directions(tiny_llama, 1, 0)},
            HARMFUL,
            CANARIES,
            REFERENCES,
            SweepOptions(max_new_tokens=4, kl_tokens=4),
            classify=lambda prompt, response: Tier.COMPLY,
        )


@pytest.mark.parametrize("count", [3, 10, 29])
def test_sample_covers_categories_evenly(count: int) -> None:
    sample = stratified_sample(POOL, count, seed=1)
    counts = Counter(prompt.category for prompt in sample)
    assert len(sample) == len(set(sample)) == count and len(counts) == 3
    assert max(counts.values()) - min(counts.values()) <= 1
    assert stratified_sample(POOL[::-1], count, seed=1) == sample
    assert count == 29 or stratified_sample(POOL, count, seed=2) != sample


def test_sample_of_fewer_prompts_than_categories() -> None:
    with pytest.raises(ContrastError, match="2 prompts cannot cover 3 categories"):
        stratified_sample(POOL, 2, seed=0)
    with pytest.raises(ContrastError, match="31 prompts are asked for"):
        stratified_sample(POOL, 31, seed=0)
