# SPDX-License-Identifier: AGPL-3.0-or-later

"""Embeddings that are ablated with the first layer: by hooks, in a study, in a sweep, and in the model that is saved."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import optuna
import pytest
import torch
import transformers
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM

from heretic_contrast.ablation.changes import Changes, require_editable, subtract
from heretic_contrast.ablation.hooks import Intervention, ablated_samples
from heretic_contrast.ablation.operator import compose
from heretic_contrast.ablation.writers import Writer, find_embeddings, with_embeddings
from heretic_contrast.engine.check import checked_engine
from heretic_contrast.engine.fast.engine import FastEngine
from heretic_contrast.errors import ContrastError
from heretic_contrast.evaluation.plan import Configuration, SweepOptions
from heretic_contrast.evaluation.sweep import sweep
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.search.parameters import Kernel, Parameters, suggest_parameters
from heretic_contrast.settings import ContrastSettings
from tests.ablation.test_writers import EXACT, model_of, states, unit_direction
from tests.engine.test_architectures import Case, logits, make_case, relative
from tests.plain_sweeps import (
    CANARIES,
    HARMFUL,
    REFERENCES,
    always_refuse_at_base,
    changed_weights,
    full_divergence,
    known_references,
    random_directions,
)
from tests.tiny_models import SIZES, build, make_tokenizer

KINDS = ["Llama", "Gemma 2", "GPT-2"]
"""A head of its own; scaled, and shared with the head; positions besides, and shared with the head."""

ALL = [pytest.param(name, marks=[] if name in KINDS else [pytest.mark.slow]) for name in EXACT]


def worst(model: LanguageModel, direction: Tensor) -> float:
    """Returns the largest |v·h_l| / ‖h_l‖ of any layer and token, from what enters the first layer on."""

    return max(
        float(((state @ direction).abs() / state.norm(dim=-1)).max()) for state in states(model)
    )


def everything(case: Case, *scales: float) -> Parameters:
    """Parameters of weight 1 in all layers, and of the embeddings, times a scale for each direction."""

    names = case.modifier.model(case.context).component_names
    assert "embeddings" in names
    kernels = {name: Kernel(1.0, 0.0, 1.0, 99.0) for name in names}
    kernels["embeddings"] = Kernel(1.0, 0.0, 0.0, 0.0)
    return Parameters(None, kernels, dict(zip(case.modifier.directions.names, scales, strict=True)))


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_nothing_of_a_direction_is_in_the_stream(name: str, tmp_path: Path) -> None:
    case = make_case(name, tmp_path / "model", embeddings=True)
    model = case.plain
    # Its norms write, too: see test_writers.py.
    nothing = 0.5 if name == "Gemma 3n" else 1e-4
    direction = unit_direction(model)
    tensor = case.modifier.directions.tensor
    tensor[:, 0] = direction
    scales = (1.0, 0.0)
    operators = {
        layer: compose(tensor[layer + 1], torch.tensor(scales)) for layer in range(model.n_layers)
    }
    assert worst(model, direction) > 0.01
    intervention = Intervention(operators, embeddings=True)
    # Where the first layer is not ablated, neither are the embeddings.
    last = Intervention({3: operators[3]}, embeddings=True)
    base = logits(model.model, model)
    with ablated_samples(model, [intervention]):
        assert worst(model, direction) < nothing
        hooked = logits(model.model, model)
    assert relative(hooked, base) > 0.01
    with ablated_samples(model, [intervention, last]):
        first, second = states(model)[0]
    assert float((first @ direction).abs().max()) < 1e-4 < float((second @ direction).abs().max())

    head = case.host.model.get_output_embeddings().weight.clone()
    before = states(model)
    # With adapters that change nothing, Mamba adds up in another order.
    start = logits(case.host.model, model)
    assert relative(start, base) < 1e-5
    case.modifier.modify_model(case.context, everything(case, *scales))
    assert relative(logits(case.host.model, model), hooked) < 1e-4
    case.modifier.reset_model(case.context)
    assert torch.equal(logits(case.host.model, model), start)
    assert all(map(torch.equal, states(model), before))

    case.modifier.modify_model(case.context, everything(case, *scales))
    network = case.host.model.get_base_model()
    is_tied = network.get_output_embeddings().weight is network.get_input_embeddings().weight
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        case.host.get_merged_model().save_pretrained(tmp_path / "saved")
    assert any("a head of its own" in str(item.message) for item in said) == is_tied
    kind = type(model.model) if case.family.processor else AutoModelForCausalLM
    reloaded = kind.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(reloaded.get_output_embeddings().weight, head)
    saved = wrap(reloaded, model.tokenizer, name)
    assert worst(saved, direction) < nothing
    assert relative(logits(reloaded, model), hooked) < 1e-4
    # Heretic loads the model anew after an export.
    case.modifier.reset_model(case.context)
    assert torch.equal(logits(case.host.model, model), start)


@pytest.mark.parametrize("name", ["GPT-2", "Qwen3 MoE"])
@torch.no_grad()
def test_a_model_without_its_adapters_is_the_original(name: str, tmp_path: Path) -> None:
    """Heretic's menu benchmarks it so, with biases, embeddings and experts that no adapter changes."""

    case = make_case(name, tmp_path / "model", embeddings=True)
    original = logits(case.host.model, case.plain)
    case.modifier.modify_model(case.context, everything(case, 0.9, 0.4))
    modified, first_layer = logits(case.host.model, case.plain), case.modifier.changes.first_layer
    with case.host.model.disable_adapter():
        assert torch.equal(logits(case.host.model, case.plain), original)
    assert torch.equal(logits(case.host.model, case.plain), modified)
    assert case.modifier.changes.first_layer == first_layer == -1
    assert relative(modified, original) > 0.01


