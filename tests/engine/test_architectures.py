# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The families of architectures that users of Heretic try, as small models with random weights.

With `HERETIC_CONTRAST_WRITE_ARCHITECTURES=1` the run writes what it measured to `docs/architectures.md`.
"""

import gc
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import is_torchvision_available

heretic_main = pytest.importorskip("heretic.main")
if not hasattr(heretic_main, "AbliterationParameters"):
    pytest.skip("needs the model class of Heretic 1.4", allow_module_level=True)

from heretic.config import Settings  # noqa: E402
from heretic.utils import Prompt as HereticPrompt  # noqa: E402

from heretic_contrast.ablation.changes import takes_adapter  # noqa: E402
from heretic_contrast.ablation.hooks import ablated_writers, missed_shares  # noqa: E402
from heretic_contrast.ablation.operator import compose  # noqa: E402
from heretic_contrast.errors import ContrastError  # noqa: E402
from heretic_contrast.evaluation.plan import SweepOptions  # noqa: E402
from heretic_contrast.evaluation.sweep import sweep  # noqa: E402
from heretic_contrast.hosts import lora_targets  # noqa: E402
from heretic_contrast.hosts.host_model import HostModel  # noqa: E402
from heretic_contrast.hosts.loading import (  # noqa: E402
    LoadedContext,
    PlainModel,
    open_model,
)
from heretic_contrast.hosts.surface import from_heretic, wrap  # noqa: E402
from heretic_contrast.language_model import LanguageModel  # noqa: E402
from heretic_contrast.modifier import ContrastAbliteration  # noqa: E402
from heretic_contrast.offloading import input_device  # noqa: E402
from heretic_contrast.prompts import Prompt  # noqa: E402
from heretic_contrast.search.parameters import Kernel, Parameters  # noqa: E402
from heretic_contrast.settings import ContrastSettings  # noqa: E402
from tests.architectures import FAMILIES, Family  # noqa: E402
from tests.contract.heretic2.heretic.model import Model as ModelOfHeretic2  # noqa: E402
from tests.plain_sweeps import (  # noqa: E402
    CANARIES,
    HARMFUL,
    REFERENCES,
    always_refuse_at_base,
    changed_weights,
    full_divergence,
    known_references,
    random_directions,
)

TABLE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"

TEXTS = ["Hi.", "What is the capital of France?", "Plant a tree", "Name four colors, please.", "Go"]
PROMPTS = [Prompt(value) for value in TEXTS]
CHECKS = ("residuals", "hooks", "sweep", "export")

Rows = dict[str, dict[str, str]]

TORCHVISION = "Qwen3VLVideoProcessor requires the Torchvision library but it was not found in your environment."

PAGE = """\
# Architectures

Families of architectures that users of Heretic 1.4 are likely to try, each as a small model of four layers with random
weights, made from its own configuration of transformers, saved, and loaded by Heretic. This page is written by the
tests:

```sh
HERETIC_CONTRAST_WRITE_ARCHITECTURES=1 pytest -m thorough tests/engine/test_architectures.py
```

- **Residuals**: those that the plugin extracts against Heretic's own, in every layer.
- **Hooks**: logits of the model ablated with forward hooks against those with LoRA adapters.
- **Sweep**: responses and divergence of every cell against a model with changed weights, two layers.
- **Export**: logits of the merged, saved and reloaded model against those with LoRA adapters; for 4-bit weights,
  against weights in full precision with the same change.

Numbers are the largest relative difference. With 16-bit and 4-bit weights, rounding alone makes such differences, and
the sweep is only run, since rounding decides between the almost equal tokens of a random model. The ablation itself
moves the logits of every family by more than 0.05.

| Family | Model | Writers found | Missed | Heretic alone | Residuals | Hooks | Sweep | Export | Remarks |
|---|---|---|---|---|---|---|---|---|---|
{supported}

Components without a count are in every layer. **Missed** is what a direction at weight 1, on all writers that were found, leaves
in what a layer adds to the residual stream, in the worst layer; it is given where rounding does not explain it. **Heretic alone**
is what Heretic 1.4 finds by its names, which `--contrast.writers heretic` ablates. All gains and biases are random, since the
equal gains of a fresh model hide what norms behind projections do. [writers.md](writers.md) explains the rest.

**Experts** that stand in one tensor, biases, and outputs of Mamba are ablated by hooks during a search, and changed when the model is
saved, so that only merged models can be saved. Heretic 1.4 looks for modules, and finds no experts.

