# SPDX-License-Identifier: AGPL-3.0-or-later

"""Checkpoints of experts in FP8 and MXFP4: hooks on them, and what is saved of them, against their values in full precision."""

import copy
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations import finegrained_fp8, hub_kernels, mxfp4
from transformers.quantizers import quantizer_finegrained_fp8, quantizer_mxfp4

from heretic_contrast.ablation.changes import require_known_writers
from heretic_contrast.ablation.hooks import Intervention, ablated_samples, ablated_writers
from heretic_contrast.ablation.operator import compose
from heretic_contrast.errors import ContrastError
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.weights import FULL_PRECISION
from tests.ablation.test_writers import states, unit_direction, worst
from tests.architectures import FAMILIES
from tests.plain_sweeps import changed_weights, random_directions

FAMILY = {"FP8": "Qwen3 MoE", "MXFP4": "gpt-oss, 4-bit"}
EXPERTS = {"FP8": "FP8Experts", "MXFP4": "Mxfp4GptOssExperts"}
BLOCK = 16
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FP4 = torch.cat([FP4, -FP4])

OLD = pytest.mark.skipif(
    transformers.__version__.startswith("5.16."),
    reason="transformers 5.16 loads no FP8 of models that it can spread over devices",
)
KINDS = [pytest.param("FP8", marks=OLD), "MXFP4"]

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(
            not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use"
        ),
    ],
)


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns codes, the scales of their blocks, and their values."""

    blocks = weight.unfold(0, BLOCK, BLOCK).unfold(1, BLOCK, BLOCK)
    scales = blocks.abs().amax(dim=(2, 3)) / 448
    spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return codes, scales, codes.float() * spread


def to_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns codes of shape (experts, out, in / 32, 16), exponents of (experts, out, in / 32), and values as (experts, in, out)."""

    groups = weight.transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1, keepdim=True) / 6).log2().ceil()
    codes = (groups[..., None] / exponents.exp2()[..., None] - FP4).abs().argmin(-1)
    values = (FP4[codes] * exponents.exp2()).flatten(2).transpose(1, 2)
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return packed, (exponents[..., 0] + 127).to(torch.uint8), values.contiguous()


def write(kind: str, folder: Path) -> LanguageModel:
    """Writes a checkpoint as such are published. Returns the model of its values, in full precision."""

    family = FAMILIES[FAMILY[kind]]
    network = family.make_model().float()
    network.save_pretrained(folder)
    file = folder / "model.safetensors"
    codes, values = load_file(file), load_file(file)
    for name, weight in load_file(file).items():
        if kind == "FP8" and name.endswith("_proj.weight"):
            codes[name], codes[f"{name}_scale_inv"], values[name] = to_fp8(weight)
        elif kind == "MXFP4" and name.endswith(("experts.down_proj", "experts.gate_up_proj")):
            del codes[name]
            codes[f"{name}_blocks"], codes[f"{name}_scales"], values[name] = to_mxfp4(weight)
    save_file(values, folder / "values.safetensors", {"format": "pt"})
    save_file(values, file, {"format": "pt"})
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    save_file(codes, file, {"format": "pt"})
    configuration = json.loads((folder / "config.json").read_text())
    configuration["quantization_config"] = (
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["lm_head"],
        }
        if kind == "FP8"
        else {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        }
    )
    (folder / "config.json").write_text(json.dumps(configuration))
    family.make_tokenizer().save_pretrained(folder)
    return wrap(reference, family.make_tokenizer(), name="values")


def fp8_kernels() -> Any:
    """The three functions that transformers takes from a library for GPUs, in full precision."""

    def values(weight: Tensor, scales: Tensor) -> Tensor:
        spread = scales.repeat_interleave(BLOCK, dim=-2).repeat_interleave(BLOCK, dim=-1)
        return weight.float() * spread

    def matmul(x: Tensor, weight: Tensor, scales: Tensor, *args: Any, **options: Any) -> Tensor:
        return x @ values(weight, scales).T

    def batched(x: Tensor, weight: Tensor, scales: Tensor, block_size: Any, expert_ids: Any) -> Any:
        return torch.einsum("soi,si->so", values(weight, scales)[expert_ids], x)

    def grouped(
        x: Tensor,
        weight: Tensor,
        scales: Tensor,
        offsets: Any,
        tokens_per_expert: Any,
        block_size: Any,
    ) -> Any:
        rows = torch.arange(len(weight)).repeat_interleave(tokens_per_expert.long())
        return batched(x, weight, scales, block_size, rows)

    return finegrained_fp8.FineGrainedFP8(matmul, batched, grouped)


