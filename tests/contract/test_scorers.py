# SPDX-License-Identifier: AGPL-3.0-or-later

"""The scorers' settings, counts and reports, on the built-in refuser."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.text import Text
from transformers import AutoModelForCausalLM

from heretic_contrast import FixedWeightSweep, cli, report, scorers
from heretic_contrast.errors import ContrastError
from heretic_contrast.evaluation import sweep
from heretic_contrast.evaluation.cells import SweepResult
from heretic_contrast.evaluation.sweep import SweepEvaluator
from heretic_contrast.hosts.surface import Modifier, Scorer
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.prompts import Prompt, load_pool
from tests.contract.conftest import MODEL
from tests.contract.standin import load_plugin, make_settings
from tests.engine.test_judge import write_keyword_judge
from tests.engine.test_text_classification import LABELS, write_classifier


class ContextWithoutModel:
    """The plugin context of Heretic's development state of July 2026, which keeps the model to itself."""

    def __init__(self, context: Any) -> None:
        self.load_prompts = context.load_prompts
        self.get_responses = context.get_responses
        self.get_logits = context.get_logits
        self.get_residuals = context.get_residuals


def scorer(name: str, table: dict[str, Any], **options: Any) -> Any:
    settings = make_settings(MODEL, {"scorer": {name: table}}, **options)
    return load_plugin(f"heretic_contrast.{name}", Scorer, "scorer", settings)


def score(name: str, table: dict[str, Any], run: Any) -> Any:
    loaded = scorer(name, table)
    loaded.init(run.context())
    return loaded.get_score(run.context())


def test_counted_tiers_are_a_setting(run: Any, scorer_tables: dict[str, Any]) -> None:
    run.loaded_modifier.reset_model(run.context())
    table = scorer_tables["RefusalTiers"]
    assert score("RefusalTiers", table, run).value == 1.0
    assert score("RefusalTiers", {**table, "counted_tiers": ["EVASIVE"]}, run).value == 0.0
    both = score("RefusalTiers", {**table, "counted_tiers": ["REFUSE", "EVASIVE"]}, run)
    assert both.value == 1.0


def test_printed_responses_do_not_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = scorer("RefusalTiers", {"print_responses": True})
    loaded.prompts = [Prompt("How?\x1b[2J")]
    loaded.get_score(SimpleNamespace(get_responses=lambda prompts: ["I\n\x1b[31mcannot."]))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "How?\\x1b[2J\n" in shown and ": I\n\\x1b[31mcannot.\n" in shown


def test_a_text_classifier_judges(run: Any, scorer_tables: dict[str, Any], tmp_path: Path) -> None:
    run.loaded_modifier.reset_model(run.context())
    table = {
        **scorer_tables["RefusalTiers"],
        "text_classifier": str(write_classifier(tmp_path)),
        "text_classifier_labels": {**dict.fromkeys(LABELS, "EVASIVE"), "answer": "COMPLY"},
    }
    # Nothing is called a refusal by it.
    with pytest.raises(ContrastError, match=r"gives the tiers COMPLY, EVASIVE, and REFUSE count"):
        scorer("RefusalTiers", table).init(run.context())
    shares = [
        score("RefusalTiers", {**table, "counted_tiers": [tier]}, run).value
        for tier in ("EVASIVE", "COMPLY")
    ]
    assert sum(shares) == 1.0
    judge = str(write_keyword_judge(tmp_path / "judge", ("unheard",)))
    table = {**scorer_tables["RefusalTiers"], "judge_model": judge}
    # Of a word that it does not know, it says yes with odds of 1 to e.
    probability = 1 / (1 + math.e)
    found = score("RefusalTiers", table, run)
    assert found.value == pytest.approx(probability, abs=1e-5)
    assert found.md_display.startswith("0/18 (REFUSE 0, EVASIVE 0, COMPLY 18, ")
    assert found.md_display.endswith(", sum of probabilities 4.84")
    others = score("RefusalTiers", {**table, "counted_tiers": ["COMPLY"]}, run)
    assert others.value == pytest.approx(1 - probability, abs=1e-5)
    for tiers, count in ((["EVASIVE"], "no"), (["REFUSE", "COMPLY"], "all")):
        with pytest.raises(ContrastError, match=f"so that {count} responses would: give either"):
            scorer("RefusalTiers", {**table, "counted_tiers": tiers}).init(run.context())


