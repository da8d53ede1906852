# SPDX-License-Identifier: AGPL-3.0-or-later

"""The plugins in Heretic 2.0's documented life cycle, by way of a stand-in (see `standin`)."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from safetensors.torch import load_file

from heretic_contrast import ContrastAbliteration
from heretic_contrast.directions.directions import Directions
from heretic_contrast.errors import ContrastError
from heretic_contrast.hosts.surface import HAS_PLUGIN_SURFACE, Modifier, checkpointed_trials
from heretic_contrast.prompts import prompts_digest
from heretic_contrast.search.parameters import Parameters, configuration_digest
from heretic_contrast.settings import ContrastSettings
from tests.contract.conftest import MODEL
from tests.contract.standin import StandIn, load_plugin, make_settings


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return list(first) == list(second) and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_baselines_are_those_of_the_unmodified_model(run: Any) -> None:
    tiers, divergence, canaries = run.baselines
    assert tiers.value == 1.0
    assert tiers.rich_display == "[bold]18[/]/18 (REFUSE 18, EVASIVE 0, COMPLY 0, incoherent 0)"
    assert abs(divergence.value) < 1e-5
    assert canaries.value == 0.0


def test_the_prompts_of_the_directions_are_known_without_their_files(run: Any) -> None:
    modifier = run.loaded_modifier
    assert modifier.known_pools is not None
    pools = modifier.known_pools.named()
    found = {name: prompts_digest(pool) for name, pool in pools.items()}
    assert found == modifier.directions.provenance["prompts"]


def test_factors_are_exact_and_restored_bit_for_bit(run: Any) -> None:
    run.restore(run.trials[0])
    first = run.factors()
    assert any(bool(factor.any()) for name, factor in first.items() if "lora_B" in name)
    assert {factor.shape[0] for name, factor in first.items() if "lora_A" in name} == {9}
    run.restore(run.trials[1])
    assert not same(first, run.factors())
    run.restore(run.trials[0])
    assert same(first, run.factors())

    run.export()
    run.restore(run.trials[0])
    assert run.has_lora()
    assert same(first, run.factors())
    run.export()
    run.restore(run.trials[0])
    assert same(first, run.factors())


def test_another_model_in_the_folder_is_noticed_when_it_is_loaded_again(
    modifier_table: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    tables = {"modifier": {"ContrastAbliteration": {**modifier_table, "classes": "single"}}}
    run = StandIn(make_settings(str(folder), tables)).start()
    run.optimize(2)
    original = (folder / "model.safetensors").read_bytes()
    run.restore(run.trials[0])
    expected = run.factors()
    run.export().save_pretrained(folder)
    # Nothing can be done with the other one.
    for trial in run.trials:
        with pytest.raises(ContrastError, match=r"another model since .* \(other weights\)"):
            run.restore(trial)
        assert run.model.model is None
    (folder / "model.safetensors").write_bytes(original)
    run.restore(run.trials[0])
    assert same(run.factors(), expected)


def test_directions_of_a_file_are_told_by_their_numbers(run: Any, tmp_path: Path) -> None:
    own = run.loaded_modifier

    def configuration(directions: Directions) -> str:
        directions.save(tmp_path / "mine.safetensors")
        return configuration_digest(
            Directions.load(tmp_path / "mine.safetensors"), own.settings.ablation()
        )

    assert configuration(own.directions) == own.configuration
    # As earlier versions have written them.
    made = {name: value for name, value in own.directions.provenance.items() if name != "digest"}
    assert configuration(replace(own.directions, provenance=made)) == own.configuration
    nothing: dict[str, Any] = {}
    for provenance in (own.directions.provenance, nothing):
        mine = replace(own.directions, provenance=provenance)
        assert configuration(mine) != configuration(replace(mine, tensor=-mine.tensor))
        assert configuration(mine) == configuration(mine)
    provenance = {**own.directions.provenance, "identity": {}}
    other = replace(own.directions, provenance=provenance)
    with pytest.raises(ContrastError, match="prompts, directions and model, and the kind of dev"):
        Parameters.from_dict(json.loads(run.trials[0])).require_fit(
            other,
            own.model(run.context()).component_names,
            configuration_digest(other, own.settings.ablation()),
        )


def test_a_shared_direction_and_components_apart(modifier_table: dict[str, Any]) -> None:
    table = {**modifier_table, "shared_direction": True, "writers": "apart"}
    shared = StandIn(
        make_settings(MODEL, {"modifier": {"ContrastAbliteration": table}}), scorers=[]
    )
    shared.start().optimize(2)
    for trial in map(json.loads, shared.trials):
        assert len(trial["scales"]) == 10 and trial["scales"]["shared"] == 1.0
        assert set(trial["kernels"]) == {"attn.o_proj", "linear_attn.out_proj", "mlp.down_proj"}
    shared.restore(shared.trials[0])
    assert {tensor.shape[0] for name, tensor in shared.factors().items() if "lora_A" in name} == {
        10
    }


def test_scores_follow_the_model_after_an_export(run: Any) -> None:
    strong = json.loads(run.trials[0])
    for kernel in strong["kernels"].values():
        kernel.update(
            max_weight=1.0, max_weight_position=3.0, min_weight=1.0, min_weight_distance=8.0
        )
    strong["direction_index"] = None
    strong["scales"] = dict.fromkeys(strong["scales"], 0.3)
    run.restore(json.dumps(strong))
    before = run.scores()
    assert before[0].value < 0.5
    assert before[1].value > 1e-4
    run.export()
    run.restore(json.dumps(strong))
    assert [score.value for score in run.scores()] == [score.value for score in before]


def test_divergence_is_that_of_full_distributions(run: Any) -> None:
    """The scorer's value against log-softmax over the whole vocabulary, computed prompt by prompt."""

    run.restore(run.trials[0])
    scorer = run.loaded_scorers[1]
    tokenizer, model = run.model.tokenizer, run.model.model
    from heretic_contrast.prompts import load_pool

    total, count = 0.0, 0
    for prompt in load_pool(scorer.settings.prompts, "harmless"):
        text = tokenizer.apply_chat_template(
            [
                {"role": "system", "content": run.settings.system_prompt},
                {"role": "user", "content": prompt.text},
            ],
            add_generation_prompt=True,
            tokenize=False,
        )
        ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False)["input_ids"]
        with model.disable_adapter():
            whole = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=8,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            base = model(input_ids=whole).logits[0].double().log_softmax(dim=-1)
        modified = model(input_ids=whole).logits[0].double().log_softmax(dim=-1)
        kl = (base.exp() * (base - modified)).sum(dim=-1)[ids.shape[1] - 1 : -1]
        total, count = total + float(kl.sum()), count + len(kl)
    measured = scorer.get_score(run.context()).value
    assert measured == pytest.approx(total / count, rel=1e-3, abs=1e-6)