@pytest.mark.parametrize("name", ["GPT-2", "gpt-oss"])
@pytest.mark.filterwarnings("ignore:The output head shares", "ignore:Attempting to save")
@torch.no_grad()
def test_a_model_that_waits_on_disk_is_saved_with_all_changes(name: str, tmp_path: Path) -> None:
    options = ['--max-memory={"cpu": "1KB"}']
    case = make_case(name, tmp_path / "model", options=options, embeddings=True)
    original = logits(case.plain.model, case.plain)
    head = case.plain.model.get_output_embeddings().weight
    case.modifier.modify_model(case.context, everything(case, 0.9, 0.4))
    modified = logits(case.host.model, case.plain)
    case.host.get_merged_model().save_pretrained(tmp_path / "saved")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(reloaded.get_output_embeddings().weight, head)
    assert relative(logits(reloaded, case.plain), modified) < 1e-4 < relative(modified, original)
    assert not reloaded.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["GPT-2", "Qwen3 MoE"])
@pytest.mark.filterwarnings("ignore:The output head shares", "ignore:Attempting to save")
@torch.no_grad()
def test_weights_that_wait_in_memory_are_changed_and_saved(name: str, tmp_path: Path) -> None:
    model = with_embeddings(model_of(name))
    head = model.model.get_output_embeddings().weight.clone()
    accelerate.cpu_offload(model.model, execution_device=torch.device("cpu"))
    # transformers saves only what it has offloaded itself.
    model.model.hf_device_map = {"": "cpu"}
    original = logits(model.model, model)
    changes, operator = Changes(), compose(unit_direction(model)[None], torch.ones(1))
    for layer, writers in enumerate(model.writers):
        for writer in writers:
            changes.add(layer, writer, operator)
    modified = logits(model.model, model)
    changes.write(model.model, model.layers)
    changes.undo()
    assert relative(logits(model.model, model), modified) < 1e-4 < relative(modified, original)
    model.model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(reloaded.get_output_embeddings().weight, head)
    assert relative(logits(reloaded, model), modified) < 1e-4


