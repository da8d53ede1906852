# SPDX-License-Identifier: AGPL-3.0-or-later

"""A prompt that is much longer than others is read beside none of them, whose batches are as without it, and no result changes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from heretic_contrast import language_model
from heretic_contrast.ablation.changes import UNCHANGED
from heretic_contrast.engine import trials
from heretic_contrast.engine.check import all_logits, checked_engine
from heretic_contrast.engine.fast import teacher_forcing
from heretic_contrast.engine.fast.decoder import Decoder, TokenBatch
from heretic_contrast.engine.fast.engine import FastEngine
from heretic_contrast.engine.interface import Continuations
from heretic_contrast.engine.plain import PlainEngine
from heretic_contrast.engine.strides import generate_watched, none_leaves
from heretic_contrast.errors import ContrastWarning
from heretic_contrast.language_model import Batches, LanguageModel, Tokens
from tests.engine.test_cuda import interventions, on_device

LIMIT, SHORT, LONG = 6, 12, 200
N_SHORT, BATCH = 8, 4

Shapes = list[tuple[int, int]]


def prompt(seed: int, length: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return (5, 6, *torch.randint(10, 300, (length - 2,), generator=generator).tolist())


SHORT_ONES = [prompt(seed, SHORT - seed % 3) for seed in range(N_SHORT)]
WITH_LONG = [*SHORT_ONES[:3], prompt(99, LONG), *SHORT_ONES[3:]]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    monkeypatch.setattr(language_model, "LONG", 40)
    found = replace(on_device("llama", "cpu"), batch_size=BATCH)
    monkeypatch.setattr(found.model.generation_config, "eos_token_id", None)
    return found


@contextmanager
def passes(model: LanguageModel) -> Iterator[Shapes]:
    """Collects the shape of what the last layer reads in each pass."""

    shapes: Shapes = []

    def count(module: Any, args: Any, output: Any) -> None:
        shapes.append(tuple(output.shape[:2]))

    handle = model.layers[-1].mlp.register_forward_hook(count)  # type: ignore[union-attr]
    try:
        yield shapes
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "generate",
    [
        lambda model, prompts: model.generate_tokens(prompts, [LIMIT] * len(prompts)),
        lambda model, prompts: generate_watched(model, prompts, LIMIT, Batches(BATCH)),
    ],
    ids=["generate_tokens", "generate_watched"],
)
def test_generation(
    generate: Callable[[LanguageModel, list[Tokens]], list[Tokens]], model: LanguageModel
) -> None:
    alone = [generate(model, [tokens])[0] for tokens in WITH_LONG]
    with passes(model) as short:
        generate(model, SHORT_ONES)
    # In the given order, each batch as long as its longest.
    assert [shape for shape in short if shape[1] > 1] == [(BATCH, SHORT)] * 2
    with passes(model) as found:
        assert generate(model, WITH_LONG) == alone
    prompts_read = [shape for shape in found if shape[1] > 1]
    assert prompts_read == [(BATCH, SHORT)] * 2 + [(1, LONG)]


def test_the_fast_engine(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # A pass may hold 512 tokens: two of the long prompt.
    monkeypatch.setattr(teacher_forcing, "CPU_ELEMENTS_PER_PASS", 0)
    chosen = interventions(model)
    plain, read, kept = PlainEngine(model), [], []
    for prompts in (SHORT_ONES, WITH_LONG):
        engine = FastEngine(model)
        # Not what the model would say, so that all responses depart from it.
        known = Continuations(tuple(prompts), ((7,) * LIMIT,) * len(prompts))
        with passes(model) as shapes:
            found = engine.respond(known, LIMIT, chosen)
        assert found == plain.respond(known, LIMIT, chosen)
        logits = [all_logits(item, known, chosen) for item in (engine, plain)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
        # Beside the prefix and steps of generation.
        read.append([shape for shape in shapes if shape[1] >= SHORT])
        caches: list[Any] = [item._unmodified for item in engine.drafts(known, LIMIT)]
        inputs = [item._inputs[2][1].hidden_states for item in engine._forcing(known)]
        tensors = [*(cache.layers[0].keys[:, 0] for cache in caches), *inputs]
        kept.append(sum(len(tensor) * tensor.shape[1] for tensor in tensors))
    # All but the last token of the draft are read, of each prompt without the two tokens that all begin with.
    n_drafted, n_shared = LIMIT - 1, 2
    of_long = LONG + n_drafted - n_shared
    assert max(read[0])[0] == BATCH
    assert [shape for shape in read[1] if shape[1] < 100] == read[0]
    # Once unmodified and once under each intervention.
    assert sum(n * length for n, length in read[1] if length > 100) == (1 + len(chosen)) * of_long
    assert kept[0] == N_SHORT * (2 * (SHORT + n_drafted) - n_shared)
    assert kept[1] - kept[0] == 2 * (LONG + n_drafted) - n_shared


def test_a_search_counts_what_is_kept(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "MOST_KEPT", 0)
    # Keys and values of every token in every layer, against half of the parameters.
    n_parameters = sum(item.numel() for item in model.model.parameters())
    n_tokens = n_parameters // (4 * model.n_layers * model.hidden_size)
    long = prompt(99, n_tokens - 4 * SHORT)
    assert trials.may_keep(model, [prompt(0, SHORT)] * 4 + [long])
    assert not trials.may_keep(model, [prompt(0, SHORT)] * 5 + [long])


def test_groups_leave_out_the_prefix(model: LanguageModel) -> None:
    prefix = prompt(1, 60)
    prompts = tuple(prefix + tokens for tokens in WITH_LONG)
    known = Continuations(prompts, ((7,),) * len(prompts))
    assert len(FastEngine(model).drafts(known, LIMIT)) == 2


def test_the_check_reads_prompts_beside_each_other(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Decoder.run

    def wrong_where_padded(self: Decoder, tokens: TokenBatch, *others: Any) -> torch.Tensor:
        is_padded = (tokens.attention_mask == 0).any(dim=1)
        states = original(self, tokens, *others)
        return torch.where(is_padded[:, None, None], -states, states)

    # In groups of two, of which the last one is wide.
    prompts = [prompt(length, length) for length in (9, 10, 48, 50, 210, 230)]
    assert type(checked_engine(model, prompts)) is FastEngine
    monkeypatch.setattr(Decoder, "run", wrong_where_padded)
    with pytest.warns(ContrastWarning, match="The fast engine does not work"):
        assert type(checked_engine(model, prompts)) is PlainEngine


def test_a_search_keeps_nothing_where_memory_does_not_suffice_for_all(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = trials.TrialEngine(model, WITH_LONG)
    original = Decoder.run

    def exhausted(self: Decoder, tokens: TokenBatch, *others: Any) -> torch.Tensor:
        if tokens.input_ids.shape[1] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, tokens, *others)

    monkeypatch.setattr(Decoder, "run", exhausted)
    with pytest.warns(ContrastWarning, match="Memory is exhausted"):
        assert engine.respond(model, WITH_LONG, LIMIT, UNCHANGED, none_leaves) is None
    assert engine._engine is None