def test_mixin_in_front_keeps_the_parameters_class(run: Any) -> None:
    from typing import Generic, TypeVar

    T = TypeVar("T")

    class Mixin(Generic[T]):
        pass

    class Mixed(Mixin[int], ContrastAbliteration):
        settings: ContrastSettings

    plugin = Mixed(heretic_settings=run.settings, settings=run.loaded_modifier.settings)
    assert plugin.parameters_class is Parameters
    # Its table is named after it.
    for raw, message in (
        ({"baseline": "matchd"}, "There is no contrast baseline"),
        ({"som_rows": 0}, r'The setting "som_rows" in \[modifier\.Mixed\] does not work'),
    ):
        with pytest.raises(ContrastError, match=message):
            Mixed.validate_settings(raw)
    plugin.heretic_settings = make_settings(MODEL, {"modifier": {"Mixed": {"som_rosw": 3}}})
    with pytest.raises(ContrastError, match=r'"som_rosw" in \[modifier\.Mixed\]: did you mean'):
        plugin.init(run.context())


def test_parameters_of_another_configuration_are_refused(run: Any) -> None:
    stored = json.loads(run.trials[0])
    for change in (
        {"configuration": "0" * 16},
        {"scales": {"all": 1.0}},
        {"kernels": {}},
    ):
        with pytest.raises(ContrastError, match="belong to another configuration"):
            run.restore(json.dumps({**stored, **change}))
    with pytest.raises(ContrastError, match="trials of another modifier"):
        run.restore(json.dumps({"direction_index": None, "weight_distributions": {}}))


@pytest.mark.parametrize(
    "change",
    [
        {"row_normalization": "full"},
        {"row_normalization": "full", "full_normalization_lora_rank": 20},
        {"composition": "capped"},
        {"equal_effective_weight": True},
        {"writers": "apart"},
        {"embeddings": True},
    ],
)
def test_a_study_is_not_gone_on_with_under_other_settings(run: Any, change: dict[str, Any]) -> None:
    """Heretic 2.0 takes what `config.toml` holds by then, under which the same parameters are another change of the model."""

    own, stored = run.loaded_modifier, json.loads(run.trials[0])
    study = optuna.create_study()
    for parameters in ({"of": "another modifier"}, stored):
        trial = study.ask()
        trial.set_user_attr("parameters", parameters)
        study.tell(trial, 0.0)
    assert own.suggest_parameters(run.context(), study.ask()).configuration
    settings = ContrastSettings.model_validate({**own.settings.given(), **change})
    other = ContrastAbliteration(heretic_settings=run.settings, settings=settings)
    other.directions = own.directions
    with pytest.raises(ContrastError, match="belong to another configuration"):
        other.suggest_parameters(run.context(), study.ask())
    with pytest.raises(ContrastError, match="belong to another configuration"):
        other.modify_model(run.context(), Parameters.from_dict(stored))


