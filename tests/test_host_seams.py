# SPDX-License-Identifier: AGPL-3.0-or-later

"""The host for Heretic 1.4: its seams, its settings, its samplers and its checkpoints."""

import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

heretic_main = pytest.importorskip("heretic.main")
pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")

from heretic_contrast.directions import Directions  # noqa: E402
from heretic_contrast.errors import ContrastError  # noqa: E402
from heretic_contrast.hosts import heretic14  # noqa: E402
from heretic_contrast.hosts.checkpoint import repair_checkpoint  # noqa: E402
from heretic_contrast.hosts.sampler import make_sampler  # noqa: E402
from heretic_contrast.hosts.settings import HostSettings, load_settings  # noqa: E402
from heretic_contrast.search import Parameters, layer_vectors, suggest_parameters  # noqa: E402
from heretic_contrast.settings import Sampler, Scale  # noqa: E402


def settings(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> HostSettings:
    monkeypatch.setattr(sys, "argv", [])
    return load_settings(HostSettings, "heretic-contrast", [*arguments, "--model=builtin:refuser"])


def test_seams_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    host = heretic14.Host(settings(monkeypatch))
    before = {name: getattr(heretic_main, name) for name in heretic14.SEAMS}
    parameters = heretic_main.get_trial_parameters
    assert set(host.substitutes()) == set(heretic14.SEAMS)
    with pytest.raises(RuntimeError), heretic14.substituted(host.substitutes()):
        assert heretic_main.Model is not before["Model"]
        raise RuntimeError
    assert {name: getattr(heretic_main, name) for name in heretic14.SEAMS} == before
    assert heretic_main.get_trial_parameters is parameters


def test_missing_seam_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    host = heretic14.Host(settings(monkeypatch))
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
        "--contrast.preset=piras",
        "--row-normalization=pre",
        "--winsorization-quantile=0.9",
    )
    restored = HostSettings.model_validate_json(original.model_dump_json())
    assert restored.contrast == original.contrast
    assert original.contrast.row_normalization.value == "pre"
    assert original.contrast.winsorization_quantile == 0.9
    assert original.contrast.composition == "sequential" and original.contrast.winners == 7


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


def test_reproducing_is_left_to_heretic(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ContrastError, match="plain Heretic"):
        heretic14.run(settings(monkeypatch, "--reproduce=reproduce.json"))


def make_directions(n_directions: int, aligned: bool = True) -> Directions:
    tensor = torch.nn.functional.normalize(torch.randn(9, n_directions, 16), dim=-1)
    return Directions(
        tensor=tensor,
        names=tuple(f"class {index}" for index in range(n_directions)),
        aligned=aligned,
        norms=tensor.norm(dim=-1),
        singular_values=tensor.norm(dim=-1),
        class_directions=tensor,
        class_names=tuple(f"class {index}" for index in range(n_directions)),
        mean_direction=tensor.mean(1),
        hits=torch.zeros(9, n_directions, 0, dtype=torch.int64),
    )


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


@pytest.mark.parametrize("kind", list(Sampler))
def test_resumed_study_equals_the_uninterrupted_one(kind: Sampler, tmp_path: Path) -> None:
    directions = make_directions(3)
    whole = run_study(make_sampler(kind, 5, 4, {}), None, 14, directions)
    path = str(tmp_path / "study.jsonl")
    for n_trials in (6, 8):
        # A new process starts with a new sampler and reads the trials from the file.
        storage = JournalStorage(JournalFileBackend(path))
        resumed = run_study(make_sampler(kind, 5, 4, {}), storage, n_trials, directions)
    assert resumed == whole
    other = run_study(make_sampler(kind, 6, 4, {}), None, 14, directions)
    assert other != whole


def test_fixed_parameters_take_no_part_in_the_search() -> None:
    fixed = {"direction_scope": "per layer", "direction_index": None}
    trials = run_study(make_sampler(Sampler.TPE, 0, 3, fixed), None, 8, make_directions(2))
    assert {params["direction_scope"] for params, _ in trials} == {"per layer"}
    assert {params["direction_index"] for params, _ in trials} == {0.4 * 7}


