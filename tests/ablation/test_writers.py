# SPDX-License-Identifier: AGPL-3.0-or-later

"""What adds to the residual stream, and that an ablation takes a direction out of all of it."""

import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from torch import Tensor

from heretic_contrast.ablation.changes import beyond_adapters, subtract
from heretic_contrast.ablation.hooks import (
    Intervention,
    ablated,
    ablated_samples,
    ablated_writers,
    missed_shares,
)
from heretic_contrast.ablation.operator import Composition, Operator, compose
from heretic_contrast.ablation.writers import find_embeddings, shared_components
from heretic_contrast.errors import ContrastError
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.language_model import LanguageModel
from tests.architectures import FAMILIES, Family
from tests.plain_sweeps import before_norms, changed_weights
from tests.tiny_models import SIZES, build, make_tokenizer

KINDS = ["Gemma 4 MoE", "gpt-oss", "GPT-2"]
"""Norms in a row and experts; transposed experts with biases; transposed weights with biases."""

EXACT = [name for name, family in FAMILIES.items() if family.dtype is torch.float32]
ALL = [pytest.param(name, marks=[] if name in KINDS else [pytest.mark.slow]) for name in EXACT]


def model_of(name: str, **options: Any) -> LanguageModel:
    family = FAMILIES[name]
    return wrap(family.make_model(), family.make_tokenizer(), name=name, **options)


def unit_direction(model: LanguageModel) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.nn.functional.normalize(torch.randn(model.hidden_size, generator=generator), dim=0)


@torch.no_grad()
def states(model: LanguageModel, whole: bool = False) -> list[Tensor]:
    """
    Returns what enters the first layer, and what leaves each that runs. Tensors of shape (2, 6, hidden_size).

    `whole`: all that layers pass on, where these are several states per token.
    """

    found: list[Tensor] = []

    def keep(passed: Any) -> None:
        first = passed[0] if isinstance(passed, tuple) else passed
        found.append(first if whole else model.stream(passed))

    with ExitStack() as stack:
        first = model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: keep(args or kwargs["hidden_states"]), with_kwargs=True
        )
        stack.callback(first.remove)
        for layer in model.layers:
            handle = layer.register_forward_hook(lambda module, args, output: keep(output))
            stack.callback(handle.remove)
        tokens = torch.arange(40, 52, device=model.device).view(2, 6)
        model.decoder()(input_ids=tokens, use_cache=False)
    return found


def worst(model: LanguageModel, direction: Tensor) -> float:
    """Returns the largest |v·h_l − v·h_0| / ‖h_l‖ of any layer and token."""

    first, *others = states(model)
    return max(
        float((((state - first) @ direction).abs() / state.norm(dim=-1)).max()) for state in others
    )


