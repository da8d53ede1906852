# SPDX-License-Identifier: AGPL-3.0-or-later

"""The language model's head gives the same for parts of the vocabulary as for the whole."""

import inspect
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import Linear

from heretic_contrast.ablation.hooks import Intervention
from heretic_contrast.ablation.operator import Composition, compose
from heretic_contrast.engine.fast import head as head_module
from heretic_contrast.engine.fast.generation import Responder, generate_tokens
from heretic_contrast.engine.fast.head import CHUNK, CPU_CHUNK, Head
from heretic_contrast.engine.fast.interventions import TeacherForcing
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.prompts import Prompt
from tests.architectures import FAMILIES
from tests.evaluation.test_sweep import random_directions
from tests.tiny_models import make_model, make_tokenizer

PROMPTS = [Prompt(text) for text in ("Bread", "Break the door", "Bake a cake for all of us")]


def take_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the vocabularies of tiny models apart, too."""

    monkeypatch.setattr(head_module, "CHUNK", 4)
    monkeypatch.setattr(head_module, "CPU_CHUNK", 8)
    monkeypatch.setattr(head_module, "CPU_ELEMENTS", 64)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `take_apart`, for a whole test."""

    take_apart(monkeypatch)


def hidden_states(model: LanguageModel, n_positions: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n_positions, model.hidden_size, generator=generator)


@pytest.mark.parametrize("name", [name for name in FAMILIES if not FAMILIES[name].quantized])
def test_parts_give_the_logits_of_every_family(name: str, small_parts: None) -> None:
    model = wrap(FAMILIES[name].make_model(), FAMILIES[name].make_tokenizer(), "tiny")
    head = Head(model)
    states = hidden_states(model).to(model.model.dtype)
    # Scaled and capped logits, too, are each made from one row of the weights.
    parts = head.parts(8)
    assert [part.stop - part.start for part in parts] == [8] * 40
    whole = head.logits(states)
    assert whole.shape == (20, head.vocabulary) and whole.dtype == torch.float32
    joined = torch.cat([head.logits(states, part) for part in parts], dim=1)
    is_exact = model.model.dtype == torch.float32
    tolerance = 1e-5 if is_exact else 1e-2
    torch.testing.assert_close(joined, whole, rtol=0, atol=float(whole.abs().max()) * tolerance)
    if is_exact:
        assert head.most_likely(states).equal(whole.argmax(dim=1))


def test_logits_are_those_of_the_model(tiny_llama: LanguageModel, small_parts: None) -> None:
    head = TeacherForcing(tiny_llama).head
    tokens = torch.tensor([[5, 6, 7, 8]])
    output = tiny_llama.model(input_ids=tokens, output_hidden_states=True)
    torch.testing.assert_close(head.logits(output.hidden_states[-1][0]), output.logits[0])


def some_interventions(model: LanguageModel) -> list[Intervention]:
    vectors = random_directions(model, 3, 0).tensor
    return [
        Intervention(
            {layer: compose(vectors[layer + 1], torch.full((3,), weight), Composition.SUM)}
        )
        for layer in (0, 2)
        for weight in (0.3, 1.0)
    ]


def test_biases_belong_to_their_part(small_parts: None) -> None:
    network = make_model("llama")
    projection = Linear(32, 320)
    projection.weight = network.lm_head.weight
    torch.nn.init.normal_(projection.bias, generator=torch.Generator().manual_seed(0))
    network.lm_head = projection
    head = Head(wrap(network, make_tokenizer(), "tiny"))
    states = hidden_states(head.model)
    parts = head.parts(8)
    assert len(parts) == 40
    joined = torch.cat([head.logits(states, part) for part in parts], dim=1)
    torch.testing.assert_close(joined, projection(states))


class CenteredHead(Linear):
    """A head whose logits depend on each other."""

    def forward(self, states: Tensor) -> Tensor:
        logits = super().forward(states)
        return logits - logits.mean(dim=-1, keepdim=True)


def with_subclass(network: Any) -> None:
    projection = network.lm_head
    network.lm_head = CenteredHead(32, projection.out_features, bias=False)
    network.lm_head.weight = projection.weight