**Mixtures with dense layers** (GLM-4, DeepSeek, ERNIE 4.5, EXAONE and others). PEFT reads the target
`model.layers.0.mlp.down_proj` of such a model as a name of transformers 4, and puts adapters on the experts instead of
on the dense layer. Heretic alone then stops with `'Linear' object has no attribute 'base_layer'`. The plugin makes PEFT take
the names literally.

**Vision.** Heretic loads a model with vision together with its processor, and gives it text alone. The processors of
Qwen and Mistral 3 need torchvision, without which Heretic cannot load these models:
`{torchvision}`
Here they are loaded with a processor of images alone, which changes nothing in the model.

**4-bit weights.** On processors with AVX-512 BF16 instructions bitsandbytes reorders the bits of a weight in its first
forward pass. The plugin restores the order before it computes adapters; Heretic 1.4 alone does not, and what it ablates
there is wrong.

Models whose code is not part of transformers, such as InternLM, were not tried.
"""


@dataclass(frozen=True)
class Case:
    """
    One family: the model on which hooks work, and the one that Heretic loads from disk, with the plugin's adapters.

    `tolerance` is the relative difference that rounding explains.
    """

    name: str
    plain: LanguageModel
    host: HostModel
    settings: Any
    modifier: ContrastAbliteration
    tolerance: float

    @property
    def family(self) -> Family:
        """The family."""

        return FAMILIES[self.name]

    @property
    def exact(self) -> bool:
        """Whether the model computes in float32."""

        return self.tolerance < 0.01

    def ablate(self, parameters: Parameters | None = None) -> None:
        """Writes the adapters: two directions in each layer, with different weights of the components."""

        self.modifier.modify_model(self.context, parameters or self.parameters)

    @property
    def context(self) -> LoadedContext:
        """What the plugin gets from its host."""

        return LoadedContext(self.host)

    @property
    def parameters(self) -> Parameters:
        """Parameters that ablate every layer, the second direction half as much."""

        names = self.modifier.directions.names
        return Parameters(
            direction_index=None,
            kernels={
                name: Kernel(1.0 + 0.5 * index, 1.0, 0.8, 8.0)
                for index, name in enumerate(self.plain.component_names)
            },
            scales=dict(zip(names, (1.0, 0.5), strict=True)),
        )

    def of(self, component: str) -> Parameters:
        """Returns the same parameters for one component alone."""

        others = dict.fromkeys(self.parameters.kernels, Kernel(0.0, 1.0, 0.0, 8.0))
        kernel = self.parameters.kernels[component]
        return replace(self.parameters, kernels={**others, component: kernel})


def relative(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, in units of the largest expected number."""

    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


@torch.no_grad()
def logits(model: Any, wrapped: LanguageModel) -> Tensor:
    """Returns the logits at the last position of every prompt: (n_prompts, vocabulary)."""

    device = input_device(model)
    inputs = {name: ids.to(device) for name, ids in wrapped.tokenize(PROMPTS).items()}
    return model(**inputs).logits[:, -1].float().cpu()


pytestmark = [pytest.mark.slow, pytest.mark.thorough]


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Keeps what is loaded already out of the garbage collections that Heretic asks for after each batch."""

    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def rows() -> Rows:
    """What the tests measure by family; becomes the table in the documentation on request."""

    return defaultdict(dict)


def heretic_settings(folder: Path, options: Sequence[str] = ()) -> Any:
    """Returns Heretic's settings for a model in a folder, as parsed from its command line."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["heretic", f"--model={folder}", "--batch-size=4", *options])
        patch.chdir(folder)
        return Settings()


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A family's model, in memory and on disk."""

    return make_case(request.param, tmp_path_factory.mktemp("model"), writers="apart")


def make_case(
    name: str,
    folder: Path,
    model_class: Any = HostModel,
    options: Sequence[str] = (),
    **contrast: Any,
) -> Case:
    """Saves a family's model to a folder, and loads it through Heretic."""

    family = FAMILIES[name]
    family.save(folder)
    settings = heretic_settings(folder, [*family.options, *options])
    if family.quantized:
        plain = from_heretic(open_model(settings), settings).identified()
    else:
        writers = contrast.get("writers", "all")
        plain = wrap(
            family.make_model(), family.make_tokenizer(), name=name, batch_size=4, writers=writers
        )
    random_directions(plain, 2, 0).save(folder / "directions.safetensors")
    host = model_class(settings)
    modifier = ContrastAbliteration(
        heretic_settings=settings,
        settings=ContrastSettings.model_validate(
            {
                "directions": str(folder / "directions.safetensors"),
                "row_normalization": "none",
                **contrast,
            }
        ),
    )
    modifier.init(LoadedContext(host))
    tolerance = 1e-4 if family.dtype is torch.float32 else 0.05
    return Case(name, plain, host, settings, modifier, tolerance)


