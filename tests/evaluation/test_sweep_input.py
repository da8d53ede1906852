# SPDX-License-Identifier: AGPL-3.0-or-later

"""What a sweep refuses, and how its prompts are sampled."""

import dataclasses
from collections import Counter
from typing import Any

import pytest

from heretic_contrast.errors import ContrastError
from heretic_contrast.evaluation.plan import SweepOptions, plan_sweep
from heretic_contrast.evaluation.sweep import check_plan, sweep
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.prompts import Prompt
from heretic_contrast.prompts.sampling import stratified_sample
from heretic_contrast.tiers import Tier
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
