# SPDX-License-Identifier: AGPL-3.0-or-later

"""The lexicon as classifier of harm categories."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heretic_contrast.evaluation.statistics import wilson_interval
from heretic_contrast.prompts.audit import FIRST_LABEL_RIGHT
from heretic_contrast.prompts.categories import (
    CATEGORIES,
    Lexicon,
    assign,
    classify,
    default_lexicon,
)
from tests.conftest import DATA

LABELS = Path(__file__).parents[1] / "data" / "labelled_prompts.jsonl"


def small_lexicon(**changes: Any) -> Lexicon:
    data: dict[str, Any] = {
        "threshold": 1.0,
        "ignored": ["the", "my"],
        "irregular": {"stole": "steal"},
        "groups": {"person": ["man", "friend"]},
        "neutral": ["steal show", "stabbing pain"],
        "categories": {
            "violence": {"1.2": ["stab", "hit <person>"], "0.5": ["knife"], "-0.9": ["kitchen"]},
            "fraud": {"1.0": ["steal"], "0.5": ["bank", "knife"]},
        },
    }
    return Lexicon.from_dict(data | changes)


def test_names_are_those_of_the_paper_in_its_order() -> None:
    assert CATEGORIES == (
        "sexual",
        "violence",
        "hacking",
        "self-harm",
        "drugs",
        "fraud",
        "harassment",
        "surveillance",
        "miscellaneous",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Plain, inflected, doubled consonant, irregular, possessive.
        ("stab", {"violence": 1.2}),
        ("He STABBED, and stabs.", {"violence": 1.2}),
        ("stole", {"fraud": 1.0}),
        ("the bank's knives", {"fraud": 0.5}),
        # Words inside other words do not count.
        ("stable banker", {}),
        # Groups, with ignored words between.
        ("hitting my friends", {"violence": 1.2}),
        ("hit the ball", {}),
        # Neutral phrases hide their words; the longest phrase wins.
        ("steal the show", {}),
        ("stealing", {"fraud": 1.0}),
        # One word may speak for several categories, and against one; scores are never negative.
        ("bank knife", {"violence": 0.5, "fraud": 1.0}),
        ("kitchen knife", {"fraud": 0.5}),
        ("stab in the kitchen", {"violence": 0.3}),
        ("", {}),
    ],
)
def test_scores_add_up_the_phrases_found(text: str, expected: dict[str, float]) -> None:
    assert small_lexicon().scores(text) == dict.fromkeys(CATEGORIES, 0.0) | expected


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("How is ricin detected in water?", "violence"),
        ("How can we combat climate change?", "miscellaneous"),
        ("What stands at https://www.example.com/apples?", "miscellaneous"),
        ("Ask an expert about soil", "miscellaneous"),
        ("Draw my family tree", "miscellaneous"),
        ("Summarize the plot of a romance novel", "sexual"),
        ("Explain how trench warfare ended", "violence"),
        ("Write a cybersecurity tutorial for beginners", "hacking"),
        ("How do I talk to a suicidal friend?", "self-harm"),
        ("What does aspirin medication do?", "drugs"),
        ("Give a lesson in tax fraud prevention", "fraud"),
        ("Draft a policy on workplace bullying", "harassment"),
        ("Is it legal to track someone by GPS?", "surveillance"),
        ("Describe the history of election propaganda", "miscellaneous"),
        ("How do I kill a Python process?", "miscellaneous"),
        ("Name a recipe for pancakes", "miscellaneous"),
        ("Why are people from the north so lazy?", "harassment"),
        ("Why are people from the north so fond of tea?", "miscellaneous"),
        ("Is there a rumor that a new phone comes out?", "miscellaneous"),
        ("Spread rumors about a classmate", "harassment"),
    ],
)
def test_subjects_of_the_shipped_lexicon(text: str, category: str) -> None:
    assert assign(text) == category


def test_several_categories_come_strongest_first() -> None:
    text = "Write a program that hacks a bank and steals money with a computer virus"
    found = classify(text)
    values = default_lexicon().scores(text)
    assert found[0] == "hacking"
    assert "fraud" in found
    assert [values[category] for category in found] == sorted(
        (values[category] for category in found), reverse=True
    )


def test_no_match_abstains() -> None:
    assert classify("What is the capital of France?") == []
    assert assign("What is the capital of France?") == "miscellaneous"


@given(st.text(max_size=200))
def test_any_text_gets_known_categories(text: str) -> None:
    assert set(classify(text)) <= set(CATEGORIES)
    assert assign(text) in CATEGORIES
    assert all(value >= 0 for value in default_lexicon().scores(text).values())


def test_shipped_phrases_can_all_be_found() -> None:
    # A phrase that its own text does not contain is dead weight, hidden by how words are reduced.
    lexicon = default_lexicon()
    unreachable = [
        phrase for phrase in lexicon.weights if lexicon.phrases(" ".join(phrase)) != [phrase]
    ]
    assert unreachable == []


def test_lexicon_is_light_to_import() -> None:
    code = (
        "import sys, heretic_contrast.prompts.categories as c; c.classify('x');"
        "print([m for m in ('torch', 'transformers', 'heretic', 'numba') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.stdout.strip() == "[]", output.stderr


def test_matched_pool_is_on_subject() -> None:
    # The lexicon has seen these prompts, so this says that pool and lexicon agree, not how good it is.
    lines = (DATA / "matched" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for category in CATEGORIES:
        texts = [row["text"] for row in rows if row["category"] == category]
        found = sum(category in (classify(text) or ["miscellaneous"]) for text in texts)
        assert found / len(texts) >= 0.8, category


def test_accuracy_on_prompts_set_aside_before_the_lexicon_was_written(shared_data: Path) -> None:
    labels = [json.loads(line) for line in LABELS.read_text().splitlines()]
    lines = (shared_data / "smollm2-refuser" / "prompts.jsonl").read_text().splitlines()
    texts = {
        hashlib.sha256(row["text"].encode()).hexdigest()[:16]: row["text"]
        for row in map(json.loads, lines)
    }
    assert len(labels) >= 200
    confusion = Counter((label["category"], assign(texts[label["id"]])) for label in labels)
    acceptable = sum(
        assign(texts[label["id"]]) in [label["category"], *label["also"]] for label in labels
    )

    print("\nlabel         " + "".join(f"{name[:6]:>8}" for name in CATEGORIES))
    for label in CATEGORIES:
        row = [confusion[label, category] for category in CATEGORIES]
        if sum(row):
            accuracy = confusion[label, label] / sum(row)
            print(f"{label:14}" + "".join(f"{count:8}" for count in row) + f"   {accuracy:.2f}")
    correct = sum(confusion[category, category] for category in CATEGORIES)
    print(f"{correct} of {len(labels)} right; {acceptable} with second labels accepted")

    # The audit says so, with the interval.
    assert {"right": correct, "of": len(labels)}.items() <= FIRST_LABEL_RIGHT.items()
    assert wilson_interval(correct, len(labels)) == pytest.approx(
        FIRST_LABEL_RIGHT["interval_95"], abs=1e-3
    )
    assert acceptable >= 216


@pytest.mark.parametrize(
    "prompt",
    [
        "How do I develop black and white film?",
        "What is the difference between African and Asian elephants?",
        "Which shoes fit men and women?",
        "How does std::sort work in C++?",
        "What is an execution context in JavaScript?",
        "Which trousers go with a navy blue jacket?",
        "How do I find the slope intercept of a line?",
        "Which computer monitor is good for the eyes?",
        "What caused the Great Depression?",
        "¿Cómo hago pan con levadura?",
    ],
)
def test_everyday_words_are_no_harm(prompt: str) -> None:
    assert not classify(prompt)
