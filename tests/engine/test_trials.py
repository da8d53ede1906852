# SPDX-License-Identifier: AGPL-3.0-or-later

"""What a trial computes is what the model's own `generate` and whole forward passes give, whichever layers are changed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from heretic_contrast.ablation.changes import UNCHANGED
from heretic_contrast.engine import trials
from heretic_contrast.engine.check import all_logits
from heretic_contrast.engine.interface import Continuations
from heretic_contrast.engine.plain import PlainEngine
from heretic_contrast.engine.strides import none_leaves
from heretic_contrast.engine.trials import TrialEngine
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.language_model import LanguageModel, Tokens
from tests.plain_sweeps import CANARIES, HARMFUL
from tests.tiny_models import make_model, make_tokenizer

LIMIT, N_LAYERS = 14, 12


def wrapped(architecture: str = "llama", **options: Any) -> LanguageModel:
    network = make_model(architecture, num_hidden_layers=N_LAYERS, **options)
    return wrap(network, make_tokenizer(), name="tiny", batch_size=16)


@contextmanager
def changed(model: LanguageModel, first_layer: float, seed: int) -> Iterator[None]:
    """Other weights of what writes to the residual stream, from a layer on."""

    generator = torch.Generator().manual_seed(seed)
    kept = []
    for index, writers in enumerate(model.writers):
        for writer in writers if index >= first_layer else ():
            weight = writer.module.weight
            kept.append((weight, weight.detach().clone()))
            weight.data.mul_(1 + 0.3 * torch.randn(weight.shape, generator=generator))
    yield
    for weight, values in kept:
        weight.data.copy_(values)


def alone(model: LanguageModel, prompt: Tokens) -> tuple[Tokens, torch.Tensor]:
    """The response, and what a whole pass predicts first."""

    tokens = torch.tensor([prompt])
    mask = torch.ones_like(tokens)
    output = model.model.generate(
        input_ids=tokens, attention_mask=mask, max_new_tokens=LIMIT, do_sample=False, pad_token_id=0
    )
    logits = model.model(input_ids=tokens).logits[0, -1].float()
    return tuple(output[0, len(prompt) :].tolist()), logits.log_softmax(dim=-1)


def logits_alone(model: LanguageModel, prompt: Tokens, tokens: Tokens) -> torch.Tensor:
    """What a whole pass predicts of each token."""

    return model.model(input_ids=torch.tensor([prompt + tokens])).logits[0, -len(tokens) - 1 : -1]


@pytest.mark.parametrize("architecture", ["llama", pytest.param("qwen3_5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shares_prefix", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_trials_are_computed_right_in_any_order(architecture: str, shares_prefix: bool) -> None:
    options = {} if architecture == "llama" else {"layer_types": None}
    model = wrapped(architecture, **options)
    prompts = model.token_ids([*HARMFUL, *CANARIES])
    if not shares_prefix:
        prompts = [prompt[index % 4 :] for index, prompt in enumerate(prompts)]
    engine = TrialEngine(model, prompts)
    # Tokens cannot be masked in recurrent states, and passes without a prefix keep nothing.
    answers = shares_prefix and architecture == "llama"
    # Begun as by the unmodified model, and read by all.
    known = Continuations(tuple(prompts), tuple(alone(model, prompt)[0][:3] for prompt in prompts))
    chosen = torch.tensor([[token] for tokens in known.tokens for token in tokens])
    responses = set()
    for seed, first_layer in enumerate((UNCHANGED, 9, 3, 11, 4, 0, UNCHANGED, 10)):
        with changed(model, first_layer, seed):
            expected = [alone(model, prompt) for prompt in prompts]
            found = engine.respond(model, prompts, LIMIT, first_layer, none_leaves)
            logprobs = engine.first_logprobs(model, prompts, first_layer)
            logits = engine.logits(model, known, first_layer)
            right = [
                logits_alone(model, *pair) for pair in zip(known.prompts, known.tokens, strict=True)
            ]
            (plain,) = all_logits(PlainEngine(model), known, None)
        assert logits is not None
        for values in (logits, plain):
            # In single precision, rounding in recurrent layers comes to 2e-4 of logits of the order of 1.
            torch.testing.assert_close(values, torch.cat(right), atol=1e-3, rtol=1e-3)
            found_chosen, right_chosen = (
                item.log_softmax(dim=-1).gather(1, chosen) for item in (values, torch.cat(right))
            )
            torch.testing.assert_close(found_chosen, right_chosen, atol=1e-4, rtol=1e-4)
        assert found == ([response for response, _ in expected] if answers else None)
        assert logprobs is not None
        torch.testing.assert_close(
            logprobs, torch.stack([right for _, right in expected]), atol=1e-4, rtol=1e-4
        )
        responses.add(tuple(response for response, _ in expected))
    # One layer at the end may change no response.
    assert len(responses) >= 6


def test_what_is_needed_no_further_leaves() -> None:
    model = wrapped()
    prompts = model.token_ids([*HARMFUL, *CANARIES])
    engine = TrialEngine(model, prompts)
    engine.respond(model, prompts, LIMIT, UNCHANGED, lambda found, ended, others: others)
    told: list[int] = []

    def watch(found: Mapping[int, Tokens], ended: list[int], others: list[int]) -> list[int]:
        told.extend(ended)
        return [row for row in others if row % 3 == 0]

    with changed(model, 5, 1):
        expected = [alone(model, prompt)[0] for prompt in prompts]
        found = engine.respond(model, prompts, LIMIT, 5, watch)
    assert found is not None
    for row, (response, right) in enumerate(zip(found, expected, strict=True)):
        assert response == (right[: len(response)] if row % 3 == 0 else right)
        assert (len(response) < LIMIT) == (row % 3 == 0)
    assert sorted(told) == [row for row in range(len(prompts)) if row % 3]


def test_what_it_does_not_know_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped()
    prompts = model.token_ids(HARMFUL)
    engine = TrialEngine(model, prompts)

    def answers(model: LanguageModel, first_layer: float) -> list[bool]:
        found = engine.respond(model, prompts, LIMIT, first_layer, none_leaves)
        return [found is not None, engine.first_logprobs(model, prompts, first_layer) is not None]

    # The unmodified model was not asked yet; later on these are the embeddings, and another model.
    assert answers(model, 3) == [False, False]
    assert answers(model, UNCHANGED) == answers(model, 3) == [True, True]
    assert answers(model, -1) == answers(wrapped(), 3) == [False, False]

    def exhausted(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    engine = TrialEngine(model, prompts)
    assert answers(model, UNCHANGED) == [True, True]
    with monkeypatch.context() as patched:
        patched.setattr(trials.FastEngine, "respond", exhausted)
        assert answers(model, 3) == [False, False]
    engine = TrialEngine(model, prompts)
    assert answers(model, UNCHANGED) == [True, True]
    with monkeypatch.context() as patched:
        patched.setattr(trials, "MOST_KEPT", 0)
        # Keys and values of every token in every layer, against half of the parameters.
        n_parameters = sum(item.numel() for item in model.model.parameters())
        n_prompts = n_parameters // (4 * N_LAYERS * model.hidden_size * len(prompts[0]))
        assert trials.may_keep(model, [prompts[0]] * n_prompts)
        assert not trials.may_keep(model, [prompts[0]] * (n_prompts + 1))
    monkeypatch.setattr(model.model.generation_config, "repetition_penalty", 1.3)
    engine = TrialEngine(model, prompts)
    assert answers(model, UNCHANGED) == [False, False]