def mxfp4_kernels() -> Any:
    """What transformers takes from a library for GPUs, in full precision, and with a routing of its own between the two halves."""

    def matmul(
        x: Tensor,
        weight: Any,
        bias: Tensor,
        routing: Any,
        precision_config: Any,
        gammas: Tensor | None,
        fused_activation: Any = None,
        **places: Any,
    ) -> Tensor:
        codes = weight.data.transpose(1, 2).long()
        pairs = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(2)
        exponents = precision_config.weight_scale.data.transpose(1, 2).float() - 127
        matrices = (FP4[pairs] * exponents.exp2().repeat_interleave(32, -1))[routing.experts]
        if x.ndim == 2:
            x = x[:, None].expand(-1, routing.experts.shape[1], -1)
        outputs = torch.einsum("teoi,tei->teo", matrices, x.float()) + bias[routing.experts]
        if gammas is not None:
            return (outputs * gammas[..., None]).sum(1).to(x.dtype)
        alpha, limit = fused_activation
        gate, up = outputs[..., ::2].clamp(max=limit), outputs[..., 1::2].clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)

    def route(logits: Tensor, count: int) -> Any:
        top = logits.topk(count)
        scales = top.values.softmax(-1)
        return SimpleNamespace(experts=top.indices, gate_scal=scales), None, None

    return SimpleNamespace(
        matmul_ogs=SimpleNamespace(
            PrecisionConfig=SimpleNamespace,
            FlexCtx=SimpleNamespace,
            InFlexData=SimpleNamespace,
            FnSpecs=lambda *args: None,
            FusedActivation=lambda specs, numbers, count: numbers,
            matmul_ogs=matmul,
        ),
        swiglu=SimpleNamespace(swiglu_fn=None),
        routing=SimpleNamespace(routing=route),
        tensor=SimpleNamespace(
            FP4=None,
            convert_layout=lambda tensor, layout, **options: tensor,
            wrap_torch_tensor=lambda tensor, dtype=None: SimpleNamespace(data=tensor),
        ),
        tensor_details=SimpleNamespace(
            layout=SimpleNamespace(
                StridedLayout=None,
                make_default_matmul_mxfp4_w_layout=lambda mx_axis: (None, {}),
            )
        ),
    )


@contextmanager
def without_gpu() -> Iterator[None]:
    """Lets transformers keep codes on this CPU as it does on a GPU, whose kernels functions of PyTorch stand in for."""

    with ExitStack() as stack:
        for owner, name, value in (
            (quantizer_finegrained_fp8.FineGrainedFP8HfQuantizer, "validate_environment", _nothing),
            (quantizer_mxfp4.Mxfp4HfQuantizer, "validate_environment", _nothing),
            (quantizer_mxfp4.Mxfp4HfQuantizer, "_process_model_before_weight_loading", _keep_mxfp4),
            (hub_kernels, "get_kernel", lambda *args, **kwargs: mxfp4_kernels()),
            (finegrained_fp8, "_FINEGRAINED_FP8", fp8_kernels()),
            (finegrained_fp8, "is_deepgemm_loadable", lambda: False),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _keep_mxfp4(quantizer: Any, network: Any, **kwargs: Any) -> None:
    """Prepares a network for codes, as on a GPU."""

    settings = quantizer.quantization_config
    left = settings.modules_to_not_convert
    quantizer.modules_to_not_convert = quantizer.get_modules_to_not_convert(
        network, left, network._keep_in_fp32_modules
    )
    mxfp4.replace_with_mxfp4_linear(
        network,
        modules_to_not_convert=quantizer.modules_to_not_convert,
        quantization_config=settings,
    )


def load(kind: str, folder: Path, device: str) -> LanguageModel:
    """Loads a checkpoint through transformers. Skips where a GPU has no kernels for its codes."""

    network: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device_map=device
    )
    name = type(network.model.layers[0].mlp.experts).__name__
    if device == "cuda" and name != EXPERTS[kind]:
        pytest.skip(f"transformers finds no kernels for {kind} here")
    if name != EXPERTS[kind]:
        # Experts of MXFP4 become weights of 16 bits, whatever is asked for; nothing is rounded on the way.
        network.float()
    return wrap(network, FAMILIES[FAMILY[kind]].make_tokenizer(), name="codes")


