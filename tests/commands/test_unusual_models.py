# SPDX-License-Identifier: AGPL-3.0-or-later

"""Whole commands on models that are offloaded, quantized, or refuse a system message."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForSequenceClassification,
    BitsAndBytesConfig,
)

from tests.architectures import FAMILIES
from tests.command_server import Server
from tests.conftest import DATA
from tests.engine.test_text_classification import write_classifier
from tests.small_runs import make_cases, study

pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")

pytestmark = pytest.mark.slow


def arguments(directory: Path, name: str, model: Path) -> list[str]:
    """The smallest run of a kind, with another model."""

    pools = [
        f"--{kind}-prompts.dataset={directory / f'{pool}-train.jsonl'}"
        for kind, pool in (("good", "harmless"), ("bad", "harmful"))
    ]
    given = make_cases(directory)[name].arguments
    return [
        *(item for item in given if item not in ("--model=builtin:refuser", "--layers=3,4,6")),
        *pools,
        f"--model={model}",
    ]


REFUSED = ["GPT-2", "GPT-NeoX", "Phi-1, Phi-2", "Falcon", "Mamba", "Jamba", "Nemotron-H"]
"""Families that Heretic refuses for the names of their layers."""

PARTLY_FOUND = ["StarCoder2", "Falcon-H1", "Bamba", "Granite MoE hybrid", "Gemma 3n"]
PARTLY_FOUND.append("Llama 3.2 with vision")


@pytest.mark.parametrize("name", REFUSED + PARTLY_FOUND)
def test_families_that_heretic_knows_in_part_or_not_at_all(
    name: str, tmp_path: Path, command_server: Server
) -> None:
    family = FAMILIES[name]
    family.save(tmp_path / "model")
    run(command_server, tmp_path, "extract", tmp_path / "model")
    # A random model does not refuse by itself, so that everything is taken for a refusal.
    classifier = write_classifier(tmp_path / "classifier", ("one", "other"))
    judge = BertForSequenceClassification.from_pretrained(classifier)
    torch.nn.init.constant_(judge.classifier.weight, 0)
    judge.classifier.bias.data.copy_(torch.tensor([1.0, 0.0]))
    judge.save_pretrained(classifier)
    labels = '--text-classifier-labels={"one": "REFUSE", "other": "COMPLY"}'
    folder, _ = run(
        command_server,
        tmp_path,
        "sweep",
        tmp_path / "model",
        *(f"--text-classifier={classifier}", labels),
    )
    cells = json.loads((folder / "output" / "sweep.json").read_text())["cells"]
    swept = {tuple(cell["layers"]) for cell in cells if len(cell["layers"]) == 1}
    assert swept == {
        (layer,) for layer in range(4) if (name, layer) != ("Llama 3.2 with vision", 1)
    }
    assert all(cell["measurement"]["kl_divergence"] > 0 for cell in cells)
    folder, _ = run(command_server, tmp_path, "search", tmp_path / "model")
    saved = getattr(transformers, family.model).from_pretrained(folder / "output" / "model")
    original = family.make_model()
    changed = [
        path
        for (path, weight), other in zip(
            saved.named_parameters(), original.parameters(), strict=True
        )
        if not torch.equal(weight, other)
    ]
    assert changed


def run(server: Server, directory: Path, name: str, model: Path, *options: str) -> tuple[Path, str]:
    """Runs a command to its end, and returns where, and what it said."""

    folder = directory / f"{name}-{len(list(directory.iterdir()))}"
    command = server.run([*arguments(directory, name, model), *options], folder)
    assert command.code == 0, command.output()[-3000:]
    return folder, command.output()


@pytest.fixture
def refusing(tmp_path: Path) -> Path:
    """The built-in refuser in a folder."""

    return Path(shutil.copytree(DATA / "refuser", tmp_path / "model"))


def run_all(server: Server, directory: Path, model: Path, *options: str) -> list[Path]:
    return [
        run(server, directory, name, model, *options)[0] for name in ("extract", "sweep", "search")
    ]


def logits_of(folder: Path) -> torch.Tensor:
    """Returns the logits of the model that a search has saved."""

    model = AutoModelForCausalLM.from_pretrained(folder / "output" / "model")
    return cast(torch.Tensor, model(input_ids=torch.arange(20, 40)[None]).logits)


def test_offloaded_models_give_the_same(
    refusing: Path, tmp_path: Path, command_server: Server
) -> None:
    whole = run_all(command_server, tmp_path, refusing)
    # Some layers fit into memory, and none.
    for memory in ("3MB", "1KB"):
        option = f'--max-memory={{"cpu": "{memory}"}}'
        extracted, swept, searched = zip(
            whole, run_all(command_server, tmp_path, refusing, option), strict=True
        )
        for path in (extracted[0] / "output").glob("*.safetensors"):
            expected, found = load_file(path), load_file(extracted[1] / "output" / path.name)
            for name, tensor in expected.items():
                assert torch.allclose(tensor.double(), found[name].double(), rtol=1e-4, atol=1e-5)
        cells = [
            json.loads((folder / "output" / "sweep.json").read_text())["cells"] for folder in swept
        ]
        for cell, other in zip(*cells, strict=True):
            assert cell["responses"] == other["responses"]
        trials = [study(folder / "checkpoints") for folder in searched]
        for trial, other in zip(*trials, strict=True):
            assert trial["params"] == other["params"]
            assert trial["values"] == pytest.approx(other["values"], rel=1e-2, abs=1e-3)
        assert torch.allclose(*map(logits_of, searched), atol=1e-3)


def test_checkpoints_of_8_bits_are_modified_as_in_full_precision(
    refusing: Path, tmp_path: Path, command_server: Server
) -> None:
    pytest.importorskip("bitsandbytes")
    quantized = Path(shutil.copytree(refusing, tmp_path / "quantized"))
    AutoModelForCausalLM.from_pretrained(
        refusing, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    ).save_pretrained(quantized)
    divergences = []
    for model in (refusing, quantized):
        folder, _ = run(
            command_server, tmp_path, "search", model, "--export-strategy=adapter", "--n-trials=2"
        )
        divergences.append(
            [trial["attributes"]["kl_divergence"] for trial in study(folder / "checkpoints")]
        )
    # The first trial has the same parameters; codes taken for weights gave a hundred times as much.
    assert divergences[1][0] == pytest.approx(divergences[0][0], rel=0.5, abs=0.02)


def quantize(model: Path, folder: Path, kind: str) -> None:
    """Writes a model with 8 bits of bitsandbytes, or with blocks of FP8 and their scales, as checkpoints are published."""

    if kind == "8 bits":
        pytest.importorskip("bitsandbytes")
        AutoModelForCausalLM.from_pretrained(
            model, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
        ).save_pretrained(folder)
        return
    weights = load_file(folder / "model.safetensors")
    for name, weight in list(weights.items()):
        if not name.endswith("_proj.weight"):
            continue
        blocks = weight.float().unfold(0, 64, 64).unfold(1, 64, 64)
        scales = blocks.abs().amax(dim=(2, 3)) / 448
        spread = scales.repeat_interleave(64, 0).repeat_interleave(64, 1)
        weights[name] = (weight.float() / spread).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scales
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    configuration = json.loads((folder / "config.json").read_text())
    configuration["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [64, 64],
        "modules_to_not_convert": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(configuration))


@pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:Merge lora module")
@pytest.mark.parametrize("kind", ["8 bits", "FP8"])
def test_merged_checkpoints_that_were_quantized_are_what_was_judged(
    refusing: Path, tmp_path: Path, command_server: Server, kind: str
) -> None:
    quantized = Path(shutil.copytree(refusing, tmp_path / "quantized"))
    quantize(refusing, quantized, kind)
    logits = {}
    for name, model in (("full", refusing), (kind, quantized)):
        options = ("--export-strategy=merge", "--n-trials=1", "--seed=1")
        folder, _ = run(command_server, tmp_path, "search", model, *options)
        merged = AutoModelForCausalLM.from_pretrained(folder / "output" / "model", dtype="float32")
        logits[name] = merged(input_ids=torch.arange(20, 40)[None]).logits
    # Codes that were read without their scales would be far away.
    error = (logits[kind] - logits["full"]).norm() / logits["full"].norm()
    assert 0 < error < 0.1


def test_templates_that_refuse_a_system_message(
    refusing: Path, tmp_path: Path, command_server: Server
) -> None:
    path = refusing / "chat_template.jinja"
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No') }}{% endif %}"
    path.write_text("{{ bos_token }}" + refusal + path.read_text())
    for name in ("extract", "search"):
        folder, output = run(command_server, tmp_path, name, refusing)
        assert output.count("refuses a system message") == 1
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "output" / "model")
    assert tokenizer.chat_template == path.read_text().rstrip("\n")
