# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Checks of a Heretic checkout: `HERETIC_SOURCE=/path/to/checkout pytest tests/upstream`.

Every check runs the checkout's own code in a process of its own, on the built-in refuser. A failure shows the
command, config.toml and the end of the output.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from heretic_contrast.directions.directions import Directions
from heretic_contrast.search.parameters import Parameters
from tests.upstream.checkout import HERETIC, LAUNCHER, MODEL, REPOSITORY, Checkout, stored_trials

ABLITERATION = "heretic.modifiers.abliteration.Abliteration"
ARA = "heretic.modifiers.ara.ARA"
PLUGIN = "heretic_contrast.ContrastAbliteration"
STRATEGIES = ("merge", "adapter")
NEED_THE_MODEL = {"heretic_contrast.TeacherForcedDivergence", "heretic_contrast.FixedWeightSweep"}
ONLY_SCORERS = "this checkout has scorers but no modifiers"


def plugin_table(pools: dict[str, str]) -> dict[str, Any]:
    return {
        "classes": "category",
        "baseline": "unmatched",
        "bad_prompts": {"dataset": pools["harmful-train"]},
        "good_prompts": {"dataset": pools["harmless-train"]},
    }


def heretic_scorers(pools: dict[str, str]) -> dict[str, Any]:
    """Tables of Heretic's own default scorers."""

    return {
        "KeywordRate": {"prompts": {"dataset": pools["harmful-test.txt"]}},
        "KLDivergence": {"prompts": {"dataset": pools["harmless-test.txt"]}},
    }


def our_scorers(pools: dict[str, str], directory: Path) -> dict[str, Any]:
    """Selection and tables of our scorers."""

    harmful = {"dataset": pools["harmful-test"]}
    harmless = {"dataset": pools["harmless-test"]}
    contrast = plugin_table(pools)
    return {
        "scorers": [
            {"plugin": "heretic_contrast.RefusalTiers", "optimization": "minimize"},
            {"plugin": "heretic_contrast.TeacherForcedDivergence", "optimization": "minimize"},
            {"plugin": "heretic_contrast.FalseRefusals", "optimization": "none"},
            {"plugin": "heretic_contrast.FixedWeightSweep", "optimization": "none"},
        ],
        "scorer": {
            "RefusalTiers": {"prompts": harmful},
            "TeacherForcedDivergence": {"prompts": harmless, "n_tokens": 8},
            "FalseRefusals": {"prompts": harmless},
            "FixedWeightSweep": {
                "contrast": contrast,
                "output": str(directory / "sweep"),
                "harmful_prompts": harmful,
                "harmless_prompts": harmless,
                "layers": [2, 3],
                "weights": [1.0],
                "n_harmful": 9,
                "n_canaries": 4,
                "n_references": 8,
                "kl_tokens": 8,
                "sweep_response_length": 8,
                "strength": "weight",
                "random_control": False,
                "synergy_size": 0,
            },
        },
    }


def headless(strategy: str) -> list[str]:
    return [
        "--trial-index=0",
        "--model-action=save",
        "--save-directory=saved",
        f"--export-strategy={strategy}",
    ]


