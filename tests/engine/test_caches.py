# SPDX-License-Identifier: AGPL-3.0-or-later

"""What a model has read is read once: caches that are copied, joined and cut, against reading everything again."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from heretic_contrast.ablation.hooks import Intervention
from heretic_contrast.ablation.operator import compose
from heretic_contrast.engine.fast import generation, known_sequences
from heretic_contrast.engine.fast.caches import (
    CACHE,
    Past,
    keeps_every_token,
    move_to_the_end,
    select_rows,
    with_room,
)
from heretic_contrast.engine.fast.generation import Responder, Running, generate_tokens
from heretic_contrast.engine.fast.head import Head
from heretic_contrast.engine.fast.interventions import LayerInput, TeacherForcing, TokenBatch
from heretic_contrast.engine.fast.known_sequences import (
    KnownSequences,
    Piece,
    Tokens,
    common_beginning,
)
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.prompts import Prompt
from tests.evaluation.test_sweep import CANARIES, HARMFUL, REFERENCES, random_directions
from tests.tiny_models import SIZES, build, make_tokenizer

SEQUENCES: list[Tokens] = [(5, 6, 7, 8, 9, 10), (5, 6, 11), (5, 6, 7, 12, 13)]


@pytest.fixture(params=["tiny_llama", "tiny_hybrid"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def sliding(window: int) -> LanguageModel:
    """A model whose layers see the last tokens only."""

    from transformers import MistralConfig

    configuration = MistralConfig(**SIZES, sliding_window=window)
    network = build("MistralForCausalLM", configuration)
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


def read(model: LanguageModel, sequences: Sequence[Tokens]) -> DynamicCache:
    """Reads sequences that are padded on the right."""

    longest = max(map(len, sequences))
    ids = torch.tensor([tokens + (0,) * (longest - len(tokens)) for tokens in sequences])
    mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in sequences])
    forcing = TeacherForcing(model)
    past = forcing.nothing_read()
    forcing.unmodified(TokenBatch(ids, mask), past)
    assert isinstance(past.cache, DynamicCache)
    return past.cache


def tensors(cache: DynamicCache) -> list[Tensor]:
    """All that a cache holds, copied."""

    found = []
    for layer in cache.layers:
        for value in vars(layer).values():
            parts = value.values() if isinstance(value, dict) else [value]
            found += [part.clone() for part in parts if isinstance(part, Tensor)]
    return found


def test_generation_goes_on_from_caches_that_were_cut(tiny_llama: LanguageModel) -> None:
    cuts = [4, 3, 2]
    caches = [read(tiny_llama, SEQUENCES[:2]), read(tiny_llama, SEQUENCES[2:])]
    cut = [tokens[:n] for tokens, n in zip(SEQUENCES, cuts, strict=True)]
    # The last token of each is read by the generation itself.
    ends = [n - 1 for n in cuts]
    running = Running.start(Head(tiny_llama), cut, move_to_the_end(caches, ends, max(ends)))
    new, running = running.advance(Head(tiny_llama), 5, None)
    expected = generate_tokens(Head(tiny_llama), cut, [9] * 3)
    assert new == [tokens[:5] for tokens in expected]
    # And once more, with samples left out and others joining in.
    first = running.select([0, 2])
    longer = [cut[0] + new[0], cut[2] + new[2]]
    assert first.select([1]).rows is not None and first.select([1]).rows.tolist() == [2]
    own = first.own_cache()
    assert own is not None
    joined = [own, read(tiny_llama, SEQUENCES[1:2])]
    n_cached = first.tokens.shape[1] - 1
    cache = move_to_the_end(joined, [n_cached, n_cached, 2], max(map(len, longer)) - 1)
    new, _ = Running.start(Head(tiny_llama), [*longer, SEQUENCES[1]], cache).advance(
        Head(tiny_llama), 4, None
    )
    assert new == [expected[0][5:], expected[2][5:], expected[1][:4]]


def test_selecting_samples_changes_nothing_in_the_original(model: LanguageModel) -> None:
    cache = read(model, SEQUENCES)
    before = tensors(cache)
    chosen = select_rows(cache, torch.tensor([2, 0, 2, 1]))
    tokens = TokenBatch(torch.full((4, 2), 9), torch.ones(4, 2, dtype=torch.long))
    TeacherForcing(model).unmodified(tokens, Past(chosen, 6))
    after = tensors(cache)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(
        a.shape == b.shape and torch.equal(a, b)
        for a, b in zip(tensors(chosen), before, strict=True)
    )


def test_room_for_tokens_that_follow(model: LanguageModel) -> None:
    """Hidden states are those of caches that grow, the cache stays as it was, and what comes later is not copied."""

    cache = read(model, SEQUENCES)
    forcing = TeacherForcing(model)
    more = [
        TokenBatch(torch.full((3, 1), token), torch.ones(3, 1, dtype=torch.long))
        for token in (7, 8)
    ]
    rows = torch.arange(3)
    growing = select_rows(cache, rows)
    expected = [forcing.unmodified(tokens, Past(growing, 6 + n)) for n, tokens in enumerate(more)]
    before = tensors(cache)
    # A layer of keys and values, or of nothing else where there is none.
    full = [index for index, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
    assert full
    with with_room(cache, 2, rows) as roomy:
        places = []
        for n, tokens in enumerate(more):
            found = forcing.unmodified(tokens, Past(roomy, 6 + n))
            torch.testing.assert_close(found, expected[n], rtol=0, atol=1e-5)
            places.append([roomy.layers[index].keys.data_ptr() for index in full])
        assert places[0] == places[1]
        assert [roomy.layers[index].keys.shape[2] for index in full] == [8] * len(full)
    for index in full:
        for name in ("keys", "values"):
            found, grown = (getattr(item.layers[index], name) for item in (roomy, growing))
            torch.testing.assert_close(found, grown, rtol=0, atol=1e-5)
    after = tensors(cache)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(type(layer) is type(cache.layers[i]) for i, layer in enumerate(roomy.layers))
    assert not any("update" in vars(layer) for layer in (*roomy.layers, *cache.layers))
    # From then on it grows as any other, also after an error.
    later = TokenBatch(torch.full((3, 1), 9), torch.ones(3, 1, dtype=torch.long))
    with pytest.raises(RuntimeError, match="stop"), with_room(roomy, 1, rows) as last:
        raise RuntimeError("stop")
    for item in (roomy, last, growing):
        forcing.unmodified(later, Past(select_rows(item, rows), 8))
    assert not any("update" in vars(layer) for layer in last.layers)


def test_generation_copies_no_cache_for_a_token(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = Head(tiny_llama)
    first, running = Running.start(head, SEQUENCES).advance(head, 1, None)
    expected = generate_tokens(head, SEQUENCES, [4] * 3)

    def copying(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("A cache grows by a copy.")

    monkeypatch.setattr(DynamicLayer, "update", copying)
    new, _ = running.select([0, 2]).advance(head, 3, None)
    assert [first[0] + new[0], first[2] + new[1]] == [expected[0], expected[2]]


def test_caches_that_tokens_can_be_taken_out_of(
    tiny_llama: LanguageModel, tiny_hybrid: LanguageModel
) -> None:
    assert keeps_every_token(read(tiny_llama, SEQUENCES), 10_000)
    assert not keeps_every_token(read(tiny_hybrid, SEQUENCES), 10)
    cache = read(sliding(8), SEQUENCES)
    assert keeps_every_token(cache, 7) and not keeps_every_token(cache, 8)


def test_common_beginning_leaves_a_token_of_each_prompt() -> None:
    assert common_beginning(SEQUENCES) == (5, 6)
    assert common_beginning([(5, 6), (5, 6, 7)]) == (5,)
    assert common_beginning([(5, 6, 7)]) == (5, 6)
    assert common_beginning([(5, 6), (7, 6)]) == ()
    assert common_beginning([(5,), (5,)]) == ()
    assert common_beginning([]) == ()


def known(
    model: LanguageModel, reads_on: bool, n_rows: int = 4
) -> tuple[TeacherForcing, KnownSequences]:
    forcing = TeacherForcing(model)
    forcing.__dict__["reads_on"] = forcing.reads_on and reads_on
    prompts = model.token_ids(REFERENCES)
    continuations = generate_tokens(Head(model), prompts, [7, 12, 9, 1])
    return forcing, KnownSequences(forcing, prompts, continuations, n_rows)


@pytest.mark.parametrize("n_rows", [3, 50])
def test_beginning_is_read_once_without_a_difference(model: LanguageModel, n_rows: int) -> None:
    once, short = known(model, reads_on=True, n_rows=n_rows)
    whole, long = known(model, reads_on=False, n_rows=n_rows)
    assert once.reads_on and short.n_common > 10 and long.n_common == 0
    calls = [
        [(0,), (0,), (2,), (1, 3)],
        # Upwards, back to the bottom, and several layers with the lowest one in the middle.
        [(3,), (3,)],
        [(1,), (2, 3), (1, 2)],
    ]
    for layers in calls:
        chosen = interventions(model, layers)
        expected = states(long, long.modified(whole, chosen))
        found = states(short, short.modified(once, chosen))
        assert set(found) == set(expected) and len(found) == 4 * len(layers)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)
    expected, found = states(long, long.unmodified(whole)), states(short, short.unmodified(once))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)


def states(known: KnownSequences, pieces: Iterator[Piece]) -> dict[tuple[int, int], Tensor]:
    """Hidden states by intervention and sequence."""

    found: dict[tuple[int, int], Tensor] = {}
    for piece in pieces:
        lengths = known.lengths[piece.sequences]
        parts = iter(piece.hidden_states.split(lengths * len(piece.interventions)))
        for intervention in piece.interventions:
            for prompt in known.order[piece.sequences]:
                found[intervention, prompt] = next(parts)
        assert next(parts, None) is None
    return found


def test_models_that_cannot_read_on_read_everything_again(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = model.decoder()
    forward = decoder.forward
    assert TeacherForcing(model).reads_on

    def forgetful(*args: Any, **arguments: Any) -> Any:
        past = arguments.pop(CACHE, None)
        if past is not None:
            arguments["use_cache"] = False
            arguments["attention_mask"] = arguments["attention_mask"][
                :, -arguments["input_ids"].shape[1] :
            ]
        return forward(*args, **arguments)

    def failing(*args: Any, **arguments: Any) -> Any:
        past = arguments.get(CACHE)
        # Generation works, which adds one token after the other.
        if past is not None and past.get_seq_length() > 0 and arguments["input_ids"].shape[1] > 1:
            raise TypeError("unexpected argument")
        return forward(*args, **arguments)

    for broken in (forgetful, failing):
        monkeypatch.setattr(decoder, "forward", broken)
        forcing, sequences = known(model, reads_on=True)
        assert not forcing.reads_on and sequences.n_common == 0
        pieces = sequences.modified(forcing, interventions(model, [(1,)]))
        assert all(piece.cache is None for piece in pieces)


def responses_one_by_one(
    model: LanguageModel, prompts: Sequence[Prompt], n_tokens: int, chosen: Sequence[Intervention]
) -> list[list[str]]:
    """Responses by plain generation, each by itself."""

    return [
        model.tokenizer.batch_decode(
            [
                generate_tokens(Head(model), [tokens], [n_tokens], [intervention])[0]
                for tokens in model.token_ids(prompts)
            ],
            skip_special_tokens=True,
        )
        for intervention in chosen
    ]


def test_responses_do_not_depend_on_what_is_generated_together(model: LanguageModel) -> None:
    prompts = [*HARMFUL[:3], CANARIES[0]]
    chosen = interventions(model, [(0,), (1,), (2, 3), (3,), (0, 1, 2)])
    expected = responses_one_by_one(model, prompts, 19, chosen)
    assert len({tuple(responses) for responses in expected}) > 3
    # Hooks of experts cannot tell samples apart.
    for batch_size, carries_samples in ((3, True), (3, False), (8, True), (16, True)):
        forcing = TeacherForcing(model)
        responder = Responder(forcing, prompts, 19, batch_size)
        forcing.__dict__["carries_samples"] = carries_samples
        assert responder.respond(chosen) == expected
    alone = Responder(TeacherForcing(model), prompts[:2], 19, 1)
    assert alone.respond(chosen[1:3]) == [responses[:2] for responses in expected[1:3]]


def test_what_the_check_has_read_is_not_read_again(tiny_llama: LanguageModel) -> None:
    responder = Responder(TeacherForcing(tiny_llama), HARMFUL, 10, 64)
    chosen = interventions(tiny_llama, [(0,), (1,), (2, 3), (3,), (0, 1, 2)])
    # Reads the beginning of the unmodified model, once and for all.
    responses = responder.respond(chosen)
    n_read = []

    def count(module: Any, args: Any, output: Any) -> None:
        n_read.append(output.shape[0] * output.shape[1])

    handle = tiny_llama.layers[-1].mlp.register_forward_hook(count)  # type: ignore[union-attr,operator]
    try:
        assert responder.respond(chosen) == responses
        with_cache = sum(n_read)
        n_read.clear()
        assert responder._unmodified is not None
        responder._unmodified = None
        assert responder.respond(chosen) == responses
    finally:
        handle.remove()
    departed = sum(
        response != base
        for row in responses
        for response, base in zip(row, responder.base_responses(), strict=True)
    )
    assert departed > 2
    # The prompt of each response that departs, but for the token that is read in both ways.
    shortest = min(map(len, tiny_llama.token_ids(HARMFUL)))
    assert sum(n_read) - with_cache >= departed * (shortest - 1)


def test_responses_within_a_sliding_window() -> None:
    model = sliding(100)
    responder = Responder(TeacherForcing(model), HARMFUL, 16, 3)
    assert responder._unmodified is not None
    chosen = interventions(model, [(0,), (2,), (1, 3)])
    assert responder.respond(chosen) == responses_one_by_one(model, HARMFUL, 16, chosen)


def test_responses_beyond_a_sliding_window() -> None:
    # The prompts alone fit into the window; with their responses they do not.
    model = sliding(max(map(len, sliding(8).token_ids(HARMFUL))) + 6)
    responder = Responder(TeacherForcing(model), HARMFUL, 16, 4)
    assert responder._unmodified is None
    chosen = interventions(model, [(0,), (2,)])
    assert responder.respond(chosen) == responses_one_by_one(model, HARMFUL, 16, chosen)


def test_passes_leave_out_what_comes_before_the_first_output_projection(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forcing = TeacherForcing(model)
    layer = 1
    # The first pass of all finds out what layers return.
    assert not forcing._returns_tuple
    first = forcing._first_projections[layer]
    assert first is not None
    query = next(item for item in first.around.children() if isinstance(item, torch.nn.Linear))
    calls: list[int] = []
    original = query.forward

    def counting(*inputs: Tensor) -> Tensor:
        calls.append(1)
        return original(*inputs)

    monkeypatch.setattr(query, "forward", counting)
    tokens = TokenBatch(torch.arange(5, 11).view(1, 6), torch.ones(1, 6, dtype=torch.long))
    [intervention] = interventions(model, [(layer,)])
    start = forcing.layer_input(tokens, layer)
    assert start.projected is not None and start.first_read == layer + 1
    assert len(calls) == 1
    found = forcing.modified(tokens, [intervention], start)
    assert len(calls) == 1
    # Only the input being known, attention is run again.
    known_input = LayerInput(layer, start.hidden_states)
    expected = forcing.modified(tokens, [intervention], known_input)
    assert len(calls) == 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, forcing.unmodified(tokens), rtol=1e-3, atol=1e-3)
    # Going up from there does not run it either.
    upper = forcing.layer_input(tokens, layer + 1, start)
    assert len(calls) == 3  # By the unmodified pass.
    torch.testing.assert_close(
        upper.hidden_states, forcing.layer_input(tokens, layer + 1).hidden_states
    )
    # And everything is as before.
    torch.testing.assert_close(
        forcing.modified(tokens, [intervention], known_input), expected, rtol=0, atol=0
    )


def test_nothing_is_left_out_where_it_is_not_known_to_be_the_same(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = tiny_llama.layers[1].self_attn
    original = attention.forward

    def scaled(*args: Any, **arguments: Any) -> Any:
        output, weights = original(*args, **arguments)
        return 2 * output, weights

    monkeypatch.setattr(attention, "forward", scaled)
    tiny_llama.layers[2].self_attn.store_full_length_kv = True
    try:
        found = TeacherForcing(tiny_llama)._first_projections
    finally:
        del tiny_llama.layers[2].self_attn.store_full_length_kv
    assert [item is not None for item in found[:3]] == [True, False, False]
    assert found[0] is not None and found[0].around is tiny_llama.layers[0].self_attn
    assert found[0].projection is tiny_llama.layers[0].self_attn.o_proj


def test_sequences_join_a_running_batch(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = [tokens for tokens in SEQUENCES for _ in range(4)]
    limits = [20, 2, 3, 1] * 3
    expected = [
        generate_tokens(Head(model), [tokens], [limit])[0]
        for tokens, limit in zip(sequences, limits, strict=True)
    ]
    assert sum(len(tokens) == 20 for tokens in expected) == 3
    steps: list[int] = []
    handle = model.layers[0].register_forward_hook(
        lambda module, args, output: steps.append(len(args[0]))
    )
    try:
        assert generate_tokens(Head(model), sequences, limits, n_rows=4) == expected
        together = list(steps)
        assert max(together) == 4
        steps.clear()
        # As for caches whose samples must all have read equally much.
        monkeypatch.setattr(generation, "can_be_joined", lambda cache: False)
        assert generate_tokens(Head(model), sequences, limits, n_rows=4) == expected
    finally:
        handle.remove()
    assert len(steps) == 60 and len(together) < 50


def test_the_last_mlp_runs_only_where_something_is_predicted(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forcing = TeacherForcing(model)
    mlp = model.layers[-1].mlp
    assert forcing._last_mlp is mlp
    tokens = TokenBatch(torch.arange(5, 17).view(2, 6), torch.ones(2, 6, dtype=torch.long))
    # The second sample asks for one column twice.
    columns = torch.tensor([[2, 3, 4], [4, 5, 5]])
    seen: list[tuple[int, ...]] = []
    for layer in (0, model.n_layers - 1):
        ablated = interventions(model, [(layer,), (layer, model.n_layers - 1)])
        start = forcing.layer_input(tokens, layer)
        expected = forcing.modified(tokens, ablated, start)
        handle = mlp.down_proj.register_forward_hook(
            lambda *inputs: seen.append(tuple(inputs[2].shape))
        )
        found = forcing.modified(tokens, ablated, start, None, columns)
        handle.remove()
        assert seen.pop() == (2, 3, model.hidden_size) and not seen
        rows = torch.arange(2)[:, None]
        torch.testing.assert_close(
            found[rows, columns], expected[rows, columns], rtol=1e-5, atol=1e-5
        )
        # What nobody asked for is what is saved.
        assert not torch.allclose(found[0, 5], expected[0, 5], rtol=1e-3, atol=1e-3)
    # Afterwards, everything is as before.
    assert torch.equal(expected, forcing.modified(tokens, ablated, start))

    # A module that mixes tokens has to see all of them.
    original = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda states: original(states.cumsum(dim=1)))
    assert TeacherForcing(model)._last_mlp is None
    start = TeacherForcing(model).layer_input(tokens, 0)
    mixed = [
        TeacherForcing(model).modified(tokens, ablated[:1] * 2, start, None, part)
        for part in (None, columns)
    ]
    assert torch.equal(*mixed)


def test_passes_on_a_cpu_are_limited_by_elements_and_tokens(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forcing, sequences = known(tiny_llama, reads_on=True, n_rows=50)
    longest = max(sequences._widths)

    def rows(elements: int, tokens: int, n_rows: int = 50) -> list[int]:
        monkeypatch.setattr(known_sequences, "CPU_ELEMENTS_PER_PASS", elements)
        monkeypatch.setattr(known_sequences, "CPU_TOKENS_PER_PASS", tokens)
        _, limited = known(tiny_llama, reads_on=True, n_rows=n_rows)
        pieces = limited.unmodified(forcing)
        return [len(limited.order[piece.sequences]) for piece in pieces]

    assert rows(2 * longest * tiny_llama.hidden_size, 0) == [2, 2]
    assert rows(0, 3 * longest) == [3, 1]
    assert rows(0, 0) == [1] * 4
    assert rows(50 * longest * tiny_llama.hidden_size, 0) == [4]
    assert rows(50 * longest * tiny_llama.hidden_size, 0, n_rows=3) == [3, 1]
