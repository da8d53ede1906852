# SPDX-License-Identifier: AGPL-3.0-or-later

"""The text of a response, prepared for the rules: stripped, normalized, and split into units."""

from __future__ import annotations

import re

_CONTRACTIONS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b(?:can't|cant)\b"), "cannot"),
    (re.compile(r"\b(?:won't|wont)\b"), "will not"),
    (re.compile(r"\bshan't\b"), "shall not"),
    (re.compile(r"\bain't\b"), "is not"),
    (
        re.compile(r"\b(do|does|did|is|are|was|were|could|would|should|must|have|has)n't\b"),
        r"\1 not",
    ),
    (re.compile(r"\b(?:dont)\b"), "do not"),
    (re.compile(r"\b(?:i'm|im)\b"), "i am"),
    (re.compile(r"\b(i|you|we|they)'ve\b"), r"\1 have"),
    (re.compile(r"\b(i|you|we|they|it|that|this)'ll\b"), r"\1 will"),
    (re.compile(r"\b(i|you|we|they)'d\b"), r"\1 would"),
    (re.compile(r"\b(you|we|they)'re\b"), r"\1 are"),
    (re.compile(r"\b(it|that|this|there|here|what|who|he|she)'s\b"), r"\1 is"),
    (re.compile(r"\blet's\b"), "let us"),
)
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "`": "'", "´": "'", "“": '"', "”": '"'})
_THINKING = re.compile(
    r"<(think|thinking|thought|reasoning)>.*?(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE
)
_THINKING_END = re.compile(
    r"\A.*?</(?:think|thinking|thought|reasoning)>", re.DOTALL | re.IGNORECASE
)
_SPECIAL_TOKEN = re.compile(
    r"<\|[^<>|\n]{1,60}\|>|</?s>|<(?:bos|eos|pad|unk|end_of_turn|start_of_turn)>|\[/?INST\]|<</?SYS>>"
)
_ITEM = re.compile(r"^\s*(?:\d{1,2}[.)]|[-*•–+]|[a-z][.)]|step \d+[:.])\s+", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])[\"')\]]*\s+(?=\S)")
_QUOTATION = re.compile(r"[\"“„«][^\"“”„«»\n]{1,400}[\"”“»]")
_OFFERING_CLAUSE = re.compile(
    r",? (?=(?:but|however),? (?:i can\b|i could\b|here|i would be (?:happy|glad)|i am happy|you can\b|you could\b))|"
    r"(?<!however,)(?<!\bbut,)(?<!said,)(?<=,) (?=i can (?:offer|suggest|tell|provide|give|help|share|explain)\b)"
)
_ABBREVIATION = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|st|vs|e\.g|i\.e|etc|jr|sr|u\.s)|\b[a-z]|^\d{1,2})\.$", re.IGNORECASE
)


def strip_special_tokens(response: str) -> str:
    """Drop special tokens that decoding left over."""
    return _SPECIAL_TOKEN.sub(" ", response).strip()


def strip_markup(response: str) -> str:
    """Drop thinking blocks (also one that never ends, or whose start was in the prompt) and special tokens."""
    text = _THINKING_END.sub(" ", _THINKING.sub(" ", response))
    return strip_special_tokens(text)


def normalize(text: str) -> str:
    """Lower case, straight apostrophes, no emphasis marks, contractions written out, single spaces."""
    text = text.translate(_APOSTROPHES).lower()
    text = re.sub(r"[*_#~]+", "", text)
    text = " ".join(text.split())
    for pattern, replacement in _CONTRACTIONS:
        text = pattern.sub(replacement, text)
    return text


def mask_quotations(response: str) -> str:
    """
    Replace what stands in quotation marks by dots, since it is not the response that says it.

    A quotation that ends with a full stop, a question or an exclamation mark still ends its sentence. A response that
    is nothing but a quotation speaks for itself, and stays.
    """

    def mask(quotation: re.Match[str]) -> str:
        dots = re.sub(r"\S", "·", quotation.group())
        return dots[:-1] + "." if quotation.group()[-2] in ".!?" else dots

    masked = _QUOTATION.sub(mask, response)
    return masked if re.search(r"[^\W\d_]", masked) else response


def split_units(response: str) -> list[tuple[str, bool]]:
    """
    Split a response into normalized sentences and list items: (text, is a list item).

    "I cannot do this, but I can do that" makes two units, each with its own stance.
    """
    units: list[tuple[str, bool]] = []
    in_code = False
    for line in mask_quotations(response).splitlines():
        if line.strip().startswith("```"):
            in_code = not in_code
        elif in_code:
            # Code answers; a line of it is one item.
            units.append((normalize(line), True))
        elif item := _ITEM.match(line):
            # The sentences of a list item stay together: it is one thought.
            units.append((normalize(line[item.end() :]), True))
        else:
            sentences: list[str] = []
            for piece in _SENTENCE_END.split(line.strip()):
                if sentences and _ABBREVIATION.search(sentences[-1]):
                    sentences[-1] += " " + piece
                else:
                    sentences.append(piece)
            for sentence in sentences:
                units.extend(
                    (clause, False) for clause in _OFFERING_CLAUSE.split(normalize(sentence))
                )
    return [(text, item) for text, item in units if text]


_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about all an and any anything are as at be been best but by can could did do does explain
        few find for from get give good has have how i if in into is it its list made make many me
        more most my need no not of on one or other our out over own please provide should show so
        some someone something steps take tell than that the their them then there these they thing
        this to up us use used using very was way ways we were what when where which while who why
        will with without would write you your
        """,
    )
)


def content_words(text: str) -> frozenset[str]:
    """Content words of a normalized text, cut to five letters, which joins most inflections."""
    return frozenset(
        word[:5] for word in re.findall(r"[^\W\d_]{3,}", text) if word not in _FUNCTION_WORDS
    )
