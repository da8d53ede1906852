# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Coherence of a response: normalized bigram entropy, and loops.

Both find repetition, which is how strong ablation breaks a model most often. Neither finds a fluent salad of
unrelated words: its bigrams are all different. docs/tiers.md has the figures behind the thresholds.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from heretic_contrast.tiers.text import strip_special_tokens

# Normalized bigram entropy below which a response is incoherent.
ENTROPY_THRESHOLD = 0.85
# With fewer words one honest repetition moves the entropy too far, so short responses are judged by loops alone.
ENTROPY_MINIMUM_WORDS = 24
# A loop is a sequence that follows itself: so many copies at least, over so many words or characters at least.
LOOP_COPIES = 4
LOOP_WORDS = 12
LOOP_MAXIMUM_PERIOD = 40
LOOP_CHARACTERS = 48

# A word is a run of letters and digits; scripts without spaces count by character.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+(?:['’][^\W_]+)*"
)
# Rules and table borders repeat one sign on purpose.
_RULER = re.compile(r"[-=_*.·…—–―‾¯\u2500-\u259f#~+|: ]{3,}")


def split_words(text: str) -> list[str]:
    """Lower-case words of a text, without punctuation."""
    return _WORD.findall(text.lower())


def normalized_bigram_entropy(response: str) -> float:
    """
    Entropy of the response's word bigrams over its maximum, in [0, 1] (paper, section 3.3).

    With N bigrams of relative frequencies p, this is -Σ p ln p / ln N: 1 when no bigram repeats, 0 when all are the same.
    Fewer than two bigrams cannot repeat: 1. Special tokens are no words.
    """
    words = split_words(strip_special_tokens(response))
    counts = Counter(pairwise(words))
    total = counts.total()
    if total < 2:
        return 1.0
    entropy = math.log(total) - sum(count * math.log(count) for count in counts.values()) / total
    return max(0.0, entropy / math.log(total))


def longest_run(sequence: Sequence[object], period: int) -> int:
    """Length of the longest stretch in which every element equals the one `period` before it, first copy included; 0 if none."""
    longest = current = 0
    for index in range(period, len(sequence)):
        current = current + 1 if sequence[index] == sequence[index - period] else 0
        longest = max(longest, current)
    return longest + period if longest else 0


def has_loop(response: str) -> bool:
    """Whether a sequence of words, or of characters, repeats itself back to back."""
    words = split_words(response)
    if any(
        longest_run(words, period) >= max(LOOP_WORDS, LOOP_COPIES * period)
        for period in range(1, min(LOOP_MAXIMUM_PERIOD, len(words) // LOOP_COPIES) + 1)
    ):
        return True
    # Characters find what has no words: "!!!!!!", "hahahaha", or a script that is not split.
    characters = _RULER.sub(" ", " ".join(response.lower().split()))
    return any(
        longest_run(characters, period) >= LOOP_CHARACTERS
        for period in range(
            1, min(LOOP_CHARACTERS // LOOP_COPIES, len(characters) // LOOP_COPIES) + 1
        )
    )


@lru_cache(maxsize=4096)
def is_coherent(response: str, threshold: float = ENTROPY_THRESHOLD) -> bool:
    """
    Whether a response is free of degenerate repetition.

    A response without a single word is incoherent. One that loops is incoherent. One of fewer than
    `ENTROPY_MINIMUM_WORDS` words is otherwise coherent, so a short refusal is. A longer one is coherent when its
    normalized bigram entropy is at least the threshold.
    """
    text = strip_special_tokens(response)
    words = split_words(text)
    if not words or has_loop(text):
        return False
    return len(words) < ENTROPY_MINIMUM_WORDS or normalized_bigram_entropy(text) >= threshold
