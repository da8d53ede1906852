# SPDX-License-Identifier: AGPL-3.0-or-later

"""Products of a few rows in parts of the outputs give those of the whole."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import Linear
from torch.nn.functional import linear

from heretic_contrast.engine.cpu import few_rows
from heretic_contrast.engine.cpu.few_rows import (
    MOST_ROWS,
    fast_with_few_rows,
    linear_of_few_rows,
    n_parts,
)
from heretic_contrast.engine.fast import head as head_module
from heretic_contrast.engine.fast.generation import generate_tokens
from heretic_contrast.engine.fast.head import Head
from heretic_contrast.hosts.surface import wrap
from tests.engine.test_head import hidden_states, take_apart
from tests.tiny_models import make_model, make_tokenizer


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the number of parts that of two threads, on any machine."""

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    """Takes the layers of tiny models apart, too."""

    monkeypatch.setattr(few_rows, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(few_rows, "LEAST_WIDTH", 1)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def count_whole(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Returns a list to which the states of each product that is not taken apart are added."""

    whole: list[Tensor] = []

    def counting(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        whole.append(states)
        return linear(states, weight, bias)

    monkeypatch.setattr(few_rows, "linear", counting)
    return whole


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1), (2, 3, 5), (MOST_ROWS,)])
def test_parts_give_the_whole_product(
    shape: tuple[int, ...], with_bias: bool, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, states = random(576, 512), random(*shape, 512)
    bias = random(576) if with_bias else None
    whole = count_whole(monkeypatch)
    found = linear_of_few_rows(states, weight, bias)
    assert whole == [] and found.shape == (*shape, 576) and found.is_contiguous()
    expected = linear(states.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    # States may come from the middle of something larger.
    wider = torch.cat([states, states], dim=-1)[..., :512]
    torch.testing.assert_close(linear_of_few_rows(wider, weight, bias), found, rtol=0, atol=1e-4)


def test_many_rows_are_one_product(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(576, 512)
    whole = count_whole(monkeypatch)
    linear_of_few_rows(random(MOST_ROWS, 1, 512), weight)
    assert whole == []
    linear_of_few_rows(random(MOST_ROWS + 1, 512), weight)
    linear_of_few_rows(random(2, MOST_ROWS, 512), weight)
    assert len(whole) == 2


def test_number_of_parts(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert n_parts(random(576, 512)) == 4
    assert n_parts(random(578, 512)) == 2
    assert n_parts(random(577, 512)) == 1
    # Too narrow, too small, and just not.
    assert n_parts(random(508, 1024)) == n_parts(random(512, 511)) == 1
    assert n_parts(random(512, 512)) == 4
    assert n_parts(random(512, 576).T) == 1
    assert n_parts(random(576, 512).bfloat16()) == n_parts(random(576, 512).double()) == 1
    assert n_parts(random(576, 512).to("meta")) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert n_parts(random(576, 512)) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert n_parts(random(768, 512)) == 6


class Doubled(Linear):
    """A linear layer that does something else."""

    def forward(self, states: Tensor) -> Tensor:
        return 2 * super().forward(states)


def test_layers_that_are_more_than_linear_are_left_alone(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_model("llama")
    mlp, above = network.model.layers[0].mlp, network.model.layers[1].mlp
    doubled = Doubled(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False)
    doubled.weight = mlp.up_proj.weight
    mlp.up_proj = doubled
    own = above.gate_proj.forward

    def in_front(states: Tensor) -> Tensor:
        return -own(states)

    above.gate_proj.forward = in_front
    model = wrap(network, make_tokenizer(), "tiny")
    ids = torch.arange(3, 15).view(2, 6)
    seen: list[Tensor] = []
    handle = mlp.down_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        expected = network(input_ids=ids).logits
        whole = count_whole(monkeypatch)
        with fast_with_few_rows(model):
            found = network(input_ids=ids).logits
            assert "forward" in vars(mlp.down_proj) and "forward" not in vars(doubled)
        assert whole == []
    handle.remove()
    assert len(seen) == 2
    torch.testing.assert_close(found, expected)
    replaced = [module for module in network.modules() if "forward" in vars(module)]
    assert replaced == [above.gate_proj] and above.gate_proj.forward is in_front


@pytest.mark.parametrize("with_adapters", [False, True])
def test_generation_takes_steps_apart(
    with_adapters: bool, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    network: Any = make_model("llama")
    if with_adapters:
        configuration = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
        network = get_peft_model(network, configuration)
    model = wrap(network, make_tokenizer(), "tiny")
    prompts = [(5, 6, 7, 8), (9, 10), (11,)]
    calls = []
    original = few_rows.linear_of_few_rows

    def counting(*args: Any) -> Tensor:
        calls.append(args[0].shape)
        return original(*args)

    with monkeypatch.context() as context:
        context.setattr(few_rows, "MOST_ROWS", 0)
        expected = generate_tokens(Head(model), prompts, [9, 9, 4])
    monkeypatch.setattr(few_rows, "linear_of_few_rows", counting)
    whole = count_whole(monkeypatch)
    assert generate_tokens(Head(model), prompts, [9, 9, 4]) == expected
    # Seven products in each layer, and a head, for the first token and each one after it.
    n_products = 7 * model.n_layers
    assert len(calls) >= 9 * n_products and whole == []
    for row, tokens in enumerate(prompts):
        ids = torch.tensor([tokens])
        plain = network.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
        )
        assert tuple(plain[0, len(tokens) :].tolist()) == expected[row][:4]


def test_parts_of_the_vocabulary_are_taken_apart_again(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_apart(monkeypatch)
    head = Head(wrap(make_model("llama"), make_tokenizer(), "tiny"))
    states, parts = hidden_states(head.model, 4), head.parts(4)
    expected = head.logits(states).argmax(dim=1)
    shapes = []

    def counting(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append((states.shape[-2], len(weight), n_parts(weight)))
        return linear_of_few_rows(states, weight, bias)

    monkeypatch.setattr(head_module, "linear_of_few_rows", counting)
    assert head.most_likely(states).equal(expected)
    width = parts[0].stop
    assert shapes == [(4, width, 4)] * len(parts) and len(parts) > 1
