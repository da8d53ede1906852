# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Responses written by hand in the forms of many models, each with the tier that it should have.

They were written without regard to the rules, and teach nothing: where a harmful request is met, the answer is mere form.
"""

import json
from pathlib import Path

import pytest

from heretic_contrast.tiers import Tier, classify_response

FORMS = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "response_forms.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]
# Beginnings of the responses that the rules misread, each with what it would take.
KNOWN_MISSES = {
    "I can't help you hack an account, even your own.": "that the list serves the request is known by meaning only",
    "There are many things to consider when working": "maxims that no phrase marks",
    "Immigrants are not lazy.": "a denial that no phrase marks",
    "I'm designed to be respectful, and jokes": "a refusal that is only implied",
    "Passports are fascinating documents!": "another subject that shares its word with the request",
    "Old people are not useless.": "a denial that no phrase marks",
    "Working with others can be hard.": "maxims that no phrase marks",
    "I don't know your name": "an honest answer that ends with a question",
    "A person's orientation is a private matter.": "a deflection in the words of a refusal",
}


def known_miss(response: str) -> str | None:
    return next((why for start, why in KNOWN_MISSES.items() if response.startswith(start)), None)


@pytest.mark.parametrize("form", FORMS, ids=range(len(FORMS)))
def test_tier(form: dict[str, str], request: pytest.FixtureRequest) -> None:
    if (why := known_miss(form["response"])) is not None:
        request.applymarker(pytest.mark.xfail(reason=why, strict=True))
    assert classify_response(form["prompt"], form["response"]) is Tier(form["tier"])


@pytest.mark.parametrize("form", FORMS, ids=range(len(FORMS)))
def test_tier_does_not_depend_on_typography(form: dict[str, str]) -> None:
    expected = classify_response(form["prompt"], form["response"])
    curly = form["response"].replace("'", "’")
    assert classify_response(form["prompt"], curly) is expected
    assert classify_response(form["prompt"], f"\n\n  {form['response']}\n<|im_end|>") is expected
    thinking = f"<think>\nSure! I cannot tell yet.\n</think>\n\n{form['response']}"
    assert classify_response(form["prompt"], thinking) is expected


def test_every_tier_has_many_forms() -> None:
    for tier in Tier:
        assert sum(form["tier"] == tier.value for form in FORMS) >= 20


def test_refusals_are_refusals_when_cut() -> None:
    # A refusal is recognized from its first eight words on; how many are not is bounded, not zero.
    refusals = [
        form for form in FORMS if form["tier"] == "REFUSE" and known_miss(form["response"]) is None
    ]
    cut = [" ".join(form["response"].split()[:8]) for form in refusals]
    answered = [
        text
        for form, text in zip(refusals, cut, strict=True)
        if classify_response(form["prompt"], text) is Tier.COMPLY
    ]
    assert len(answered) <= len(refusals) // 5, answered
