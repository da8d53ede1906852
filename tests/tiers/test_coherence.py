# SPDX-License-Identifier: AGPL-3.0-or-later

"""Coherence against an independent entropy, on real text, and on text broken in known ways."""

import csv
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from heretic_contrast.tiers.coherence import (
    ENTROPY_MINIMUM_WORDS,
    ENTROPY_THRESHOLD,
    has_loop,
    is_coherent,
    longest_run,
    normalized_bigram_entropy,
    split_words,
)

PARAGRAPH = (
    "To repot a fern, choose a container that is slightly wider than the old one. Loosen the roots with "
    "your fingers, set the plant at the same depth as before, and fill the gaps with fresh soil. Water it "
    "well, then keep it out of direct sun for a week. New leaves show that it has settled."
)

COHERENT = {
    "short refusal": "I'm sorry, but I can't assist with that.",
    "one word": "No.",
    "repeated on purpose": "No, no, no! Please do not do that.",
    "short answer": "42",
    "paragraph": PARAGRAPH,
    "paragraph cut in the middle": PARAGRAPH[:170],
    "numbered list": "Here are three ways:\n\n1. Walk to the park.\n2. Walk to the lake.\n3. Walk to the station.",
    "heading with rulers": "Overview\n" + "=" * 60 + "\n" + PARAGRAPH + "\n" + "-" * 60,
    "rulers of other signs": f"Overview\n{'═' * 60}\n{PARAGRAPH}\n{'—' * 60}\nThe end\n{'…' * 50}",
    "table": "| name | price |\n|" + "-" * 40 + "|" + "-" * 40 + "|\n| apple | 1 |\n| pear | 2 |",
    "typographic signs": "I’m sorry — I can’t help with “that”.",
    "Chinese": "抱歉，我不能帮助你完成这个请求。如果你有其他问题，请告诉我。",
    "Russian": "Извините, я не могу помочь с этим запросом.",
    "Arabic": "عذرا، لا أستطيع المساعدة في هذا الطلب.",
    "special token left over": "I cannot help with that.<|im_end|>",
}

INCOHERENT = {
    "one word": "the " * 30,
    "one sign": "!" * 80,
    "one letter": "a" * 80,
    "laughter": "ha" * 60,
    "one phrase": "I cannot help with that. " * 8,
    "one line": "1. Gather what you need.\n" * 10,
    "a good start that loops": PARAGRAPH[:120] + " and the soil" * 15,
    "a loop in a script without spaces": "我不能帮助你" * 12,
    "few words in changing order": " ".join(random.Random(0).choices(["the", "of", "and"], k=60)),
    "only signs": "... ,,, ---",
    "only special tokens": "<|im_end|><|im_end|>",
    "nothing": "",
    "white space": " \n\t ",
}


@pytest.mark.parametrize("name", COHERENT)
def test_whole_text_is_coherent(name: str) -> None:
    assert is_coherent(COHERENT[name])


@pytest.mark.parametrize("name", INCOHERENT)
def test_degenerate_text_is_not(name: str) -> None:
    assert not is_coherent(INCOHERENT[name])


@settings(deadline=None)
@given(st.lists(st.sampled_from(["one", "two", "three", "four"]), min_size=3, max_size=60))
def test_entropy_is_that_of_scipy(words: list[str]) -> None:
    pairs = list(pairwise(words))
    counts = list(Counter(pairs).values())
    reference = stats.entropy(counts) / stats.entropy([1] * len(pairs))
    assert normalized_bigram_entropy(" ".join(words)) == pytest.approx(reference, abs=1e-12)


def test_entropy_of_known_texts() -> None:
    assert normalized_bigram_entropy("alpha beta gamma delta") == 1.0
    assert normalized_bigram_entropy("again again again again") == 0.0
    # Bigrams ab, ba, ab: entropy of (2/3, 1/3) over ln 3.
    assert normalized_bigram_entropy("a b a b") == pytest.approx(0.5793801643)
    assert normalized_bigram_entropy("") == normalized_bigram_entropy("word") == 1.0
    # Special tokens that decoding left over are no words.
    assert normalized_bigram_entropy("a b " + "[INST] </s> " * 30) == 1.0


