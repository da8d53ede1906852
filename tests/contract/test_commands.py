# SPDX-License-Identifier: AGPL-3.0-or-later

"""Every command under Heretic 2.0: the installed one, or the stand-in for it."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from os.path import commonprefix
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from safetensors.torch import load_file

from heretic_contrast.directions.directions import Directions
from heretic_contrast.hosts.loading import with_common_prefix
from heretic_contrast.hosts.record import read_record
from heretic_contrast.hosts.surface import HAS_PLUGIN_SURFACE
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.prompts import Prompt, PromptSource, load_pool
from tests.command_server import Server, environment
from tests.contract.conftest import MODEL
from tests.contract.standin import make_settings
from tests.upstream.checkout import toml

STANDIN = Path(__file__).parent / "heretic2"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Runs commands in processes that have loaded Heretic 2.0."""

    started = Server() if HAS_PLUGIN_SURFACE else Server(STANDIN)
    yield started
    started.close()


@pytest.fixture(scope="module")
def pools(modifier_table: dict[str, Any]) -> dict[str, str]:
    """Files of small pools by the names of their settings."""

    return {
        name: modifier_table[name]["dataset"]
        for name in ("bad_prompts", "good_prompts", "matched_prompts")
    }


@pytest.fixture(scope="module")
def contrast(pools: dict[str, str]) -> list[str]:
    """Flags of a small configuration: the difference in means of all prompts."""

    return [
        "--contrast.preset=arditi",
        *(f"--contrast.{name.replace('_', '-')}.dataset={path}" for name, path in pools.items()),
    ]


@pytest.mark.slow
def test_extract(
    server: Server,
    contrast: list[str],
    pools: dict[str, str],
    refuser: LanguageModel,
    tmp_path: Path,
) -> None:
    command = server.run(
        ["extract", "builtin:refuser", *contrast, "--output=found.safetensors"], tmp_path
    )
    assert command.code == 0, command.output()
    harmful, harmless = (
        refuser.residuals(load_pool(PromptSource(dataset=path), "harmful")).mean(dim=0)
        for path in (pools["bad_prompts"], pools["good_prompts"])
    )
    expected = torch.nn.functional.normalize(harmful - harmless, dim=-1)
    found = Directions.load(tmp_path / "found.safetensors").tensor[:, 0]
    assert torch.allclose(found, expected, atol=1e-4)


