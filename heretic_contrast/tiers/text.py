# SPDX-License-Identifier: AGPL-3.0-or-later

"""The text of a response: without thoughts and special tokens, and split into units of words."""

from __future__ import annotations

import re
import unicodedata

_TAG = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning|reflection|analysis|scratchpad)"
# What ends a thought: a closing tag of any family, harmony's final channel with and without its tokens, or a heading.
_THOUGHT_END = re.compile(
    rf"</{_TAG}>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>|<\|inner_suffix\|>|<\|end_of_thought\|>|<channel\|>|\[BEGIN FINAL RESPONSE\]|"
    r"<\|channel\|>\s*final(?:\s?<\|constrain\|>\w+)?<\|message\|>|\bassistant\s?final(?-i:(?=[A-Z\d\W]|$))|"
    # With nothing behind it, a heading ends no thought, but what was cut off.
    r"^[^\w\n]*(?:here is my response|final (?:answer|response|output))[^\w:]*:\W*(?=\w)",
    re.IGNORECASE | re.MULTILINE,
)
_OPENING_TAG = re.compile(rf"<{_TAG}>|\[THINK\]|◁think▷", re.IGNORECASE)
# "Okay, let's see. The user is asking ...": answers speak of users and of what "we need to" do, too, so that only what a thought
# alone says counts.
_FILLER = r"(?:(?:okay|ok|alright|hmm+|well|so|first|got it)\b\W*)"
_LET_US = (
    r"(?:let(?:['’]s| me| us) (?:see|think|tackle|break|start|figure|look)\b[^.!?\n]*[.!?,:]\s*)"
)
_ASKS = (
    r"(?: is (?:asking|requesting|trying|looking|seeking)| asks| asked| requests| requested| has (?:asked|requested)| said|"
    r"['’]s (?:request|question|query|message|prompt))\b"
)
# A thinking process that leads to the answer, by its heading or its first line, and not one for baking bread.
_OF_THE_REPLY = (
    r"(?:\b(?:an?|the|this|your) (?:[\w'’]+ ){0,2}(?:answer|response|reply|request|query|prompt)\b|\b(?:your question|user input)\b|"
    r"\*\*(?:understand|deconstruct|analy[sz]e|identify|initial)\b|"
    rf"\bto the suggested\b|\bof the model\b|\(internal\b|\bI (?:followed|used|went)\b|\bthe user{_ASKS})"
)
# What begins a thought: an opening tag, harmony's analysis channel, a heading, or a speech about the user.
_THOUGHT_START = re.compile(
    r"[\s*_#>\ufeff\u200b-\u200f]*(?:(?:here(?:['’]s| is) )?(?:(?:a|my|the) )?(?:thinking(?: process)?|thought process)[\s*_]*:[\s*_]*)?(?:"
    rf"{_OPENING_TAG.pattern}|<\|START_THINKING\|>|<\|inner_prefix\|>|<\|begin_of_thought\|>|<\|channel>\s*thought|"
    r"(?:<\|start\|>assistant)?<\|channel\|>\s*analysis|(?-i:analysis(?=[A-Z]))|"
    r"(?:here is my thought process|(?:here(?:['’]s| is) a )?thinking process|here are my reasoning steps)\W*:|"
    rf"(?:here(?:['’]s| is) a )?thinking process\b(?![^:\n]*\byou(?!r (?:request|question|query|prompt|message)\b))"
    rf"(?=(?:[^\n]{{0,200}}\n+)?[^\n]{{0,200}}{_OF_THE_REPLY})[^:\n]{{0,60}}:(?=[\s*_]*(?:\n|\d|the user\b|$))|"
    rf"{_FILLER}*{_LET_US}{{0,2}}(?:the|this) user{_ASKS}|the user wants (?:me|us) to\b|"
    rf"{_FILLER}+{_LET_US}{{0,2}}(?:the|this) user (?:wants|just (?:asked|said|sent))\b|"
    r"we (?:need|have) to (?:respond|comply|refuse|answer (?:the|this|as|with)|decide (?:if|whether)|"
    r"produce (?:an? |the )?(?:response|answer|reply)|follow (?:the )?(?:system|developer|polic|instruction|guideline))|"
    rf"{_FILLER}+(?:let me|i need to|i['’]m trying to) (?:think about|figure out) (?:this|how|what|the user)\b|"
    r"(?:let me|i need to) (?:think about|figure out) the user\b)",
    re.IGNORECASE,
)
_SPECIAL_TOKEN = re.compile(
    r"<[|｜][^<>|｜\n]{1,60}[|｜]>|<\|turn>(?:model)?|<turn\|>|\[gMASK\]|<sop>|</?s>|<(?:bos|eos|pad|unk|end_of_turn|start_of_turn)>|"
    r"\[/?INST\]|<</?SYS>>|</?(?:answer|response|solution)>"
)


def strip_special_tokens(response: str) -> str:
    """Drop special tokens that decoding left over."""
    return _SPECIAL_TOKEN.sub(" ", response).strip()


