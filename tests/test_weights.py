# SPDX-License-Identifier: AGPL-3.0-or-later

"""Weights that are not plain numbers in a module: quantized, with a scale beside them, or offloaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from heretic_contrast.ablation.hooks import ablated, output_projections
from heretic_contrast.ablation.lora import (
    lora_factors,
    require_mergeable,
    set_factors,
    zero_factors,
)
from heretic_contrast.ablation.operator import compose
from heretic_contrast.errors import ContrastError
from heretic_contrast.evaluation.plan import SweepOptions
from heretic_contrast.evaluation.sweep import sweep
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.identity import weights_digest
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.offloading import is_offloaded
from heretic_contrast.prompts import Prompt
from heretic_contrast.tiers.responses import Tier
from heretic_contrast.weights import base_weight, require_known
from tests.tiny_models import make_model, make_tokenizer

PROMPTS = [Prompt("Plant a tree."), Prompt("Bake some bread, please."), Prompt("Go")]


def by_forward(layer: Any, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a module multiplies by, as its own forward pass shows."""

    with torch.no_grad():
        whole = layer(torch.eye(in_features, dtype=dtype))
        return (whole - layer(torch.zeros(1, in_features, dtype=dtype))).T.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["linear", "transposed"])
def test_plain_weights(dtype: torch.dtype, kind: str) -> None:
    layer = (Linear(6, 4, bias=False) if kind == "linear" else Conv1D(4, 6)).to(dtype)
    found = base_weight(layer)
    assert found.dtype == torch.float32 and found.shape == (4, 6)
    assert torch.allclose(found, by_forward(layer, 6, dtype), atol=1e-3)