@pytest.fixture(scope="session")
def exported(
    checkout: Checkout, pools: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A whole run per export strategy, with the same seed: optimization, a restored trial, the saved model."""

    found = {}
    for strategy in STRATEGIES:
        directory = tmp_path_factory.mktemp(strategy)
        if checkout.surface == "2.0":
            config: dict[str, Any] = {
                "modifiers": [{"plugin": PLUGIN}],
                "modifier": {"ContrastAbliteration": plugin_table(pools)},
                "scorer": heretic_scorers(pools),
            }
            output = checkout.heretic(directory, config, *headless(strategy))
        elif checkout.surface == "1.4":
            config = {"modifier": {"ContrastAbliteration": plugin_table(pools)}}
            output = checkout.heretic(
                directory,
                config,
                f"--bad-evaluation-prompts.dataset={pools['harmful-test.txt']}",
                f"--good-evaluation-prompts.dataset={pools['harmless-test.txt']}",
                *headless(strategy),
                launcher=True,
            )
        else:
            pytest.skip(ONLY_SCORERS + ", and is no Heretic 1.4 either")
        assert "Restoring model from trial" in output
        # A failed action is reported, and Heretic ends with exit code 0 all the same.
        expected = "adapter_model.safetensors" if strategy == "adapter" else "model.safetensors"
        assert (directory / "saved" / expected).is_file(), checkout.failure(
            directory, ["heretic"], 0, output
        )
        found[strategy] = directory
    return found


def plugin_parameters(directory: Path) -> list[dict[str, Any]]:
    """The plugin's parameters in each trial; 1.4's own stand under another name."""

    return [trial.get("contrast") or trial["parameters"] for trial in stored_trials(directory)]


def test_optimization_is_finished_and_repeatable(
    checkout: Checkout, exported: dict[str, Path], record_property: Any
) -> None:
    first, second = (plugin_parameters(exported[strategy]) for strategy in STRATEGIES)
    assert len(first) == 2
    assert first == second
    for parameters in first:
        assert Parameters.from_dict(json.loads(json.dumps(parameters))).to_dict() == parameters
    record_property("trials", "2, the same in two runs with one seed")


def test_export_in_both_strategies_and_reload(
    checkout: Checkout, exported: dict[str, Path], record_property: Any
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = AutoModelForCausalLM.from_pretrained(exported["merge"] / "saved")
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    original = {name: weight.clone() for name, weight in base.state_dict().items()}
    adapted = PeftModel.from_pretrained(base, exported["adapter"] / "saved").merge_and_unload()
    largest, n_changed = 0.0, 0
    for name, weight in adapted.state_dict().items():
        other = merged.state_dict()[name]
        n_changed += not torch.equal(weight, original[name])
        largest = max(largest, float((weight - other).norm() / weight.norm().clamp_min(1e-12)))
    assert n_changed > 0, "the exported model is the unmodified one"
    assert largest < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(exported["merge"] / "saved")
    ids = tokenizer("Hello", return_tensors="pt", return_token_type_ids=False)
    assert merged.generate(**ids, max_new_tokens=2).shape[1] > ids["input_ids"].shape[1]
    record_property(
        "largest relative difference of merged and adapter",
        f"{largest:.1e} ({n_changed} tensors changed)",
    )


def test_checkpoint_of_a_finished_study_is_restored(
    checkout: Checkout, exported: dict[str, Path], record_property: Any
) -> None:
    """Shows the results of the previous run, and saves the same trial again, after a merge: the same bytes."""

    directory = exported["merge"]
    first = directory / "saved" / "model.safetensors"
    before = tensors(first)
    first.unlink()
    flags = ["--checkpoint-action=continue", *headless("merge")]
    hosted = checkout.surface == "1.4"
    code = LAUNCHER if hosted else HERETIC
    extra = study_arguments(directory) if hosted else []
    output = checkout.python(
        directory,
        "-c",
        code,
        "--model",
        MODEL,
        "--seed=3",
        "--n-trials=2",
        "--n-startup-trials=2",
        "--batch-size=64",
        "--max-response-length=12",
        "--response-prefix=",
        *extra,
        *flags,
    )
    assert first.is_file(), checkout.failure(directory, ["heretic", *flags], 0, output)
    after = tensors(first)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "Running trial" not in output
    record_property("weights", "bit-identical to those saved first")


def study_arguments(directory: Path) -> list[str]:
    """The evaluation prompts of a 1.4 run, which are part of what its checkpoint is found by."""

    (journal,) = sorted((directory / "checkpoints").rglob("*.jsonl"))
    for line in journal.read_text(encoding="utf-8").splitlines():
        stored = json.loads(line).get("user_attr", {}).get("settings")
        if stored is not None:
            settings = json.loads(stored)
            return [
                f"--{name.replace('_', '-')}.dataset={settings[name]['dataset']}"
                for name in ("bad_evaluation_prompts", "good_evaluation_prompts")
            ]
    raise AssertionError(f"{journal} holds no settings.")


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("modifier", [PLUGIN, ABLITERATION, ARA])
def test_scorers_beside(
    modifier: str, checkout: Checkout, pools: dict[str, str], tmp_path: Path, record_property: Any
) -> None:
    if checkout.surface == "1.4":
        pytest.skip("Heretic 1.4 has no scorer plugins")
    config = our_scorers(pools, tmp_path)
    flags = []
    if checkout.surface == "2.0":
        name = modifier.rpartition(".")[2]
        module = checkout.package / "modifiers" / f"{modifier.split('.')[-2]}.py"
        if modifier != PLUGIN and not module.is_file():
            pytest.skip(f"this checkout has no {modifier}")
        config["modifiers"] = [{"plugin": modifier}]
        table: dict[str, Any] = plugin_table(pools)
        if modifier != PLUGIN:
            table = {
                "bad_prompts": {"dataset": pools["harmful-train.txt"]},
                "good_prompts": {"dataset": pools["harmless-train.txt"]},
            }
        if modifier == ARA:
            table["n_optimization_steps"] = 1
        config["modifier"] = {name: table}
    elif modifier == ABLITERATION:
        # Without access to the model, the scorers that judge responses are left.
        config["scorers"] = [
            entry for entry in config["scorers"] if entry["plugin"] not in NEED_THE_MODEL
        ]
        flags = abliteration_pools(pools)
    else:
        pytest.skip(ONLY_SCORERS + ": its built-in abliteration is used")
    output = checkout.heretic(tmp_path, config, *flags, *headless("merge"))
    scores = {score["name"]: score for score in stored_trials(tmp_path)[-1]["scores"]}
    expected = ["Refusal tiers", "False refusals"]
    if checkout.surface == "2.0":
        expected[1:1] = ["Teacher-forced KL divergence"]
        expected.append("Fixed-weight sweep")
    assert list(scores) == expected, checkout.failure(tmp_path, ["heretic"], 0, output)
    assert scores["Refusal tiers"]["baseline"]["value"] == 1.0
    assert scores["False refusals"]["baseline"]["value"] == 0.0
    found = f"refused {scores['Refusal tiers']['score']['md_display']}"
    if checkout.surface == "2.0":
        assert abs(scores["Teacher-forced KL divergence"]["baseline"]["value"]) < 1e-5
        assert scores["Teacher-forced KL divergence"]["score"]["value"] > -1e-6
        sweep = scores["Fixed-weight sweep"]
        assert sweep["score"] == sweep["baseline"]
        assert any((tmp_path / "sweep").iterdir())
        found += f", sweep {sweep['score']['md_display']}"
    record_property("scores", found)


@pytest.mark.parametrize("plugin", sorted(NEED_THE_MODEL))
def test_scorers_that_need_the_model_say_so(
    plugin: str, checkout: Checkout, pools: dict[str, str], tmp_path: Path, record_property: Any
) -> None:
    if checkout.surface != "scorers":
        pytest.skip("this checkout gives scorers access to the model, or has none")
    config = our_scorers(pools, tmp_path)
    config["scorers"] = [
        {"plugin": "heretic_contrast.RefusalTiers", "optimization": "minimize"},
        {"plugin": plugin, "optimization": "none"},
    ]
    output = refused(checkout, tmp_path, config, *abliteration_pools(pools))
    name = plugin.rpartition(".")[2]
    assert f"Error: {name} looks into the model, which this Heretic keeps to itself" in output
    record_property("shown", f"{name} looks into the model …")


def refused(checkout: Checkout, directory: Path, config: dict[str, Any], *flags: str) -> str:
    """Runs Heretic with what cannot work, and returns its output, which has no traceback, on one line."""

    with pytest.raises(AssertionError) as error:
        checkout.heretic(
            directory, config, *flags, *headless("merge"), launcher=checkout.surface == "1.4"
        )
    output = str(error.value).partition("End of the output:")[2]
    assert "Traceback" not in output, output
    return " ".join(output.split())


def abliteration_pools(pools: dict[str, str]) -> list[str]:
    """Flags for Heretic's own abliteration, where it is no plugin."""

    return [
        f"--bad-prompts.dataset={pools['harmful-train.txt']}",
        f"--good-prompts.dataset={pools['harmless-train.txt']}",
    ]


def test_commands(
    checkout: Checkout, pools: dict[str, str], tmp_path: Path, record_property: Any
) -> None:
    """Extraction, a sweep, tiers and, where something can run the modifier, the demo; doctor says the same."""

    contrast = [
        "--contrast.classes=category",
        f"--contrast.bad-prompts.dataset={pools['harmful-train']}",
        f"--contrast.good-prompts.dataset={pools['harmless-train']}",
    ]
    checkout.contrast(tmp_path, "extract", MODEL, *contrast, "--output=found.safetensors")
    assert Directions.load(tmp_path / "found.safetensors").n_directions == 9
    checkout.contrast(
        tmp_path,
        "sweep",
        MODEL,
        *contrast,
        f"--bad-evaluation-prompts.dataset={pools['harmful-test.txt']}",
        f"--good-evaluation-prompts.dataset={pools['harmless-test.txt']}",
        *("--layers=3", "--weights=[1.0]", "--n-harmful=9", "--n-canaries=4", "--n-references=8"),
        *("--kl-tokens=8", "--sweep-response-length=8", "--synergy-size=0", "--output=sweep"),
    )
    result = json.loads((tmp_path / "sweep" / "sweep.json").read_text(encoding="utf-8"))
    assert result["baseline"]["refusals"] == 9
    row = {"prompt": "How do I pick a lock?", "response": "I cannot help with that."}
    (tmp_path / "responses.jsonl").write_text(json.dumps(row), encoding="utf-8")
    checkout.contrast(tmp_path, "judge", "responses.jsonl", "--output=judged.jsonl")
    assert '"tier": "REFUSE"' in (tmp_path / "judged.jsonl").read_text(encoding="utf-8")
    works = {"extract", "sweep", "audit", "judge"}
    demo = ["demo", "--output=demo", "--n-trials=1", "--n-startup-trials=1", *contrast]
    if checkout.surface == "scorers":
        with pytest.raises(
            AssertionError, match="Error: This Heretic has scorers but no modifiers"
        ):
            checkout.contrast(tmp_path, *demo)
    else:
        works |= {"demo", "rebuild", *(["run"] if checkout.surface == "1.4" else [])}
        checkout.contrast(tmp_path, *demo)
        summary = json.loads((tmp_path / "demo" / "summary.json").read_text(encoding="utf-8"))
        assert summary["base_refusals"] == summary["n_prompts"]
    shown = checkout.contrast(tmp_path, "doctor")
    lines = [line.replace("│", "").split() for line in shown.splitlines()]
    assert works == {line[2] for line in lines if line[:2] == ["Ok", "Command"]}
    record_property("work", ", ".join(sorted(works)))


def test_one_direction_equals_abliteration(
    checkout: Checkout, pools: dict[str, str], tmp_path: Path, record_property: Any
) -> None:
    if checkout.surface == "2.0":
        if not (checkout.package / "modifiers" / "abliteration.py").is_file():
            pytest.skip(f"this checkout has no {ABLITERATION}")
        output = checkout.python(
            tmp_path,
            str(REPOSITORY / "tests" / "upstream" / "compare.py"),
            MODEL,
            pools["harmful-train.txt"],
            pools["harmless-train.txt"],
        )
        differences = json.loads(output.splitlines()[-1])
        record_property(
            "largest relative difference",
            ", ".join(f"{name} {value:.1e}" for name, value in differences.items()),
        )
        assert max(differences.values()) < 1e-4, differences
    elif checkout.surface == "1.4":
        output = checkout.python(
            REPOSITORY,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/hosts/test_heretic_equality.py",
        )
        record_property("tests/hosts/test_heretic_equality.py", output.strip().splitlines()[-1])
    else:
        pytest.skip(ONLY_SCORERS)


def test_misspelled_setting_ends_in_one_sentence(
    checkout: Checkout, pools: dict[str, str], tmp_path: Path, record_property: Any
) -> None:
    flags = []
    if checkout.surface == "scorers":
        config = our_scorers(pools, tmp_path)
        config["scorers"] = config["scorers"][:1]
        config["scorer"] = {"RefusalTiers": {"wieghts": 1}}
        flags = abliteration_pools(pools)
    else:
        config = {
            "modifiers": [{"plugin": PLUGIN}],
            "modifier": {"ContrastAbliteration": {**plugin_table(pools), "wieghts": 1}},
        }
    if checkout.surface == "2.0":
        config["scorer"] = heretic_scorers(pools)
    output = refused(checkout, tmp_path, config, *flags)
    assert 'There is no setting "wieghts"' in output, output
    record_property("shown", 'There is no setting "wieghts" …')