def test_other_settings_are_refused_before_the_study_is_touched(run: Any, tmp_path: Path) -> None:
    """Heretic 2.0 stores what it has merged before its first trial, from when on the old settings would be refused as well."""

    own, stored = run.loaded_modifier, json.loads(run.trials[0])
    heretic_settings = SimpleNamespace(
        model="some/model 1", study_checkpoint_dir=str(tmp_path), evaluate_model=None
    )
    assert checkpointed_trials(heretic_settings) == []
    # Named as Heretic names it.
    path = tmp_path / "some--model--1.jsonl"
    storage = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.create_study(study_name="heretic", storage=storage)
    trial = study.ask()
    trial.set_user_attr("parameters", stored)
    study.tell(trial, 0.0)
    before = path.read_bytes()
    trials = checkpointed_trials(heretic_settings)
    model = own.model(run.context())
    own.require_same_study(trials, model)
    settings = ContrastSettings.model_validate({**own.settings.given(), "composition": "capped"})
    other = ContrastAbliteration(heretic_settings=run.settings, settings=settings)
    other.directions = own.directions
    with pytest.raises(ContrastError, match="belong to another configuration"):
        other.require_same_study(trials, model)
    assert path.read_bytes() == before
    heretic_settings.evaluate_model = "some/other"
    assert checkpointed_trials(heretic_settings) == []


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"modifier": {"ContrastAbliteration": {"basline": "matched"}}},
            'There is no setting "basline" in [modifier.ContrastAbliteration]: did you mean "baseline"?',
        ),
        (
            {"modifier": {"ContrastAbliteration": {"baseline": "matchd"}}},
            'There is no contrast baseline "matchd"',
        ),
        (
            {"modifier": {"ContrastAbliteration": {"som_rows": 0}}},
            'The setting "som_rows" in [modifier.ContrastAbliteration] does not work',
        ),
        (
            {"modifier": {"ContrastAbliteration": {"category_source": "lexicon"}}},
            "The setting category_source has no effect on one direction",
        ),
        (
            {
                "modifier": {
                    "ContrastAbliteration": {
                        "classes": "category",
                        "shared_direction": True,
                        "search_space": {"scale.shared": [0, 1]},
                    }
                }
            },
            'The range of "scale.shared" in search_space has no effect',
        ),
    ],
)
def test_bad_tables_are_one_sentence(tables: dict[str, Any], message: str, run: Any) -> None:
    settings = make_settings(MODEL, tables)
    with pytest.raises(ContrastError) as error:
        plugin = load_plugin(
            "heretic_contrast.ContrastAbliteration", Modifier, "modifier", settings
        )
        plugin.init(run.context())
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_shared_direction_of_a_file_has_no_scale(run: Any, tmp_path: Path) -> None:
    own = run.loaded_modifier.directions
    names = ("shared", *own.names[1:])
    provenance = {**own.provenance, "settings": {**own.settings, "shared_direction": True}}
    replace(own, names=names, provenance=provenance).save(tmp_path / "shared.safetensors")
    table = {"directions": str(tmp_path / "shared.safetensors")}
    standins = {
        name: StandIn(
            make_settings(
                MODEL,
                {
                    "modifier": {
                        "ContrastAbliteration": {
                            **table,
                            "search_space": {f"scale.{name}": [0.0, 0.5]},
                        }
                    }
                },
            )
        )
        for name in ("shared", names[1])
    }
    with pytest.raises(ContrastError, match='range for the direction "shared", but there are'):
        standins["shared"].start()
    standins[names[1]].start()