def fp8_layer(out_features: int, in_features: int, **options: Any) -> Any:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    torch.manual_seed(0)
    layer = fp8.FP8Linear(in_features, out_features, **options)
    layer.weight.data = (100 * torch.randn(out_features, in_features)).to(torch.float8_e4m3fn)
    scales = layer.weight_scale_inv
    scales.data = (0.01 * torch.rand(scales.shape) + 0.001).to(scales.dtype)
    return layer


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((32, 48), {"block_size": (16, 16)}),
        ((40, 70), {"block_size": (16, 32)}),
        ((8, 200), {"block_size": (128, 128)}),
        ((32, 48), {"block_size": None}),
        pytest.param(
            (32, 64),
            {"block_size": (32, 32), "scale_fmt": "ue8m0"},
            marks=pytest.mark.skipif(
                not hasattr(torch, "float8_e8m0fnu"), reason="needs PyTorch 2.7"
            ),
        ),
    ],
)
def test_fp8_weights_are_scaled_by_block(shape: tuple[int, int], options: dict[str, Any]) -> None:
    layer = fp8_layer(*shape, **options)
    rows, columns = options["block_size"] or shape
    scales = layer.weight_scale_inv.detach().double().reshape(-(-shape[0] // rows), -1)
    codes = layer.weight.detach()
    expected = [
        [
            float(codes[row, column]) * float(scales[row // rows, column // columns])
            for column in range(shape[1])
        ]
        for row in range(shape[0])
    ]
    assert torch.allclose(base_weight(layer), torch.tensor(expected), rtol=1e-6)


def test_fp8_weights_are_those_that_transformers_dequantizes() -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = fp8_layer(32, 48, block_size=(16, 16))
    expected = fp8.Fp8Dequantize(None)._dequantize_one(
        layer.weight, layer.weight_scale_inv, torch.float32
    )
    assert torch.equal(base_weight(layer), expected)


def test_adapters_of_fp8_weights_have_digits_and_are_not_merged() -> None:
    class Network(Module):
        def __init__(self) -> None:
            super().__init__()
            self.o_proj = fp8_layer(32, 48, block_size=(16, 16))

    network: Any = get_peft_model(Network(), LoraConfig(r=2, target_modules=["o_proj"]))
    layer = network.base_model.model.o_proj
    factors = torch.randn(2, 48), torch.randn(32, 2)
    set_factors(layer, *factors)
    assert torch.equal(layer.lora_A["default"].weight, factors[0])
    assert torch.equal(layer.lora_B["default"].weight, factors[1])
    with pytest.raises(ContrastError, match="cannot be merged into the weights of FP8Linear"):
        require_mergeable([layer.get_base_layer()])


class Subclass(Linear):
    """Does something else with its weight."""

    def forward(self, states: Tensor) -> Tensor:
        return 2 * super().forward(states)


class Wrapped(Tensor):
    """A tensor whose numbers are elsewhere, as torchao's."""


def with_scale() -> Module:
    layer = Linear(6, 4)
    layer.register_buffer("weight_scale", torch.ones(4))
    return layer


def with_type(dtype: torch.dtype) -> Module:
    layer = Linear(6, 4)
    layer.weight = Parameter(torch.zeros(4, 6).to(dtype), requires_grad=False)
    return layer


def replaced() -> Module:
    # As compressed-tensors puts its own in front of a module's.
    layer = Linear(6, 4)
    layer.forward = lambda states: states  # type: ignore[method-assign]
    return layer


def wrapped() -> Module:
    layer = Linear(6, 4)
    layer.weight = Parameter(torch.zeros(4, 6).as_subclass(Wrapped), requires_grad=False)
    return layer


UNKNOWN: dict[str, Callable[[], Module]] = {
    "a scale": with_scale,
    "int8": lambda: with_type(torch.int8),
    "uint8": lambda: with_type(torch.uint8),
    "float8": lambda: with_type(torch.float8_e4m3fn),
    "a subclass": lambda: Subclass(6, 4),
    "another forward": replaced,
    "a tensor subclass": wrapped,
    "no weight": torch.nn.Identity,
    "a convolution": lambda: torch.nn.Conv1d(6, 4, 1),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_refused(name: str) -> None:
    for look in (require_known, base_weight):
        with pytest.raises(ContrastError, match="It is not known how"):
            look(UNKNOWN[name]())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model on disk whose layers bitsandbytes can quantize."""

    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    make_model("llama", attention_bias=True, **sizes).save_pretrained(folder)
    return folder


def loaded(folder: Path, **options: Any) -> LanguageModel:
    network = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    return wrap(network, make_tokenizer(), name="tiny", batch_size=4)


@pytest.fixture(scope="module")
def eight_bits(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that bitsandbytes has quantized to 8 bits."""

    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("eight")
    AutoModelForCausalLM.from_pretrained(
        tiny, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    ).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_weights_of_8_bits(tiny: Path, eight_bits: Path) -> None:
    plain, quantized = loaded(tiny), loaded(eight_bits, device_map="cpu")
    digest = weights_digest(quantized.model)
    for layer in range(plain.n_layers):
        pairs = zip(
            output_projections(quantized, layer, None),
            output_projections(plain, layer, None),
            strict=True,
        )
        for module, original in pairs:
            before = base_weight(module)
            expected = by_forward(module, before.shape[1], quantized.model.dtype)
            weight = original.weight.detach()
            largest = float(weight.abs().max())
            assert float((before - weight).abs().max()) <= largest / 127
            assert float((before - expected).abs().max()) <= largest / 127
            # The first pass moves the scales.
            assert torch.equal(base_weight(module), before)
    assert weights_digest(quantized.model) == digest
    projection = quantized.model.model.layers[2].mlp.down_proj
    scales = projection.weight.SCB if projection.state.SCB is None else projection.state.SCB
    scales[3] *= 1.01
    assert weights_digest(quantized.model) != digest


@pytest.mark.parametrize("nested", [True, False])
def test_digest_of_4_bits_is_that_of_the_codes(nested: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(
        256, 64, bias=False, compress_statistics=nested, quant_type="nf4"
    ).to("cpu")
    before = weights_digest(layer)
    # What the first forward pass does on some processors.
    layer.weight.data, state = bitsandbytes.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    packed = layer.weight.data.clone()
    assert weights_digest(layer) == before and torch.equal(layer.weight.data, packed)
    state.absmax[0, 0] *= 2
    assert weights_digest(layer) != before


def with_adapters(model: LanguageModel) -> Any:
    """A model with LoRA adapters as Heretic applies them, without effect yet."""

    named = {id(module): name for name, module in model.model.named_modules()}
    targets = [named[id(writer.module)] for writers in model.writers for writer in writers]
    configuration = LoraConfig(r=2, lora_alpha=2, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model.model, configuration)


def modify(network: Any, vectors: Tensor) -> None:
    """Writes the factors that ablate some directions everywhere."""

    operator = compose(vectors, torch.full((len(vectors),), 0.7))
    for module in network.modules():
        if hasattr(module, "lora_A"):
            zero_factors(module)
            set_factors(module, *lora_factors(operator, base_weight(module)))


@torch.no_grad()
def logits(network: Any) -> Tensor:
    ids = torch.arange(3, 15).view(2, 6)
    found: Tensor = network(input_ids=ids).logits.float()
    return found


def directions_of(model: LanguageModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(2, model.hidden_size, generator=generator)
    return vectors / vectors.norm(dim=1, keepdim=True)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_change_of_8_bits_is_that_of_the_hooks(eight_bits: Path) -> None:
    model = loaded(eight_bits, device_map="cpu")
    modules = [module for layer in range(4) for module in output_projections(model, layer, None)]
    operator = compose(directions_of(model), torch.full((2,), 0.7))
    unmodified = logits(model.model)
    with ablated(modules, operator):
        expected = logits(model.model)
    network = with_adapters(model)
    modify(network, directions_of(model))
    # Activations are rounded to 8 bits as well, at which the change is a few times as large.
    error = (logits(network) - expected).norm() / (unmodified - expected).norm()
    assert error < 0.2
    require_mergeable(modules)


WAYS = ("cpu", "disk", "part", "all")
"""accelerate's functions, and a limit of memory that some layers or none fit into."""


@pytest.fixture(scope="module", params=WAYS)
def offloaded(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], LanguageModel]:
    """Loads a model whose weights wait elsewhere."""

    def load() -> LanguageModel:
        if request.param in ("part", "all"):
            memory = {"cpu": "300KB" if request.param == "part" else "1KB"}
            return loaded(tiny, device_map="auto", max_memory=memory)
        model = loaded(tiny)
        device = torch.device("cpu")
        if request.param == "cpu":
            accelerate.cpu_offload(model.model, execution_device=device)
        else:
            folder = tmp_path_factory.mktemp("offloaded")
            accelerate.disk_offload(model.model, str(folder), execution_device=device)
        return model

    return load


def test_offloaded_weights_are_read(offloaded: Callable[[], LanguageModel], tiny: Path) -> None:
    plain, model = loaded(tiny), offloaded()
    devices = {parameter.device.type for parameter in model.model.parameters()}
    assert "meta" in devices and any(map(is_offloaded, model.model.modules()))
    assert model.identity() == plain.identity()
    assert torch.equal(model.residuals(PROMPTS), plain.residuals(PROMPTS))
    assert model.generate(PROMPTS, 5) == plain.generate(PROMPTS, 5)
    for layer in range(plain.n_layers):
        for module, original in zip(
            output_projections(model, layer, None),
            output_projections(plain, layer, None),
            strict=True,
        ):
            assert torch.equal(base_weight(module), original.weight)
    assert {parameter.device.type for parameter in model.model.parameters()} == devices


def test_offloaded_models_are_modified_and_saved(
    offloaded: Callable[[], LanguageModel], tiny: Path, tmp_path: Path
) -> None:
    plain, model = loaded(tiny), offloaded()
    vectors = directions_of(plain)
    expected, network = with_adapters(plain), with_adapters(model)
    for item in (expected, network):
        modify(item, vectors)
    assert torch.allclose(logits(network), logits(expected), atol=1e-5)
    if not hasattr(model.model, "hf_device_map"):
        # transformers saves only what it has offloaded itself.
        return
    network.merge_and_unload().save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(logits(saved), logits(expected), atol=1e-4)


@pytest.mark.slow
def test_offloaded_models_are_swept(offloaded: Callable[[], LanguageModel], tiny: Path) -> None:
    from tests.plain_sweeps import random_directions

    plain, model = loaded(tiny), offloaded()
    directions = {"one": random_directions(plain, 2, 0)}
    options = SweepOptions(layers=(1, 2), weights=(0.5, 1.5), max_new_tokens=6, kl_tokens=6)
    found, expected = (
        sweep(item, directions, PROMPTS, PROMPTS, PROMPTS, options, classify=lambda *_: Tier.REFUSE)
        for item in (model, plain)
    )
    for cell, other in zip(found.cells, expected.cells, strict=True):
        assert cell.responses == other.responses
        assert cell.measurement.kl_divergence == pytest.approx(
            other.measurement.kl_divergence, rel=1e-3, abs=1e-6
        )
