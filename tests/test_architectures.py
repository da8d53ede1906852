# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Every family of architectures whose layers Heretic 1.4 can ablate, as small models with random weights.

With `HERETIC_CONTRAST_WRITE_ARCHITECTURES=1` the run writes what it measured to `docs/architectures.md`.
"""

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

heretic_main = pytest.importorskip("heretic.main")
if not hasattr(heretic_main, "AbliterationParameters"):
    pytest.skip("needs the model class of Heretic 1.4", allow_module_level=True)

from heretic.config import Settings  # noqa: E402
from heretic.model import get_model_class  # noqa: E402
from heretic.utils import Prompt as HereticPrompt  # noqa: E402

from heretic_contrast.ablation import ablated, compose  # noqa: E402
from heretic_contrast.errors import ContrastError  # noqa: E402
from heretic_contrast.evaluation.interventions import output_projections  # noqa: E402
from heretic_contrast.evaluation.sweep import SweepOptions, sweep  # noqa: E402
from heretic_contrast.hosts.heretic14 import HostContext, HostModel  # noqa: E402
from heretic_contrast.hosts.surface import from_heretic, wrap  # noqa: E402
from heretic_contrast.language_model import LanguageModel  # noqa: E402
from heretic_contrast.modifier import ContrastAbliteration  # noqa: E402
from heretic_contrast.prompts import Prompt  # noqa: E402
from heretic_contrast.search import Kernel, Parameters  # noqa: E402
from heretic_contrast.settings import ContrastSettings  # noqa: E402
from tests.test_sweep import (  # noqa: E402
    CANARIES,
    HARMFUL,
    REFERENCES,
    always_refuse_at_base,
    changed_weights,
    full_divergence,
    random_directions,
)
from tests.tiny_models import make_tokenizer  # noqa: E402

TABLE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"

COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR_ATTENTION: dict[str, Any] = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "full_attention_interval": 4,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
CONVOLUTIONS: dict[str, Any] = {
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
}
GEMMA: dict[str, Any] = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}


@dataclass(frozen=True)
class Family:
    """A family of architectures: its model class, the configuration of a small model, and what is special."""

    model: str
    configuration: Callable[[], Any]
    remark: str = ""
    dtype: torch.dtype = torch.float32


def text(configuration: str, **options: Any) -> Callable[[], Any]:
    """Returns a function that makes a configuration of a language model."""

    return lambda: getattr(transformers, configuration)(**COMMON, **options)


def llava_configuration() -> Any:
    """A Llama with an eye of one layer."""

    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    return transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**COMMON), image_token_id=319
    )


def qwen_vision_configuration() -> Any:
    """The hybrid Qwen3.5 with an eye of one layer, as it is published."""

    return transformers.Qwen3_5Config(
        text_config={**COMMON, **LINEAR_ATTENTION},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "num_position_embeddings": 16,
        },
        image_token_id=316,
        video_token_id=317,
        vision_start_token_id=318,
        vision_end_token_id=319,
    )


def granite_configuration() -> Any:
    """Mamba layers and attention, shared and routed experts, and Granite's multipliers."""

    return transformers.GraniteMoeHybridConfig(
        **COMMON,
        layer_types=["mamba", "attention", "mamba", "attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=48,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=16,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        logits_scaling=2.0,
        position_embedding_type="rope",
    )


ROUTED = "Heretic does not find the routed experts, which transformers 5 keeps in one tensor."

FAMILIES = {
    "Llama": Family("LlamaForCausalLM", text("LlamaConfig")),
    "Llama, bfloat16": Family(
        "LlamaForCausalLM", text("LlamaConfig"), "16-bit weights.", torch.bfloat16
    ),
    "Mistral": Family(
        "MistralForCausalLM", text("MistralConfig", sliding_window=16), "Sliding window."
    ),
    "Qwen2": Family("Qwen2ForCausalLM", text("Qwen2Config"), "Biases before attention."),
    "Qwen3": Family("Qwen3ForCausalLM", text("Qwen3Config", head_dim=8)),
    "Qwen3 MoE": Family(
        "Qwen3MoeForCausalLM",
        text("Qwen3MoeConfig", head_dim=8, mlp_only_layers=[0], **EXPERTS),
        ROUTED,
    ),
    "Qwen3.5": Family(
        "Qwen3_5ForCausalLM",
        text("Qwen3_5TextConfig", **LINEAR_ATTENTION),
        "Linear and full attention.",
    ),
    "Qwen3.5 MoE": Family(
        "Qwen3_5MoeForCausalLM",
        text(
            "Qwen3_5MoeTextConfig",
            shared_expert_intermediate_size=16,
            **LINEAR_ATTENTION,
            **EXPERTS,
        ),
        f"{ROUTED} Nor the shared one.",
    ),
    "Qwen3.5 with vision": Family(
        "Qwen3_5ForConditionalGeneration", qwen_vision_configuration, "Text only."
    ),
    "Gemma": Family(
        "GemmaForCausalLM",
        text("GemmaConfig", head_dim=8),
        "Scaled embeddings, tied to the head.",
    ),
    "Gemma 2": Family(
        "Gemma2ForCausalLM",
        text("Gemma2Config", **GEMMA),
        "Capped logits; norms between the projections and the residual stream.",
    ),
    "Gemma 3": Family(
        "Gemma3ForCausalLM",
        text("Gemma3TextConfig", **GEMMA),
        "Norms between the projections and the residual stream.",
    ),
    "Phi-3": Family("Phi3ForCausalLM", text("Phi3Config"), "Fused input projections."),
    "Phi-3.5 MoE": Family(
        "PhimoeForCausalLM", text("PhimoeConfig", num_local_experts=4, attention_bias=True), ROUTED
    ),
    "LFM2": Family("Lfm2ForCausalLM", text("Lfm2Config", **CONVOLUTIONS), "Convolution layers."),
    "LFM2 MoE": Family(
        "Lfm2MoeForCausalLM",
        text("Lfm2MoeConfig", num_dense_layers=1, **CONVOLUTIONS, **EXPERTS),
        ROUTED,
    ),
    "Granite MoE hybrid": Family(
        "GraniteMoeHybridForCausalLM",
        granite_configuration,
        "Heretic finds neither the routed experts nor the output of Mamba layers.",
    ),
    "LLaVA": Family(
        "LlavaForConditionalGeneration", llava_configuration, "Llama with vision; text only."
    ),
}

UNSUPPORTED = {
    "Phi-1, Phi-2": (
        Family("PhiForCausalLM", text("PhiConfig")),
        "Heretic 1.4 knows neither of its output projections, `dense` and `fc2`.",
    ),
    "GPT-2": (
        Family(
            "GPT2LMHeadModel",
            lambda: transformers.GPT2Config(
                vocab_size=320, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
            ),
        ),
        "Heretic 1.4 looks for the layers in `model.layers`, not in `transformer.h`.",
    ),
    "GPT-NeoX": (
        Family(
            "GPTNeoXForCausalLM",
            lambda: transformers.GPTNeoXConfig(
                vocab_size=320,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
            ),
        ),
        "Heretic 1.4 looks for the layers in `model.layers`, not in `gpt_neox.layers`.",
    ),
    "Mamba": (
        Family(
            "MambaForCausalLM",
            lambda: transformers.MambaConfig(
                vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4
            ),
        ),
        "Heretic 1.4 looks for the layers in `model.layers`, not in `backbone.layers`.",
    ),
}

TEXTS = ["Hi.", "What is the capital of France?", "Plant a tree", "Name four colors, please.", "Go"]
PROMPTS = [Prompt(value) for value in TEXTS]
CHECKS = ("residuals", "hooks", "sweep", "export")

Rows = dict[str, dict[str, str]]


def make(family: Family) -> Any:
    """Returns a small model of a family, with random weights and biases."""

    torch.manual_seed(0)
    model = getattr(transformers, family.model)(family.configuration())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The default initialization is so small that every model answers alike.
            if parameter.ndim >= 2:
                parameter.mul_(6.0)
            elif name.endswith("proj.bias"):
                parameter.normal_()
    return model.to(family.dtype).eval()


@dataclass(frozen=True)
class Case:
    """
    One family: the model as it was made, and as Heretic loads it from disk, with the plugin's adapters.

    `tolerance` is the relative difference that rounding explains.
    """

    name: str
    plain: LanguageModel
    host: HostModel
    settings: Any
    modifier: ContrastAbliteration
    tolerance: float

    def ablate(self) -> None:
        """Writes the adapters: two directions in each layer, with different weights of the components."""

        self.modifier.modify_model(self.context, self.parameters)

    @property
    def context(self) -> HostContext:
        """What the plugin gets from its host."""

        return HostContext(self.host, self.settings)

    @property
    def parameters(self) -> Parameters:
        """Parameters that ablate every layer, the second direction half as much."""

        names = self.modifier.directions.names
        return Parameters(
            direction_index=None,
            kernels={
                name: Kernel(0.6 + 0.3 * index, 1.0, 0.4, 8.0)
                for index, name in enumerate(self.plain.component_names)
            },
            scales=dict(zip(names, (1.0, 0.5), strict=True)),
        )


def relative(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, in units of the largest expected number."""

    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


@torch.no_grad()
def logits(model: Any, wrapped: LanguageModel) -> Tensor:
    """Returns the logits at the last position of every prompt: (n_prompts, vocabulary)."""

    return model(**wrapped.tokenize(PROMPTS)).logits[:, -1].float()


pytestmark = pytest.mark.slow

UNTESTED = {
    "Qwen3.5 with vision": "its small model has no image processor, which Heretic loads",
    "LLaVA": "its small model has no image processor, which Heretic loads",
}
"""Families whose checks are still to be made possible, and why they are not."""

WITHOUT_ADAPTERS = {
    "Qwen3 MoE": "Heretic's LoRA adapters do not reach the dense layer's output projection",
}
"""Families that hooks ablate, but LoRA adapters do not."""


@pytest.fixture(scope="module")
def rows() -> Iterator[Rows]:
    """What the tests measure by family; becomes the table in the documentation on request."""

    measured: Rows = defaultdict(dict)
    yield measured
    if os.environ.get("HERETIC_CONTRAST_WRITE_ARCHITECTURES"):
        TABLE.write_text(table(measured), encoding="utf-8")


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A family's model, in memory and on disk."""

    if request.param in UNTESTED:
        pytest.skip(UNTESTED[request.param])
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = make(family), make_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    plain = wrap(model, tokenizer, name=request.param, batch_size=4)
    random_directions(plain, 2, 0).save(folder / "directions.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["heretic", f"--model={folder}", "--batch-size=4"])
        patch.chdir(folder)
        settings = Settings()
    host = HostModel(settings)
    modifier = ContrastAbliteration(
        heretic_settings=settings,
        settings=ContrastSettings.model_validate(
            {"directions": str(folder / "directions.safetensors")}
        ),
    )
    modifier.init(HostContext(host, settings))
    tolerance = 1e-4 if family.dtype is torch.float32 else 0.05
    return Case(request.param, plain, host, settings, modifier, tolerance)


def test_residuals_equal_heretic(case: Case, rows: Rows) -> None:
    case.host.reset_model()
    system = case.settings.system_prompt
    expected = case.host.get_residuals_batched(
        [HereticPrompt(system=system, user=value) for value in TEXTS]
    )
    found = from_heretic(case.host, case.settings).residuals(PROMPTS)
    assert found.dtype == torch.float32 and found.shape == (5, case.plain.n_layers + 1, 32)
    difference = max(
        relative(found[:, layer], expected[:, layer]) for layer in range(found.shape[1])
    )
    assert difference <= case.tolerance
    rows[case.name]["residuals"] = f"{difference:.0e}"


def test_hooks_equal_adapters(case: Case, rows: Rows) -> None:
    if case.name in WITHOUT_ADAPTERS:
        with pytest.raises(ContrastError, match="carries no LoRA adapter"):
            case.ablate()
        return
    base = logits(case.plain.model, case.plain)
    case.host.reset_model()
    assert relative(logits(case.host.model, case.plain), base) <= case.tolerance
    case.ablate()
    with_adapters = logits(case.host.model, case.plain)
    case.host.reset_model()

    parameters = case.parameters
    scales = torch.tensor(list(parameters.scales.values()))
    with ExitStack() as stack:
        for layer in range(case.plain.n_layers):
            vectors = case.modifier.directions.tensor[layer + 1]
            for component in case.plain.components[layer]:
                weights = scales * parameters.kernels[component].weight(layer)
                modules = output_projections(case.plain, layer, (component,))
                stack.enter_context(ablated(modules, compose(vectors, weights)))
        with_hooks = logits(case.plain.model, case.plain)
    difference = relative(with_hooks, with_adapters)
    assert relative(with_hooks, base) > 10 * max(difference, 1e-3) or difference == 0
    assert relative(with_hooks, base) > 0.03
    assert difference <= case.tolerance
    rows[case.name]["hooks"] = f"{difference:.0e}"


def test_sweep_equals_changed_weights(case: Case, rows: Rows) -> None:
    model = case.plain
    directions = random_directions(model, 2, 1)
    options = SweepOptions(
        layers=(1, 2), weights=(1.0,), max_new_tokens=12, kl_tokens=6, top_k=320, synergy_size=0
    )
    result = sweep(
        model,
        {"two": directions},
        HARMFUL,
        CANARIES,
        REFERENCES,
        options,
        classify=always_refuse_at_base(model, HARMFUL),
    )
    cells = [cell for cell in result.cells if len(cell.layers) == 1]
    assert [cell.layers for cell in cells] == [(1,), (2,)]
    assert result.floor == pytest.approx(0, abs=1e-5 if case.tolerance < 0.01 else 0.02)
    for cell in cells:
        assert cell.measurement.kl_divergence > 0
        if model.model.dtype is not torch.float32:
            # Rounding of 16 bits decides between tokens that are equally likely in a random model.
            continue
        vectors = directions.tensor[cell.layers[0] + 1].double()
        change = vectors.T @ vectors

        def changed(layer: int = cell.layers[0], change: Tensor = change) -> Any:
            return changed_weights(model, layer, change)

        with changed():
            assert list(cell.responses) == model.generate(HARMFUL, 12)
            assert list(cell.canary_responses) == model.generate(CANARIES, 12)
        assert cell.measurement.kl_divergence == pytest.approx(
            full_divergence(model, changed, 6), rel=1e-2, abs=1e-5
        )
    rows[case.name]["sweep"] = "runs" if model.model.dtype is not torch.float32 else "equal"


def test_export_and_reload(case: Case, rows: Rows, tmp_path: Path) -> None:
    if case.name in WITHOUT_ADAPTERS:
        pytest.skip(WITHOUT_ADAPTERS[case.name])
    case.host.reset_model()
    case.ablate()
    expected = logits(case.host.model, case.plain)
    merged = case.host.get_merged_model()
    merged.save_pretrained(tmp_path)
    reloaded = get_model_class(str(tmp_path)).from_pretrained(tmp_path)
    assert reloaded.dtype == case.plain.model.dtype
    difference = relative(logits(reloaded, case.plain), expected)
    assert difference <= case.tolerance
    # After an export Heretic loads the model again.
    case.modifier.reset_model(case.context)
    base = logits(case.plain.model, case.plain)
    assert relative(logits(case.host.model, case.plain), base) <= case.tolerance
    case.ablate()
    assert relative(logits(case.host.model, case.plain), expected) <= 1e-6
    case.host.reset_model()
    rows[case.name]["export"] = f"{difference:.0e}"


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_architectures_say_so(name: str) -> None:
    family, _ = UNSUPPORTED[name]
    with pytest.raises(ContrastError, match=f"{family.model}.*not supported"):
        wrap(make(family), make_tokenizer(), name=name)


def component_summary(model: LanguageModel) -> str:
    """Returns the components with the number of layers that have them."""

    counts = {
        name: sum(name in modules for modules in model.components) for name in model.component_names
    }
    return ", ".join(
        f"`{name}`" if count == model.n_layers else f"`{name}` ({count} of {model.n_layers} layers)"
        for name, count in counts.items()
    )


def fixed_cells(name: str) -> str:
    """Returns the part of a table row that does not depend on rounding."""

    family = FAMILIES[name]
    model = wrap(make(family), make_tokenizer(), name=name)
    return f"| {name} | `{family.model}` | {component_summary(model)} |"


def sentence(reason: str) -> str:
    """Returns a reason as a sentence of its own; nothing for none."""

    return f"{reason[0].upper()}{reason[1:]}." if reason else ""


def table(measured: Rows) -> str:
    """Returns the page of the documentation."""

    lines = [
        "# Architectures",
        "",
        "The families of architectures whose layers Heretic 1.4 can ablate, each as a small model of four layers with random",
        "weights, made from its own configuration. This page is written by the tests:",
        "",
        "```",
        "HERETIC_CONTRAST_WRITE_ARCHITECTURES=1 pytest tests/test_architectures.py",
        "```",
        "",
        "- **Residuals**: those that the plugin extracts against Heretic's own, in every layer.",
        "- **Hooks**: logits of the model ablated with forward hooks against those with LoRA adapters.",
        "- **Sweep**: responses and divergence of every cell against a model with changed weights, two layers.",
        "- **Export**: logits of the merged, saved and reloaded model against those with LoRA adapters.",
        "",
        "Numbers are the largest relative difference. With 16-bit weights, rounding alone makes such differences, and the sweep",
        "is only run, since rounding decides between the almost equal tokens of a random model.",
        "",
        "| Family | Model | Components | Residuals | Hooks | Sweep | Export | Remarks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, family in FAMILIES.items():
        cells = " | ".join(measured[name].get(check, "not run") for check in CHECKS)
        remark = " ".join(
            filter(None, [family.remark, sentence({**UNTESTED, **WITHOUT_ADAPTERS}.get(name, ""))])
        )
        lines.append(f"{fixed_cells(name)} {cells} | {remark} |")
    lines += [
        "",
        "Components without a count are in every layer. What Heretic does not find is neither ablated nor swept.",
        "",
        "## Not supported",
        "",
        "| Family | Model | Reason |",
        "|---|---|---|",
    ]
    for name, (family, reason) in UNSUPPORTED.items():
        lines.append(f"| {name} | `{family.model}` | {reason} |")
    return "\n".join(lines) + "\n"


def test_table_is_up_to_date() -> None:
    page = TABLE.read_text(encoding="utf-8")
    for name in FAMILIES:
        assert fixed_cells(name) in page
    for name, (family, reason) in UNSUPPORTED.items():
        assert f"| {name} | `{family.model}` | {reason} |" in page
    for line in page.splitlines():
        family = line.split(" | ")[0].removeprefix("| ")
        if family in FAMILIES and family not in UNTESTED and family not in WITHOUT_ADAPTERS:
            assert "not run" not in line
