# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The nine harm categories of the paper (section 3.1), and the lexicon that assigns them.

The lexicon matches a prompt's subject, not its harmfulness: it assigns categories to harmful prompts, and it
counts topic matches in harmless pools (the contamination of section 2.2).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from itertools import product
from typing import Any

CATEGORIES: tuple[str, ...] = (
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
"""The nine harm categories (paper, section 3.1)."""

MISCELLANEOUS = "miscellaneous"
"""The category of whatever no classifier is sure about."""

Phrase = tuple[str, ...]

_WORD = re.compile(r"\b[a-z0-9]+\b")
_POSSESSIVE = re.compile(r"['’]s\b")
_GROUP = re.compile(r"<([a-z]+)>")


def _base_forms(word: str) -> Iterator[str]:
    """Yields the words that `word` may be a plain English inflection of, likeliest first."""

    if word.endswith(("ies", "ied")):
        yield word[:-3] + "y"
    if word.endswith("s"):
        yield word[:-1]
    if word.endswith("es"):
        yield word[:-2]
    for suffix in ("ing", "ed"):
        stem = word.removesuffix(suffix)
        if stem != word and len(stem) >= 2:
            yield stem + "e"
            yield stem
            if len(stem) >= 4 and stem[-1] == stem[-2]:
                yield stem[:-1]


@dataclass(frozen=True)
class Reducer:
    """
    Turns text into words, with inflections reduced to other words of the vocabulary ("stabbed" to "stab").

    A word is never reduced to one outside the vocabulary, so that "rapping" cannot become "rape".
    """

    vocabulary: frozenset[str]
    irregular: Mapping[str, str]
    ignored: frozenset[str]

    def reduce(self, word: str) -> str:
        """Returns the base form of `word`, or `word` itself when the vocabulary has none."""

        while True:
            base = self.irregular.get(word)
            if base is None:
                base = next((form for form in _base_forms(word) if form in self.vocabulary), word)
            if base == word:
                return word
            word = base

    def words(self, text: str) -> list[str]:
        """Returns the reduced words of `text` in lower case, without possessive endings and ignored words."""

        words = _WORD.findall(_POSSESSIVE.sub("", text.lower()))
        return [self.reduce(word) for word in words if word not in self.ignored]


@dataclass(frozen=True)
class Lexicon:
    """
    Words and phrases, each with a weight for the categories it speaks for or (when negative) against.

    `weights` maps a phrase of reduced words to pairs of category and weight; a phrase without pairs is
    neutral: it hides the words it consists of ("heart attack"). A category matches when the weights of its
    distinct phrases in a text add up to `threshold`.
    """

    weights: Mapping[Phrase, tuple[tuple[str, float], ...]]
    reducer: Reducer
    threshold: float
    longest: int

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Lexicon":
        """
        Builds a lexicon from the structure of `data/lexicon.json`.

        `categories` maps a category to weights (as text) and their phrases, `neutral` lists phrases without a
        category, and `<name>` in a phrase stands for each word of `groups[name]`. Where a category has two
        phrases that reduce to the same words, the first one counts.
        """

        entries: list[tuple[Phrase, str | None, float]] = [
            (words, None, 0.0)
            for phrase in data["neutral"]
            for words in _expand(phrase, data["groups"])
        ]
        for category, phrases_of_weight in data["categories"].items():
            entries.extend(
                (words, category, float(weight))
                for weight, phrases in phrases_of_weight.items()
                for phrase in phrases
                for words in _expand(phrase, data["groups"])
            )
        reducer = Reducer(
            vocabulary=frozenset(word for words, _, _ in entries for word in words),
            irregular=dict(data["irregular"]),
            ignored=frozenset(data["ignored"]),
        )
        weights: dict[Phrase, dict[str, float]] = {}
        for words, entry_category, weight in entries:
            of_phrase = weights.setdefault(tuple(reducer.words(" ".join(words))), {})
            if entry_category is not None:
                of_phrase.setdefault(entry_category, weight)
        return cls(
            weights={phrase: tuple(pairs.items()) for phrase, pairs in weights.items()},
            reducer=reducer,
            threshold=float(data["threshold"]),
            longest=max(map(len, weights)),
        )

    def phrases(self, text: str) -> list[Phrase]:
        """Returns the phrases found in `text`, from left to right; longer ones hide those they contain."""

        words = self.reducer.words(text)
        found: list[Phrase] = []
        position = 0
        while position < len(words):
            for length in range(min(self.longest, len(words) - position), 0, -1):
                candidate = tuple(words[position : position + length])
                if candidate in self.weights:
                    found.append(candidate)
                    position += length
                    break
            else:
                position += 1
        return found

    def scores(self, text: str) -> dict[str, float]:
        """Returns the sum of the weights of the distinct phrases in `text` for every category, at least 0."""

        sums = dict.fromkeys(CATEGORIES, 0.0)
        for phrase in dict.fromkeys(self.phrases(text)):
            for category, weight in self.weights[phrase]:
                sums[category] += weight
        # Rounding makes sums such as 0.7 + 0.3 independent of the order of the phrases.
        return {category: max(0.0, round(value, 6)) for category, value in sums.items()}


def _expand(phrase: str, groups: Mapping[str, Sequence[str]]) -> Iterator[Phrase]:
    """Yields the phrase as words, once for every choice of the words that its group names stand for."""

    found = ((word, _GROUP.fullmatch(word)) for word in phrase.split())
    choices = [groups[group[1]] if group else [word] for word, group in found]
    yield from product(*choices)


@lru_cache(maxsize=1)
def default_lexicon() -> Lexicon:
    resource = files("heretic_contrast").joinpath("data/lexicon.json")
    return Lexicon.from_dict(json.loads(resource.read_text(encoding="utf-8")))


def classify(text: str) -> list[str]:
    """Returns the categories whose subject the lexicon finds in `text`, strongest first; ties in paper order."""

    lexicon = default_lexicon()
    matching = [item for item in lexicon.scores(text).items() if item[1] >= lexicon.threshold]
    return [category for category, _ in sorted(matching, key=lambda item: -item[1])]


def assign(text: str) -> str:
    """Returns the lexicon's strongest category for `text`, "miscellaneous" when none matches."""

    return next(iter(classify(text)), MISCELLANEOUS)