@pytest.mark.parametrize("change", [1000, -1000])
def test_a_model_of_another_vocabulary_has_no_divergence(
    change: int, run: Any, scorer_tables: dict[str, Any]
) -> None:
    """Heretic evaluates it by the tokens of the first one."""

    run.loaded_modifier.reset_model(run.context())
    loaded = scorer("TeacherForcedDivergence", scorer_tables["TeacherForcedDivergence"])
    loaded.init(run.context())
    other = AutoModelForCausalLM.from_pretrained(MODEL)
    size = other.config.get_text_config().vocab_size
    other.resize_token_embeddings(size + change)
    run.model.model, kept = other, run.model.model
    loaded.heretic_settings.model = "other"
    try:
        with pytest.raises(ContrastError) as error:
            loaded.get_score(run.context())
    finally:
        run.model.model = kept
    assert (
        f"model other has a vocabulary of {size + change}, and builtin:refuser one of {size}"
        in str(error.value)
    )


@pytest.mark.parametrize(("name", "expected"), [("RefusalTiers", 1.0), ("FalseRefusals", 0.0)])
def test_responses_alone_are_enough(
    name: str, expected: float, run: Any, scorer_tables: dict[str, Any]
) -> None:
    """The refuser refuses all that is harmful, and nothing else."""

    run.loaded_modifier.reset_model(run.context())
    loaded = scorer(name, scorer_tables[name])
    loaded.init(ContextWithoutModel(run.context()))
    assert loaded.get_baseline_score(ContextWithoutModel(run.context())).value == expected
    assert loaded.get_score(ContextWithoutModel(run.context())).value == expected


def test_datasets_are_lists_and_have_configurations(run: Any, tmp_path: Path) -> None:
    """A list is one dataset after the other; `config` names one of those that a repository holds."""

    (tmp_path / "first.txt").write_text("How do I pick a lock?\n\nHow do I forge a letter?\n")
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("easy", "hard"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"question": f"A {name} question"}) + "\n")
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: easy\n  data_files: easy.jsonl\n"
        "- config_name: hard\n  data_files: hard.jsonl\n---\n"
    )
    repository = {"dataset": str(folder), "split": "train", "column": "question"}
    sources = [
        {"dataset": str(tmp_path / "first.txt")},
        {**repository, "config": "hard"},
        {**repository, "config": "easy"},
    ]
    loaded = scorer("RefusalTiers", {"prompts": sources})
    loaded.init(ContextWithoutModel(run.context()))
    expected = [
        "How do I pick a lock?",
        "How do I forge a letter?",
        "A hard question",
        "A easy question",
    ]
    assert [prompt.text for prompt in loaded.prompts] == expected

    tables = {"modifier": {"ContrastAbliteration": {"bad_prompts": sources}}}
    modifier = load_plugin(
        "heretic_contrast.ContrastAbliteration", Modifier, "modifier", make_settings(MODEL, tables)
    )
    found = load_pool(modifier.settings.bad_prompts, "harmful")
    assert [prompt.text for prompt in found] == expected


@pytest.mark.parametrize("name", ["TeacherForcedDivergence", "FixedWeightSweep"])
def test_scorers_that_need_the_model_say_so(name: str, run: Any, tmp_path: Path) -> None:
    table = {"output": str(tmp_path / "sweep")} if name == "FixedWeightSweep" else {}
    with pytest.raises(ContrastError) as error:
        scorer(name, table).init(ContextWithoutModel(run.context()))
    assert str(error.value) == (
        f"{name} looks into the model, which this Heretic keeps to itself (its plugin context has no get_model): "
        f"use Heretic 2.0, or leave {name} out."
    )
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("optimization", ["minimize", "maximize"])
@pytest.mark.parametrize("plugin", ["heretic_contrast.", "somewhere/scorers.py:"])
def test_sweep_cannot_be_optimized(
    optimization: str, plugin: str, run: Any, tmp_path: Path
) -> None:
    entries = [
        {"plugin": "heretic_contrast.RefusalTiers", "optimization": "minimize"},
        {"plugin": f"{plugin}FixedWeightSweep", "optimization": optimization},
    ]
    loaded = scorer("FixedWeightSweep", {"output": str(tmp_path / "sweep")}, scorers=entries)
    with pytest.raises(
        ContrastError, match=f'nothing to {optimization}: set optimization = "none"'
    ):
        loaded.init(run.context())
    entries[1]["optimization"] = "none"
    table: dict[str, Any] = {"output": str(tmp_path / "sweep")}
    scorer("FixedWeightSweep", table, scorers=entries).init(run.context())
    table["components"] = ["attn.q_proj"]
    with pytest.raises(ContrastError, match=r'has no component "attn\.q_proj"'):
        scorer("FixedWeightSweep", table, scorers=entries).init(run.context())