def test_residuals_equal_heretic(case: Case, rows: Rows) -> None:
    case.host.reset_model()
    found = from_heretic(case.host, case.settings).residuals(PROMPTS)
    assert found.dtype == torch.float32 and found.shape == (
        5,
        case.plain.n_layers + 1,
        case.plain.hidden_size,
    )
    if case.name == "Gemma 3n":
        expected = active_states(case)
    else:
        system = case.settings.system_prompt
        expected = case.host.get_residuals_batched(
            [HereticPrompt(system=system, user=value) for value in TEXTS]
        )
    if case.name == "Mamba":
        # Its hidden states begin after the first layer in transformers, and so in Heretic.
        expected = torch.cat([found[:, :1], expected[:, :-2], expected[:, -1:]], dim=1)
    if case.name == "Llama 3.2 with vision":
        # Layer 1 is for images, and Heretic has no residual of it.
        expected = torch.cat([expected[:, :2], expected[:, 1:]], dim=1)
    assert expected.shape == found.shape
    difference = max(
        relative(found[:, layer], expected[:, layer]) for layer in range(found.shape[1])
    )
    assert difference <= case.tolerance
    rows[case.name]["residuals"] = f"{difference:.0e}"


@torch.no_grad()
def active_states(case: Case) -> Tensor:
    """Returns the first of the four states per token that transformers gives, of which Heretic makes no residuals."""

    decoder = case.plain.decoder()
    output = decoder(**case.plain.tokenize(PROMPTS), output_hidden_states=True)
    states = [state[0, :, -1] for state in output.hidden_states[:-1]]
    return torch.stack([*states, output.last_hidden_state[:, -1]], dim=1)


def test_hooks_equal_adapters(case: Case, rows: Rows) -> None:
    base = logits(case.plain.model, case.plain)
    case.host.reset_model()
    pristine = logits(case.host.model, case.plain)
    weights = {key: value.clone() for key, value in own_weights(case.host.model).items()}
    assert relative(pristine, base) <= case.tolerance
    case.ablate()
    with_adapters = logits(case.host.model, case.plain)
    case.host.reset_model()
    # To the bit.
    assert weights.keys() == own_weights(case.host.model).keys()
    for key, value in own_weights(case.host.model).items():
        assert torch.equal(value, weights[key]), key
    assert torch.equal(logits(case.host.model, case.plain), pristine)

    with_hooks = logits_with_hooks(case)
    difference = relative(with_hooks, with_adapters)
    assert relative(with_hooks, base) > 10 * max(difference, 1e-3) or difference == 0
    assert relative(with_hooks, base) > 0.05
    assert difference <= case.tolerance
    rows[case.name]["hooks"] = f"{difference:.0e}"


def own_weights(model: Any) -> dict[str, Tensor]:
    """Returns all parameters and buffers of a model but its adapters."""

    # A dictionary of its state would reorder what bitsandbytes keeps.
    named = (*model.named_parameters(), *model.named_buffers())
    return {key: value for key, value in named if "lora_" not in key}


def logits_with_hooks(case: Case, parameters: Parameters | None = None) -> Tensor:
    """Returns the logits of the model in memory, ablated with forward hooks as `Case.ablate` does with adapters."""

    parameters = parameters or case.parameters
    scales = torch.tensor(list(parameters.scales.values()))
    with ExitStack() as stack:
        for layer in range(case.plain.n_layers):
            vectors = case.modifier.directions.tensor[layer + 1]
            for writer in case.plain.writers[layer]:
                weights = scales * parameters.kernels[writer.component].weight(layer)
                stack.enter_context(ablated_writers([writer], compose(vectors, weights)))
        return logits(case.plain.model, case.plain)


def test_sweep_equals_changed_weights(case: Case, rows: Rows) -> None:
    model = case.plain
    directions = random_directions(model, 2, 1)
    # Without an image, layer 1 of Llama 3.2 writes nothing.
    layers = (2, 3) if case.name == "Llama 3.2 with vision" else (1, 2)
    options = SweepOptions(
        layers=layers, weights=(1.0,), max_new_tokens=12, kl_tokens=6, top_k=320, synergy_size=0
    )
    arguments = (model, {"two": directions}, HARMFUL, CANARIES, REFERENCES, options)
    classify = always_refuse_at_base(model, HARMFUL)
    result = sweep(*arguments, classify=classify)
    cells = [cell for cell in result.cells if len(cell.layers) == 1]
    assert [cell.layers for cell in cells] == [(layer,) for layer in layers]
    assert result.floor == pytest.approx(0, abs=1e-5 if case.exact else 0.02)
    known = known_references(model, 6)
    for cell in cells:
        assert cell.measurement.kl_divergence > 0
        if not case.exact:
            # Rounding of 16 bits decides between tokens that are equally likely in a random model.
            continue
        vectors = directions.tensor[cell.layers[0] + 1].double()
        change = vectors.T @ vectors
        with changed_weights(model, cell.layers[0], change):
            assert list(cell.responses) == model.generate(HARMFUL, 12)
            assert list(cell.canary_responses) == model.generate(CANARIES, 12)
            expected = full_divergence(model, known)
        assert cell.measurement.kl_divergence == pytest.approx(expected, rel=1e-2, abs=1e-5)
    rows[case.name]["sweep"] = "equal" if case.exact else "runs"


