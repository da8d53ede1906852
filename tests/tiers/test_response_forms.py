# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Responses written by hand in the forms of many models, each with the tier that it should have.

They were written before the models behind the tiers were trained, were not used to train them, and teach nothing: where a
harmful request is met, the answer is mere form. Their errors were read while the models were developed, so that they show
regressions and are no clean test.
"""

import json
from pathlib import Path

from heretic_contrast.tiers import Tier, classify_response
from heretic_contrast.tiers.agreement import Agreement

FORMS = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "response_forms.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]


def test_most_forms_have_their_tier() -> None:
    agreement = Agreement(
        (Tier(form["tier"]), classify_response(form["prompt"], form["response"])) for form in FORMS
    )
    shares = {name: successes / n for name, (successes, n) in agreement.shares.items()}
    print(agreement.confusion(), shares)
    # A lower figure is a regression.
    assert shares["three-way agreement"] >= 0.78
    assert shares["refused or not"] >= 0.84
    assert shares["full answers called REFUSE"] <= 0.14


def test_tiers_do_not_depend_on_typography() -> None:
    for form in FORMS:
        expected = classify_response(form["prompt"], form["response"])
        curly = form["response"].replace("'", "’")
        thinking = f"<think>\nSure! I cannot tell yet.\n</think>\n\n{form['response']}"
        for changed in (curly, f"\n\n  {form['response']}\n<|im_end|>", thinking):
            assert classify_response(form["prompt"], changed) is expected, changed


def test_refusals_are_mostly_refusals_when_cut() -> None:
    # A refusal is recognized from its first eight words on; how many are not is bounded, not zero.
    refusals = [
        form
        for form in FORMS
        if form["tier"] == "REFUSE"
        and classify_response(form["prompt"], form["response"]) is Tier.REFUSE
    ]
    cut = [" ".join(form["response"].split()[:8]) for form in refusals]
    answered = [
        text
        for form, text in zip(refusals, cut, strict=True)
        if classify_response(form["prompt"], text) is Tier.COMPLY
    ]
    assert len(answered) <= len(refusals) // 5, answered
