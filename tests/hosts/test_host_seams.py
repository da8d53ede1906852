# SPDX-License-Identifier: AGPL-3.0-or-later

"""The host for Heretic 1.4: its seams, its settings, its samplers and its checkpoints."""

import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from unittest.mock import Mock

import optuna
import pytest
import torch
from filelock import FileLock
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from pydantic import ValidationError
from questionary import Choice
from rich.text import Text

heretic_main = pytest.importorskip("heretic.main")
pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")

from heretic_contrast.directions.directions import Directions  # noqa: E402
from heretic_contrast.errors import ContrastError, ContrastWarning  # noqa: E402
from heretic_contrast.hosts import heretic14  # noqa: E402
from heretic_contrast.hosts.answers import TRIAL_QUESTION  # noqa: E402
from heretic_contrast.hosts.evaluator import Evaluator, first_token_divergence  # noqa: E402
from heretic_contrast.hosts.loading import LoadedContext  # noqa: E402
from heretic_contrast.hosts.record import Made, Record  # noqa: E402
from heretic_contrast.hosts.settings import HostSettings, load_settings  # noqa: E402
from heretic_contrast.hosts.studies import own_checkpoints, repair_checkpoint  # noqa: E402
from heretic_contrast.hosts.unused import FORMER_POOLS  # noqa: E402
from heretic_contrast.language_model import LanguageModel  # noqa: E402
from heretic_contrast.modifier import ContrastAbliteration  # noqa: E402
from heretic_contrast.processes import LOCK, alone_in  # noqa: E402
from heretic_contrast.prompts import Prompt  # noqa: E402
from heretic_contrast.search.parameters import (  # noqa: E402
    HERETIC_20_RANGES,
    Parameters,
    layer_vectors,
    require_ranges,
    suggest_parameters,
)
from heretic_contrast.search.samplers import make_sampler  # noqa: E402
from heretic_contrast.settings import (  # noqa: E402
    PRESETS,
    ContrastSettings,
    PromptSource,
    Sampler,
)
from tests.conftest import DATA, Refused, small_pool  # noqa: E402
from tests.made_directions import make_directions  # noqa: E402


