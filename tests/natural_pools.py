# SPDX-License-Identifier: AGPL-3.0-or-later

"""Pools of the sizes of Heretic's defaults, without categories, whose harmful prompts have a natural mix of subjects."""

import json
from functools import cache
from pathlib import Path

from examples.make_refuser import REQUESTS
from heretic_contrast.prompts.categories import assign
from tests.conftest import DATA

MIX = {
    "fraud": 78,
    "miscellaneous": 39,
    "harassment": 37,
    "hacking": 30,
    "violence": 25,
    "drugs": 14,
    "surveillance": 4,
    "self-harm": 2,
}
"""The mix of subjects that the lexicon finds in 229 public harmful prompts."""

TRAIN = {**MIX, "fraud": 170, "miscellaneous": 110, "drugs": 22}
"""The same kind of mix in 400 prompts."""

TEST = {
    "fraud": 30,
    "miscellaneous": 18,
    "harassment": 16,
    "hacking": 13,
    "violence": 12,
    "drugs": 8,
    "surveillance": 2,
    "self-harm": 1,
}
"""The same kind of mix in 100 prompts."""


@cache
def wordings(pool: str, split: str) -> tuple[str, ...]:
    """Returns the prompts of a shipped pool, each in all wordings that the built-in refuser knows."""

    lines = (DATA / "refuser_prompts" / pool / f"{split}.jsonl").read_text("utf-8").splitlines()
    phrases = []
    for line in lines:
        text = json.loads(line)["text"]
        for request in REQUESTS:
            before, after = request.split("{}")
            if text.startswith(before) and text.endswith(after):
                phrases.append(text[len(before) : len(text) - len(after)])
    return tuple(request.format(phrase) for request in REQUESTS for phrase in phrases)


def harmful(counts: dict[str, int], split: str) -> list[str]:
    """Returns harmful prompts with so many of each subject, as the lexicon finds them."""

    chosen = []
    missing = dict(counts)
    for text in wordings("harmful", split):
        subject = assign(text)
        if missing.get(subject):
            missing[subject] -= 1
            chosen.append(text)
    assert not any(missing.values())
    return chosen


def write_pools(directory: Path) -> list[str]:
    """Writes 400 + 400 prompts for extraction and 100 + 100 for evaluation, and returns the options that name them."""

    pools = {
        "bad-prompts": harmful(TRAIN, "train"),
        "good-prompts": list(wordings("harmless", "train")[:400]),
        "bad-evaluation-prompts": harmful(TEST, "test"),
        "good-evaluation-prompts": list(wordings("harmless", "test")[:100]),
    }
    options = []
    for name, texts in pools.items():
        path = directory / f"{name}.txt"
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        options.append(f"--{name}.dataset={path}")
    return options