@pytest.mark.parametrize("name", [item for item in ALL if item.values != ("Gemma 3n",)])
def test_nothing_of_a_direction_is_written(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    direction = unit_direction(model)
    operator = compose(direction[None], torch.ones(1))
    assert worst(model, direction) > 0.01
    before = states(model)
    interventions = [Intervention(dict.fromkeys(range(model.n_layers), operator))] * 2
    with ablated_samples(model, interventions):
        assert worst(model, direction) < 1e-4
    assert all(map(torch.equal, states(model), before))
    for writers in model.writers:
        for writer in writers:
            subtract(writer, operator)
    assert worst(model, direction) < 1e-4
    assert missed_shares(model) == {}
    model.model.save_pretrained(tmp_path)
    reloaded = type(model.model).from_pretrained(tmp_path, dtype=torch.float32)
    assert worst(wrap(reloaded, model.tokenizer, name), direction) < 1e-4


@pytest.mark.parametrize("name", ALL)
def test_hooks_are_dense_algebra_component_by_component(name: str) -> None:
    model = model_of(name, writers="apart")
    vectors = torch.randn(2, model.hidden_size, generator=torch.Generator().manual_seed(3)) / 5
    operator = compose(vectors, torch.tensor([0.9, 0.4]))
    change = operator.vectors.T.double() @ operator.kernel.double() @ operator.vectors.double()
    base = states(model)[-1]
    for component in model.component_names:
        layer = next(
            index
            for index, writers in enumerate(model.writers)
            if component in {writer.component for writer in writers}
        )
        with ablated_writers(
            [writer for writer in model.writers[layer] if writer.component == component], operator
        ):
            hooked = states(model)[-1]
        with changed_weights(model, layer, change, (component,)):
            changed = states(model)[-1]
        assert float((hooked - base).abs().max()) > 1e-3 * float(base.abs().max())
        assert float((hooked - changed).abs().max()) < 1e-4 * float(base.abs().max())


@torch.no_grad()
def test_all_states_of_gemma_3n_lose_a_direction_but_for_their_norms() -> None:
    model = model_of("Gemma 3n")
    direction = unit_direction(model)
    operator = compose(direction[None], torch.ones(1))
    intervention = Intervention(dict.fromkeys(range(4), operator), embeddings=True)

    def left() -> float:
        return max(
            float(((state @ direction).abs() / state.norm(dim=-1)).max())
            for state in states(model, whole=True)
        )

    assert states(model, whole=True)[0].shape == (4, 2, 6, model.hidden_size)
    assert len(find_embeddings(model)) == 4
    with ablated_samples(model, [intervention]):
        with_norms = left()
        # A layer adds its normalized input in here.
        with ablated([layer.laurel for layer in model.layers], operator):
            assert left() < 1e-4
    assert 1e-3 < with_norms < left()
    with pytest.raises(ContrastError, match="pass on several hidden states per token"):
        model_of("Llama").stream(torch.zeros(2, 1, 3, 32))


@pytest.mark.skipif(not hasattr(transformers, "ZayaConfig"), reason="needs transformers with ZAYA")
@torch.no_grad()
def test_a_sum_of_scaled_states_is_no_norm() -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    configuration = transformers.ZayaConfig(
        **sizes, head_dim=8, num_experts=4, moe_intermediate_size=16, router_hidden_size=16
    )
    network = build("ZayaForCausalLM", configuration)
    model = wrap(network, make_tokenizer(), name="ZAYA")
    assert model.component_names == ["attn.o_proj", "mlp.experts"]
    assert {writer.norms for writers in model.writers for writer in writers} == {()}
    direction = unit_direction(model)
    operator = compose(direction[None], torch.ones(1))
    assert worst(model, direction) > 0.01
    with ablated_samples(model, [Intervention(dict.fromkeys(range(4), operator))] * 2):
        assert worst(model, direction) < 1e-4
    assert missed_shares(model) == {}
    # Unequal scales turn other parts of the states into the direction.
    network.model.layers[2].post_mlp_residual_scale.residual_scale[::2] = 2.0
    assert set(missed_shares(model)) == {2}


def test_what_heretic_finds_is_less() -> None:
    model = model_of("Qwen3-Next", writers="heretic")
    assert model.component_names == ["attn.o_proj"]
    assert not any(writer.with_bias for writers in model.writers for writer in writers)
    assert set(missed_shares(model)) == set(range(model.n_layers))
    every = model_of("Qwen3-Next")
    assert every.component_names == ["attn.o_proj", "mlp.experts", "mlp.shared_expert"]
    assert beyond_adapters(every) == ["mlp.experts"]


@pytest.mark.parametrize(
    ("name", "together", "own"),
    [
        ("Qwen3-Next", "attn.o_proj", {"linear_attn.out_proj": "linear_attn.out_proj"}),
        ("LFM2 MoE", "attn.o_proj", {"conv.out_proj": "conv.out_proj"}),
        ("Granite MoE hybrid", "mlp.down_proj", {"shared_mlp.output_linear": "mlp.shared_expert"}),
        ("Jamba", "", {}),
    ],
)
def test_components_apart(name: str, together: str, own: dict[str, str]) -> None:
    model = model_of(name)
    apart = wrap(model.model, model.tokenizer, name=name, writers="apart")
    for writers, others in zip(model.writers, apart.writers, strict=True):
        for writer, other in zip(writers, others, strict=True):
            assert other == replace(writer, component=own.get(writer.path, writer.component))
            assert (writer.component == together) >= (writer.path in own)
    assert set(own.values()) < set(apart.component_names)
    assert set(apart.component_names) - set(own.values()) <= set(model.component_names)
    assert shared_components(apart) == {
        component: together if component in own.values() else component
        for component in apart.component_names
    }
    # Whoever wraps it as before finds it as it was.
    again = wrap(model.model, model.tokenizer, name=name)
    assert again.component_names == model.component_names


def test_rounding_of_a_long_stream_is_no_missed_writer() -> None:
    family = FAMILIES["Qwen3-Next"]
    network = family.make_model().to(torch.bfloat16)
    with torch.no_grad():
        # Hundreds of times as long as what a layer adds.
        network.get_input_embeddings().weight.mul_(1000)
    found = wrap(network, family.make_tokenizer(), name="long")
    assert missed_shares(found, 0.01) == {}
    less = wrap(network, family.make_tokenizer(), name="long", writers="heretic")
    assert set(missed_shares(less, 0.02)) == set(range(less.n_layers))


@pytest.mark.parametrize("size", [1.0, 0.03])
def test_a_writer_that_is_not_found_is_noticed(
    size: float, capsys: pytest.CaptureFixture[str]
) -> None:
    family = FAMILIES["Llama"]
    network = family.make_model()
    layer = network.model.layers[2]
    original = layer.forward
    layer.forward = lambda states, **options: (
        original(states, **options) + size * states.roll(1, -1)
    )
    model = wrap(network, family.make_tokenizer(), name="odd")
    missed = missed_shares(model)
    assert set(missed) == {2}
    said = " ".join(capsys.readouterr().out.split())
    found = re.search(r"Layers 2 of odd have writers that were not found, .*? ([\d.]+) ?% of", said)
    assert found and float(found[1]) == pytest.approx(100 * missed[2], rel=0.1)


def test_a_model_without_writers_is_refused() -> None:
    family = FAMILIES["Llama"]
    network = family.make_model()
    for layer in network.model.layers:
        layer.forward = lambda states, **options: states
    with pytest.raises(ContrastError, match="Nothing was found in still that writes"):
        wrap(network, family.make_tokenizer(), name="still")


@pytest.mark.parametrize("n_directions", [1, 3])
def test_a_norm_behind_leaves_the_rest_of_the_operator(n_directions: int) -> None:
    generator = torch.Generator().manual_seed(n_directions)
    gain = torch.exp(1.2 * torch.randn(64, generator=generator, dtype=torch.float64))
    gain[:3] = 1e-6
    vectors = torch.randn(n_directions, 64, generator=generator)
    if n_directions == 3:
        # A direction that is a sum of others.
        vectors[2] = vectors[0] + vectors[1]
    operator = compose(vectors / 8, torch.rand(n_directions, generator=generator), "sequential")
    inputs = torch.randn(50, 64, generator=generator, dtype=torch.float64)
    behind = operator.behind(gain)

    def dense(item: Operator) -> Tensor:
        return item.mixed_vectors.T.double() @ item.vectors.double()

    wanted = gain * inputs - (gain * inputs) @ dense(operator).T
    found = gain * (inputs - inputs @ dense(behind).T)
    along = operator.vectors.double().T
    scale = float((gain * inputs).norm())
    assert float(((found - wanted) @ along).norm()) < 1e-5 * scale
    even = operator.behind(torch.full((64,), -3.0))
    assert torch.allclose(dense(even), dense(operator), atol=1e-6)


@pytest.mark.parametrize("n_directions", [1, 3])
def test_a_norm_that_takes_the_mean_away_leaves_the_rest(n_directions: int) -> None:
    generator = torch.Generator().manual_seed(n_directions)
    gain = 1 + 0.6 * torch.randn(64, generator=generator, dtype=torch.float64)
    vectors = torch.randn(n_directions, 64, generator=generator) / 8
    operator = compose(vectors, torch.rand(n_directions, generator=generator), "sequential")
    inputs = 2 + torch.randn(50, 64, generator=generator, dtype=torch.float64)
    behind = operator.behind(gain, centered=True)
    matrix, changed = (
        (item.mixed_vectors.T @ item.vectors).double() for item in (operator, behind)
    )
    norm = torch.diag(gain) @ (torch.eye(64, dtype=torch.float64) - 1 / 64)
    wanted = inputs @ norm.T @ (torch.eye(64, dtype=torch.float64) - matrix).T
    found = inputs @ (torch.eye(64, dtype=torch.float64) - changed).T @ norm.T
    assert float(((found - wanted) @ vectors.double().T).norm()) < 1e-5 * float(wanted.norm())
    # The mean is left as it is.
    assert float((inputs @ changed.T).mean(dim=1).abs().max()) < 1e-5
    # Along the mean such a norm writes nothing.
    mean = compose(torch.ones(1, 64) / 8, torch.ones(1)).behind(torch.ones(64), centered=True)
    assert float((mean.mixed_vectors.T @ mean.vectors).norm()) < 1e-5


@pytest.mark.parametrize("name", ["Bloom", "ModernBertDecoder"])
@torch.no_grad()
def test_embeddings_lose_a_direction_behind_a_norm_that_takes_the_mean_away(name: str) -> None:
    configuration = getattr(transformers, f"{name}Config")(**SIZES)
    family = Family(f"{name}ForCausalLM", lambda: configuration)
    network = family.make_model()
    (norm,) = (
        module
        for path, module in network.named_modules()
        if path.endswith(("word_embeddings_layernorm", "embeddings.norm"))
    )
    if norm.bias is not None:
        # What it adds by itself is no embedding's.
        norm.bias.zero_()
    model = wrap(network, family.make_tokenizer(), name=name)
    (embeddings,) = find_embeddings(model)
    assert embeddings.centered and torch.allclose(embeddings.gain.float(), norm.weight, atol=1e-3)
    direction = unit_direction(model)
    operator = compose(direction[None], torch.ones(1))

    def left() -> float:
        state = states(model)[0]
        return float(((state @ direction).abs() / state.norm(dim=-1)).max())

    assert left() > 0.1
    with ablated_samples(model, [Intervention({0: operator}, embeddings=True)] * 2):
        assert left() < 1e-5
    subtract(embeddings, operator)
    assert left() < 1e-5


@pytest.mark.parametrize("composition", get_args(Composition))
def test_a_weight_of_0_changes_nothing_behind_a_norm(composition: Composition) -> None:
    generator = torch.Generator().manual_seed(5)
    gain = 1 + 0.6 * torch.randn(64, generator=generator, dtype=torch.float64)
    # Of lengths that differ as those of trained directions do, and more.
    vectors = torch.randn(4, 64, generator=generator) * torch.tensor([[1e-7], [0.3], [0.1], [0.2]])
    weights = torch.tensor([5e13, 0.0, 20.0, 0.0])
    found, without = (
        compose(vectors[rows], weights[rows], composition)
        for rows in (torch.arange(4), torch.tensor([0, 2]))
    )
    matrices = [
        (item.mixed_vectors.T @ item.vectors).double()
        for item in (found.behind(gain), without.behind(gain), found)
    ]
    assert torch.allclose(matrices[0], matrices[1], rtol=1e-4, atol=1e-6)
    if composition != "sequential":
        # Dense algebra of a symmetric operator.
        assert torch.allclose(matrices[0], before_norms(matrices[2], gain), rtol=1e-4, atol=1e-5)
    nothing = compose(vectors, torch.zeros(4), composition).behind(gain)
    assert not nothing.mixed_vectors.any()
