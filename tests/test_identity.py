# SPDX-License-Identifier: AGPL-3.0-or-later

"""What decides numbers: everything that may be used again is told apart from what only looks like it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import create_trial
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from heretic_contrast import cli, identity
from heretic_contrast.directions.directions import Directions
from heretic_contrast.directions.extraction import extract
from heretic_contrast.directions.pools import Pools
from heretic_contrast.directions.residuals import cached_residuals
from heretic_contrast.engine.judge import JudgeModel
from heretic_contrast.errors import ContrastError, ContrastWarning
from heretic_contrast.evaluation import storage as storage_module
from heretic_contrast.evaluation.plan import Configuration, SweepOptions, plan_sweep
from heretic_contrast.evaluation.sweep import SweepEvaluator, run_cells
from heretic_contrast.hosts.surface import from_heretic, wrap
from heretic_contrast.identity import NAMES, differences, identify, weights_digest
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.leases import open_storage
from heretic_contrast.prompts import Prompt
from heretic_contrast.settings import ContrastSettings
from heretic_contrast.tiers.responses import Tier
from tests.engine.test_judge import write_keyword_judge
from tests.made_directions import make_directions, random_tensor
from tests.tiny_models import CHAT_TEMPLATE, SIZES, build, make_model, make_tokenizer

ROOT = Path(__file__).resolve().parents[1]

PROMPTS = [Prompt("Plant a tree."), Prompt("Bake some bread, please."), Prompt("Go")]

POOLS = Pools(
    harmful=tuple(Prompt(f"Break {name}!") for name in "abc"),
    bulk=tuple(Prompt(f"Bake {name}.") for name in "abc"),
    matched=(),
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model on disk."""

    folder = tmp_path_factory.mktemp("original")
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""

    return Path(shutil.copytree(original, tmp_path / "copy"))


def load(folder: Path, **options: Any) -> LanguageModel:
    """A model as a command loads it."""

    network = AutoModelForCausalLM.from_pretrained(folder, **options)
    return wrap(network.eval(), AutoTokenizer.from_pretrained(folder), name="tiny", batch_size=4)


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def other_positions(folder: Path) -> None:
    edit_json(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 500.0})


def other_epsilon(folder: Path) -> None:
    edit_json(folder / "config.json", rms_norm_eps=0.01)


def added_beginning(folder: Path) -> None:
    """The tokenizer is told to put a token in front of every text."""

    edit_json(
        folder / "tokenizer.json",
        post_processor={
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {
                "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
            },
        },
    )


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("assistant", "model"))


def changed(folder: Path, change: Callable[[Any], None]) -> None:
    """Changes the weights on disk."""

    network = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        change(network)
    network.save_pretrained(folder)


def two_rows(folder: Path) -> None:
    # Those of letters, which a sample of a few elements does not meet.
    changed(folder, lambda network: network.get_input_embeddings().weight[72:74].mul_(1.5))


EDITS: dict[str, tuple[Callable[[Path], None], str]] = {
    "rope_theta": (other_positions, "configuration"),
    "epsilon": (other_epsilon, "configuration"),
    "beginning": (added_beginning, "tokenizer"),
    "template": (other_template, "tokenizer"),
    "two rows": (two_rows, "weights"),
}
"""What may happen to a model's folder, and the part of its identity that tells."""


@pytest.mark.parametrize("name", EDITS)
def test_residuals_and_directions_of_a_changed_model_are_made_anew(
    name: str, folder: Path, tmp_path: Path
) -> None:
    edit, part = EDITS[name]
    before = load(folder)
    kept = cached_residuals(before, PROMPTS, tmp_path / "cache")
    settings = ContrastSettings(preset=["arditi"])
    settings = settings.model_copy(update={"residual_cache": str(tmp_path / "cache")})
    made = extract(before, POOLS, settings, lambda line: None)
    made.save(tmp_path / "directions.safetensors")

    edit(folder)
    after = load(folder)
    assert before.identity()[part] != after.identity()[part]
    expected = after.residuals(PROMPTS)
    assert not torch.equal(expected, kept)
    assert torch.equal(cached_residuals(after, PROMPTS, tmp_path / "cache"), expected)
    with pytest.raises(ContrastError, match="another model of the same shape"):
        Directions.load(tmp_path / "directions.safetensors").require_model(after, "the file")
    fresh = settings.model_copy(update={"residual_cache": str(tmp_path / "none")})
    assert torch.equal(
        extract(after, POOLS, settings, lambda line: None).tensor,
        extract(after, POOLS, fresh, lambda line: None).tensor,
    )


