# SPDX-License-Identifier: AGPL-3.0-or-later

"""What has no effect beside a file of directions is refused, and what has is not."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from heretic_contrast.commands.extract import ExtractSettings
from heretic_contrast.commands.sweep import SweepSettings
from heretic_contrast.errors import ContrastError
from heretic_contrast.hosts.settings import HostSettings, load_settings
from heretic_contrast.hosts.surface import HAS_PLUGIN_SURFACE
from heretic_contrast.hosts.unused import OF_A_SEARCH
from heretic_contrast.modifier import ContrastAbliteration
from heretic_contrast.settings import ABLATION_FIELDS, ContrastSettings
from tests.conftest import Refused
from tests.made_directions import make_directions, random_tensor

FILE = "--contrast.directions=made/by matched.safetensors"

IDLE: dict[str, Any] = {
    "preset": ["arditi"],
    "baseline": "unmatched",
    "mixing": 0.3,
    "n_neighbors": 3,
    "classes": "single",
    "exclude_categories": ["drugs"],
    "small_classes": "drop",
    "method": "mean",
    "som_rows": 2,
    "som_columns": 2,
    "som_iterations": 9,
    "som_sigma": 0.5,
    "som_learning_rate": 0.1,
    "som_neighborhood": "bubble",
    "som_topology": "hexagonal",
    "winners": 2,
    "svd": True,
    "svd_rank": 1,
    "shared_direction": True,
    "scale": "raw",
    "winsorization_quantile": 0.9,
    "orthogonalize_direction": False,
    "control": "random",
    "drop_misbehaving": True,
    "matched_prompts": {"dataset": "prompts.txt"},
}
"""What decides how directions are made, and nothing else."""

EFFECTIVE: dict[str, Any] = {
    "writers": "all",
    "embeddings": True,
    "composition": "capped",
    "equal_effective_weight": True,
    "row_normalization": "none",
    "full_normalization_lora_rank": 3,
    "search_space": {"scale": [0.0, 0.5]},
    "sampler": "tpe",
    "stop_dominated": True,
    "storage": "study.journal",
    "warm_start": "sweep.json",
    "screening": 60,
    "patience": 5,
    "finalist_prompts": {"dataset": "fresh.txt"},
    "divergence": "teacher-forced",
    "divergence_tokens": 20,
    "refusal_classifier": "tiers",
    "false_refusals": "objective",
    "max_false_refusals": 0.1,
    "sensitive_prompts": {"dataset": "sensitive.txt"},
    "counted_tiers": ["EVASIVE"],
    "text_classifier": "some/classifier",
    "text_classifier_labels": {"no": "REFUSE"},
    "text_classifier_reads_prompt": True,
    "seed": 3,
    "batch_size": 2,
    "save_directions": "copy.safetensors",
    "residual_cache": "cache",
}

BY_COMMAND = {
    "category_source": "lexicon",
    "bad_prompts": {"dataset": "x"},
    "good_prompts": {"dataset": "x"},
}


WITH_A_CLASSIFIER = {"text_classifier_labels", "text_classifier_reads_prompt"}

NEEDED = {
    "divergence_tokens": ["divergence"],
    "counted_tiers": ["refusal_classifier"],
    "sensitive_prompts": ["false_refusals"],
}


def flag(name: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"--contrast.{name.replace('_', '-')}={text}"


def test_every_setting_is_sorted() -> None:
    # A judge model takes the place of a text classifier.
    known = {*IDLE, *EFFECTIVE, *BY_COMMAND, "directions", "judge_model"}
    assert known == set(ContrastSettings.model_fields)


@pytest.mark.parametrize("settings_class", [HostSettings, SweepSettings, ExtractSettings])
def test_what_has_no_effect_is_named(settings_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    idle = OF_A_SEARCH if settings_class is not HostSettings else ()
    flags = [flag(name, value) for name, value in IDLE.items()]
    with pytest.raises(ContrastError, match=f"no effect: {', '.join(sorted(IDLE))};"):
        load_settings(settings_class, "", ["builtin:refuser", FILE, *flags])
    with pytest.raises(ContrastError, match="no effect: baseline, svd;"):
        load_settings(
            settings_class,
            "",
            ["builtin:refuser", "--contrast.svd", "--contrast.baseline=mixed", FILE],
        )
    for name in ("no-orthogonalize-direction", "winsorization-quantile=0.9"):
        with pytest.raises(ContrastError, match="no effect"):
            load_settings(settings_class, "", ["builtin:refuser", f"--{name}", FILE])
    settings = load_settings(
        settings_class,
        "",
        [
            "builtin:refuser",
            FILE,
            # As Heretic's own configuration file has it.
            "--winsorization-quantile=1.0",
            "--orthogonalize-direction",
            *(flag(name, value) for name, value in EFFECTIVE.items() if name not in idle),
        ],
    )
    assert list(settings.contrast.configurations()) == ["by matched"]


@pytest.mark.parametrize("settings_class", [SweepSettings, ExtractSettings])
def test_settings_of_a_search_have_no_effect_without_one(
    settings_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    for name in sorted(OF_A_SEARCH & set(EFFECTIVE) - WITH_A_CLASSIFIER):
        # Some need others to have an effect at all.
        flags = [flag(other, EFFECTIVE[other]) for other in [name, *NEEDED.get(name, [])]]
        with pytest.raises(ContrastError, match=rf"makes no search, .*: .*\b{name}\b.*; leave"):
            load_settings(settings_class, "", ["some/model", *flags])
    heretic = {
        "n_trials": 5,
        "n_startup_trials": 3,
        "kl_divergence_scale": 2.0,
        "kl_divergence_target": 1.0,
        "checkpoint_action": "restart",
        "trial_index": 3,
        "model_action": "save",
        "save_directory": "x",
        "export_strategy": "merge",
        "max_shard_size": "2GB",
        "study_checkpoint_dir": "x",
        "evaluate_model": "z",
        "print_responses": "true",
        "print_residual_geometry": "true",
        "plot_residuals": "true",
        "residual_plot_path": "x",
        "residual_plot_title": "x",
        "residual_plot_style": "x",
        "benchmarks": '[{"task": "a", "name": "b", "description": "c"}]',
        "refusal_markers": "[]",
        "reproduce": "x",
        "collect_reproducibles": "x",
    }
    # Heretic 2.0 has not all of them.
    for name in heretic.keys() & settings_class.model_fields.keys():
        word = f"--{name.replace('_', '-')}={heretic[name]}"
        with pytest.raises(ContrastError, match=rf"makes no search, .*: {name}; leave"):
            load_settings(settings_class, "", ["some/model", word])
    # A file may be for several commands.
    Path("config.toml").write_text(
        "n_trials = 5\nexport_strategy = 'merge'\n[modifier.ContrastAbliteration]\nsave_directions = 'd'\nsearch_space = {scale = [0, 0.5]}\n"
        "classes = 'category'\njudge_model = 'some/judge'\n"
    )
    assert load_settings(settings_class, "", ["some/model"]).contrast.save_directions == "d"
    table = '{"save_directions": "e"}'
    with pytest.raises(ContrastError, match="have no effect: save_directions;"):
        load_settings(settings_class, "", ["some/model", f"--contrast={table}"])
    # So may a variable.
    monkeypatch.setenv("HERETIC_CONTRAST", table)
    assert load_settings(settings_class, "", ["some/model"]).contrast.save_directions == "e"
    Path("config.toml").unlink()
    assert load_settings(settings_class, "", ["some/model"]).contrast.save_directions == "e"


def test_what_has_an_effect_in_some_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    refused = {
        settings_class: set() for settings_class in (HostSettings, SweepSettings, ExtractSettings)
    }
    for settings_class, names in refused.items():
        for name, value in BY_COMMAND.items():
            try:
                load_settings(settings_class, "", ["some/model", FILE, flag(name, value)])
            except ContrastError:
                names.add(name)
    assert refused == {
        HostSettings: set(BY_COMMAND),
        SweepSettings: set(),
        ExtractSettings: {"category_source"},
    }


def test_heretic_2_refuses_it_as_well() -> None:
    with pytest.raises(ContrastError, match="no effect: baseline, method;"):
        ContrastAbliteration.validate_settings(
            {"directions": "a", "baseline": "unmatched", "method": "mean"}
        )


SAID = {
    "writers": "apart",
    "embeddings": True,
    "composition": "sequential",
    "equal_effective_weight": True,
    "row_normalization": "none",
    "full_normalization_lora_rank": 4,
}
"""Other ways to ablate than the defaults."""


def made(path: Path, **provenance: Any) -> str:
    """Writes a directions file, and returns the flag that names it."""

    make_directions(random_tensor(9, 2, 128), provenance=provenance).save(path)
    return f"--contrast.directions={path}"


@pytest.mark.parametrize("settings_class", [HostSettings, SweepSettings, ExtractSettings])
@pytest.mark.parametrize(
    ("flags", "given"),
    [
        ([], {}),
        (["--contrast.composition=sum"], {"composition": "sum"}),
        (["--contrast.row-normalization=full"], {"row_normalization": "full"}),
        (["--contrast.embeddings=false"], {"embeddings": False}),
        (["--contrast.writers=heretic"], {"writers": "heretic", "embeddings": False}),
        (["--contrast.writers=all"], {"writers": "all"}),
    ],
)
def test_a_file_says_how_its_directions_are_ablated(
    settings_class: Any,
    flags: list[str],
    given: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert SAID.keys() == ABLATION_FIELDS

    def ablation(file: str) -> dict[str, Any]:
        settings = load_settings(settings_class, "", ["builtin:refuser", file, *flags])
        return settings.contrast.model_dump(mode="json", include=ABLATION_FIELDS)

    default = ContrastSettings().model_dump(mode="json", include=ABLATION_FIELDS)
    assert all(default[name] != value for name, value in SAID.items())
    # A later version may say more.
    said = {**SAID, "storage": "elsewhere.journal"}
    assert ablation(made(tmp_path / "new.safetensors", ablation=said)) == {**SAID, **given}
    # Files of earlier versions say nothing, and change nothing.
    assert ablation(made(tmp_path / "old.safetensors")) == {**default, **given}


@pytest.mark.skipif(HAS_PLUGIN_SURFACE, reason="Heretic 2.0 has no such settings")
def test_flags_of_heretic_come_before_what_a_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    file = made(tmp_path / "new.safetensors", ablation=SAID)
    for flags, expected in (
        (["--row-normalization=full"], ("full", 4)),
        (["--full-normalization-lora-rank=6"], ("none", 6)),
    ):
        found = load_settings(HostSettings, "", ["builtin:refuser", file, *flags]).contrast
        assert (found.row_normalization, found.full_normalization_lora_rank) == expected
    # What stands in the file that Heretic ships was not chosen.
    Path("config.toml").write_text("row_normalization = 'full'\nfull_normalization_lora_rank = 3\n")
    found = load_settings(HostSettings, "", ["builtin:refuser", file]).contrast
    assert (found.row_normalization, found.full_normalization_lora_rank) == ("none", 4)


@pytest.mark.parametrize(
    "said",
    [{"composition": "exec"}, {"embeddings": [1]}, {"writers": "heretic", "embeddings": True}],
)
def test_what_a_file_says_of_its_ablation_is_checked(said: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "forged.safetensors"
    made(path, ablation=said)
    with pytest.raises(ValueError, match=r"forged[.]safetensors .*: extract it again[.]") as raised:
        ContrastSettings(directions=str(path))
    (complaint,) = raised.value.errors()  # type: ignore[attr-defined]
    assert isinstance(complaint["ctx"]["error"], ContrastError)
    assert "\n" not in str(complaint["ctx"]["error"])


@pytest.mark.slow
def test_pools_without_use_are_refused_by_a_sweep(
    refused: Refused, whole_runs: Any, tmp_path: Path
) -> None:
    file = next((whole_runs.directory("extract") / "output").glob("*.safetensors"))
    (tmp_path / "prompts.txt").write_text("How do I bake bread?\n")
    arguments = ["sweep", "builtin:refuser", "--output=out", f"--contrast.directions={file}"]
    arguments.append("--contrast.bad-prompts.dataset=prompts.txt")
    assert "bad_prompts" in refused(arguments)