def with_normalized_outputs(network: Any) -> None:
    forward = network.forward

    def normalized(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits.softmax(dim=-1)
        return output

    network.forward = normalized


def with_biases_behind_it(network: Any) -> None:
    forward = network.forward
    biases = torch.linspace(-1, 1, network.config.vocab_size)

    def biased(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits + biases
        return output

    network.forward = biased


def with_a_method_in_front(network: Any) -> None:
    network.lm_head.forward = network.lm_head.forward


@pytest.mark.parametrize(
    "change",
    [with_subclass, with_normalized_outputs, with_biases_behind_it, with_a_method_in_front],
)
def test_other_heads_stay_whole(change: Any, small_parts: None) -> None:
    network = make_model("llama")
    change(network)
    head = Head(wrap(network, make_tokenizer(), "tiny"))
    assert head.parts(8) == [slice(0, head.vocabulary)]
    assert head.n_positions == head_module.CHUNK
    states = torch.randn(10, 32)
    assert head.most_likely(states).equal(head.logits(states).argmax(dim=1))


def test_small_vocabularies_stay_whole(tiny_llama: LanguageModel) -> None:
    head = Head(tiny_llama)
    assert head.parts(1) == head.parts(10_000) == [slice(0, 320)]
    assert head.n_positions == 2**20 // 320


@pytest.mark.parametrize("n_positions", [1, CHUNK, CPU_CHUNK])
def test_large_vocabularies_are_taken_apart(n_positions: int) -> None:
    network = make_model("llama", num_hidden_layers=1, vocab_size=50_000)
    head = Head(wrap(network, make_tokenizer(), "tiny"))
    parts = head.parts(n_positions)
    assert parts[0].start == 0 and parts[-1].stop == 50_000
    assert all(first.stop == second.start for first, second in pairwise(parts))
    assert parts[0].stop == 2**19 // max(n_positions, CHUNK)
    assert head.n_positions == CPU_CHUNK


def test_large_vocabularies_that_stay_whole_have_fewer_positions() -> None:
    network = make_model("llama", num_hidden_layers=1, vocab_size=50_000)
    with_a_method_in_front(network)
    head = Head(wrap(network, make_tokenizer(), "tiny"))
    assert head.parts(256) == [slice(0, 50_000)]
    assert head.n_positions == CHUNK == 256


@pytest.mark.parametrize("architecture", ["llama", "qwen3_5"])
def test_generation_without_all_logits(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(make_model(architecture), make_tokenizer(), "tiny", batch_size=3)
    sequences = [tuple(range(3, 3 + length)) for length in (4, 9, 6, 12, 5)]
    limits = [7, 12, 1, 20, 9]
    expected = generate_tokens(Head(model), sequences, limits, n_rows=3)
    original = model.model.forward
    widths = set()

    def seen(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        widths.add(output.logits.shape[-1])
        return output

    take_apart(monkeypatch)
    head = Head(model)
    assert len(head.parts(1)) > 1
    seen.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    model.model.forward = seen
    try:
        found = generate_tokens(head, sequences, limits, n_rows=3)
    finally:
        del model.model.forward
    assert found == expected
    # One number in place of the logits, and parts of at most 16.
    assert max(widths) <= 16
    assert "forward" not in vars(model.model) and "forward" not in vars(model.model.lm_head)


def test_penalties_see_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(make_model("llama"), make_tokenizer(), "tiny")
    sequences = [tuple(range(3, 3 + length)) for length in (4, 9, 6)]
    plain = generate_tokens(Head(model), sequences, [15] * 3)
    model.model.generation_config.repetition_penalty = 5.0
    penalized = generate_tokens(Head(model), sequences, [15] * 3)
    assert penalized != plain
    take_apart(monkeypatch)
    assert generate_tokens(Head(model), sequences, [15] * 3) == penalized


def test_responses_without_all_logits(tiny_llama: LanguageModel, small_parts: None) -> None:

    interventions = some_interventions(tiny_llama)
    forcing = TeacherForcing(tiny_llama)
    assert len(forcing.head.parts(1)) > 1
    found = Responder(forcing, PROMPTS, 12, 8).respond(interventions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_module, "CPU_ELEMENTS", 2**20)
        expected = Responder(TeacherForcing(tiny_llama), PROMPTS, 12, 8).respond(interventions)
    assert found == expected


def test_generation_with_adapters_and_hooks(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_model("llama")
    with_adapters = get_peft_model(
        network, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    )
    model = replace(wrap(network, make_tokenizer(), "tiny"), model=with_adapters)
    sequences = [tuple(range(3, 3 + length)) for length in (4, 9, 6, 12)]
    interventions = some_interventions(model)
    expected = generate_tokens(Head(model), sequences, [12] * 4, interventions)
    widths = []
    network.register_forward_hook(
        lambda module, args, output: widths.append(output.logits.shape[-1])
    )
    take_apart(monkeypatch)
    # It has seen nothing of the model before.
    assert generate_tokens(Head(model), sequences, [12] * 4, interventions) == expected
    assert widths.count(320) == 1 and set(widths) == {1, 16, 107, 106, 320}