def test_same_model_elsewhere_is_the_same(folder: Path, original: Path, tmp_path: Path) -> None:
    first, second = load(original), load(folder)
    assert first.identity() == second.identity()
    kept = cached_residuals(first, PROMPTS, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    time = path.stat().st_mtime_ns
    assert torch.equal(cached_residuals(second, PROMPTS, tmp_path / "cache"), kept)
    assert path.stat().st_mtime_ns == time and len(list(path.parent.iterdir())) == 1


def test_other_ways_to_load_a_model(original: Path) -> None:
    plain = load(original).identity()
    for options, part in (
        ({"dtype": torch.bfloat16}, "dtype"),
        ({"attn_implementation": "eager"}, "configuration"),
    ):
        found = load(original, **options).identity()
        assert found[part] != plain[part]


def test_other_settings_have_other_residuals(original: Path, tmp_path: Path) -> None:
    model = load(original).identified()
    for other in (
        model,
        replace(model, system_prompt="Be rude."),
        replace(model, response_prefix="Well,"),
        replace(model, winsorization_quantile=0.5),
        # Other prompts beside a prompt round it otherwise.
        replace(model, batch_size=1),
    ):
        found = cached_residuals(other, PROMPTS, tmp_path)
        assert torch.equal(found, other.residuals(PROMPTS))
    assert len(list(tmp_path.iterdir())) == 5


@torch.no_grad()
def test_every_bit_and_every_buffer_belongs_to_the_weights() -> None:
    network = make_model("llama")
    digests = [weights_digest(network)]
    weight = network.model.layers[3].mlp.up_proj.weight
    weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(torch.inf))
    digests.append(weights_digest(network))
    network.model.rotary_emb.inv_freq[3] *= 2
    digests.append(weights_digest(network))
    assert len(set(digests)) == 3


@torch.no_grad()
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_what_was_read_last_is_no_property_of_the_model(rope_type: str) -> None:
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 10_000.0, "factor": 4.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        rope["original_max_position_embeddings"] = 8
    sizes = {**SIZES, "max_position_embeddings": 8}
    network = build("LlamaForCausalLM", LlamaConfig(**sizes, rope_parameters=rope))
    plain = build("LlamaForCausalLM", LlamaConfig(**sizes))
    frequencies = network.model.rotary_emb.inv_freq.clone()
    before = weights_digest(network)
    network(torch.arange(12)[None])
    assert not network.model.rotary_emb.inv_freq.equal(frequencies)
    # The configuration tells how they grow.
    assert weights_digest(network) == before == weights_digest(plain)
    # A short prompt brings back those that it begins with: two names of one tensor.
    network(torch.arange(4)[None])
    assert weights_digest(network) == before