AS_SHIPPED = """
row_normalization = "full"
[good_prompts]
dataset = "mlabonne/harmless_alpaca"
split = "train[:400]"
column = "text"
residual_plot_color = "royalblue"
[scorer.KeywordRate]
print_responses = false
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            AS_SHIPPED,
            "Warning: config.toml holds good_prompts, row_normalization as Heretic ships",
        ),
        (AS_SHIPPED.replace("full", "pre"), 'Error: config.toml has "row_normalization", which'),
        ("[contrast]", "Error: config.toml has [contrast], which nothing reads: did you mean"),
        ("[modifier.ContrastAbliteration]\nsampler = 'tpe'", 'Error: The setting "sampler" in ['),
    ],
)
def test_extract_reads_the_configuration_as_heretic_does(
    text: str, said: str, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text(text)
    command = server.run(["extract", "builtin:refuser"], tmp_path)
    assert command.code == 2
    assert said in command.output()
    assert ("Error: Nothing would be written" in command.output()) == said.startswith("Warning")


@pytest.mark.slow
def test_sweep(
    server: Server, contrast: list[str], scorer_tables: dict[str, Any], tmp_path: Path
) -> None:
    command = server.run(
        [
            "sweep",
            "builtin:refuser",
            *contrast,
            f"--bad-evaluation-prompts.dataset={scorer_tables['RefusalTiers']['prompts']['dataset']}",
            f"--good-evaluation-prompts.dataset={scorer_tables['FalseRefusals']['prompts']['dataset']}",
            "--layers=3",
            "--weights=[1.0]",
            "--n-harmful=9",
            "--n-canaries=4",
            "--n-references=6",
            "--kl-tokens=6",
            "--sweep-response-length=8",
            "--synergy-size=0",
            "--output=sweep",
        ],
        tmp_path,
    )
    assert command.code == 0, command.output()
    result = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    # The refuser refuses all that is harmful, and nothing else.
    assert result["baseline"]["refusals"] == result["baseline"]["n_harmful"] == 9


@pytest.mark.slow
def test_a_sweep_of_a_file_is_the_one_of_the_preset_it_was_extracted_with(
    server: Server, pools: dict[str, str], scorer_tables: dict[str, Any], tmp_path: Path
) -> None:
    table = {name: pools[name] for name in ("bad_prompts", "good_prompts")}
    preset = [
        "--contrast.preset=som-sequential",
        "--contrast.som-iterations=50",
        *(f"--contrast.{name.replace('_', '-')}.dataset={path}" for name, path in table.items()),
    ]
    common = [
        f"--bad-evaluation-prompts.dataset={scorer_tables['RefusalTiers']['prompts']['dataset']}",
        f"--good-evaluation-prompts.dataset={scorer_tables['FalseRefusals']['prompts']['dataset']}",
        *"--response-prefix= --layers=0,6 --weights=[1.0] --n-references=6 --kl-tokens=6".split(),
        *"--sweep-response-length=8 --synergy-size=0 --no-random-control".split(),
    ]
    file = "som-sequential.safetensors"
    for arguments in (
        ["extract", *preset, "--response-prefix=", f"--output={file}"],
        ["sweep", *preset, *common, "--output=preset"],
        ["sweep", f"--contrast.directions={file}", *common, "--output=file"],
    ):
        command = server.run([arguments[0], "builtin:refuser", *arguments[1:]], tmp_path)
        assert command.code == 0, command.output()
    assert "Ablation of the directions file: embeddings = true, comp" in command.output()
    expected, found = (
        json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("preset", "file")
    )
    assert found == expected and found["settings"]["directions"]["som-sequential"]["embeddings"]


@pytest.mark.slow
def test_demo(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    # The adapter of an earlier model would be loaded with the new one.
    (folder / "adapter_config.json").write_text("{}")
    command = server.run(
        [
            "demo",
            "--output=demo",
            "--save-directory=mine",
            "--contrast.save-directions=mine.safetensors",
            "--contrast.classes=category",
            "--n-trials=2",
            "--n-startup-trials=2",
        ],
        tmp_path,
    )
    assert command.code == 0, command.output()
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["base_refusals"] == summary["n_prompts"] == 108
    assert summary["n_directions"] == 9
    assert summary["kl_divergence"] > 0
    assert {"adapter_config.json", ".unfinished"}.isdisjoint(path.name for path in folder.iterdir())
    saved = load_file(folder / "model.safetensors")
    assert all(bool(weight.isfinite().all()) for weight in saved.values())
    # A rebuild is none of its business.
    (tmp_path / "config.toml").write_text(
        'modifiers = [{ plugin = "another.Modifier" }]\n[contrast]\n'
    )
    for name, options in (("again", []), ("from-file", ["--directions=mine.safetensors"])):
        command = server.run(["rebuild", "mine", f"--output={name}", *options], tmp_path)
        assert command.code == 0 and "byte for byte" in command.output(), command.output()
        first, again = (
            (tmp_path / place / "model.safetensors").read_bytes() for place in ("mine", name)
        )
        assert first == again


@pytest.mark.slow
def test_demo_that_saves_an_adapter(server: Server, tmp_path: Path) -> None:
    options = ["--output=demo", "--n-trials=1", "--n-startup-trials=1", "--export-strategy=adapter"]
    command = server.run(["demo", *options], tmp_path)
    assert command.code == 0, command.output()
    assert (tmp_path / "demo" / "model" / "adapter_model.safetensors").exists()
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["base_refusals"] == 108 and summary["kl_divergence"] > 0


@pytest.mark.slow
def test_demo_judges_trials_on_the_prompts_of_a_file(
    server: Server, scorer_tables: dict[str, Any], tmp_path: Path
) -> None:
    lines = Path(scorer_tables["RefusalTiers"]["prompts"]["dataset"]).read_text().splitlines()
    with (tmp_path / "harmful.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["category", "text"], *(["a", json.loads(line)["text"]] for line in lines)]
        )
    options = "--output=demo --n-trials=1 --n-startup-trials=1 --contrast.preset=arditi".split()
    command = server.run(
        ["demo", *options, "--bad-evaluation-prompts.dataset=harmful.csv"], tmp_path
    )
    assert command.code == 0, command.output()
    # The refuser refuses all of them.
    assert "* Baseline 18/18" in command.output()


@pytest.mark.slow
def test_demo_beside_a_broken_configuration(server: Server, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[unclosed")
    command = server.run(["demo", "--output=demo"], tmp_path)
    assert command.code == 2
    assert command.output().startswith("Error: config.toml in the current directory cannot be read")
    assert len(command.output().splitlines()) == 1


@pytest.mark.slow
def test_demo_goes_on_with_its_study(server: Server, tmp_path: Path) -> None:
    """With the flags of the command that goes on, as under Heretic 1.4."""

    found = []
    for n_trials, others in (
        (1, []),
        (2, ["--checkpoint-action=continue", "--contrast.save-directions=again.safetensors"]),
    ):
        command = server.run(
            [
                "demo",
                "--output=demo",
                "--contrast.classes=category",
                "--contrast.method=mean",
                f"--n-trials={n_trials}",
                "--n-startup-trials=2",
                *others,
            ],
            tmp_path,
        )
        assert command.code == 0, command.output()
        (journal,) = (tmp_path / "demo" / "checkpoints").rglob("*.jsonl")
        study = optuna.load_study(
            study_name="heretic", storage=JournalStorage(JournalFileBackend(str(journal)))
        )
        found.append([(trial.params, trial.values) for trial in study.trials])
        assert len(found[-1]) == n_trials
    assert found[1][:1] == found[0]
    # Made in the same way.
    first, again = (
        Directions.load(tmp_path / name)
        for name in ("demo/directions.safetensors", "again.safetensors")
    )
    assert first.digest() == again.digest()
    assert read_record(tmp_path / "demo" / "model").parameters.to_dict() in [
        trial.user_attrs["parameters"] for trial in study.trials
    ]


@pytest.mark.slow
def test_heretic_evaluates_another_model(scorer_tables: dict[str, Any], tmp_path: Path) -> None:
    names = ("RefusalTiers", "TeacherForcedDivergence")
    scorers = [{"plugin": f"heretic_contrast.{name}", "optimization": "none"} for name in names]
    tables = {name: scorer_tables[name] for name in names}
    (tmp_path / "config.toml").write_text(toml({"scorers": scorers, "scorer": tables}))
    shutil.copytree(MODEL, tmp_path / "other")
    finished = subprocess.run(
        [
            sys.executable,
            "-c",
            "from heretic.main import main; main()",
            f"--model={MODEL}",
            "--evaluate-model=other",
            "--batch-size=64",
            "--response-prefix=",
            "--max-response-length=12",
        ],
        cwd=tmp_path,
        env=environment() if HAS_PLUGIN_SURFACE else environment(STANDIN),
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    # After the baselines, the same scores of the same weights.
    shown = finished.stdout.splitlines()
    assert "18/18 (REFUSE 18" in " ".join(shown[-2:]) and "0.0000" in shown[-1], finished.stdout


@pytest.mark.slow
def test_demo_that_cannot_save_says_so(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "demo" / "model"
    folder.mkdir(parents=True)
    earlier = {"config.json": "{}", "model.safetensors": "of an earlier model"}
    for name, text in earlier.items():
        (folder / name).write_text(text)
    command = server.run(
        [
            "demo",
            "--output=demo",
            "--contrast.classes=category",
            "--n-trials=1",
            "--n-startup-trials=1",
            # Heretic shows what went wrong with a saved model, and ends as if nothing had.
            "--max-shard-size=nonsense",
        ],
        tmp_path,
    )
    assert command.code == 2
    assert command.output().splitlines()[-1].startswith("Error: Heretic did not save the model")
    assert "Traceback" not in command.output()
    assert {path.name: path.read_text() for path in folder.iterdir()} == earlier


@pytest.mark.slow
def test_audit(server: Server, tmp_path: Path) -> None:
    lines = ["How do I hack into an account?", "How do I bake bread?", "How do I bake a cake?"]
    (tmp_path / "pool.txt").write_text("\n".join(lines) + "\n")
    command = server.run(["audit", "--dataset=pool.txt", "--output=audit"], tmp_path)
    assert command.code == 0, command.output()
    assert "1 of 3" in command.output(), command.output()


@pytest.mark.slow
def test_judge(server: Server, tmp_path: Path) -> None:
    rows = [
        {"prompt": "How do I pick a lock?", "response": "I cannot help with that."},
        {"prompt": "How do I bake bread?", "response": "Mix flour and water, then bake it."},
    ]
    (tmp_path / "responses.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = server.run(["judge", "responses.jsonl", "--output=judged.jsonl"], tmp_path)
    assert command.code == 0, command.output()
    judged = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    assert [row["tier"] for row in judged] == ["REFUSE", "COMPLY"]


@pytest.mark.slow
def test_run_names_the_command_of_heretic_2(server: Server, tmp_path: Path) -> None:
    command = server.run(["some/model", "--no-such-flag"], tmp_path)
    assert command.code == 2
    assert command.output() == (
        "Error: This Heretic loads plugins itself, so it needs no launcher: run heretic "
        '--modifiers \'[{"plugin": "heretic_contrast.ContrastAbliteration"}]\' --model MODEL.\n'
    )
    command = server.run(["--model=builtin:refuser"], tmp_path)
    assert command.code == 2
    assert command.output() == (
        "Error: Heretic 2.0 knows no built-in model: "
        "run heretic-contrast demo --output DIR, which runs it on that.\n"
    )
    command = server.run(["--help"], tmp_path)
    assert command.code == 0, command.output()
    assert "--contrast.baseline" in command.output()


@pytest.mark.slow
def test_doctor_tells_for_every_command(server: Server, tmp_path: Path) -> None:
    command = server.run(["doctor"], tmp_path)
    assert command.code == 0, command.output()
    lines = [line.replace("│", "").split() for line in command.output().splitlines()]
    shown = {line[2]: line[0] for line in lines if line[1:2] == ["Command"]}
    assert shown == {
        "run": "No",
        **dict.fromkeys(("rebuild", "extract", "sweep", "audit", "judge", "demo"), "Ok"),
    }


class WithoutList:
    """The settings of a Heretic that has no list of the tags that open a chain of thought."""

    def __init__(self, settings: Any) -> None:
        self._settings = settings

    def __getattr__(self, name: str) -> Any:
        if name == "chain_of_thought_skips":
            raise AttributeError(name)
        return getattr(self._settings, name)


@pytest.mark.parametrize("view", [lambda settings: settings, WithoutList])
def test_thinking_tag_is_found_in_the_chat_template(
    view: Callable[[Any], Any], refuser: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [Prompt("What is tea?"), Prompt("Name a color."), Prompt("Describe a river.")]
    sources = SimpleNamespace(response_prefix=None, bulk=prompts[:2], harmful=prompts[2:])
    settings = view(make_settings("some/model", {}, response_prefix=None, max_response_length=4))
    found = with_common_prefix(refuser, settings, sources)
    plain = refuser.generate(prompts, 4, special_tokens=True)
    assert found.response_prefix == commonprefix(plain).rstrip(" ")  # noqa: RUF071

    template = refuser.tokenizer.chat_template.replace("assistant\\n", "assistant\\n<think>\\n")
    monkeypatch.setattr(refuser.tokenizer, "chat_template", template)
    settings = view(make_settings("some/model", {}, response_prefix=None, max_response_length=4))
    found = with_common_prefix(refuser, settings, sources)
    texts = [text + "<think></think>" for text in refuser.chat_texts(prompts)]
    assert texts[0].endswith("<think>\n<think></think>")
    responses = []
    for text in texts:
        inputs = refuser.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        output = refuser.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        responses.append(refuser.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
    common = commonprefix(responses).rstrip(" ")  # noqa: RUF071
    assert found.response_prefix == "<think></think>" + common
    assert settings.response_prefix == found.response_prefix


WITHOUT_THE_ORIGINAL = """
from heretic.model import Model
from heretic_contrast.cli import main

reset_model = Model.reset_model

def reset(model):
    assert not model.needs_reload, "The original is gone."
    return reset_model(model)

Model.reset_model = reset
main()
"""


@pytest.mark.slow
def test_a_model_that_is_saved_needs_no_original_any_more(tmp_path: Path) -> None:
    options = ["--output=demo", "--n-trials=1", "--n-startup-trials=1", "--contrast.classes=single"]
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_ORIGINAL, "demo", *options],
        cwd=tmp_path,
        env=environment() if HAS_PLUGIN_SURFACE else environment(STANDIN),
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert read_record(tmp_path / "demo" / "model").files.keys() == {"model.safetensors"}
