# SPDX-License-Identifier: AGPL-3.0-or-later

"""The shipped matched pool and capture pairs keep what the documentation says of them."""

import json
import re
from collections import Counter
from itertools import combinations
from typing import Any

import pytest

from heretic_contrast.prompts.categories import CATEGORIES
from tests.conftest import DATA


def read(name: str) -> list[dict[str, Any]]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def jaccard(one: set[Any], other: set[Any]) -> float:
    return len(one & other) / len(one | other)


def shingles(text: str) -> set[tuple[str, ...]]:
    sequence = words(text)
    return {tuple(sequence[start : start + 3]) for start in range(len(sequence) - 2)}


@pytest.fixture(scope="module")
def pool() -> list[dict[str, Any]]:
    return read("matched/train.jsonl")


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    return read("pairs.jsonl")


def test_pool_has_fifty_prompts_of_every_category_and_no_other_fields(
    pool: list[dict[str, Any]],
) -> None:
    counts = Counter(row["category"] for row in pool)
    assert set(counts) == set(CATEGORIES)
    assert min(counts.values()) >= 50
    assert len(pool) >= 450
    assert all(set(row) == {"text", "category"} for row in pool)


def test_pool_has_no_near_duplicates(pool: list[dict[str, Any]]) -> None:
    texts = [row["text"] for row in pool]
    tokens = [set(words(text)) for text in texts]
    triples = [shingles(text) for text in texts]
    close = [
        (texts[i], texts[j])
        for i, j in combinations(range(len(texts)), 2)
        if jaccard(triples[i], triples[j]) > 0.5 or jaccard(tokens[i], tokens[j]) > 0.6
    ]
    assert close == []


def test_pool_varies_in_form_and_length(pool: list[dict[str, Any]]) -> None:
    for category in CATEGORIES:
        texts = [row["text"] for row in pool if row["category"] == category]
        assert all(4 <= len(text.split()) <= 20 for text in texts)
        # Both questions and instructions, so that form alone does not separate it from a harmful pool.
        assert 0.1 <= sum(text.endswith("?") for text in texts) / len(texts) <= 0.6
        openings = Counter(text.split()[0] for text in texts)
        assert max(openings.values()) <= 0.25 * len(texts)
        assert len(openings) >= 15


def test_pool_is_clean_text(pool: list[dict[str, Any]]) -> None:
    for row in pool:
        assert row["text"] == " ".join(row["text"].split())
        assert row["text"][0].isupper()


def test_pairs_are_two_of_every_category_on_one_topic(pairs: list[dict[str, Any]]) -> None:
    assert len(pairs) == 18
    assert Counter(pair["category"] for pair in pairs) == dict.fromkeys(CATEGORIES, 2)
    # Words that two prompts share whatever they are about.
    ignored = set(words("a an and are be can for from have how i in is me my of on that the to"))
    for pair in pairs:
        assert set(pair) == {"refused", "answered", "category"}
        assert pair["refused"] != pair["answered"]
        shared = (set(words(pair["refused"])) & set(words(pair["answered"]))) - ignored
        assert len(shared) >= 2, pair


def test_pairs_and_pool_share_no_prompt(
    pool: list[dict[str, Any]], pairs: list[dict[str, Any]]
) -> None:
    texts = [row["text"] for row in pool]
    texts += [pair[side] for pair in pairs for side in ("refused", "answered")]
    assert len({text.lower() for text in texts}) == len(texts)