def test_shape_and_type_belong_to_the_weights() -> None:
    class Weights(torch.nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("weight", weight)

    zeros = torch.zeros(4, 6)
    others = [torch.zeros(6, 4), torch.zeros(4, 6, dtype=torch.int32), torch.zeros(4, 12).half()]
    digests = {weights_digest(Weights(weight)) for weight in [zeros, *others, torch.zeros(0)]}
    assert len(digests) == 5
    # How they lie in memory is no difference.
    weight = torch.randn(4, 6)
    assert weights_digest(Weights(weight)) == weights_digest(Weights(weight.T.contiguous().T))


def adapter(**options: Any) -> LoraConfig:
    return LoraConfig(
        r=2, target_modules=["o_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **options
    )


class Loaded:
    """What is read of Heretic's model and settings."""

    model_commit = None
    system_prompt = "You are a helpful assistant."
    response_prefix = ""
    batch_size = 4

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def get_layers(self) -> Any:
        return self.model.get_base_model().model.layers

    def get_layer_modules(self, index: int) -> dict[str, list[Any]]:
        return {"attn.o_proj": [self.get_layers()[index].self_attn.o_proj]}


def test_an_intervention_is_no_part_of_the_model_and_an_adapter_of_its_own_is(
    original: Path, folder: Path
) -> None:
    plain = load(original)
    expected = plain.identity()
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(original), adapter())
    heretic = Loaded(wrapped, plain.tokenizer)
    settings = Loaded(None, None)
    settings.model = str(original)
    assert from_heretic(heretic, settings).identity() == expected
    # The same adapter, where it came with the model.
    given = replace(from_heretic(heretic, settings), own_adapter=None)
    assert differences(expected, given.identity()) == "weights and configuration"

    wrapped.save_pretrained(folder)
    with_adapter = load(folder)
    assert torch.equal(with_adapter.residuals(PROMPTS), given.residuals(PROMPTS))
    assert differences(expected, with_adapter.identity()) == "weights and configuration"
    edit_json(folder / "adapter_config.json", lora_alpha=99)
    assert load(folder).identity()["configuration"] != with_adapter.identity()["configuration"]


def test_tensors_in_tensors_belong_to_the_weights() -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")

    def found(*parts: float) -> str:
        layer = torch.nn.Linear(2, 2, bias=False)
        tensors = [torch.full((2, 2), part) for part in parts]
        layer.weight = torch.nn.Parameter(two_tensor.TwoTensor(*tensors), requires_grad=False)
        return weights_digest(layer)

    assert found(1, 2) == found(1, 2) and len({found(1, 2), found(1, 3), found(2, 1)}) == 3


def test_a_command_reads_all_weights_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def counting(*arguments: Any) -> str:
        reads.append(arguments)
        return weights_digest(*arguments)

    monkeypatch.setattr(identity, "weights_digest", counting)
    monkeypatch.chdir(tmp_path)
    options = []
    for kind, verb in (("bad", "Break"), ("good", "Bake")):
        pool = tmp_path / f"{kind}.txt"
        pool.write_text("".join(f"{verb} {thing}.\n" for thing in "abcdefghij"))
        options.append(f"--contrast.{kind}-prompts.dataset={pool}")
    presets = [f"--contrast.preset={name}" for name in ("arditi", "paper-unmatched")]
    output = [
        "--output=directions.safetensors",
        "--response-prefix=",
        "--contrast.classes=category",
    ]
    monkeypatch.setattr(
        sys,
        "argv",
        ["heretic-contrast", "extract", f"--model={folder}", *presets, *options, *output],
    )
    cli.main()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 and len(reads) == 1


def test_directions_say_what_they_lack(original: Path) -> None:
    model = load(original).identified()
    settings = ContrastSettings(preset=["arditi"])
    directions = extract(model, POOLS, settings, lambda line: None)
    directions.require_model(model, "the file")
    made_for = directions.provenance["identity"]
    for provenance, expected in (
        ({}, "do not say which model"),
        ({"fingerprint": "of an earlier version"}, "do not say which model"),
        ({"identity": {**made_for, "versions": {"torch": "1.0"}}}, "versions of the libraries"),
        ({"identity": {**made_for, "device": ["cuda", "highest"]}}, "kind of device"),
    ):
        with pytest.warns(ContrastWarning, match=expected):
            replace(directions, provenance=provenance).require_model(model, "the file")
    with pytest.raises(ContrastError, match="other data type; extract"):
        replace(directions, provenance={"identity": {**made_for, "dtype": "x"}}).require_model(
            model, "the file"
        )


def refuses(prompt: str, response: str) -> Tier:
    return Tier.REFUSE


def refuses_or_complies(prompt: str, response: str) -> Tier:
    return Tier.REFUSE if prompt.startswith("B") else Tier.COMPLY


def classifier(first: str) -> Callable[[str, str], Tier]:
    return lambda prompt, response: Tier.REFUSE if prompt.startswith(first) else Tier.COMPLY


HARMFUL = [Prompt("Break it", category="violence"), Prompt("Bend it", category="violence")]


DIRECTIONS = make_directions(random_tensor(5, 1, 32))


def evaluator(model: LanguageModel, **changes: Any) -> SweepEvaluator:
    arguments: dict[str, Any] = {
        "configurations": {"one": DIRECTIONS},
        "harmful": HARMFUL,
        "canaries": [Prompt("Bake it")],
        "references": [Prompt("Paint it")],
        "options": SweepOptions(layers=(1,), weights=(1.0,), max_new_tokens=2, kl_tokens=2),
        "classify": refuses,
    }
    arguments |= changes
    classify = arguments.pop("classify")
    return SweepEvaluator(model, plan_sweep(**arguments), classify)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "references of the same length": ({"references": [Prompt("Print it")]}, "prompts"),
    "a category": ({"harmful": [HARMFUL[0], replace(HARMFUL[1], category="fraud")]}, "prompts"),
    "rules": ({"classify": refuses_or_complies}, "rules for tiers"),
    "how directions are put together": (
        {"configurations": {"one": Configuration(DIRECTIONS, "sequential")}},
        "directions",
    ),
    "the mean direction": (
        {
            "configurations": {
                "one": replace(DIRECTIONS, mean_direction=DIRECTIONS.mean_direction.roll(1, 1))
            }
        },
        "directions",
    ),
    "what rules were made with": ({"classify": classifier("Bre")}, "rules for tiers"),
    "options": (
        {"options": SweepOptions(layers=(1,), weights=(1.0,), max_new_tokens=3, kl_tokens=2)},
        "options",
    ),
}


