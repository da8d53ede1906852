# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The linear models behind the tiers, whose numbers are data/tiers.safetensors.

Two linear models over hashed n-grams score every unit (sentence, clause, list item): whether it declines, and whether it
is what surrounds a refusal (reasons, advice, offers) rather than an answer. A third one over a few figures of the whole
response, in which neither words nor style are seen, names the tier. `examples/train_tiers.py` trains all three.

The scores depend on no library's version: hashes are CRC-32 and integer arithmetic, weights are 8-bit integers.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from heretic_contrast.tiers.text import content_words, tokens

BITS = 18
"""Both models have 2 ** BITS weights."""

Unit = tuple[list[str], bool]

_START = 1
# An n-gram's salt keeps words in a row, words with a gap between them and beginnings of words apart.
_GAP, _STEM = 12, 9
# Of the first units, those with more words than _LONG are also read by their first words alone.
_FIRST_UNITS, _LONG, _OPENING = 4, 12, 6


@lru_cache(maxsize=65536)
def _code(word: str) -> int:
    return zlib.crc32(word.encode())


def _mix(values: NDArray[np.uint32], salt: int) -> NDArray[np.uint32]:
    values = (values ^ np.uint32(salt * 0x85EBCA6B & 0xFFFFFFFF)) * np.uint32(0x9E3779B1)
    values ^= values >> np.uint32(15)
    values *= np.uint32(0xC2B2AE35)
    values ^= values >> np.uint32(13)
    return values >> np.uint32(32 - BITS)


@dataclass(frozen=True)
class Features:
    """N-grams of units: the weight's index, the unit, and (for `texts`) the places of the first and last word of each."""

    index: NDArray[np.uint32]
    unit: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    words: list[str]

    def text(self, feature: int) -> str:
        """What was read, for people."""
        first, last = int(self.first[feature]), int(self.last[feature])
        if last < 0:
            return self.words[first][:5] + "~"
        if first > last:
            return f"{self.words[last]} … {self.words[first]}"
        return " ".join(self.words[first : last + 1])


def features(units: Sequence[Unit]) -> Features:
    """N-grams of one to four words, pairs of words with one to three between them, and beginnings of long words."""
    words = [word for unit, _ in units for word in ("^", *unit)]
    lengths = [len(unit) + 1 for unit, _ in units]
    owner = np.repeat(np.arange(len(units)), lengths)
    codes = np.array([_START if word == "^" else _code(word) for word in words], np.uint32)
    place = np.arange(len(words))
    parts: list[tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]] = []
    grams = codes
    for n in range(1, min(4, len(words)) + 1):
        if n > 1:
            grams = grams[:-1] * np.uint32(0x01000193) ^ codes[n - 1 :]
        inside = np.flatnonzero(owner[: len(grams)] == owner[n - 1 :])
        parts.append((_mix(grams[inside], n), inside, inside + n - 1))
    for gap in range(2, min(5, len(words))):
        inside = np.flatnonzero(owner[:-gap] == owner[gap:])
        pairs = codes[:-gap] * np.uint32(0x01000193) ^ codes[gap:]
        parts.append((_mix(pairs[inside], _GAP), inside + gap, inside))
    stems = np.array([p for p in place if len(words[p]) > 6], np.int64)
    if len(stems):
        hashes = np.array([_code("~" + words[p][:5]) for p in stems], np.uint32)
        parts.append((_mix(hashes, _STEM), stems, np.full(len(stems), -1)))
    index, first, last = (np.concatenate([part[k] for part in parts]) for k in range(3))
    return Features(index, owner[first], first, last, words)


