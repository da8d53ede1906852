# SPDX-License-Identifier: AGPL-3.0-or-later

"""What a study begins with, without a model."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")

from heretic_contrast.builtin import DATA
from heretic_contrast.errors import ContrastError
from heretic_contrast.evaluation.cells import Cell, Measurement, SweepResult
from heretic_contrast.hosts import heretic14
from heretic_contrast.hosts.warm_start import first_trials, fitted
from heretic_contrast.settings import ContrastSettings
from tests.made_directions import make_directions, random_tensor

MODEL = str(DATA / "refuser")


def measurement(refusals: int, divergence: float) -> Measurement:
    return Measurement(refusals, 0, 9 - refusals, 0, 9, 0, 2, divergence, None)


def sweep(model: str = "builtin:refuser", strength: str = "weight") -> SweepResult:
    cells = {
        (3, 0.5): (2, 0.3),
        (3, 1.0): (0, 0.9),
        (4, 0.5): (5, 0.1),
        (4, 1.0): (2, 0.2),
        (5, 0.5): (9, 0.01),
    }
    return SweepResult(
        model=model,
        baseline=measurement(9, 0.0),
        cells=tuple(
            Cell("unmatched", strength, (layer,), weight, weight, weight, measurement(*found))
            for (layer, weight), found in cells.items()
        ),
    )


def sweep_of(key: dict[str, Any], **changes: Any) -> SweepResult:
    """The same of a configuration that this is said of."""

    return replace(sweep(), settings={"directions": {"unmatched": key}}, **changes)


def write_study(
    path: Path,
    model: str,
    points: list[tuple[int, float]],
    parameters: dict[str, Any] | None = None,
    attributes: dict[str, Any] | None = None,
    **stored: Any,
) -> None:
    """A checkpoint as plain Heretic leaves it; its trials have x = 0, 0.1, ..., or these parameters, and more attributes."""

    study = optuna.create_study(
        study_name="heretic",
        storage=JournalStorage(JournalFileBackend(str(path))),
        directions=["minimize", "minimize"],
    )
    study.set_user_attr("settings", json.dumps({"model": model, **stored}))
    for number, (refusals, divergence) in enumerate(points):
        values = {"x": number / 10} if parameters is None else parameters
        trial = study.ask(
            {
                name: CategoricalDistribution([value])
                if isinstance(value, str)
                else FloatDistribution(value, value)
                for name, value in values.items()
            }
        )
        trial.set_user_attr("refusals", refusals)
        trial.set_user_attr("kl_divergence", divergence)
        for name, value in (attributes or {}).items():
            trial.set_user_attr(name, value)
        study.tell(trial, [refusals, divergence])
    study.ask({"x": FloatDistribution(0, 1)})


def settings(path: Path, **values: Any) -> ContrastSettings:
    return ContrastSettings.model_validate({"warm_start": str(path), **values})


def test_the_best_cells_of_a_sweep(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    path.write_text(sweep().to_json())
    distributions = {
        "direction_scope": CategoricalDistribution(["global", "per layer"]),
        "direction_index": FloatDistribution(2, 6),
        "attn.o_proj.max_weight": FloatDistribution(0.2, 0.9),
        "attn.o_proj.max_weight_position": FloatDistribution(3.5, 7),
        "attn.o_proj.min_weight": FloatDistribution(0, 1),
        "attn.o_proj.min_weight_distance": FloatDistribution(1, 4),
        "scale.drugs": FloatDistribution(0, 1),
    }
    first = first_trials(settings(path), MODEL)[0]
    found, moved = zip(*(fitted(values, distributions, {}) for values in first), strict=True)
    assert moved == (True, True, False)
    assert [
        (trial["attn.o_proj.max_weight_position"], trial["attn.o_proj.max_weight"])
        for trial in found
    ] == [(3.5, 0.9), (4.0, 0.9), (4.0, 0.5)]
    for trial in found:
        assert trial["direction_scope"] == "per layer" and trial["scale.drugs"] == 1.0
        assert trial["attn.o_proj.min_weight"] == 0.0
        assert trial["attn.o_proj.min_weight_distance"] == 1.0
        assert "direction_index" not in trial


def test_no_cell_that_broke_the_model(tmp_path: Path) -> None:
    path, found = tmp_path / "sweep.json", sweep()
    broken = replace(found.cells[0], layers=(6,), measurement=measurement(0, math.inf))
    whole = [cell for cell in found.cells if cell.measurement.refusals > 0]
    path.write_text(replace(found, cells=(broken, *whole)).to_json())
    first = first_trials(settings(path), MODEL)[0]
    assert [trial["component.max_weight_position"] for trial in first] == [4, 4]


@pytest.mark.parametrize("lowest", [0.0, 0.2])
def test_components_that_were_not_swept_are_left_alone(tmp_path: Path, lowest: float) -> None:
    path = tmp_path / "sweep.json"
    of_attention = replace(sweep(), settings={"components": ["attn.o_proj"]})
    path.write_text(of_attention.to_json())
    distributions = {
        f"{name}.max_weight": FloatDistribution(lowest, 1.5)
        for name in ("attn.o_proj", "mlp.down_proj", "embeddings")
    }
    whole, (found, _) = (
        sweep().single_cells("unmatched", "weight"),
        first_trials(settings(path), MODEL),
    )
    for values in found:
        fit, is_moved = fitted(values, distributions, {})
        assert fit["attn.o_proj.max_weight"] in {cell.weight for cell in whole}
        assert fit["mlp.down_proj.max_weight"] == fit["embeddings.max_weight"] == lowest
        # A range that does not reach down to 0 is said.
        assert is_moved == (lowest > 0)


def test_the_front_of_an_earlier_study(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    write_study(path, MODEL, [(3, 0.2), (4, 0.3), (1, 0.5), (3, 0.2), (0, math.inf)])
    found = first_trials(settings(path), MODEL)[0]
    assert [trial["x"] for trial in found] == [0.2, 0.0]
    # What its one direction had nothing of.
    rest = {"rest": FloatDistribution(-1, 1), "scale.drugs": FloatDistribution(0, 1)}
    assert fitted(found[0], rest, {}) == ({"rest": 0.0}, False)


def test_a_component_of_its_own_begins_with_what_it_had_among_others() -> None:
    kernels = {
        f"{component}.max_weight": FloatDistribution(0, 1)
        for component in ("linear_attn.out_proj", "attn.o_proj")
    }
    shared = {"linear_attn.out_proj": "attn.o_proj"}
    together = {"attn.o_proj.max_weight": 0.7}
    assert set(fitted(together, kernels, shared)[0].values()) == {0.7}
    alone = {**together, "linear_attn.out_proj.max_weight": 0.2}
    assert fitted(alone, kernels, shared) == (alone, False)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sweep.json", None, "There is no file"),
        ("sweep.json", "{", "cannot be read as a sweep"),
        ("sweep.json", "[1]", "cannot be read as a sweep"),
        ("sweep.json", "[" * 100_000, "cannot be read as a sweep"),
        ("sweep.json", sweep("other").to_json(), "made for other and not for builtin:refuser"),
        ("sweep.json", sweep(strength="effective").to_json(), "but unmatched [(]effective[)]"),
        ("study.jsonl", "", "holds no study of Heretic's"),
    ],
)
def test_what_is_no_warm_start(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ContrastError, match=message) as raised:
        first_trials(settings(path), MODEL)
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


def test_a_folder_is_no_warm_start_and_its_studies_are_named(tmp_path: Path) -> None:
    with pytest.raises(ContrastError, match=r"is a folder: .* there is none in it[.]$"):
        first_trials(settings(tmp_path), MODEL)
    path = tmp_path / "contrast-0" / "model.jsonl"
    path.parent.mkdir()
    path.touch()
    with pytest.raises(ContrastError, match=rf"there is {re.escape(str(path))}[.]$"):
        first_trials(settings(tmp_path), MODEL)


def test_a_study_of_another_model_is_no_warm_start(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    write_study(path, "some/model", [(3, 0.2)])
    with pytest.raises(ContrastError, match="made for some/model and not for builtin:refuser"):
        first_trials(settings(path), MODEL)


def test_directions_are_no_warm_start(tmp_path: Path) -> None:
    path = tmp_path / "directions.safetensors"
    make_directions(random_tensor(9, 1, 8)).save(path)
    with pytest.raises(ContrastError, match="cannot be read as a sweep"):
        first_trials(settings(path), MODEL)


def test_a_database_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    with pytest.raises(ContrastError, match="holds no study of Heretic's"):
        first_trials(ContrastSettings(warm_start=f"sqlite:///{path}"), MODEL)
    assert not path.exists()


@pytest.mark.parametrize("model", [MODEL, 7])
def test_a_study_of_another_program_is_no_warm_start(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    storage = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.create_study(
        study_name="heretic", storage=storage, directions=["minimize", "minimize"]
    )
    study.set_user_attr("settings", json.dumps({"model": model}))
    study.tell(study.ask(), [1, 0.5])
    with pytest.raises(ContrastError, match="holds no study of Heretic's"):
        first_trials(settings(path), MODEL)


def test_a_sweep_of_another_composition_is_no_warm_start(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    path.write_text(sweep_of({"composition": "sum"}).to_json())
    several = {"classes": "category"}
    with pytest.raises(
        ContrastError, match=r"unmatched with the composition sum, .* with capped: .*[.]$"
    ) as raised:
        first_trials(settings(path, composition="capped", **several), MODEL)
    assert "\n" not in str(raised.value)
    assert len(first_trials(settings(path, **several), MODEL)[0]) == 3
    path.write_text(sweep_of({"composition": "capped"}).to_json())
    assert len(first_trials(settings(path, composition="capped", **several), MODEL)[0]) == 3


@pytest.mark.parametrize(
    ("name", "other"), [("composition", "capped"), ("equal_effective_weight", True)]
)
def test_a_study_with_another_strength_of_several_directions_is_no_warm_start(
    name: str, other: Any, tmp_path: Path
) -> None:
    several, own = {"classes": "category"}, ContrastSettings.model_fields[name].default
    for parameters, stored in (({"scale.drugs": 1.0}, own), ({"x": 1.0}, other)):
        path = tmp_path / f"{stored}.jsonl"
        write_study(path, MODEL, [(3, 0.2)], parameters, contrast={name: stored})
        assert len(first_trials(settings(path, **several), MODEL)[0]) == 1
    path = tmp_path / "study.jsonl"
    write_study(path, MODEL, [(3, 0.2)], {"scale.drugs": 1.0}, contrast={name: other})
    flag = f"--contrast.{name.replace('_', '-')}"
    with pytest.raises(
        ContrastError, match=f"with {flag} {other}, .* with {own}: give {flag} {other}, .*[.]$"
    ):
        first_trials(settings(path, **several), MODEL)
    assert len(first_trials(settings(path, **{name: other}, **several), MODEL)[0]) == 1
    # One direction is ablated alike with each of them.
    assert len(first_trials(settings(path), MODEL)[0]) == 1


def test_a_study_whose_settings_were_edited_is_no_warm_start(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    write_study(path, MODEL, [(3, 0.2)], contrast=5)
    with pytest.raises(ContrastError, match="holds no study of Heretic's"):
        first_trials(settings(path), MODEL)


@pytest.mark.parametrize("directions", [5, {"unmatched": 5}])
def test_a_sweep_that_was_edited_is_no_warm_start(directions: Any, tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    path.write_text(replace(sweep(), settings={"directions": directions}).to_json())
    with pytest.raises(ContrastError, match="cannot be read as a sweep"):
        first_trials(settings(path), MODEL)


def test_an_earlier_study_in_a_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(
        study_name="heretic", storage=url, directions=["minimize", "minimize"]
    )
    study.set_user_attr("settings", json.dumps({"model": MODEL}))
    trial = study.ask({"x": FloatDistribution(0.5, 0.5)})
    trial.set_user_attr("refusals", 1)
    trial.set_user_attr("kl_divergence", 0.5)
    study.tell(trial, [1, 0.5])
    # Plain Heretic does not say what decided its numbers.
    found = first_trials(ContrastSettings(warm_start=url), MODEL)
    assert found == ([{"rest": 0.0, "x": 0.5}], {})


IDENTITY = {"weights": "a", "dtype": "float32", "configuration": "b", "tokenizer": "c"}


@pytest.mark.parametrize("kind", ["sweep", "study"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "other"}, None),
        ({"weights": "d"}, "(other weights)"),
        ({"weights": "d", "dtype": "bfloat16"}, "(other weights and data type)"),
    ],
)
def test_another_model_of_the_same_name_is_said(
    kind: str,
    changes: dict[str, Any],
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stored = {**IDENTITY, **changes}
    path = tmp_path / ("sweep.json" if kind == "sweep" else "study.jsonl")
    if kind == "sweep":
        path.write_text(replace(sweep(), identity=stored).to_json())
    else:
        write_study(path, MODEL, [(3, 0.2)], attributes={"identity": stored})
    output = begun(path, monkeypatch, capsys)
    # Long paths are cut at the end of a line.
    assert f"trialsof{path}" in "".join(output.split())
    assert ("another model of that name" in output) == (said is not None)
    assert said is None or said in output


@pytest.mark.parametrize(("digest", "is_said"), [("other", True), ("mine", False), (None, False)])
def test_other_directions_of_the_same_name_are_said(
    digest: str | None,
    is_said: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "sweep.json"
    key = {} if digest is None else {"digest": digest}
    path.write_text(sweep_of(key, identity=IDENTITY).to_json())
    output = begun(path, monkeypatch, capsys)
    assert output.count("with other directions than those of this search") == is_said
    assert "another model of that name" not in output


def begun(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Begins a study with the trials of a sweep or a study, and returns what is said on one line."""

    host = heretic14.Host.__new__(heretic14.Host)
    contrast = settings(path)
    host.settings = host.evaluator = SimpleNamespace(contrast=contrast)  # type: ignore[assignment]
    host.evaluator.settings = host.settings
    host.modifier = SimpleNamespace(  # type: ignore[assignment]
        suggest_parameters=lambda context, trial: trial.suggest_float("x", 0, 1),
        model=lambda context: None,
        directions=SimpleNamespace(digest=lambda: "mine"),
        settings=contrast,
    )
    host.shared, host.context, host.identity = None, None, IDENTITY  # type: ignore[assignment]
    host.first_trials, host.first_identity = first_trials(contrast, MODEL)
    monkeypatch.setattr(heretic14, "shared_components", lambda model: {})
    monkeypatch.setenv("COLUMNS", "500")
    host.create_study(directions=["minimize", "minimize"])
    return " ".join(capsys.readouterr().out.split())