def test_weights_without_data_are_refused() -> None:
    writer = Writer("mlp.down_proj", "", torch.nn.Linear(4, 6, bias=False, device="meta"))
    with pytest.raises(ContrastError, match=r"mlp.down_proj have no data"):
        subtract(writer, compose(torch.ones(1, 6), torch.ones(1)))


ZAMBA: dict[str, Any] = {
    "layers_block_type": ["mamba", "hybrid"] * 2,
    "num_key_value_heads": 4,
    "mamba_d_state": 8,
    "n_mamba_heads": 4,
    "mamba_headdim": 16,
    "mamba_ngroups": 1,
    "num_mem_blocks": 1,
    "chunk_size": 16,
    "use_mamba_kernels": False,
}


@pytest.mark.parametrize("name", ["Zamba", "Zamba2"])
@pytest.mark.filterwarnings("ignore:The output head shares")
@torch.no_grad()
def test_blocks_that_layers_share_are_saved_beside_a_new_head(name: str, tmp_path: Path) -> None:
    """The setting that ties the head to the embeddings is also that of the blocks."""

    configuration = getattr(transformers, f"{name}Config")(**{**SIZES, **ZAMBA})
    network = build(f"{name}ForCausalLM", configuration)
    model = wrap(network, make_tokenizer(), name=name)
    direction = unit_direction(model)
    expected = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    table = expected["model.embed_tokens.weight"]
    table -= (table @ direction)[:, None] * direction
    changes = Changes()
    (embeddings,) = find_embeddings(model)
    changes.add(0, embeddings, compose(direction[None], torch.ones(1)))
    changes.write(network, model.layers)
    changes.undo()
    network.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    found = reloaded.state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.allclose(found[key], expected[key], atol=1e-5)] == []
    assert torch.equal(logits(reloaded, model), logits(network, model))


@torch.no_grad()
def test_a_table_of_embeddings_loses_the_operator() -> None:
    """By dense algebra, for several directions and weights below 1, behind a number that scales the embeddings."""

    model = model_of("Gemma 2")
    vectors = torch.randn(3, model.hidden_size, generator=torch.Generator().manual_seed(3)) / 5
    operator = compose(vectors, torch.tensor([0.9, 0.4, 0.7]), "sequential")
    identity = torch.eye(model.hidden_size, dtype=torch.float64)
    rest = identity
    for vector, weight in zip(vectors.double(), (0.9, 0.4, 0.7), strict=True):
        rest = rest @ (identity - weight * torch.outer(vector, vector))
    table = model.model.get_input_embeddings().weight.double()
    expected = (table @ rest.T)[torch.arange(40, 52).view(2, 6)] * model.hidden_size**0.5
    (embeddings,) = find_embeddings(model)
    assert embeddings.gain is None
    with ablated_samples(model, [Intervention({0: operator}, embeddings=True)] * 2):
        assert relative(states(model)[0], expected.float()) < 1e-3


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
@torch.no_grad()
def test_sweep_ablates_embeddings_with_the_first_layer(name: str) -> None:
    model = model_of(name, batch_size=4)
    directions = random_directions(model, 2, 1)
    options = SweepOptions(
        layers=(0, 1), weights=(1.0,), max_new_tokens=12, kl_tokens=6, top_k=320, synergy_size=0
    )
    classify = always_refuse_at_base(model, HARMFUL)
    known = known_references(model, 6)
    assert type(checked_engine(model, model.token_ids(HARMFUL))) is FastEngine
    with_embeddings = Configuration(directions, embeddings=True)
    result = sweep(
        model,
        {"plain": directions, "embedded": with_embeddings},
        *(HARMFUL, CANARIES, REFERENCES, options),
        classify=classify,
    )
    cells = {(cell.configuration, cell.layers[0]): cell for cell in result.cells}
    tables = [item.module.weight for item in find_embeddings(model)]
    assert len(tables) == (2 if name == "GPT-2" else 1)
    head = model.model.get_output_embeddings()
    original, own = [table.data for table in tables], head.weight
    divergences = []
    for (configuration, layer), cell in cells.items():
        vectors = directions.tensor[layer + 1].double()
        change = vectors.T @ vectors
        try:
            if configuration == "embedded" and layer == 0:
                head.weight = torch.nn.Parameter(own.detach().clone())
                for table in tables:
                    table.data = (table.double() - table.double() @ change).float()
            with changed_weights(model, layer, change):
                assert list(cell.responses) == model.generate(HARMFUL, 12)
                expected = full_divergence(model, known)
        finally:
            head.weight = own
            for table, data in zip(tables, original, strict=True):
                table.data = data
        assert cell.measurement.kl_divergence == pytest.approx(expected, rel=1e-2, abs=1e-5)
        divergences.append(cell.measurement.kl_divergence)
    assert cells["plain", 0].measurement != cells["embedded", 0].measurement
    assert cells["plain", 1].measurement == cells["embedded", 1].measurement
    assert with_embeddings.key() != Configuration(directions).key()