def settings(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> HostSettings:
    monkeypatch.setattr(sys, "argv", [])
    return load_settings(HostSettings, "heretic-contrast", [*arguments, "--model=builtin:refuser"])


def test_seams_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    host = heretic14.Host(settings(monkeypatch), ContrastAbliteration)
    before = {name: getattr(heretic_main, name) for name in host.substitutes()}
    with pytest.raises(RuntimeError), heretic14.substituted(host.substitutes()):
        assert heretic_main.Model is not before["Model"]
        raise RuntimeError
    assert {name: getattr(heretic_main, name) for name in before} == before


def test_a_pool_that_is_given_for_two_uses_is_read_for_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("own", "heretic"):
        (tmp_path / name).write_text(f"{name}\n")
    given = settings(
        monkeypatch,
        f"--contrast.bad-prompts.dataset={tmp_path / 'own'}",
        *(f"--{pool.replace('_', '-')}.dataset={tmp_path / 'heretic'}" for pool in FORMER_POOLS),
    )
    # What a study judges by may be what Heretic would have taken for something else.
    given.bad_prompts = given.bad_evaluation_prompts.model_copy()
    host = heretic14.Host(given, ContrastAbliteration)
    for pool, text in (("bad_prompts", "own"), *((pool, "heretic") for pool in FORMER_POOLS)):
        assert [item.user for item in host.load_prompts(given, getattr(given, pool))] == [text]


def test_missing_seam_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    host = heretic14.Host(settings(monkeypatch), ContrastAbliteration)
    monkeypatch.delattr(heretic_main, "prompt_path")
    with (
        pytest.raises(ContrastError, match="no prompt_path"),
        heretic14.substituted(host.substitutes()),
    ):
        pass


def test_checkpoints_of_different_configurations_do_not_collide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directories = [
        settings(monkeypatch, *arguments).study_checkpoint_dir
        for arguments in (
            [],
            ["--contrast.baseline=matched"],
            ["--contrast.seed=1"],
            ["--seed=1"],
            ["--kl-divergence-target=0.1"],
        )
    ]
    assert len(set(directories)) == 5
    # What does not decide trials leaves the checkpoint where it is.
    assert (
        settings(
            monkeypatch, "--n-trials=7", "--batch-size=3", "--save-directory=x"
        ).study_checkpoint_dir
        == directories[0]
    )


def test_stored_settings_restore_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    original = settings(
        monkeypatch,
        "--contrast.preset=som-sequential",
        "--row-normalization=pre",
        "--winsorization-quantile=0.9",
    )
    restored = HostSettings.model_validate_json(original.model_dump_json())
    assert restored.contrast == original.contrast
    assert original.contrast.row_normalization == "pre"
    assert original.contrast.winsorization_quantile == 0.9
    assert original.contrast.composition == "sequential" and original.contrast.winners == 7


def test_the_default_does_as_heretic_and_presets_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("row_normalization", "orthogonalize_direction")

    def chosen(*arguments: str) -> list[Any]:
        return [getattr(settings(monkeypatch, *arguments).contrast, name) for name in names]

    assert chosen() == [HostSettings.model_fields[name].default for name in names]
    given = ["--row-normalization=pre", "--orthogonalize-direction=true"]
    for preset in PRESETS:
        assert chosen(f"--contrast.preset={preset}") == ["none", False]
        # Heretic's own flags stand before a preset.
        assert chosen(f"--contrast.preset={preset}", *given) == ["pre", True]


def test_what_a_file_holds_as_heretic_ships_it_is_left_to_the_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Heretic's config.default.toml, renamed as it says."""

    shipped = {
        "orthogonalize_direction": "true",
        "row_normalization": '"full"',
        "full_normalization_lora_rank": "3",
        "winsorization_quantile": "1.0",
    }

    def chosen(values: dict[str, str], *arguments: str) -> tuple[Any, ...]:
        text = "\n".join(f"{name} = {value}" for name, value in values.items())
        (tmp_path / "config.toml").write_text(text)
        contrast = settings(monkeypatch, *arguments).contrast
        return tuple(getattr(contrast, name) for name in shipped)

    monkeypatch.chdir(tmp_path)
    preset = "--contrast.preset=paper-matched"
    message = "row_normalization, orthogonalize_direction as Heretic"
    with pytest.warns(ContrastWarning, match=message):
        assert chosen(shipped, preset) == (False, "none", None, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Several directions need more than Heretic's rank.
        assert chosen(shipped) == (True, "full", None, 1.0)
        other = {"orthogonalize_direction": "false", "row_normalization": '"pre"'}
        assert chosen({**other, "full_normalization_lora_rank": "4"}) == (False, "pre", 4, 1.0)
        assert chosen(other, preset) == (False, "pre", None, 1.0)
        given = [f"--{name.replace('_', '-')}={shipped[name].strip(chr(34))}" for name in shipped]
        assert chosen(shipped, preset, *given) == (True, "full", 3, 1.0)
        monkeypatch.setenv("HERETIC_ROW_NORMALIZATION", "full")
        assert chosen({"row_normalization": '"full"'}, preset)[1] == "full"


def test_table_and_flags_mean_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = settings(monkeypatch, "--contrast.baseline=mixed", "--contrast.mixing=0.25")
    (tmp_path / "config.toml").write_text(
        "[modifier.ContrastAbliteration]\nbaseline = 'mixed'\nmixing = 0.25\n"
    )
    monkeypatch.chdir(tmp_path)
    table = settings(monkeypatch)
    assert table.contrast == flags.contrast
    # The command line wins over the file.
    assert settings(monkeypatch, "--contrast.mixing=0.75").contrast.mixing == 0.75


def test_a_flag_comes_before_the_file_in_either_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heretic's own flag, and the environment, over what the file has for the plugin."""

    (tmp_path / "config.toml").write_text(
        "[modifier.ContrastAbliteration]\nrow_normalization = 'full'\nwinsorization_quantile = 1.0\n"
        "orthogonalize_direction = true\nfull_normalization_lora_rank = 7\nseed = 5\n"
        "bad_prompts = { dataset = 'theirs.jsonl', split = 'train' }\n"
    )
    monkeypatch.chdir(tmp_path)
    found = settings(
        monkeypatch,
        "--row-normalization=none",
        "--winsorization-quantile=0.9",
        "--orthogonalize-direction=false",
        "--full-normalization-lora-rank=5",
        "--bad-prompts.dataset=ours.jsonl",
        "--bad-prompts.column=text",
    ).contrast
    assert (found.row_normalization, found.winsorization_quantile) == ("none", 0.9)
    assert (found.orthogonalize_direction, found.full_normalization_lora_rank) == (False, 5)
    assert isinstance(found.bad_prompts, PromptSource)
    assert (found.bad_prompts.dataset, found.bad_prompts.split) == ("ours.jsonl", None)
    assert found.seed == 5
    monkeypatch.setenv("HERETIC_ROW_NORMALIZATION", "pre")
    found = settings(monkeypatch).contrast
    assert found.row_normalization == "pre" and found.full_normalization_lora_rank == 7
    assert found.bad_prompts == PromptSource(dataset="theirs.jsonl", split="train")


def test_reproducing_is_left_to_heretic(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ContrastError, match="plain Heretic"):
        heretic14.run(settings(monkeypatch, "--reproduce=reproduce.json"), ContrastAbliteration)


def unit_directions(n_directions: int, aligned: bool = True) -> Directions:
    tensor = torch.nn.functional.normalize(torch.randn(9, n_directions, 16), dim=-1)
    return make_directions(tensor, aligned=aligned)


def run_study(sampler: Any, storage: Any, n_trials: int, directions: Directions) -> list[Any]:
    """A study over the real search space with a made-up objective."""

    study = optuna.create_study(
        study_name="heretic",
        sampler=sampler,
        storage=storage,
        directions=["minimize", "minimize"],
        load_if_exists=True,
    )

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        parameters = suggest_parameters(trial, ["attn.o_proj", "mlp.down_proj"], 8, directions)
        weight = sum(kernel.max_weight for kernel in parameters.kernels.values())
        return weight, sum(parameters.scales.values())

    study.optimize(objective, n_trials=n_trials)
    return [(trial.params, trial.values) for trial in study.trials]


@pytest.mark.parametrize("kind", get_args(Sampler))
def test_resumed_study_equals_the_uninterrupted_one(kind: Sampler, tmp_path: Path) -> None:
    directions = unit_directions(3)
    whole = run_study(make_sampler(kind, 5, 4, {}), None, 14, directions)
    path = str(tmp_path / "study.jsonl")
    for n_trials in (6, 8):
        # A new process starts with a new sampler and reads the trials from the file.
        storage = JournalStorage(JournalFileBackend(path))
        resumed = run_study(make_sampler(kind, 5, 4, {}), storage, n_trials, directions)
    assert resumed == whole
    other = run_study(make_sampler(kind, 6, 4, {}), None, 14, directions)
    assert other != whole


def test_trials_are_heretics_own(tmp_path: Path) -> None:
    """Heretic's sampler lives through a study; ours draws the same numbers, also after a trial that failed, and in a new process."""

    directions = unit_directions(1)
    own = TPESampler(n_startup_trials=4, n_ei_candidates=128, multivariate=True, seed=5)
    whole = run_study(own, None, 12, directions)
    assert run_study(make_sampler("tpe", 5, 4, {}), None, 12, directions) == whole
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.jsonl")))
    for n_trials in (2, 3, 2):
        resumed = run_study(make_sampler("tpe", 5, 4, {}), storage, n_trials, directions)
        study = optuna.load_study(study_name="heretic", storage=storage)
        study.sampler = make_sampler("tpe", 5, 4, {})
        with pytest.raises(KeyError):
            study.optimize(lambda trial: [1.0, {}[trial.suggest_float("x", 0, 1)]], n_trials=1)
    assert [values for values in resumed if values[1]] == whole[:7]


@pytest.mark.parametrize("n_good", [3, 30])
def test_a_sampler_takes_bounds_for_bad_trials(n_good: int) -> None:
    """Also where fewer others are left than it takes for good ones."""

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        x, _ = (trial.suggest_float(name, 0, 1) for name in "xy")
        if trial.number < 60 and trial.number % (60 // n_good) > 0:
            trial.set_user_attr("bound", 0)
            # Both are better than those of any other trial.
            return -1.0, -1.0
        return abs(x - 0.9), x

    def constraints(trial: optuna.trial.FrozenTrial) -> list[float]:
        return [float("bound" in trial.user_attrs)]

    found = []
    for taken in (constraints, None):
        study = optuna.create_study(
            directions=["minimize", "minimize"], sampler=make_sampler("tpe", 0, 60, {}, taken)
        )
        study.optimize(objective, n_trials=90)
        found.append([trial.params for trial in study.trials])
    assert found[0][:50] == found[1][:50] and found[0][60:] != found[1][60:]


def test_only_a_sampler_that_knows_bounds_gets_them() -> None:
    with pytest.raises(ValidationError, match="nsga2 needs every trial to its end"):
        ContrastSettings(stop_dominated=True, sampler="nsga2")


def test_the_search_beside_a_shared_direction_contains_heretics() -> None:
    shared = replace(
        unit_directions(3),
        names=("shared", "drugs", "fraud"),
        provenance={"settings": {"shared_direction": True}},
    )
    components = ["attn.o_proj", "mlp.down_proj"]
    single, several = optuna.create_study().ask(), optuna.create_study().ask()
    suggest_parameters(single, components, 24, unit_directions(1))
    suggest_parameters(several, components, 24, shared)
    added = {"rest", "scale.drugs", "scale.fraud"}
    assert several.distributions.items() >= single.distributions.items()
    assert set(several.distributions) - set(single.distributions) == added
    chosen = {**several.params, "scale.drugs": 0.5, "scale.fraud": 1.0}
    for rest, scales in ((-0.3, [0.0, 0.0]), (0.0, [0.0, 0.0]), (0.5, [0.25, 0.5])):
        trial = optuna.trial.FixedTrial({**chosen, "rest": rest})
        found = suggest_parameters(trial, components, 24, shared)  # type: ignore[arg-type]
        assert list(found.scales.values()) == [1.0, *scales]


def test_fixed_parameters_take_no_part_in_the_search() -> None:
    fixed = {"direction_scope": "per layer", "direction_index": 0.4 * 7}
    trials = run_study(make_sampler("tpe", 0, 3, fixed), None, 8, unit_directions(2))
    assert {params["direction_scope"] for params, _ in trials} == {"per layer"}
    assert {params["direction_index"] for params, _ in trials} == {0.4 * 7}


def test_parameters_survive_json() -> None:
    import json

    trial = optuna.create_study().ask()
    parameters = suggest_parameters(trial, ["a", "b"], 8, unit_directions(3))
    restored = Parameters.from_dict(json.loads(json.dumps(parameters.to_dict())))
    assert restored == parameters
    assert all(isinstance(value, str) for value in parameters.to_presentation_dict().values())


def test_names_of_directions_are_no_markup() -> None:
    names = ("a [/x]", "b [c]", "b [d]", "[bold]")
    shown = Parameters(None, {}, dict.fromkeys(names, 0.5)).to_presentation_dict()
    # As Heretic prints them.
    lines = [Text.from_markup(f"{name} = [bold]{value}[/]").plain for name, value in shown.items()]
    assert lines == ["direction_index = per layer", *(f"scale.{name} = 0.50" for name in names)]


def test_directions_after_svd_are_per_layer_only() -> None:
    trial = optuna.create_study().ask()
    parameters = suggest_parameters(trial, ["a"], 8, unit_directions(3, aligned=False))
    assert parameters.direction_index is None
    assert "direction_index" not in trial.params


def test_interpolated_directions_have_unit_length() -> None:
    directions = unit_directions(2)
    vectors = layer_vectors(directions, 2.25, 0, "unit")
    expected = torch.nn.functional.normalize(
        0.75 * directions.tensor[3] + 0.25 * directions.tensor[4], dim=1
    )
    assert torch.allclose(vectors, expected)
    assert torch.equal(layer_vectors(directions, None, 2, "unit"), directions.tensor[3])


@pytest.mark.parametrize("index", [None, 1.0, 1.5, 2.3])
def test_directions_around_a_shared_one_stay_orthonormal(index: float | None) -> None:
    # Two rows of rank 1 beside the shared one: as near to orthonormal as their span allows.
    axes = torch.linalg.qr(torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0)))[0]
    shares = torch.tensor([0.6, 0.8])[:, None]
    tensor = torch.stack([torch.cat([layer[:1], shares * layer[1:2]]) for layer in axes])
    directions = make_directions(
        tensor,
        class_directions=tensor[:, 1:],
        names=("shared", "a", "b"),
        provenance={"settings": {"shared_direction": True}},
    )
    assert directions.has_shared
    vectors = layer_vectors(directions, index, 1, "unit").double()
    shared, rest = vectors[0], vectors[1:]
    assert float(shared.norm()) == pytest.approx(1, rel=1e-5)
    assert float((rest @ shared).abs().max()) < 1e-6
    # No combination removes more than all of anything.
    assert float(torch.linalg.matrix_norm(vectors, ord=2)) == pytest.approx(1, rel=1e-5)
    if index in (None, 1.0):
        assert torch.allclose(vectors.float(), tensor[2], atol=1e-6)


def write_checkpoint(path: Path) -> optuna.Study:
    """A study as Heretic begins one."""

    return optuna.create_study(
        study_name="heretic",
        storage=JournalStorage(JournalFileBackend(str(path))),
        directions=["minimize", "minimize"],
    )


def read_checkpoint(path: Path) -> optuna.Study:
    return optuna.load_study(
        study_name="heretic", storage=JournalStorage(JournalFileBackend(str(path)))
    )


def test_unfinished_trials_are_taken_out_of_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.jsonl"
    study = write_checkpoint(path)
    study.set_user_attr("settings", "{}")
    study.set_user_attr("finished", False)
    for value in (1.0, 2.0):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        study.tell(trial, [value, value])
    study.ask()
    with path.open("ab") as file:
        file.write(b'{"op_code": 6, "half')
    (tmp_path / "model.jsonl.lock").write_text("")
    repair_checkpoint(path)
    repaired = read_checkpoint(path)
    assert [trial.values for trial in repaired.trials] == [[1.0, 1.0], [2.0, 2.0]]
    assert repaired.user_attrs == {"settings": "{}", "finished": False}
    assert not list(tmp_path.glob("*.lock"))


def test_no_two_trials_get_one_number(tmp_path: Path) -> None:
    """Heretic goes on counting from how many trials there are, and an interrupted one may have others after it."""

    path = tmp_path / "model.jsonl"
    study = write_checkpoint(path)
    for number in range(1, 7):
        trial = study.ask()
        if number != 2:
            # One that another program has added has none.
            trial.set_user_attr("index", number)
        if number == 3:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, [number, number])
    repair_checkpoint(path)
    repaired = read_checkpoint(path)
    numbers = [(trial.values[0], trial.user_attrs.get("index")) for trial in repaired.trials]
    assert numbers == [(1, 1), (2, None), (4, 3), (5, 4), (6, 5)]