def test_export_and_reload(case: Case, rows: Rows, tmp_path: Path) -> None:
    case.host.reset_model()
    case.ablate()
    with_adapters = logits(case.host.model, case.plain)
    expected = full_precision_logits(case) if case.family.quantized else with_adapters
    merged = case.host.get_merged_model()
    merged.save_pretrained(tmp_path)
    case.host.tokenizer.save_pretrained(tmp_path)
    if case.host.processor is not None:
        case.host.processor.save_pretrained(tmp_path)
    reloaded = PlainModel(heretic_settings(tmp_path))
    assert reloaded.model.dtype == case.family.dtype
    assert type(reloaded.processor) is type(case.host.processor)
    difference = relative(logits(reloaded.model, case.plain), expected)
    assert difference <= case.tolerance
    # After an export Heretic loads the model again.
    case.modifier.reset_model(case.context)
    base = logits(case.plain.model, case.plain)
    assert relative(logits(case.host.model, case.plain), base) <= case.tolerance
    case.ablate()
    assert relative(logits(case.host.model, case.plain), with_adapters) <= 1e-6
    case.host.reset_model()
    rows[case.name]["export"] = f"{difference:.0e}"


def test_each_component_is_exported_by_itself(case: Case, tmp_path: Path) -> None:
    names = case.plain.component_names
    base = logits(case.plain.model, case.plain)
    # A single one is all there is, which is exported above.
    for name in names if len(names) > 1 else ():
        case.host.reset_model()
        case.ablate(case.of(name))
        hooked = logits_with_hooks(case, case.of(name))
        assert relative(logits(case.host.model, case.plain), hooked) <= case.tolerance, name
        expected = full_precision_logits(case) if case.family.quantized else hooked
        case.host.get_merged_model().save_pretrained(tmp_path / name)
        reloaded = type(case.plain.model).from_pretrained(tmp_path / name, dtype=case.family.dtype)
        found = logits(reloaded, case.plain)
        assert relative(found, expected) <= case.tolerance, name
        assert relative(found, base) > 3 * case.tolerance, name
        case.modifier.reset_model(case.context)


@torch.no_grad()
def full_precision_logits(case: Case) -> Tensor:
    """Returns the logits of the model before its quantization, plus the change that the adapters make, and what is beyond them."""

    model = wrap(case.family.make_model(), case.plain.tokenizer, name=case.name)
    for adapted, plain in zip(
        from_heretic(case.host, case.settings).writers, model.writers, strict=True
    ):
        for writer, original in zip(adapted, plain, strict=True):
            layer = writer.module
            if not takes_adapter(writer):
                continue
            factor_a, factor_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            weight = original.module.weight
            weight += (factor_b.float() @ factor_a.float()).to(weight.dtype)
    # By dense algebra.
    for layer_index, writer, operator, is_adapted in case.modifier.changes._kept:
        matrix = operator.mixed_vectors.T @ operator.vectors
        module: Any = next(
            item.module for item in model.writers[layer_index] if item.path == writer.path
        )
        changed = [module.bias] if is_adapted else [*module.down_proj, module.down_proj_bias]
        for rows in changed:
            rows -= (rows.float() @ matrix.T).to(rows.dtype)
    return logits(model.model, model)


def test_peft_misreads_dense_layers_of_mixtures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("Qwen3 MoE, one dense layer", tmp_path)
    case.ablate()
    with pytest.raises(ContrastError, match="cannot be saved by itself"):
        case.host.model.save_pretrained(tmp_path / "adapter")
    # Where PEFT reads the names in its own way, the plugin says so.
    monkeypatch.setattr(lora_targets, "literal_targets", lambda: nullcontext([]))
    case.host.needs_reload = True
    case.modifier.reset_model(case.context)
    with pytest.raises(ContrastError, match=r"down_proj of layer 0 carries no LoRA adapter"):
        case.ablate()