def test_presets_ablate_what_their_authors_do() -> None:
    found = {
        preset: ContrastSettings.model_validate({"preset": preset}).embeddings
        for preset in ("arditi", "som-sequential", "paper-unmatched", "som-summed")
    }
    assert found == {
        "arditi": True,
        "som-sequential": True,
        "paper-unmatched": False,
        "som-summed": False,
    }
    settings = ContrastSettings.model_validate({"preset": "arditi", "writers": "heretic"})
    assert not settings.embeddings
    with pytest.raises((ContrastError, ValidationError), match="Heretic ablates no embeddings"):
        ContrastSettings.model_validate({"embeddings": True, "writers": "heretic"})


def test_the_setting_that_leaves_embeddings_is_named(tiny_llama: LanguageModel) -> None:
    (embeddings,) = find_embeddings(tiny_llama)
    require_editable(embeddings)
    coded = torch.nn.Embedding(8, 4).to(torch.float8_e4m3fn)
    with pytest.raises(
        ContrastError, match=r"Embedding \(embeddings\).* with embeddings = false\."
    ):
        require_editable(replace(embeddings, module=coded))
    writer = replace(tiny_llama.writers[0][0], module=torch.nn.Identity())
    with pytest.raises(ContrastError, match=r"Identity .* with writers = heretic\."):
        require_editable(writer)


def test_embeddings_have_one_weight_in_the_search(tiny_llama: LanguageModel) -> None:
    directions = random_directions(tiny_llama, 1, 0)
    trial = optuna.create_study().ask()
    names = ["attn.o_proj", "embeddings"]
    parameters = suggest_parameters(trial, names, 4, directions)
    assert [name for name in trial.params if name.startswith("embeddings")] == [
        "embeddings.max_weight"
    ]
    kernel = parameters.kernels["embeddings"]
    assert kernel.weight(0) == max(0.0, trial.params["embeddings.max_weight"])
    trial = optuna.create_study().ask()
    space = {"embeddings.max_weight": (0.25, 0.25)}
    fixed = suggest_parameters(trial, names, 4, directions, space)
    assert fixed.kernels["embeddings"].weight(0) == 0.25
    shown = fixed.to_presentation_dict()
    assert [name for name in shown if name.startswith("embeddings")] == ["embeddings.max_weight"]


def test_an_adapter_without_embeddings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ContrastError, match=r"No LoRA adapter carries embeddings of .*embeddings = false"
    ):
        make_case(
            "Llama", tmp_path / "asked", embeddings=True, options=["--export-strategy=adapter"]
        )
    case = make_case("Llama", tmp_path / "model", embeddings=True, row_normalization="full")
    with pytest.raises(ContrastError, match="no LoRA adapter carries embeddings: merge it"):
        case.host.model.save_pretrained(tmp_path / "adapter")
    case.modifier.modify_model(case.context, everything(case, 1.0, 0.5))
    case.host.get_merged_model()
    # The model that is loaded again has none either.
    case.modifier.reset_model(case.context)
    with pytest.raises(ContrastError, match="no LoRA adapter carries embeddings: merge it"):
        case.host.model.save_pretrained(tmp_path / "adapter")