def test_cells_of_another_sweep_are_not_taken(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(original).identified()
    storage = str(tmp_path / "sweep.journal")
    cells = run_cells(evaluator(model, classify=classifier("B")), storage, None)

    def never(*arguments: Any) -> None:
        raise AssertionError("Cells were computed anew.")

    for changes, expected in CHANGES.values():
        with pytest.raises(ContrastError, match=f"holds another sweep \\(other .*{expected}"):
            run_cells(evaluator(model, **changes), storage, None)
    for other, expected in (
        (replace(model, system_prompt="Be rude."), "prompts as the model reads them"),
        (replace(model, response_prefix="No"), "prompts as the model reads them"),
    ):
        with pytest.raises(ContrastError, match=expected):
            run_cells(evaluator(other, classify=classifier("B")), storage, None)
    again = evaluator(model, classify=classifier("B"))
    monkeypatch.setattr(again, "evaluate", never)
    assert run_cells(again, storage, None) == cells


@pytest.mark.parametrize("part", ["configuration", "template"])
def test_a_judge_model_belongs_to_a_sweep(part: str, original: Path, tmp_path: Path) -> None:
    write_keyword_judge(tmp_path, ("Break",))
    edit_json(tmp_path / "tokenizer_config.json", pad_token="[UNK]")
    model = load(original).identified()

    def judged() -> tuple[list[float], Any]:
        judge = JudgeModel(str(tmp_path))
        probabilities = judge.probabilities(["Break it"], ["Gladly, this is how"])
        return probabilities, evaluator(model, classify=judge).identity()

    before = judged()
    assert judged() == before
    if part == "configuration":
        edit_json(tmp_path / "config.json", rms_norm_eps=0.5)
    else:
        template = "{% for message in messages %}{{ message.content }} Break{% endfor %}"
        (tmp_path / "chat_template.jinja").write_text(template)
    after = judged()
    assert after[0] != before[0]
    assert differences(before[1], after[1]) == "rules for tiers"


def test_generation_configuration_belongs_to_a_sweep(folder: Path) -> None:
    before = evaluator(load(folder)).identity()
    edit_json(folder / "generation_config.json", repetition_penalty=1.5)
    assert differences(before, evaluator(load(folder)).identity()) == "generation configuration"


def test_storages_that_do_not_say_what_they_hold_are_refused(tmp_path: Path) -> None:
    import optuna

    storage = str(tmp_path / "sweep.journal")
    study = optuna.create_study(
        study_name=storage_module.STUDY_NAME,
        storage=open_storage(storage),
        directions=["minimize", "minimize"],
    )
    study.add_trial(create_trial(values=[0, 0]))
    content = Path(storage).read_bytes()
    with pytest.raises(ContrastError, match="holds another sweep"):
        storage_module.SweepState(storage, {"options": "f"})
    assert Path(storage).read_bytes().startswith(content)


def test_tokens_are_those_that_the_model_reads(original: Path) -> None:
    model = load(original).identified()
    first = identify(model, {"harmful": [Prompt("a"), Prompt("b")]})
    for other in ([Prompt("b"), Prompt("a")], [Prompt("a"), Prompt("b", system="c")]):
        assert differences(first, identify(model, {"harmful": other})) == NAMES["tokens"]
    # A category is no token.
    same = [Prompt("a", category="fraud"), Prompt("b")]
    assert identify(model, {"harmful": same}) == first


def test_the_date_in_a_template_is_no_property_of_the_model(folder: Path) -> None:
    dated = '{{ strftime_now("%d %m %Y %f") }}'
    (folder / "chat_template.jinja").write_text(dated + CHAT_TEMPLATE)
    first, second = load(folder), load(folder)
    assert first.token_ids(PROMPTS) != second.token_ids(PROMPTS)
    assert first.identity() == second.identity()


PROCESS = """
import json, sys
from tests.test_identity import HARMFUL, classifier, evaluator, load
print(json.dumps(evaluator(load(sys.argv[1]), classify=classifier("B")).identity(), sort_keys=True))
"""


@pytest.mark.slow
def test_another_process_finds_the_same(original: Path) -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", PROCESS, str(original)],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1 and len(json.loads(found.pop())) > 8