@pytest.mark.parametrize("name", ["Qwen3 MoE, one dense layer", "DeepSeek V3"])
def test_dense_layers_of_mixtures_under_heretic_2(name: str, tmp_path: Path) -> None:
    """Heretic 2.0's model applies adapters when the modifier says so, and once more after it was loaded again."""

    case = make_case(name, tmp_path, ModelOfHeretic2)
    expected = logits_with_hooks(case)
    for _ in range(2):
        case.ablate()
        assert relative(logits(case.host.model, case.plain), expected) <= case.tolerance
        with pytest.raises(ContrastError, match="cannot be saved by itself"):
            case.host.model.save_pretrained(tmp_path / "adapter")
        merged = case.host.get_merged_model()
        assert relative(logits(merged, case.plain), expected) <= case.tolerance
        case.modifier.reset_model(case.context)
        base = logits(case.plain.model, case.plain)
        assert relative(logits(case.host.model, case.plain), base) <= case.tolerance


def test_adapters_that_hold_the_whole_change_are_saved(tmp_path: Path) -> None:
    case = make_case("Qwen3 MoE", tmp_path / "all")
    with pytest.raises(ContrastError, match=r"no LoRA adapter carries mlp\.experts: merge it"):
        case.host.model.save_pretrained(tmp_path / "adapter")
    case = make_case("Qwen3 MoE", tmp_path / "heretic", writers="heretic")
    case.host.model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_what_experts_cannot_do_is_said_before_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ContrastError, match=r"No LoRA adapter carries mlp.experts of "):
        make_case("Qwen3 MoE", tmp_path, options=["--export-strategy=adapter"])
    capsys.readouterr()
    make_case("Qwen3 MoE", tmp_path, row_normalization="full")
    said = " ".join(capsys.readouterr().out.split())
    assert "The rows of mlp.experts are not normalized, since no adapter changes them" in said


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_processor_of_videos_needs_torchvision(tmp_path: Path) -> None:
    FAMILIES["Qwen3.5 with vision"].save(tmp_path)
    # Published models have these two files instead.
    (tmp_path / "processor_config.json").unlink()
    for name, kind, value in (
        ("preprocessor_config.json", "image_processor_type", "Qwen2VLImageProcessorFast"),
        ("video_preprocessor_config.json", "video_processor_type", "Qwen3VLVideoProcessor"),
    ):
        content = {"processor_class": "Qwen3VLProcessor", kind: value}
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ContrastError, match=re.escape(TORCHVISION)):
        open_model(heretic_settings(tmp_path))


def component_summary(model: LanguageModel) -> str:
    """Returns the components with the number of layers that have them."""

    counts = {
        name: sum(any(writer.component == name for writer in writers) for writers in model.writers)
        for name in model.component_names
    }
    return ", ".join(
        f"`{name}`" if count == model.n_layers else f"`{name}` ({count} of {model.n_layers} layers)"
        for name, count in counts.items()
    )


@cache
def fixed_cells(name: str) -> str:
    """Returns the part of a table row that does not depend on rounding."""

    family = FAMILIES[name]
    model = wrap(family.make_model(), family.make_tokenizer(), name=name)
    missed = missed_shares(model)
    left = f"{max(missed.values()):.0%} left" if missed else "none"
    try:
        alone = component_summary(wrap(model.model, model.tokenizer, name=name, writers="heretic"))
    except ContrastError:
        alone = "refused"
    return (
        f"| {name} | `{family.model}` | {component_summary(model)} | {left} | "
        f"{'the same' if alone == component_summary(model) else alone} |"
    )


def table(measured: Rows) -> str:
    """Returns the page of the documentation."""

    supported = [
        f"{fixed_cells(name)} {' | '.join(measured[name][check] for check in CHECKS)} | {family.remark} |"
        for name, family in FAMILIES.items()
    ]
    return PAGE.format(supported="\n".join(supported), torchvision=TORCHVISION)


def test_table_is_up_to_date(rows: Rows) -> None:
    if os.environ.get("HERETIC_CONTRAST_WRITE_ARCHITECTURES"):
        assert all(set(rows[name]) == set(CHECKS) for name in FAMILIES), "a check failed"
        TABLE.write_text(table(rows), encoding="utf-8")
    page = TABLE.read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    documented: Rows = {}
    for name, line in zip(FAMILIES, lines[1:], strict=False):
        assert line.startswith(fixed_cells(name))
        cells = line.removeprefix(fixed_cells(name)).split("|")
        documented[name] = dict(zip(CHECKS, (cell.strip() for cell in cells), strict=False))
    # Rounding differs between machines.
    assert page == table(documented)
