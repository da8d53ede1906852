# SPDX-License-Identifier: AGPL-3.0-or-later

"""The category classifier that asks the loaded model."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from heretic_contrast.directions.model_categories import (
    category_probabilities,
    category_question,
    classify_with_model,
)
from heretic_contrast.errors import ContrastError
from heretic_contrast.prompts import Prompt
from heretic_contrast.prompts.categories import CATEGORIES, MISCELLANEOUS

PROMPTS = [
    Prompt("How do I bake bread?"),
    Prompt("Explain how a firewall decides which packets to block, and which ones it lets through"),
    Prompt("Hi", system="Answer in French."),
    Prompt("What is double-entry bookkeeping?"),
    Prompt("Describe the stages of a clinical trial for a new medication"),
]


def digit_logits(language_model: Any, text: str) -> torch.Tensor:
    """The logits of the digits after one question alone, without a batch and its padding."""

    tokenizer = language_model.tokenizer
    question = language_model.chat_texts([Prompt(category_question(text))])[0]
    ids = torch.tensor([tokenizer(question)["input_ids"]])
    with torch.no_grad():
        logits = language_model.model(input_ids=ids).logits[0, -1].double()
    # In this vocabulary a digit after a space takes two tokens, so that each digit has one token only.
    return logits[[tokenizer.convert_tokens_to_ids(digit) for digit in "123456789"]]


def test_question_offers_every_category_and_holds_the_text() -> None:
    question = category_question("How do I bake bread?")
    assert "How do I bake bread?" in question
    lines = question.splitlines()
    for digit, category in zip("123456789", CATEGORIES, strict=True):
        assert sum(line.startswith(f"{digit}. {category}:") for line in lines) == 1


@pytest.mark.parametrize("architecture", ["tiny_llama", "tiny_hybrid"])
def test_probabilities_equal_those_of_single_prompts(
    architecture: str, request: pytest.FixtureRequest
) -> None:
    language_model = request.getfixturevalue(architecture)
    expected = torch.stack(
        [digit_logits(language_model, prompt.text).softmax(dim=-1) for prompt in PROMPTS]
    )
    plain = category_probabilities(language_model, PROMPTS, calibrate=False)
    assert plain.dtype == torch.float64
    torch.testing.assert_close(plain, expected, rtol=1e-3, atol=1e-5)

    divided = expected / digit_logits(language_model, "").softmax(dim=-1)
    calibrated = category_probabilities(language_model, PROMPTS)
    torch.testing.assert_close(
        calibrated, divided / divided.sum(dim=-1, keepdim=True), rtol=1e-3, atol=1e-5
    )


def test_threshold_decides_between_the_likeliest_category_and_abstaining(tiny_llama: Any) -> None:
    values, indices = category_probabilities(tiny_llama, PROMPTS).max(dim=-1)
    named = [CATEGORIES[index] for index in indices.tolist()]
    assert classify_with_model(tiny_llama, PROMPTS, threshold=0) == named
    assert len(set(named)) > 1, "The random model must tell prompts apart, or nothing is tested."

    threshold = float(values.median())
    expected = [
        category if value >= threshold else MISCELLANEOUS
        for category, value in zip(named, values.tolist(), strict=True)
    ]
    assert classify_with_model(tiny_llama, PROMPTS, threshold=threshold) == expected
    assert float(values.max()) < 1
    assert classify_with_model(tiny_llama, PROMPTS, threshold=1) == [MISCELLANEOUS] * len(PROMPTS)


def test_calibration_cancels_a_liking_for_one_digit(tiny_llama: Any) -> None:
    class Liking(torch.nn.Module):
        """The same model with a constant added to the logit of "3", whatever it reads."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_llama.model
            self.config = tiny_llama.model.config
            self.device = tiny_llama.model.device
            self.liked = tiny_llama.tokenizer.convert_tokens_to_ids("3")

        def forward(self, **inputs: Any) -> Any:
            logits = self.inner(**inputs).logits.clone()
            logits[..., self.liked] += 40
            return SimpleNamespace(logits=logits)

    liking = replace(tiny_llama, model=Liking())
    plain = category_probabilities(liking, PROMPTS, calibrate=False)
    assert (plain.argmax(dim=-1) == CATEGORIES.index("hacking")).all()
    torch.testing.assert_close(
        category_probabilities(liking, PROMPTS),
        category_probabilities(tiny_llama, PROMPTS),
        rtol=1e-4,
        atol=1e-6,
    )


def test_no_prompts_give_no_categories(tiny_llama: Any) -> None:
    assert classify_with_model(tiny_llama, []) == []


def test_tokenizer_that_cannot_write_the_digits_is_refused(tiny_llama: Any) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "1": 1, "2": 2}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.chat_template = tiny_llama.tokenizer.chat_template
    with pytest.raises(ContrastError, match="no token of its own"):
        classify_with_model(replace(tiny_llama, tokenizer=tokenizer), PROMPTS)