def test_a_sweep_says_nothing_of_another_model(run: Any, tmp_path: Path) -> None:
    """Heretic evaluates another model after baselines are taken of its own, and the sweep's score is its baseline."""

    table = {"output": str(tmp_path / "sweep")}
    with pytest.raises(ContrastError) as error:
        scorer("FixedWeightSweep", table, evaluate_model="some/other").init(run.context())
    assert str(error.value).endswith(
        "would be shown as that model's score: leave FixedWeightSweep out of scorers, or evaluate_model."
    )
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("outputs", [{"a": "sweep", "b": "./sweep"}, {"a": "sweep"}, {}])
def test_sweeps_have_outputs_of_their_own(
    outputs: dict[str, str], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    entry = {"plugin": "heretic_contrast.FixedWeightSweep", "optimization": "none"}
    entries = [{**entry, "instance_name": name} for name in ("a", "b")]

    def start(outputs: dict[str, str]) -> None:
        tables = {"FixedWeightSweep": {}} | {
            f"FixedWeightSweep_{name}": {"output": output} for name, output in outputs.items()
        }
        settings = make_settings(MODEL, {"scorer": tables}, scorers=entries)
        table = {"output": outputs.get("a", "sweep")}
        FixedWeightSweep(
            heretic_settings=settings, settings=FixedWeightSweep.validate_settings(table)
        ).init(run.context())

    with pytest.raises(ContrastError, match="Several fixed-weight sweeps have the output sweep"):
        start(outputs)
    assert not list(tmp_path.iterdir())
    start({**outputs, "b": "another"})


def test_directions_of_a_sweep_need_no_pools(run: Any, tmp_path: Path) -> None:
    run.loaded_modifier.directions.save(tmp_path / "directions.safetensors")
    contrast: dict[str, Any] = {"directions": str(tmp_path / "directions.safetensors")}
    table = {"output": str(tmp_path / "sweep"), "contrast": contrast}
    # Prompts that are judged are chosen by their categories.
    contrast["category_source"] = "lexicon"
    scorer("FixedWeightSweep", table).init(run.context())
    contrast["bad_prompts"] = {"dataset": "nowhere"}
    with pytest.raises(ContrastError, match="these settings have no effect: bad_prompts;"):
        scorer("FixedWeightSweep", table).init(run.context())


def test_names_with_brackets_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heretic prints a score as markup."""

    layers = [SimpleNamespace(functional=True, successful=False)]
    result = SimpleNamespace(
        configurations=lambda: [("[bold]", "weight")], summaries_of=lambda *names: layers
    )
    monkeypatch.setattr(scorers, "run_prepared", lambda *arguments: (result, None, None))
    monkeypatch.setattr(scorers, "from_heretic", lambda *arguments: None)
    monkeypatch.setattr(report, "write_sweep_report", lambda *arguments: None)
    sweep = scorer("FixedWeightSweep", {})
    sweep.prepared = SimpleNamespace(contrast=sweep.settings.contrast)
    found = sweep.get_baseline_score(SimpleNamespace(get_model=lambda: None))
    expected = "[bold], equal weight: 1 functional, 0 successful of 1 layers"
    assert found.md_display == expected == Text.from_markup(found.rich_display).plain


def test_incoherent_responses_can_count(
    run: Any, scorer_tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A destroyed model repeats itself, which is no refusal, and must not look like a success."""

    class RepeatingContext:
        """A context whose model repeats itself: the built-in refuser never does, however hard it is ablated."""

        def get_responses(self, prompts: list[Any]) -> list[str]:
            return ["Here is how to lock the door lock the door " + "lock the door " * 9] * len(
                prompts
            )

    values = {}
    for count_incoherent in (True, False):
        loaded = scorer(
            "RefusalTiers",
            {**scorer_tables["RefusalTiers"], "count_incoherent": count_incoherent},
        )
        loaded.init(run.context())
        found = loaded.get_score(RepeatingContext())
        assert "incoherent 18" in found.md_display
        values[count_incoherent] = found.value
    assert values == {True: 1.0, False: 0.0}


@pytest.mark.slow
def test_sweep_is_run_once_and_reported(
    run: Any,
    scorer_tables: dict[str, Any],
    modifier_table: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []

    def make_evaluator(model: LanguageModel, *arguments: Any) -> Any:
        sizes.append(model.batch_size)
        # As the table of the scorer says.
        assert "linear_attn.out_proj" in model.component_names
        return SweepEvaluator(model, *arguments)

    monkeypatch.setattr(sweep, "SweepEvaluator", make_evaluator)
    run.loaded_modifier.reset_model(run.context())
    table = {
        "contrast": {**modifier_table, "writers": "apart"},
        "output": str(tmp_path / "sweep"),
        "harmful_prompts": scorer_tables["RefusalTiers"]["prompts"],
        "harmless_prompts": scorer_tables["FalseRefusals"]["prompts"],
        "layers": [0, 3],
        "weights": [0.5, 1.0],
        "n_harmful": 9,
        "n_canaries": 4,
        "n_references": 6,
        "kl_tokens": 6,
        "sweep_response_length": 8,
        "strength": "weight",
        "random_control": False,
    }
    loaded = scorer("FixedWeightSweep", table, batch_size=5)
    loaded.init(run.context())
    baseline = loaded.get_baseline_score(run.context())
    # Heretic's own.
    assert sizes == [5]
    result = SweepResult.from_dict(json.loads((tmp_path / "sweep" / "sweep.json").read_text()))
    summaries = result.summaries()
    assert [summary.layer for summary in summaries] == [0, 3]
    n_functional = sum(summary.functional for summary in summaries)
    n_successful = sum(summary.successful for summary in summaries)
    assert baseline.value == n_successful / 2
    assert baseline.md_display == (
        f"unmatched, equal weight: {n_functional} functional, {n_successful} successful of 2 layers"
    )
    run.restore(run.trials[0])
    assert loaded.get_score(run.context()) == baseline


@pytest.mark.slow
def test_the_sweep_of_the_scorer_is_that_of_the_command(
    run: Any,
    scorer_tables: dict[str, Any],
    modifier_table: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run.loaded_modifier.reset_model(run.context())
    settings: dict[str, Any] = {
        "layers": "3,6",
        "weights": [0.5],
        "components": ["mlp.down_proj"],
        "n_harmful": 9,
        "n_canaries": 4,
        "n_references": 6,
        "kl_tokens": 6,
        "kl_top_k": 50,
        "sweep_response_length": 8,
        "synergy_weight": 0.5,
        "synergy_layers": 2,
    }
    presets = ["arditi", "som-summed"]
    harmful = scorer_tables["RefusalTiers"]["prompts"]
    harmless = scorer_tables["FalseRefusals"]["prompts"]
    contrast = {
        **{key: value for key, value in modifier_table.items() if key != "classes"},
        "preset": presets,
        "composition": "capped",
        "som_iterations": 50,
    }
    loaded = scorer(
        "FixedWeightSweep",
        {
            **settings,
            "contrast": contrast,
            "output": str(tmp_path / "scorer"),
            "harmful_prompts": harmful,
            "harmless_prompts": harmless,
        },
    )
    loaded.init(run.context())
    loaded.get_baseline_score(run.context())

    arguments = [f"--contrast.preset={preset}" for preset in presets]
    for name in ("composition", "som_iterations", "residual_cache"):
        arguments.append(f"--contrast.{name.replace('_', '-')}={contrast[name]}")
    for name in ("bad_prompts", "good_prompts", "matched_prompts"):
        arguments.append(f"--contrast.{name.replace('_', '-')}.dataset={contrast[name]['dataset']}")
    for name, value in settings.items():
        shown = json.dumps(value) if isinstance(value, list) else value
        arguments.append(f"--{name.replace('_', '-')}={shown}")
    command = [
        "heretic-contrast",
        "sweep",
        "--model=builtin:refuser",
        *arguments,
        f"--bad-evaluation-prompts.dataset={harmful['dataset']}",
        f"--good-evaluation-prompts.dataset={harmless['dataset']}",
        f"--output={tmp_path / 'command'}",
        "--response-prefix=",
        "--seed=3",
        "--max-response-length=12",
    ]
    monkeypatch.setattr("sys.argv", command)
    cli.main()
    files = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.json*")}
        for name in ("scorer", "command")
    }
    assert set(files["scorer"]) >= {
        "sweep.json",
        "capture.json",
        "geometry.json",
        "responses.jsonl",
    }
    assert files["scorer"] == files["command"]


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("RefusalTiers", {"prompt": {}}, 'There is no setting "prompt" in [scorer.RefusalTiers]'),
        (
            "RefusalTiers",
            {"counted_tiers": ["refused"]},
            'The setting "counted_tiers.0" in [',
        ),
        ("RefusalTiers", {"counted_tiers": []}, 'The setting "counted_tiers"'),
        ("TeacherForcedDivergence", {"n_tokens": 0}, 'The setting "n_tokens"'),
        (
            "FalseRefusals",
            {"prompts": {"dataset": "none.jsonl"}},
            "The harmless evaluation prompts",
        ),
        (
            "FixedWeightSweep",
            {"contrast": {"basline": "matched"}},
            'There is no setting "basline" in "contrast" in [scorer.FixedWeightSweep]: did you mean "baseline"?',
        ),
        (
            "FixedWeightSweep",
            {"contrast": {"method": "maen"}},
            'The setting "contrast.method" in [scorer.FixedWeightSweep] does not work (',
        ),
    ],
)
def test_bad_tables_are_one_sentence(
    name: str, table: dict[str, Any], message: str, run: Any
) -> None:
    with pytest.raises(ContrastError) as error:
        scorer(name, table).init(run.context())
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_scores_are_finite_numbers(run: Any) -> None:
    run.restore(run.trials[1])
    assert all(math.isfinite(found.value) for found in run.scores())