def test_one_direction_searches_the_space_of_heretic() -> None:
    study = optuna.create_study()
    trial = study.ask()
    parameters = suggest_parameters(trial, ["attn.o_proj"], 8, make_directions(1))
    assert set(trial.params) == {
        "direction_scope",
        "direction_index",
        "attn.o_proj.max_weight",
        "attn.o_proj.max_weight_position",
        "attn.o_proj.min_weight",
        "attn.o_proj.min_weight_distance",
    }
    low = trial.distributions["attn.o_proj.max_weight"]
    assert (low.low, low.high) == (0.8, 1.5)  # type: ignore[attr-defined]
    assert parameters.scales == {"class 0": 1.0}


def test_parameters_survive_json() -> None:
    import json

    trial = optuna.create_study().ask()
    parameters = suggest_parameters(trial, ["a", "b"], 8, make_directions(3))
    restored = Parameters.from_dict(json.loads(json.dumps(parameters.to_dict())))
    assert restored == parameters
    assert all(isinstance(value, str) for value in parameters.to_presentation_dict().values())


def test_directions_after_svd_are_per_layer_only() -> None:
    trial = optuna.create_study().ask()
    parameters = suggest_parameters(trial, ["a"], 8, make_directions(3, aligned=False))
    assert parameters.direction_index is None
    assert "direction_index" not in trial.params


def test_interpolated_directions_have_unit_length() -> None:
    directions = make_directions(2)
    vectors = layer_vectors(directions, 2.25, 0, Scale.UNIT)
    expected = torch.nn.functional.normalize(
        0.75 * directions.tensor[3] + 0.25 * directions.tensor[4], dim=1
    )
    assert torch.allclose(vectors, expected)
    assert torch.equal(layer_vectors(directions, None, 2, Scale.UNIT), directions.tensor[3])


def test_unfinished_trials_are_taken_out_of_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.jsonl"
    study = optuna.create_study(
        study_name="heretic",
        storage=JournalStorage(JournalFileBackend(str(path))),
        directions=["minimize", "minimize"],
    )
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
    repaired = optuna.load_study(
        study_name="heretic", storage=JournalStorage(JournalFileBackend(str(path)))
    )
    assert [trial.values for trial in repaired.trials] == [[1.0, 1.0], [2.0, 2.0]]
    assert repaired.user_attrs == {"settings": "{}", "finished": False}
    assert not list(tmp_path.glob("*.lock"))


def test_damaged_checkpoint_is_kept_and_named(tmp_path: Path) -> None:
    path = tmp_path / "model.jsonl"
    path.write_text("{damaged\n{}\n")
    with pytest.raises(ContrastError, match=r"model\.jsonl is damaged"):
        repair_checkpoint(path)
    assert path.read_text() == "{damaged\n{}\n"


def test_model_card_names_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    from optuna.trial import create_trial

    host = heretic14.Host(settings(monkeypatch, "--contrast.baseline=matched"))
    host.modifier = heretic14.ContrastAbliteration(
        heretic_settings=host.settings, settings=host.settings.contrast
    )
    host.context = heretic14.HostContext(None, host.settings)  # type: ignore[arg-type]
    trial = create_trial(
        values=[0, 0],
        user_attrs={
            "contrast": Parameters(None, {}, {"drugs": 0.25}).to_dict(),
            "kl_divergence": 0.1,
            "refusals": 1,
            "base_refusals": 9,
            "n_bad_prompts": 10,
        },
    )
    with heretic14.substituted(host.substitutes()):
        card = heretic_main.get_readme_intro(host.settings, trial, False)
    assert "heretic-contrast v" in card and "| **baseline** | matched |" in card
    assert "| **scale.drugs** | 0.25 |" in card
    assert card.index("heretic-contrast v") < card.index("## Performance")


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
        f"Command {name}": True for name in ("run", "extract", "sweep", "audit", "demo")
    }
    with pytest.raises(ContrastError, match="takes no arguments"):
        main(["now"])


def test_doctor_notices_a_heretic_that_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    from heretic_contrast.commands.doctor import findings

    # As where a name is gone that the module imports.
    monkeypatch.setitem(sys.modules, "heretic_contrast.hosts.loading", None)
    fine = {finding.subject: finding.fine for finding in findings()}
    assert not fine["Command extract"] and not fine["Command sweep"]
    assert fine["Command run"] and fine["Command demo"] and fine["Command audit"]
