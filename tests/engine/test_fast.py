# SPDX-License-Identifier: AGPL-3.0-or-later

"""The fast engine gives what the plain one gives, with less work."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache, MistralConfig

from heretic_contrast.ablation.hooks import Intervention
from heretic_contrast.ablation.operator import compose
from heretic_contrast.engine.check import all_logits
from heretic_contrast.engine.compat import keeps_every_token, select_rows
from heretic_contrast.engine.fast import decoder as decoder_module
from heretic_contrast.engine.fast import engine as engine_module
from heretic_contrast.engine.fast import teacher_forcing
from heretic_contrast.engine.fast.decoder import Decoder, TokenBatch
from heretic_contrast.engine.fast.engine import FastEngine
from heretic_contrast.engine.fast.teacher_forcing import TeacherForcing, common_prefix
from heretic_contrast.engine.interface import Continuations
from heretic_contrast.engine.plain import PlainEngine
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.language_model import LanguageModel, Tokens, groups_by_length
from heretic_contrast.prompts import Prompt
from tests.plain_sweeps import CANARIES, HARMFUL, REFERENCES, random_directions
from tests.tiny_models import SIZES, build, make_model, make_tokenizer

SEQUENCES: list[Tokens] = [(5, 6, 7, 8, 9, 10), (5, 6, 11), (5, 6, 7, 12, 13)]


@pytest.fixture(params=["tiny_llama", "tiny_hybrid"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def sliding(window: int) -> LanguageModel:
    """A model whose layers see the last tokens only."""

    network = build("MistralForCausalLM", MistralConfig(**SIZES, sliding_window=window))
    return wrap(network, make_tokenizer(), name="sliding", batch_size=4)


def interventions(model: LanguageModel, layers: Sequence[tuple[int, ...]]) -> list[Intervention]:
    """An intervention for each set of layers, each of another strength."""

    directions = random_directions(model, 2, 0).tensor
    return [
        Intervention(
            {
                layer: compose(directions[layer + 1], torch.full((2,), 0.4 + 0.3 * index))
                for layer in chosen
            }
        )
        for index, chosen in enumerate(layers)
    ]


def known(model: LanguageModel, prompts: Sequence[Prompt], limits: Sequence[int]) -> Continuations:
    """The prompts with what the unmodified model says, by plain generation."""

    tokens = model.token_ids(prompts)
    return Continuations(tuple(tokens), tuple(PlainEngine(model).generate(tokens, limits)))


def read(model: LanguageModel, sequences: Sequence[Tokens]) -> DynamicCache:
    """Reads sequences that are padded on the right."""

    longest = max(map(len, sequences))
    ids = torch.tensor([tokens + (0,) * (longest - len(tokens)) for tokens in sequences])
    mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in sequences])
    cache = DynamicCache(config=Decoder(model).config)
    Decoder(model).run(TokenBatch(ids, mask), cache)
    return cache


def tensors(cache: DynamicCache) -> list[Tensor]:
    """All that a cache holds, copied."""

    found = []
    for layer in cache.layers:
        for value in vars(layer).values():
            parts = value.values() if isinstance(value, dict) else [value]
            found += [part.clone() for part in parts if isinstance(part, Tensor)]
    return found


def test_selecting_samples_changes_nothing_in_the_original(model: LanguageModel) -> None:
    cache = read(model, SEQUENCES)
    before = tensors(cache)
    chosen = select_rows(cache, torch.tensor([2, 0, 2, 1]))
    tokens = TokenBatch(torch.full((4, 2), 9), torch.ones(4, 2, dtype=torch.long))
    Decoder(model).run(tokens, chosen, 6)
    after = tensors(cache)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(
        a.shape == b.shape and torch.equal(a, b)
        for a, b in zip(tensors(chosen), before, strict=True)
    )


def test_caches_in_which_tokens_can_be_masked(
    tiny_llama: LanguageModel, tiny_hybrid: LanguageModel
) -> None:
    assert keeps_every_token(read(tiny_llama, SEQUENCES), 10_000)
    assert not keeps_every_token(read(tiny_hybrid, SEQUENCES), 10)
    cache = read(sliding(8), SEQUENCES)
    assert keeps_every_token(cache, 7) and not keeps_every_token(cache, 8)


def test_common_prefix_leaves_a_token_of_each_prompt() -> None:
    assert common_prefix(SEQUENCES) == (5, 6)
    assert common_prefix([(5, 6), (5, 6, 7)]) == (5,)
    assert common_prefix([(5, 6, 7)]) == (5, 6)
    assert common_prefix([(5, 6), (7, 6)]) == ()
    assert common_prefix([(5,), (5,)]) == ()
    assert common_prefix([]) == ()


def test_logits_are_those_of_whole_passes(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_module, "ELEMENTS", 320 * 7)
    continuations = known(model, REFERENCES, [7, 12, 9, 1])
    plain = PlainEngine(model)
    calls = [
        None,
        [(0,), (0,), (2,), (1, 3)],
        # Upwards, back to the bottom, and several layers with the lowest one in the middle.
        [(3,), (3,)],
        [(1,), (2, 3), (1, 2)],
    ]
    chosen = [None if layers is None else interventions(model, layers) for layers in calls]
    expected = [all_logits(plain, continuations, group) for group in chosen]
    for n_rows, has_prefix in [(3, True), (50, True), (3, False), (50, False)]:
        if not has_prefix:
            monkeypatch.setattr(engine_module, "common_prefix", lambda prompts: ())
        engine = FastEngine(replace(model, batch_size=n_rows))
        assert all(len(item.values) <= 7 for item in engine.logits(continuations))
        assert bool(engine._forcing(continuations)[0].prefix) == has_prefix
        for group, logits in zip(chosen, expected, strict=True):
            n_read: list[int] = []
            found = list(engine.logits(continuations, group, n_read.append))
            assert sum(n_read) == 4 * (1 if group is None else len(group))
            assert all(item.values.dtype == torch.float32 for item in found)
            for own, right in zip(all_logits(engine, continuations, group), logits, strict=True):
                torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-4)


Responses = tuple[Continuations, list[list[Tokens]]]


def plain_responses(
    model: LanguageModel, prompts: Sequence[Prompt], limit: int, chosen: Sequence[Intervention]
) -> Responses:
    """What plain generation gives for each prompt by itself, without and with the interventions."""

    continuations = known(model, prompts, [limit] * len(prompts))
    expected = PlainEngine(replace(model, batch_size=1)).respond(continuations, limit, chosen)
    assert len({tuple(responses) for responses in expected}) > 1
    return continuations, expected


def check_responses(
    model: LanguageModel, responses: Responses, limit: int, chosen: Sequence[Intervention]
) -> FastEngine:
    """Compares the responses of the fast engine with `responses`."""

    continuations, expected = responses
    n_prompts = len(continuations.prompts)
    engine = FastEngine(model)
    assert engine.generate(continuations.prompts, [limit] * n_prompts) == list(continuations.tokens)
    n_read: list[int] = []
    assert engine.respond(continuations, limit, chosen, n_read.append) == expected
    assert sum(n_read) == n_prompts * len(chosen)
    return engine


@pytest.mark.slow
def test_responses_do_not_depend_on_what_is_generated_together(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = interventions(model, [(0,), (1,), (2, 3), (3,), (0, 1, 2)])
    responses = plain_responses(model, [*HARMFUL[:3], CANARIES[0]], 19, chosen)
    for batch_size, carries in [(1, True), (3, True), (8, True), (64, True), (3, False)]:
        # Hooks of experts cannot tell samples apart.
        monkeypatch.setattr(
            teacher_forcing, "carries_samples", lambda model, carries=carries: carries
        )
        check_responses(replace(model, batch_size=batch_size), responses, 19, chosen)


def drafts(engine: FastEngine) -> Any:
    """What the engine keeps of the one set of continuations that it has answered."""

    ((found,),) = engine._drafts.values()
    return found


def test_what_the_verification_has_read_is_not_read_again(tiny_llama: LanguageModel) -> None:
    model = replace(tiny_llama, batch_size=64)
    continuations = known(model, HARMFUL, [10] * len(HARMFUL))
    chosen = interventions(model, [(0,), (1,), (2, 3), (3,), (0, 1, 2)])
    engine = FastEngine(model)
    # Reads what the unmodified model says, once and for all.
    responses = engine.respond(continuations, 10, chosen)
    n_read = []

    def count(module: Any, args: Any, output: Any) -> None:
        n_read.append(output.shape[0] * output.shape[1])

    handle = model.layers[-1].mlp.register_forward_hook(count)  # type: ignore[union-attr,operator]
    try:
        assert engine.respond(continuations, 10, chosen) == responses
        with_cache = sum(n_read)
        n_read.clear()
        assert drafts(engine)._unmodified is not None
        drafts(engine)._unmodified = None
        assert engine.respond(continuations, 10, chosen) == responses
    finally:
        handle.remove()
    departed = sum(
        response != base
        for row in responses
        for response, base in zip(row, continuations.tokens, strict=True)
    )
    assert departed > 2
    # The prompt of each response that departs, but for the token that is read in both ways.
    shortest = min(map(len, continuations.prompts))
    assert sum(n_read) - with_cache >= departed * (shortest - 1)


def test_responses_within_a_sliding_window() -> None:
    model = sliding(100)
    chosen = interventions(model, [(0,), (2,), (1, 3)])
    responses = plain_responses(model, HARMFUL, 16, chosen)
    assert drafts(check_responses(model, responses, 16, chosen))._unmodified is not None


def test_responses_beyond_a_sliding_window() -> None:
    # The prompts alone fit into the window; with their responses they do not.
    model = sliding(max(map(len, sliding(8).token_ids(HARMFUL))) + 6)
    chosen = interventions(model, [(0,), (2,)])
    responses = plain_responses(model, HARMFUL, 16, chosen)
    assert drafts(check_responses(model, responses, 16, chosen))._unmodified is None


def test_layers_below_the_ablated_one_are_not_run_again(model: LanguageModel) -> None:
    continuations = known(model, REFERENCES, [7, 12, 9, 1])
    engine = FastEngine(replace(model, batch_size=50))
    counts = [0] * model.n_layers

    def counter(index: int) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            counts[index] += 1

        return count

    handles = [
        layer.mlp.register_forward_hook(counter(index))  # type: ignore[union-attr,operator]
        for index, layer in enumerate(model.layers)
    ]
    try:
        list(engine.logits(continuations, interventions(model, [(2,)])))
        below = list(counts)
        assert min(below) > 0
        list(engine.logits(continuations, interventions(model, [(2,), (3,)])))
    finally:
        for handle in handles:
            handle.remove()
    assert counts[:2] == below[:2] and counts[2] > below[2]
    assert not any("forward" in vars(layer) for layer in model.layers)


def test_passes_on_a_cpu_are_limited_by_elements_and_tokens(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    continuations = known(tiny_llama, REFERENCES, [7, 12, 9, 1])
    decoder = Decoder(tiny_llama)
    (order,) = groups_by_length(continuations.sequences)
    prefix = common_prefix(continuations.prompts)
    longest = TeacherForcing(decoder, continuations, order, prefix, 50)._width

    def rows(elements: int, tokens: int, n_rows: int = 50) -> list[int]:
        monkeypatch.setattr(teacher_forcing, "CPU_ELEMENTS_PER_PASS", elements)
        monkeypatch.setattr(teacher_forcing, "CPU_TOKENS_PER_PASS", tokens)
        passes = TeacherForcing(decoder, continuations, order, prefix, n_rows).unmodified()
        return [len(item.rows) for item in passes]

    assert rows(2 * longest * tiny_llama.hidden_size, 0) == [2, 2]
    assert rows(0, 3 * longest) == [3, 1]
    assert rows(0, 0) == [1] * 4
    assert rows(50 * longest * tiny_llama.hidden_size, 0) == [4]
    assert rows(50 * longest * tiny_llama.hidden_size, 0, n_rows=3) == [3, 1]


def test_adapters_and_hooks() -> None:
    network = make_model("llama")
    adapted = get_peft_model(
        network, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    )
    model = replace(wrap(network, make_tokenizer(), "tiny", batch_size=3), model=adapted)
    chosen = interventions(model, [(0,), (1, 2), (3,)])
    check_responses(model, plain_responses(model, HARMFUL, 9, chosen), 9, chosen)
    continuations = known(model, REFERENCES, [7, 12, 9, 1])
    pairs = [all_logits(kind(model), continuations, None)[0] for kind in (FastEngine, PlainEngine)]
    torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-4)
    with adapted.disable_adapter():
        unadapted = all_logits(PlainEngine(model), continuations, None)[0]
    assert not torch.allclose(pairs[0], unadapted, rtol=1e-2, atol=1e-2)