def measure(
    prompt: str,
    units: Sequence[Unit],
    declining: NDArray[np.float64],
    surrounding: NDArray[np.float64],
) -> NDArray[np.float64]:
    """
    The figures of a response from which its tier follows.

    `declining` and `surrounding` are the scores of its units, shape (n_units,). What is on the prompt's subject, and
    how much of an answer stands before and after the first unit that declines, count; the words themselves do not.
    """
    words = np.array([sum(word[0].isalnum() for word in unit) for unit, _ in units], float)
    items = np.array([item for _, item in units])
    d, s = np.tanh(declining / 2), np.tanh(surrounding / 2)
    found = np.flatnonzero(d > 0)
    first = int(found[0]) if len(found) else len(units)
    answer = words * (1 - s) / 2 * (d < 0)
    after = slice(first + 1, None) if len(found) else slice(0, None)
    before, behind = (
        np.log1p(answer[:first].sum()),
        np.log1p(answer[after].sum()) * bool(len(found)),
    )
    subject = content_words(tokens(prompt))
    said = content_words([word for unit, _ in list(units)[after] for word in unit])
    share = len(subject & said) / len(subject) if subject else 0.3
    head = np.full(3, -1.0)
    head[: min(3, len(d))] = d[:3]
    last = units[-1][0][-1]
    return np.array(
        [
            *head,
            d[:5].max(),
            d.max(),
            first == 0,
            first in (1, 2),
            bool(len(found)) and first > 2,
            before,
            behind,
            (s * words).sum() / max(1.0, words.sum()),
            (s[after] * words[after]).sum() / max(1.0, words[after].sum()),
            s[0],
            np.log1p(items[after].sum()),
            np.log1p(items[after].sum()) * bool(len(found)),
            share * bool(len(found)),
            share * behind,
            np.log1p(words.sum()),
            (words * (d > 0)).sum() / max(1.0, words.sum()),
            (words * (s > 0)).sum() / max(1.0, words.sum()),
            last in "?？",
            len(units) < 3,
        ],
        float,
    )


@dataclass(frozen=True)
class Model:
    """
    The numbers of the three models.

    `weights`: int8, shape (2, 2 ** BITS), for units that decline and units that surround; `scales` and `biases`: (2,).
    `tiers`: (3, n_figures), and `tier_biases`: (3,), over standardized figures, for REFUSE, EVASIVE and COMPLY.
    """

    weights: NDArray[np.int8]
    scales: NDArray[np.float64]
    biases: NDArray[np.float64]
    tiers: NDArray[np.float64]
    tier_biases: NDArray[np.float64]

    def unit_scores(self, found: Features, n_units: int) -> NDArray[np.float64]:
        """Scores of units, shape (2, n_units): positive where a unit declines, and where it surrounds a refusal."""
        root = np.sqrt(np.bincount(found.unit, minlength=n_units))
        sums = [
            np.bincount(found.unit, row[found.index].astype(float), n_units) for row in self.weights
        ]
        return np.array(sums) / root * self.scales[:, None] + self.biases[:, None]

    def read(self, units: Sequence[Unit]) -> tuple[Features, NDArray[np.float64]]:
        """
        The n-grams of units, and their scores as `unit_scores` gives them, shape (2, n_units).

        A refusal names what it refuses, at length: so the first units of a response decline as much as their first words do,
        where that is more than the whole.
        """
        found = features(units)
        scores = self.unit_scores(found, len(units))
        long = [k for k, (words, _) in enumerate(units[:_FIRST_UNITS]) if len(words) > _LONG]
        if long:
            openings: list[Unit] = [(units[k][0][:_OPENING], units[k][1]) for k in long]
            alone = self.unit_scores(features(openings), len(openings))
            scores[0, long] = np.maximum(scores[0, long], alone[0])
        return found, scores

    def tier_scores(self, figures: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scores of REFUSE, EVASIVE and COMPLY, shape (3,): the highest is the tier."""
        return self.tiers @ figures + self.tier_biases


@lru_cache(maxsize=1)
def _file() -> bytes:
    return files("heretic_contrast").joinpath("data/tiers.safetensors").read_bytes()


def numbers_digest() -> str:
    """SHA-256 of the numbers, for the identity of what was judged by them."""
    return sha256(_file()).hexdigest()


@lru_cache(maxsize=1)
def default_model() -> Model:
    """The shipped model, read once."""
    return Model(**load(_file()))