@pytest.mark.parametrize("is_screened", [True, False])
def test_what_was_screened_before_the_first_trial_is_kept(
    is_screened: bool, tmp_path: Path
) -> None:
    path = tmp_path / "model.jsonl"
    study = write_checkpoint(path)
    if is_screened:
        study.set_user_attr("screened", [{"x": 0.5}])
    study.ask()
    repair_checkpoint(path)
    assert path.exists() == is_screened
    if is_screened:
        repaired = read_checkpoint(path)
        assert repaired.user_attrs == {"screened": [{"x": 0.5}]} and not repaired.trials


HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("action", ["continue", "restart"])
def test_a_checkpoint_that_another_process_works_on_is_left_to_it(
    action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its start on: before the first trial there is nothing in the checkpoint that says so."""

    ours = settings(
        monkeypatch,
        f"--study-checkpoint-dir={tmp_path}",
        f"--checkpoint-action={action}",
        "--model-action=none",
    )
    folder = Path(ours.study_checkpoint_dir)
    folder.mkdir()
    path = folder / "model.jsonl"
    path.write_text('{"op_code": 6, "half')
    command = [sys.executable, "-c", HOLD, str(folder / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None and worker.stdout.readline() == "held\n"
        with pytest.raises(ContrastError, match="Another process works in"):
            heretic14.run(ours, ContrastAbliteration)
        worker.kill()
    assert path.read_text() == '{"op_code": 6, "half'
    # As plain Heretic leaves it when it is killed, which would be waited for.
    (folder / "model.jsonl.lock").write_text("")
    with own_checkpoints(ours):
        assert [item.name for item in folder.iterdir()] == [LOCK]
        path.write_text("begun")
    assert path.read_text() == "begun"


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_model_is_evaluated_without_any_study(
    is_shared: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """While a search of the same settings works on one, too."""

    pools = [
        f"--{name}-evaluation-prompts.dataset={small_pool(tmp_path, pool, 'test', 1)}"
        for name, pool in (("bad", "harmful"), ("good", "harmless"))
    ]
    journal = tmp_path / "study.journal"
    ours = settings(
        monkeypatch,
        *pools,
        f"--evaluate-model={DATA / 'refuser'}",
        f"--study-checkpoint-dir={tmp_path / 'checkpoints'}",
        *"--checkpoint-action=restart --batch-size=32 --max-response-length=4 --response-prefix=".split(),
        *([f"--contrast.storage={journal}"] if is_shared else []),
    )
    path = Path(ours.study_checkpoint_dir) / "model.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("kept")
    with alone_in(path.parent, "wait"), torch.no_grad():
        heretic14.run(ours, ContrastAbliteration)
    assert capsys.readouterr().out.count("* Refusals:") == 1
    assert path.read_text() == "kept"
    assert list(path.parent.iterdir()) == [path] and not journal.exists()


@pytest.mark.parametrize("error", [NotImplementedError, OSError(95, "Not supported")])
def test_a_file_system_without_locks(
    error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileLock, "acquire", Mock(side_effect=error))
    with alone_in(tmp_path, "do something else"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "answer", [["--model-action=none"], ["--trial-index=0", "--model-action=none"]]
)
def test_nothing_is_judged_after_an_interruption_without_a_user(
    answer: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = heretic14.Host(settings(monkeypatch, *answer), ContrastAbliteration)
    host.finalist_prompts = [Prompt("How do I pick a lock?")]
    host.answers.was_interrupted = True
    # There is no model that could be judged.
    with pytest.raises(KeyboardInterrupt):
        host.select(TRIAL_QUESTION, [Choice("Trial 1", value=optuna.trial.create_trial(value=0))])


def test_a_run_that_fails_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = settings(monkeypatch, f"--study-checkpoint-dir={tmp_path}")
    folder = Path(ours.study_checkpoint_dir)
    folder.mkdir()
    with pytest.raises(RuntimeError), own_checkpoints(ours):
        raise RuntimeError
    assert not list(folder.iterdir())


@pytest.mark.parametrize("kind", get_args(Sampler))
def test_no_trial_is_drawn_twice_beside_others(kind: Sampler) -> None:
    """The trial of a process that died is made up for by the next one, whatever other processes have begun since."""

    study = optuna.create_study(
        directions=["minimize", "minimize"], sampler=make_sampler(kind, 0, 10, {})
    )

    def begin() -> tuple[optuna.Trial, float]:
        trial = study.ask()
        return trial, trial.suggest_float("x", 0, 1)

    (_, first), (lost, x), (_, third) = (begin() for _ in range(3))
    study.tell(lost, state=optuna.trial.TrialState.FAIL)
    assert begin()[1] == x
    found = [first, third, x, *(begin()[1] for _ in range(3))]
    assert len(set(found)) == len(found)


def test_a_divergence_that_is_no_number_is_infinite() -> None:
    logarithms = torch.full((2, 5), 0.2).log()
    assert first_token_divergence(logarithms, logarithms) == pytest.approx(0, abs=1e-6)
    assert first_token_divergence(logarithms * torch.nan, logarithms) == math.inf


def test_damaged_checkpoint_is_kept_and_named(tmp_path: Path) -> None:
    path = tmp_path / "model.jsonl"
    path.write_text('{"op_code": damaged\n{}\n')
    with pytest.raises(ContrastError, match=r"model\.jsonl is damaged"):
        repair_checkpoint(path)
    assert path.read_text() == '{"op_code": damaged\n{}\n'


@pytest.mark.parametrize(
    ("arguments", "made_with", "shown"),
    [
        (["--contrast.baseline=matched"], {"baseline": "matched"}, {"baseline": "matched"}),
        # What a file was made with counts, and what it does not say is not claimed.
        (
            ["--contrast.directions=made.safetensors", "--contrast.sampler=nsga2"],
            {"baseline": "matched", "svd": True},
            {
                "baseline": "matched",
                "svd": True,
                "sampler": "nsga2",
                "method": None,
                "preset": None,
            },
        ),
        # A judge of the Hub is named, and where somebody has one of their own is not.
        (["--contrast.judge-model=some/judge"], {}, {"judge_model": "some/judge"}),
        ([f"--contrast.judge-model={DATA}"], {}, {"judge_model": None}),
    ],
)
def test_model_card_names_the_plugin(
    arguments: list[str],
    made_with: dict[str, Any],
    shown: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    refuser: LanguageModel,
) -> None:
    from optuna.trial import create_trial

    host = heretic14.Host(settings(monkeypatch, *arguments), ContrastAbliteration)
    host.modifier = ContrastAbliteration(
        heretic_settings=host.settings, settings=host.settings.contrast
    )
    nothing = torch.zeros(2, 1, 4)
    host.modifier.directions = Directions(
        nothing, ("all",), True, nothing, ("all",), nothing[:, 0], nothing, {"settings": made_with}
    )
    host.context = LoadedContext(None)
    host.evaluator = Evaluator.__new__(Evaluator)
    parameters = Parameters(None, {}, {"drugs": 0.25})
    trial = create_trial(
        values=[0, 0],
        user_attrs={
            "contrast": parameters.to_dict(),
            "kl_divergence": 0.1,
            "refusals": 1,
            "base_refusals": 9,
            "n_bad_prompts": 10,
        },
    )
    made = Made(
        host.settings, host.settings.contrast, refuser, host.modifier.directions, parameters
    )
    monkeypatch.setattr(host, "made", lambda: made)
    with heretic14.substituted(host.substitutes()):
        card = heretic_main.get_readme_intro(host.settings, trial, False)
    assert "heretic-contrast v" in card
    record = card.partition("```json\n")[2].partition("```")[0]
    assert Record.model_validate_json(record) == made.record().portable()
    for name, value in shown.items():
        assert (f"| **{name}** | {value} |" in card) == (value is not None)
        assert (f"| **{name}** |" in card) == (value is not None)
    assert "| **scale.drugs** | 0.25 |" in card
    assert card.index("heretic-contrast v") < card.index("## Performance")


def test_a_summary_is_never_that_of_an_earlier_demo(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from heretic_contrast.commands.demo import main

    summary = tmp_path / "demo" / "summary.json"
    summary.parent.mkdir()
    summary.write_text("{}")
    # What is refused at once has changed nothing.
    assert "leave --model-action out" in refused(["demo", "--output=demo", "--model-action=none"])
    assert summary.exists()
    monkeypatch.setattr(heretic14, "run", Mock(side_effect=KeyboardInterrupt))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            main(["--output=demo"])
        assert not summary.exists()


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    from heretic_contrast.commands.doctor import findings, main

    main([])
    shown = capsys.readouterr().out
    assert "Heretic" in shown and "PyTorch" in shown
    found = findings()
    assert all(finding.fine for finding in found if finding.required)
    commands = {
        finding.subject: finding.fine for finding in found if finding.subject.startswith("Command ")
    }
    assert commands == {
        f"Command {name}": True
        for name in ("run", "rebuild", "extract", "sweep", "audit", "judge", "demo")
    }
    with pytest.raises(ContrastError, match="takes no arguments"):
        main(["now"])


@pytest.mark.parametrize(
    ("kind", "name"), [("cuda", "NVIDIA H200"), ("xpu", "Intel Arc B580"), ("mps", "Apple GPU")]
)
def test_doctor_names_the_gpu_that_is_used(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from heretic_contrast.commands.doctor import torch_finding

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "get_device_name", {0: name}.get)
    assert torch_finding().detail == f"{torch.__version__}, {name}"


def test_doctor_notices_a_heretic_that_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    from heretic_contrast.commands.doctor import findings

    # As where a name is gone that the module imports.
    monkeypatch.setitem(sys.modules, "heretic_contrast.hosts.loading", None)
    fine = {finding.subject: finding.fine for finding in findings()}
    assert not fine["Command extract"] and not fine["Command sweep"]
    assert fine["Command run"] and fine["Command demo"] and fine["Command audit"]


def test_doctor_names_what_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    from heretic_contrast.commands import doctor

    def fail(name: str) -> None:
        raise ImportError("cannot import name 'Cache' from 'transformers'", name="transformers")

    monkeypatch.setattr(doctor, "import_module", fail)
    (found,) = (item for item in doctor.findings() if item.subject == "Command sweep")
    assert found.detail.startswith("transformers cannot be imported as sweep needs it (cannot")
    assert "heretic-llm" not in found.remedy


class Sampled(Exception):
    """Ends Heretic's own objective when all of its parameters are sampled."""


def heretic_space(
    components: list[str], n_layers: int, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The distributions that Heretic 1.4's own objective samples from, on the built-in refuser with other layers."""

    found: dict[str, Any] = {}

    def stop(trial: optuna.Trial) -> None:
        found.update(trial.distributions)
        raise Sampled

    class Model(heretic_main.Model):
        def __init__(self, settings: Any) -> None:
            super().__init__(settings)
            # Loading looks at the real ones.
            self.get_layers = lambda: [None] * n_layers
            self.get_abliterable_components = lambda: components

        def get_residuals_mean(self, prompts: list[Any]) -> torch.Tensor:
            return torch.randn(n_layers + 1, 4)

    class Evaluator:
        base_refusals = 1

        def __init__(self, *arguments: Any) -> None:
            pass

    monkeypatch.setattr(heretic_main, "Model", Model)
    monkeypatch.setattr(heretic_main, "Evaluator", Evaluator)
    monkeypatch.setattr(heretic_main, "load_prompts", lambda *arguments: ["Hi."])
    monkeypatch.setattr(heretic_main, "get_trial_parameters", stop)
    arguments = [f"--model={DATA / 'refuser'}", "--batch-size=1", "--response-prefix=", "--seed=1"]
    monkeypatch.setattr(sys, "argv", ["heretic", *arguments])
    # Heretic turns gradients off, which come back at the end of the context.
    with torch.no_grad(), pytest.raises(Sampled):
        heretic_main.run()
    return found


@pytest.mark.parametrize("n_layers", [5, 24])
def test_one_direction_searches_what_heretic_searches(
    n_layers: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    components = ["attn.o_proj", "mlp.down_proj"]
    trial = optuna.create_study().ask()
    parameters = suggest_parameters(trial, components, n_layers, unit_directions(1))
    assert trial.distributions == heretic_space(components, n_layers, monkeypatch)
    assert len(trial.distributions) == 10
    assert parameters.scales == {"class 0": 1.0}


def ranges(trial: optuna.Trial) -> dict[str, tuple[float, float]]:
    return {
        name: (distribution.low, distribution.high)
        for name, distribution in trial.distributions.items()
        if isinstance(distribution, optuna.distributions.FloatDistribution)
    }


def test_heretic_20_can_leave_the_mlp_alone() -> None:
    """Its space is that of 1.4 but for the largest weight of the MLP, which is sampled from -0.25 on, and clamped."""

    components = ["attn.o_proj", "mlp.down_proj"]
    trials = [optuna.create_study().ask() for _ in range(2)]
    suggest_parameters(trials[0], components, 24, unit_directions(1))
    suggest_parameters(trials[1], components, 24, unit_directions(1), {}, HERETIC_20_RANGES)
    expected = {**ranges(trials[0]), "mlp.down_proj.max_weight": (-0.25, 1.5)}
    assert ranges(trials[1]) == expected

    fixed = {"mlp.down_proj.max_weight": -0.1, "mlp.down_proj.min_weight": 0.5}
    study = optuna.create_study()
    study.enqueue_trial(fixed)
    found = suggest_parameters(
        study.ask(), components, 24, unit_directions(3), {}, HERETIC_20_RANGES
    )
    kernel = found.kernels["mlp.down_proj"]
    assert [kernel.weight(index) for index in range(24)] == [0.0] * 24
    assert found.kernels["attn.o_proj"].max_weight > 0


def test_given_ranges_stand_before_those_of_heretic() -> None:
    space = {
        "max_weight": (0.1, 3.0),
        "attn.o_proj.max_weight_position": (0.25, 0.5),
        "min_weight_distance": (0.0, 0.01),
        "scale": (0.5, 1.0),
        "scale.class 1": (0.25, 0.25),
    }
    trial = optuna.create_study().ask()
    parameters = suggest_parameters(
        trial, ["attn.o_proj", "mlp.down_proj"], 25, unit_directions(2), space, HERETIC_20_RANGES
    )
    found = ranges(trial)
    assert found["attn.o_proj.max_weight"] == found["mlp.down_proj.max_weight"] == (0.1, 3.0)
    assert found["attn.o_proj.max_weight_position"] == (6.0, 12.0)
    assert found["mlp.down_proj.max_weight_position"] == (0.6 * 24, 24.0)
    # A distance is at least one layer.
    assert found["attn.o_proj.min_weight_distance"] == (1.0, 1.0)
    assert found["scale.class 0"] == (0.5, 1.0) and parameters.scales["class 1"] == 0.25


def test_several_directions_reach_down_to_the_strength_of_one() -> None:
    trial = optuna.create_study().ask()
    suggest_parameters(trial, ["attn.o_proj", "mlp.down_proj"], 24, unit_directions(4))
    assert ranges(trial)["mlp.down_proj.max_weight"] == (0.4, 1.5)
    assert ranges(trial)["scale.class 3"] == (0.0, 1.0)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"max_weigth": [0, 1]},
            'There is no parameter "max_weigth" for search_space: did you mean "max_weight"?',
        ),
        (
            {"max_weight": [1, 0.5]},
            'The range of "max_weight" in search_space goes from 1 to 0.5: give the lowest value first.',
        ),
        (
            {"mlp.down_proj.min_weight": [0, 2]},
            'The range of "mlp.down_proj.min_weight" in search_space goes from 0 to 2: it is a fraction',
        ),
        (
            {"max_weight_position": [5, 20]},
            'The range of "max_weight_position" in search_space goes from 5 to 20: it is a fraction',
        ),
        *(
            (
                {name: [0, 1]},
                f'There is no parameter "{name}" for search_space: did you mean "{near}"?',
            )
            for name, near in (
                ("embeddings.min_weight", "embeddings.max_weight"),
                ("embeddings.max_weight_position", "embeddings.max_weight"),
                ("mlp.down_proj.scale", "scale"),
                ("mlp.down_proj.rest", "rest"),
            )
        ),
    ],
)
def test_bad_ranges_are_one_sentence(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ContrastSettings(search_space=space)
    assert message in str(error.value)


def test_ranges_from_table_and_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"mlp.down_proj.max_weight": (-0.5, 1.0), "scale.drugs": (0.0, 0.5)}
    flag = '{"mlp.down_proj.max_weight": [-0.5, 1.0], "scale.drugs": [0, 0.5]}'
    assert (
        settings(monkeypatch, f"--contrast.search-space={flag}").contrast.search_space == expected
    )
    (tmp_path / "config.toml").write_text(
        "[modifier.ContrastAbliteration.search_space]\n"
        "mlp.down_proj.max_weight = [-0.5, 1.0]\n'scale.drugs' = [0, 0.5]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert settings(monkeypatch).contrast.search_space == expected


@pytest.mark.parametrize(
    ("name", "unused", "expected"),
    [
        (
            "scale.drug",
            "heretic.model.Model.__init__",
            'for the direction "drug", but there are drugs',
        ),
        (
            "mlp.experts.max_weight",
            "heretic.model.Model.get_responses",
            'for the component "mlp.experts", but there are attn.o_proj, mlp.down_proj',
        ),
        (
            "self_attn.o_proj.max_weight",
            "heretic.model.Model.get_responses",
            'for the component "self_attn.o_proj", but there are attn.o_proj, linear_attn.out_proj',
        ),
    ],
    ids=["direction", "component", "apart"],
)
def test_ranges_are_refused_before_anything_is_asked(
    name: str, unused: str, expected: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(unused)

    monkeypatch.setattr(unused, fail)
    space = json.dumps({f"{name}": [0.0, 1.0]})
    writers = "apart" if name.startswith("self") else "all"
    assert expected in refused(
        [
            "--model=builtin:refuser",
            f"--contrast.search-space={space}",
            f"--contrast.writers={writers}",
            "--contrast.classes=category",
            "--model-action=none",
        ]
    )


def test_ranges_of_what_does_not_exist() -> None:
    space = {"max_weight": (0.0, 1.0), "mlp.max_weight": (0.0, 1.0), "scale.drug": (0.0, 1.0)}
    with pytest.raises(ContrastError, match='for the component "mlp", but there are attn, other'):
        require_ranges(space, "component", ["attn", "other"])
    require_ranges(space, "component", ["attn", "mlp"])
    with pytest.raises(ContrastError, match='for the direction "drug", but there are drugs'):
        require_ranges(space, "direction", ["drugs", "fraud"])
    require_ranges(space, "direction", ["drug", "fraud"])
    with pytest.raises(ContrastError, match="one direction has no scale of its own"):
        require_ranges(space, "direction", ["drug"])
    with pytest.raises(ContrastError, match="a range for scale, but one direction has no scale"):
        require_ranges({"scale": (0.5, 1.0)}, "direction", ["drug"])