def strip_markup(response: str) -> str:
    """
    Drop thoughts and special tokens.

    A thought ends at the last sign of its end, also where its start stood in the prompt. One that was cut off has no
    response: nothing is left.
    """
    ends = [match.end() for match in _THOUGHT_END.finditer(response)]
    tags = [match.start() for match in _OPENING_TAG.finditer(response)]
    if ends and tags and not re.search(r"\w", response[ends[-1] :]):
        # A thought behind the answer, or an answer about thoughts: what stands before it is read.
        response = response[: tags[-1]]
        ends = [end for end in ends if end <= tags[-1]]
    if ends:
        response = response[ends[-1] :]
    elif _THOUGHT_START.match(response):
        return ""
    return strip_special_tokens(response)


# Scripts without spaces, and Hangul, whose endings are glued on, are read character by character.
_SIGNS = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_TOKEN = re.compile(
    rf"[{_SIGNS}]|[^\W_{_SIGNS}]+(?:'[^\W_]+)*|\n\s{{0,99}}(?:[-•–+]|\d{{1,2}}[.)])(?=\s)|\n|[.!?:,;。！？：，、…]"
)
_PLAIN = str.maketrans(
    dict.fromkeys("’‘ʼ`´′＇", "'") | {"ё": "е", "Ё": "Е"} | dict.fromkeys("*_#~")
)
_ENDS = frozenset(".!?:;。！？：…\n")
# "I cannot do this for you, but I can do that" makes two units, each with its own stance; "sorry, but no" makes one.
_TURNS = frozenset(
    "but however aber jedoch mais cependant pero ma però tuttavia mas porém но однако maar ale".split()
)
# What stands in quotation marks is not what the response says, unless that is most of it.
_QUOTATION = re.compile(
    r"[\"“„«][^\"“”„«»\n]{1,400}[\"”“»]|「[^「」\n]{1,400}」|『[^『』\n]{1,400}』|‹[^‹›\n]{1,400}›|"
    r"(?<!\w)‘[^‘\n]{1,400}?’(?!\w)|(?<!\w)'[^'\n]*\w'\w[^'\n]*'(?!\w)"
)
_LETTER = re.compile(r"[^\W\d_]")
_STAR = re.compile(r"^([^\S\n]*)\*(?=\s)", re.MULTILINE)
_FIRST_ITEM = re.compile(r"\s*(?:[-•–+*]|\d{1,2}[.)])\s")
# "Response:", "### Answer": who speaks, and no part of what is said.
_LABEL = re.compile(
    r"\A[\s*_#>]*(?:my |the )?(?:final )?(?:response|answer|reply|output|assistant|ai)\b[ *_]*(?:[:：]|\n)[\s*_#>]*(?=\S)",
    re.IGNORECASE,
)
# A stance shows in so many characters, words and units of a response.
MAXIMUM_CHARACTERS, MAXIMUM_WORDS, MAXIMUM_UNITS = 6000, 400, 16


def tokens(text: str) -> list[str]:
    """Words in lower case, signs of scripts without spaces, punctuation, line breaks, and marks of list items."""
    text = unicodedata.normalize("NFC", text[:MAXIMUM_CHARACTERS])
    return _TOKEN.findall(text.translate(_PLAIN).lower())


def split_units(text: str) -> list[tuple[list[str], bool]]:
    """Split the beginning of a text into sentences, clauses after a turn, and list items: (words, is in a list item)."""
    units: list[tuple[list[str], bool]] = []
    unit: list[str] = []
    text = _LABEL.sub("", text, count=1)
    item = _FIRST_ITEM.match(text) is not None
    text = text[:MAXIMUM_CHARACTERS]
    masked = _QUOTATION.sub(" ", text)
    if 2 * len(_LETTER.findall(masked)) > len(_LETTER.findall(text)):
        text = masked
    text = _STAR.sub(r"\1-", text)
    for token in tokens(text.strip())[:MAXIMUM_WORDS]:
        turns = token in _TURNS and len(unit) > 6 and unit[-1] in ",，"
        if token in _ENDS or token[0] == "\n" or turns:
            if unit:
                units.append(([*unit, token] if token in _ENDS and token != "\n" else unit, item))
            unit = [token] if turns else []
            if token[0] == "\n":
                item = len(token.strip()) > 0
        else:
            unit.append(token)
    if unit:
        units.append((unit, item))
    # What is said again says nothing new.
    distinct: dict[tuple[str, ...], tuple[list[str], bool]] = {}
    for unit, item in units:
        distinct.setdefault(tuple(unit), (unit, item))
    return list(distinct.values())[:MAXIMUM_UNITS]


_ENGLISH = frozenset("the you i to that is for with it this can't cannot can of and".split())


def is_english(units: list[tuple[list[str], bool]]) -> bool:
    """Whether one in ten words of the first units is one of the most common English ones."""
    words = [word for unit, _ in units[:5] for word in unit if word[0].isalnum()]
    return 10 * sum(word in _ENGLISH for word in words) >= len(words)


_FUNCTION_WORDS = frozenset(
    "about also and any are because been before but can could did does doing each even every for from had has have her "
    "here his how into its just let like make many may might more most much must not now off one only other our out over "
    "own please provide should some such tell than that the their them then there these they this those through under "
    "until use using very want was way ways were what when where which while who why will with would write you your".split()
)


def content_words(words: list[str]) -> frozenset[str]:
    """Content words, cut to five letters, which joins most inflections."""
    return frozenset(
        word[:5]
        for word in words
        if (len(word) > 2 or word > "\u0e00") and word not in _FUNCTION_WORDS
    )
