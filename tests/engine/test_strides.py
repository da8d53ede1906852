# SPDX-License-Identifier: AGPL-3.0-or-later

"""Responses that leave their batch early are, up to there, what transformers generates for each prompt alone."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from heretic_contrast.engine import strides
from heretic_contrast.engine.strides import generate_watched, is_watchable
from heretic_contrast.errors import ContrastWarning
from heretic_contrast.language_model import DEVICE_FAILS, Batches, LanguageModel, Tokens
from tests.plain_sweeps import CANARIES, HARMFUL

LIMIT = 21


@pytest.fixture(params=["tiny_llama", "tiny_hybrid"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def alone(model: LanguageModel, prompt: Tokens) -> Tokens:
    tokens = torch.tensor([prompt])
    output = model.model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=LIMIT,
        do_sample=False,
        pad_token_id=0,
    )
    return tuple(output[0, len(prompt) :].tolist())


def test_rows_leave_and_end(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = model.token_ids([*HARMFUL, *CANARIES])
    expected = [alone(model, prompt) for prompt in prompts]
    # Tokens that some responses have in the middle and others do not end them; the hybrid has one response for all.
    ends = [
        token
        for token in sorted({token for row in expected for token in row[:-1]})
        if 0 < sum(token in row for row in expected) < len(expected)
    ]
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", ends[:1] or None)
    expected = [alone(model, prompt) for prompt in prompts]
    seen: dict[int, Tokens] = {}
    n_rows: list[int] = []

    def watch(found: Mapping[int, Tokens], ended: list[int], others: list[int]) -> list[int]:
        seen.update((row, found[row]) for row in ended)
        assert not {*ended} & {*others}
        n_rows.append(len(ended) + len(others))
        return [row for row in others if row % 3 == 0 and len(found[row]) > 6]

    found = generate_watched(model, prompts, LIMIT, Batches(5), watch)
    for row, (response, right) in enumerate(zip(found, expected, strict=True)):
        assert (response == right[: len(response)] and len(response) > 6) or response == right
        if row % 3:
            assert response == right and seen[row] == right
    assert any(found[row] != expected[row] for row in range(0, len(prompts), 3))
    assert any(b < a for a, b in pairwise(n_rows))


def test_a_model_is_tried(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = model.token_ids(HARMFUL)
    assert is_watchable(model, prompts)

    def broken(*args: Any) -> Any:
        raise IndexError("no such row")

    def other_tokens(tokens: Tokens, *others: Any) -> Tokens:
        return tuple(token + 1 for token in tokens)

    for name, replacement in (("select_rows", broken), ("until_end", other_tokens)):
        with monkeypatch.context() as patched:
            patched.setattr(strides, name, replacement)
            with pytest.warns(ContrastWarning, match="cannot leave a batch"):
                assert not is_watchable(model, prompts)

    def failing(*args: Any) -> Any:
        raise DEVICE_FAILS("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(strides, "select_rows", failing)
    with pytest.raises(DEVICE_FAILS):
        is_watchable(model, prompts)


def test_penalties_need_whole_batches(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_llama.model.generation_config, "repetition_penalty", 1.3)
    assert not is_watchable(replace(tiny_llama), tiny_llama.token_ids(HARMFUL))
