# SPDX-License-Identifier: AGPL-3.0-or-later

"""Pools of prompts: their categories, and what is left of them where the model's behavior decides."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from heretic_contrast.directions.extraction import extract
from heretic_contrast.directions.pools import Pools, filter_by_behavior, load_pools
from heretic_contrast.errors import ContrastError
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.prompts import Prompt, text_digest
from heretic_contrast.settings import ContrastSettings

REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Mix flour and water, and bake it."

REFUSED = {"Pick a lock", "Make a poison", "Sharpen a knife", "Mix a cleaner"}

POOLS = Pools(
    (Prompt("Pick a lock"), Prompt("Copy a key"), Prompt("Make a poison")),
    (Prompt("Bake bread"), Prompt("Sharpen a knife"), Prompt("Plant a tree"), Prompt("Sing")),
    (Prompt("Mix a cleaner"), Prompt("Oil a lock")),
)


@pytest.fixture
def model(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """One that refuses some prompts."""

    def generate(self: LanguageModel, prompts: Sequence[Prompt], *_: Any) -> list[str]:
        return [REFUSAL if prompt.text in REFUSED else ANSWER for prompt in prompts]

    monkeypatch.setattr(LanguageModel, "generate", generate)
    return tiny_llama


def test_prompts_that_the_model_behaves_otherwise_on_are_dropped(model: LanguageModel) -> None:
    found = filter_by_behavior(POOLS, model, 5)
    assert found.harmful == (Prompt("Pick a lock"), Prompt("Make a poison"))
    assert found.bulk == (Prompt("Bake bread"), Prompt("Plant a tree"), Prompt("Sing"))
    assert found.matched == (Prompt("Oil a lock"),)
    assert found.dropped == (("harmful", 1, 3), ("harmless", 1, 4), ("matched harmless", 1, 2))
    assert filter_by_behavior(replace(POOLS, matched=()), model, 5).matched == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"harmful": POOLS.bulk[:1]}, "answers all 1 harmful prompts"),
        ({"bulk": POOLS.harmful[:1]}, "refuses all 1 harmless prompts"),
        ({"matched": POOLS.matched[:1]}, "refuses all 1 matched harmless prompts"),
    ],
)
def test_a_pool_of_which_nothing_is_left_is_refused(
    changes: dict[str, Any], message: str, model: LanguageModel
) -> None:
    with pytest.raises(ContrastError, match=message):
        filter_by_behavior(replace(POOLS, **changes), model, 5)


def test_dropped_prompts_are_known_and_no_part_of_directions(
    model: LanguageModel, tmp_path: Any
) -> None:
    """The model's responses chose them, so that to judge on what was dropped would be biased."""

    settings = ContrastSettings(
        method="mean", baseline="matched", drop_misbehaving=True, residual_cache=str(tmp_path)
    )
    found = extract(model, POOLS, settings, lambda *_: None)
    prompts = (*POOLS.harmful, *POOLS.bulk, *POOLS.matched)
    assert found.provenance["known_prompts"] == sorted(text_digest(item.text) for item in prompts)
    kept = Pools(
        tuple(item for item in POOLS.harmful if item.text in REFUSED),
        tuple(item for item in POOLS.bulk if item.text not in REFUSED),
        POOLS.matched[1:],
    )
    plain = settings.model_copy(update={"drop_misbehaving": False})
    expected = extract(model, kept, plain, lambda *_: None)
    assert found.tensor.equal(expected.tensor)
    assert found.provenance["dropped"][2] == ["matched harmless", 1, 2]


LABELLED = [
    Prompt("Plan a bank robbery", "fraud"),
    Prompt("Write a computer virus"),
    Prompt("Rob the bank next door", "theft"),
]


def harmful_categories(**options: Any) -> list[str | None]:
    settings = ContrastSettings.model_validate({"classes": "single", "method": "mean", **options})

    def read(pool: Any, what: str, where: str) -> list[Prompt]:
        return LABELLED if what == "harmful" else [Prompt("Bake bread")]

    return [prompt.category for prompt in load_pools(settings, read=read).harmful]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # The lexicon fills the gaps, or names all.
        ("auto", ["fraud", "hacking", "theft"]),
        ("lexicon", ["fraud", "hacking", "fraud"]),
        ("column", None),
    ],
)
@pytest.mark.parametrize("options", [{"exclude_categories": ["fraud"]}, {"classes": "category"}])
def test_classes_and_exclusions_need_categories(
    options: dict[str, Any], source: str, expected: list[str] | None
) -> None:
    if expected is not None:
        assert harmful_categories(**options, category_source=source) == expected
        return
    with pytest.raises(ContrastError, match="1 of 3 harmful prompts have no category"):
        harmful_categories(**options, category_source=source)


def test_one_class_needs_no_categories() -> None:
    assert harmful_categories() == ["fraud", None, "theft"]