@pytest.mark.slow
def test_directions_of_a_file_are_ablated_as_they_were_extracted(
    modifier_table: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "som-sequential.safetensors"
    pools = {name: modifier_table[name] for name in ("bad_prompts", "good_prompts")}
    preset = {"preset": ["som-sequential"], "som_iterations": 50, "save_directions": str(path)}

    def start(**table: Any) -> StandIn:
        standin = StandIn(make_settings(MODEL, {"modifier": {"ContrastAbliteration": table}}))
        standin.start().optimize(1)
        return standin

    expected, found = start(**preset, **pools), start(directions=str(path))
    assert found.loaded_modifier.settings.composition == "sequential"
    assert found.loaded_modifier.configuration == expected.loaded_modifier.configuration
    assert found.trials == expected.trials and '"embeddings"' in found.trials[0]
    assert same(found.factors(), expected.factors())
    output = " ".join(capsys.readouterr().out.split())
    assert output.count('file: embeddings = true, composition = "sequential", row_') == 1
    summed = start(directions=str(path), composition="sum")
    assert not same(summed.factors(), expected.factors())


@pytest.mark.parametrize("place", ["bad_prompts", "scorer", "directory"])
def test_directions_are_not_saved_over_what_is_read(
    place: str, modifier_table: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    """The host for Heretic 1.4 looks at the place before it loads a model, and Heretic 2.0 looks at none."""

    pool = tmp_path / "pool.jsonl"
    pool.write_bytes(Path(modifier_table["bad_prompts"]["dataset"]).read_bytes())
    path = tmp_path if place == "directory" else pool
    table = {**modifier_table, "save_directions": str(path)}
    scorer = {}
    if place == "bad_prompts":
        table[place] = {"dataset": os.path.relpath(pool)}
    else:
        scorer = {"RefusalTiers": {"prompts": {"dataset": str(pool)}}}
    tables = {"modifier": {"ContrastAbliteration": table}, "scorer": scorer}
    plugin = load_plugin(
        "heretic_contrast.ContrastAbliteration", Modifier, "modifier", make_settings(MODEL, tables)
    )
    before = pool.read_bytes()
    # Nothing is computed.
    plugin.model = None
    message = "is a directory: give" if place == "directory" else "is read, so it cannot be written"
    with pytest.raises(ContrastError, match=message):
        plugin.init(run.context())
    assert pool.read_bytes() == before


@pytest.mark.slow
@pytest.mark.skipif(HAS_PLUGIN_SURFACE, reason="needs Heretic 1.4 to compare with")
def test_both_hosts_make_the_same_directions_and_factors(
    tmp_path: Path, modifier_table: dict[str, Any], scorer_tables: dict[str, Any]
) -> None:
    lines = {
        name: "\n".join(
            json.loads(line)["text"]
            for line in Path(scorer_tables[scorer]["prompts"]["dataset"]).read_text().splitlines()
        )
        for name, scorer in (("bad", "RefusalTiers"), ("good", "FalseRefusals"))
    }
    for name, text in lines.items():
        (tmp_path / f"{name}.txt").write_text(text)
    finished = subprocess.run(
        [
            sys.executable,
            "-c",
            "from heretic_contrast.cli import main; main()",
            f"--model={MODEL}",
            "--seed=3",
            "--n-trials=1",
            "--n-startup-trials=1",
            "--batch-size=64",
            "--max-response-length=4",
            "--response-prefix=",
            f"--bad-evaluation-prompts.dataset={tmp_path / 'bad.txt'}",
            f"--good-evaluation-prompts.dataset={tmp_path / 'good.txt'}",
            "--contrast.classes=category",
            "--contrast.baseline=unmatched",
            "--contrast.row-normalization=none",
            *(
                f"--contrast.{name.replace('_', '-')}.dataset={modifier_table[name]['dataset']}"
                for name in ("bad_prompts", "good_prompts", "matched_prompts")
            ),
            f"--contrast.save-directions={tmp_path / 'hosted.safetensors'}",
            f"--study-checkpoint-dir={tmp_path / 'checkpoints'}",
            "--trial-index=0",
            "--model-action=save",
            "--export-strategy=adapter",
            f"--save-directory={tmp_path / 'adapter'}",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    (journal,) = tmp_path.glob("checkpoints/contrast-*/*.jsonl")
    study = optuna.load_study(
        study_name="heretic", storage=JournalStorage(JournalFileBackend(str(journal)))
    )

    table = {**modifier_table, "save_directions": str(tmp_path / "standin.safetensors")}
    # Nothing cached, so that the residuals are computed here as well.
    table["residual_cache"] = str(tmp_path / "cache")
    standin = StandIn(make_settings(MODEL, {"modifier": {"ContrastAbliteration": table}})).start()
    assert (tmp_path / "standin.safetensors").read_bytes() == (
        tmp_path / "hosted.safetensors"
    ).read_bytes()

    standin.restore(json.dumps(study.trials[0].user_attrs["contrast"]))
    hosted = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    factors = {name.replace(".default.", "."): factor for name, factor in standin.factors().items()}
    assert sorted(hosted) == sorted(factors)
    assert all(torch.equal(hosted[name], factors[name].contiguous()) for name in hosted)