@settings(deadline=None)
@given(st.text(max_size=300))
def test_any_text_has_an_entropy_and_an_answer(text: str) -> None:
    assert 0.0 <= normalized_bigram_entropy(text) <= 1.0
    assert is_coherent(text) in (True, False)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=6, unique=True), st.integers(2, 6), st.data()
)
def test_longest_run_measures_whole_copies(
    period: list[int], copies: int, data: st.DataObject
) -> None:
    # Other elements on both sides are different from everything in the run, and from each other.
    before = list(range(100, 100 + data.draw(st.integers(0, 5))))
    after = list(range(200, 200 + data.draw(st.integers(0, 5))))
    assert longest_run(before + period * copies + after, len(period)) == copies * len(period)


def test_longest_run_of_none() -> None:
    assert longest_run([1, 2, 3, 4], 2) == 0
    assert longest_run([], 1) == 0


def test_words() -> None:
    assert split_words("Don't *panic*, it’s 3 pm!") == ["don't", "panic", "it’s", "3", "pm"]
    assert split_words("你好 world") == ["你", "好", "world"]


def test_the_threshold_decides_without_a_loop() -> None:
    generator = random.Random(1)
    text = " ".join(generator.choices(["red", "blue", "green"], k=4 * ENTROPY_MINIMUM_WORDS))
    entropy = normalized_bigram_entropy(text)
    assert not has_loop(text)
    assert entropy < ENTROPY_THRESHOLD
    assert not is_coherent(text)
    assert is_coherent(text, threshold=entropy)
    assert not is_coherent(PARAGRAPH, threshold=1.01)


def test_human_annotated_completions_are_coherent_and_their_loops_are_not(
    shared_data: Path,
) -> None:
    generator = random.Random(0)
    texts: list[str] = []
    for model in ("gpt4", "llama2orig"):
        path = shared_data / "xstest" / f"xstest_v2_completions_{model}.csv"
        with path.open(encoding="utf-8", newline="") as file:
            texts.extend(row["completion"] for row in csv.DictReader(file))
    assert len(texts) == 900
    # Whole, and cut where a sweep cuts them.
    assert sum(not is_coherent(text) for text in texts) <= 2
    assert sum(not is_coherent(" ".join(text.split()[:40])) for text in texts) <= 2
    # A sentence's worth of words, then a phrase over and over until the tokens are spent.
    looping = []
    for text in texts:
        words = text.split()
        start = generator.randrange(max(1, len(words) - 6))
        phrase = words[start : start + generator.randint(1, 6)]
        looping.append(" ".join(words[:15] + (phrase * 30)[:30]))
    found = sum(not is_coherent(text) for text in looping)
    assert found / len(looping) >= 0.99


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a " * 11, False),
        ("a " * 12, True),
        ("a b c d " * 3 + "a b c", False),
        ("a b c d " * 4, True),
        ((" ".join(f"w{index}" for index in range(40)) + " ") * 4, True),
        ((" ".join(f"w{index}" for index in range(41)) + " ") * 4, False),
        ("!" * 47, False),
        ("!" * 48, True),
    ],
)
def test_where_loops_begin(text: str, expected: bool) -> None:
    assert has_loop(text) == expected


# Of three words none of which, nor any sequence of them, follows itself: 9 bigrams at most, ln 9 / ln 23 = 0.70.
SQUARE_FREE = "a b c a c b a b c b a c a b c a c b a c a b c b".split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (SQUARE_FREE[:23], True),
        (SQUARE_FREE, False),
        # Twice the same: ln 50 / ln 100 = 0.8495, and ln 51 / ln 102 = 0.8501.
        ([f"w{index % 50}" for index in range(101)], False),
        ([f"w{index % 51}" for index in range(103)], True),
    ],
)
def test_where_incoherence_begins(words: list[str], expected: bool) -> None:
    assert is_coherent(" ".join(words)) == expected