@pytest.mark.parametrize("place", ["dequantized", "codes", CUDA])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_are_dense_algebra_on_values(kind: str, place: str, tmp_path: Path) -> None:
    reference = write(kind, tmp_path)
    with without_gpu() if place == "codes" else nullcontext():
        model = load(kind, tmp_path, "cuda" if place == "cuda" else "cpu")
        experts = type(model.layers[0].get_submodule("mlp.experts")).__name__
        assert (experts == EXPERTS[kind]) == (place != "dequantized")
        # On a GPU activations are rounded as well.
        tolerance = 0.05 if place == "cuda" else 1e-3
        assert model.component_names == reference.component_names == ["attn.o_proj", "mlp.experts"]
        vectors = torch.randn(2, model.hidden_size, generator=torch.Generator().manual_seed(3))
        operator = compose(vectors / 8, torch.tensor([0.9, 0.4]))
        change = operator.vectors.T.double() @ operator.kernel.double() @ operator.vectors.double()
        base = states(reference)[-1]
        scale = float(base.abs().max())
        assert float((states(model)[-1].cpu() - base).abs().max()) < tolerance * scale
        for component in model.component_names:
            chosen = [writer for writer in model.writers[1] if writer.component == component]
            with ablated_writers(chosen, operator):
                hooked = states(model)[-1].cpu()
            with changed_weights(reference, 1, change, (component,)):
                expected = states(reference)[-1]
            assert float((expected - base).abs().max()) > 5 * tolerance * scale
            assert float((hooked - expected).abs().max()) < tolerance * scale
        # Nothing is missed, in a batch of which each sample has hooks of its own.
        direction = unit_direction(model)
        whole = Intervention(
            dict.fromkeys(range(model.n_layers), compose(direction[None], torch.ones(1)))
        )
        with ablated_samples(model, [whole] * 2):
            assert worst(model, direction.to(model.device)) < tolerance


class Buffered(torch.nn.Module):
    """A projection without parameters, as those of BitNet."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("codes", linear.weight.detach() * 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ (self.codes * self.scale).T  # type: ignore[operator]


def test_projections_without_parameters_are_ablated(tiny_llama: LanguageModel) -> None:
    direction = unit_direction(tiny_llama)
    operator = compose(direction[None], torch.ones(1))
    with ablated_writers(tiny_llama.writers[1], operator):
        expected = states(tiny_llama)[-1]
    network = copy.deepcopy(tiny_llama.model)
    for layer in network.model.layers:
        for place in ("self_attn.o_proj", "mlp.down_proj"):
            layer.set_submodule(place, Buffered(layer.get_submodule(place)))
    model = wrap(network, tiny_llama.tokenizer, name="buffers")
    assert model.component_names == tiny_llama.component_names
    with ablated_writers(model.writers[1], operator):
        found = states(model)[-1]
    torch.testing.assert_close(found, expected)
    with pytest.raises(ContrastError, match="Buffered"):
        require_known_writers(model, is_reloaded=False)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_refused_before_a_search(kind: str, tmp_path: Path) -> None:
    write(kind, tmp_path)
    with without_gpu():
        model = load(kind, tmp_path, "cpu")
        with pytest.raises(ContrastError, match=rf"{EXPERTS[kind]} \(mlp.experts\) keeps"):
            require_known_writers(model, is_reloaded=False)
    # What is saved is loaded anew in full precision.
    require_known_writers(model, is_reloaded=True)


@pytest.mark.parametrize("heretic", ["1.4", "2.0"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_not_codes(kind: str, heretic: str, tmp_path: Path) -> None:
    pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")
    from heretic_contrast.hosts.host_model import HostModel
    from heretic_contrast.hosts.loading import LoadedContext
    from heretic_contrast.modifier import ContrastAbliteration
    from heretic_contrast.search.parameters import Kernel, Parameters
    from heretic_contrast.settings import ContrastSettings
    from tests.contract.heretic2.heretic.model import Model as ModelOfHeretic2
    from tests.engine.test_architectures import heretic_settings

    reference = write(kind, tmp_path)
    directions = random_directions(reference, 1, 0)
    directions.save(tmp_path / "directions.safetensors")
    settings = heretic_settings(tmp_path, ["--export-strategy=merge"])
    host = (HostModel if heretic == "1.4" else ModelOfHeretic2)(settings)
    path = str(tmp_path / "directions.safetensors")
    contrast = ContrastSettings(directions=path, row_normalization="none")
    modifier = ContrastAbliteration(heretic_settings=settings, settings=contrast)
    context = LoadedContext(host)
    modifier.init(context)
    kernels = dict.fromkeys(reference.component_names, Kernel(1.0, 1.0, 1.0, 9.0))
    modifier.modify_model(context, Parameters(None, kernels, {directions.names[0]: 1.0}))
    host.get_merged_model().save_pretrained(tmp_path / "saved")

    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} <= set(FULL_PRECISION)
    assert saved.keys() == load_file(tmp_path / "values.safetensors").keys()
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    base = states(reference)[-1]
    with ExitStack() as stack:
        for layer in range(reference.n_layers):
            vector = directions.tensor[layer + 1].double()
            stack.enter_context(changed_weights(reference, layer, vector.T @ vector))
        expected = states(reference)[-1]
    found = states(wrap(network, reference.tokenizer, name="saved"))[-1]
    assert float((found - expected).norm()) < 0.05 * float((expected - base).norm())
