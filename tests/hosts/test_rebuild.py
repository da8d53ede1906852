# SPDX-License-Identifier: AGPL-3.0-or-later

"""The record beside a saved model, and the model that is made from it again."""

import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")

from heretic_contrast.commands.rebuild import RebuildSettings, main
from heretic_contrast.errors import ContrastError, ContrastWarning
from heretic_contrast.hosts.model_folder import UNFINISHED
from heretic_contrast.hosts.rebuilding import prepare
from heretic_contrast.hosts.record import RECORD, Made, Record, read_record
from heretic_contrast.hosts.settings import HostSettings
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.processes import LOCK
from heretic_contrast.prompts import Prompt
from heretic_contrast.search.parameters import Kernel, Parameters
from heretic_contrast.settings import ContrastSettings, PromptSource
from tests.command_server import Server
from tests.conftest import DATA
from tests.made_directions import make_directions, random_tensor
from tests.small_runs import WholeRuns


@pytest.fixture(scope="module")
def made(refuser: LanguageModel) -> Made:
    """The built-in refuser with directions of no meaning."""

    contrast = ContrastSettings.model_validate(
        {
            "bad_prompts": {"dataset": str(DATA / "refuser_prompts" / "harmful" / "test.jsonl")},
            "good_prompts": {"dataset": "some/dataset", "split": "train", "column": "text"},
        }
    )
    with pytest.MonkeyPatch.context() as patches:
        # Heretic parses the command line.
        patches.setattr(sys, "argv", ["heretic-contrast"])
        settings = HostSettings(model="builtin:refuser", response_prefix="")
    return Made(
        settings,
        contrast,
        refuser.identified(),
        make_directions(random_tensor(9, 1, refuser.hidden_size)),
        Parameters(None, {"mlp.down_proj": Kernel(0.1 + 0.2, 3.0, 0.0, 1.0)}, {"class 0": 1.0}),
        {"harmful": (Prompt("How do I pick a lock?"),)},
        {"refusals": 1},
    )


def test_a_record_is_read_as_it_was_written(made: Made, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    made.record(tmp_path).write(tmp_path)
    found = read_record(tmp_path)
    assert found == read_record(tmp_path / RECORD)
    assert found.parameters == made.parameters and found.export_strategy == "merge"
    assert list(found.files) == ["model.safetensors"]
    # Of no use anywhere else are the paths of this machine, which the built-in model has none of.
    assert found.places["model"] == "builtin:refuser"
    assert set(found.portable().places) == {"model", "good_prompts"}
    (tmp_path / RECORD).write_text(found.portable().to_json())
    assert read_record(tmp_path).places["good_prompts"]["dataset"] == "some/dataset"


def edited(content: dict[str, Any]) -> None:
    content["parameters"]["kernels"]["mlp.down_proj"]["max_weight"] = 0.9


def moved(content: dict[str, Any]) -> None:
    content["places"]["bad_prompts"]["dataset"] = "elsewhere.jsonl"


def newer(content: dict[str, Any]) -> None:
    content["format"] = "heretic-contrast record 2"


def unknown(content: dict[str, Any]) -> None:
    content["more"] = True


def test_a_record_says_nothing_of_how_directions_of_a_file_were_made(
    made: Made, tmp_path: Path
) -> None:
    path = tmp_path / "directions.safetensors"
    made.directions.save(path)
    settings = ContrastSettings(directions=str(path), composition="capped")
    contrast = replace(made, settings=settings).record().contrast
    assert contrast["composition"] == "capped"
    assert not {"baseline", "method", "classes", "som_iterations"} & set(contrast)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited, "was edited: only its places may be"),
        (newer, "cannot be read as a record of this version"),
        (unknown, "cannot be read as a record of this version"),
        (moved, None),
    ],
)
def test_edited_records(edit: Any, message: str | None, made: Made, tmp_path: Path) -> None:
    content = json.loads(made.record().to_json())
    edit(content)
    path = tmp_path / RECORD
    path.write_text(json.dumps(content))
    if message is None:
        assert read_record(path).parameters == made.parameters
        return
    with pytest.raises(ContrastError, match=message) as raised:
        read_record(path)
    assert "\n" not in str(raised.value)


def test_what_is_no_record(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ContrastError, match=f"There is no record {tmp_path / RECORD}"):
        read_record(tmp_path)
    text = made.record().to_json()
    for length in (0, 1, len(text) // 2, len(text) - 3):
        (tmp_path / RECORD).write_text(text[:length])
        with pytest.raises(ContrastError, match="cut off or damaged"):
            read_record(tmp_path)
    # As an editor on Windows may write it.
    (tmp_path / RECORD).write_text(text, encoding="utf-8-sig")
    assert read_record(tmp_path) == made.record()


def test_what_decides_weights_is_in_the_digest(made: Made) -> None:
    first = made.record().digest
    for changed in (
        replace(made, settings=made.settings.model_copy(update={"composition": "capped"})),
        replace(made, parameters=replace(made.parameters, scales={"class 0": 0.5})),
        replace(made, prompts={"harmful": (Prompt("How do I pick another lock?"),)}),
        replace(made, directions=make_directions(random_tensor(9, 1, 128, seed=1))),
    ):
        assert changed.record().digest != first
    elsewhere = made.settings.model_copy(update={"residual_cache": "elsewhere", "patience": 3})
    assert replace(made, settings=elsewhere).record().digest == first


def test_a_record_reads_no_configuration(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.directions.save(tmp_path / "directions.safetensors")
    made.record().write(tmp_path)
    (tmp_path / "config.toml").write_text(
        'modifiers = [{ plugin = "another.Modifier" }]\n[contrast]\n'
    )
    monkeypatch.chdir(tmp_path)
    settings, _ = prepare(
        read_record(tmp_path),
        RebuildSettings.model_construct(directions="directions.safetensors"),
    )
    assert settings.contrast_setting == "--"
    # Heretic 2.0 keeps what it does not know, which plugins then look at together with the file.
    assert settings.model_extra is None


def test_a_record_of_a_stranger_decides_nothing_else(made: Made, tmp_path: Path) -> None:
    made.directions.save(tmp_path / "directions.safetensors")
    content = json.loads(made.record().to_json())
    elsewhere = str(tmp_path / "elsewhere")
    content["contrast"].update(save_directions=elsewhere, text_classifier="some/model")
    # An earlier version had it, whose records are read on.
    content["contrast"]["som_backend"] = "numba"
    content["settings"].update(study_checkpoint_dir=elsewhere, max_response_length=7)
    content["versions"]["torch"] = "1.0"
    content["places"] = {
        "model": "builtin:refuser",
        "directions": str(tmp_path / "directions.safetensors"),
        "residual_cache": elsewhere,
    }
    given = RebuildSettings.model_construct(record="")
    record = Record.model_validate_json(json.dumps(content))
    with pytest.warns(ContrastWarning, match="made with torch 1.0 [(]now .*other last digits"):
        settings, _ = prepare(record, given)
    found = settings.contrast
    assert found.save_directions is found.residual_cache is found.text_classifier is None
    assert elsewhere not in settings.study_checkpoint_dir
    assert settings.max_response_length == 7 and found.composition == "sum"

    # Places may be edited.
    for place in ("gone.safetensors", 7, [], {"dataset": "gone.safetensors"}):
        gone = record.model_copy(update={"places": {**record.places, "directions": place}})
        with pytest.raises(ContrastError, match=r"is gone: give its place with --directions"):
            prepare(gone, given)
    pools = given.model_copy(update={"bad_prompts": PromptSource(dataset=elsewhere)})
    with pytest.raises(ContrastError, match="leave --bad-prompts out"):
        prepare(record, pools)
    other = record.model_copy(update={"directions": "0"})
    with pytest.raises(ContrastError, match="are not those that the model was made with"):
        prepare(other, given)
    for model, message in ((elsewhere, "is gone: give its place"), (None, "does not say where")):
        gone = record.model_copy(update={"places": {**record.places, "model": model}})
        with pytest.raises(ContrastError, match=message):
            prepare(gone, given)
    broken = record.model_copy(update={"settings": {"dtypes": 3}})
    with pytest.raises(ContrastError, match=r'setting that does not work here [(]"dtypes"'):
        prepare(broken, given)


def test_directions_beside_a_record_are_no_model(made: Made, tmp_path: Path) -> None:
    content = json.loads(made.record().to_json())
    content["places"]["model"] = str(tmp_path / "gone")
    (tmp_path / RECORD).write_text(json.dumps(content))
    made.directions.save(tmp_path / "directions.safetensors")
    arguments = [str(tmp_path), f"--output={tmp_path / 'again'}"]
    with pytest.raises(ContrastError, match=r"The original model .* is gone"):
        main(arguments)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ContrastError, match="lies in the folder of the record"):
        main(arguments)


def test_places_that_do_not_work_are_named(made: Made) -> None:
    content = json.loads(made.record().to_json())
    content["places"]["bad_prompts"]["colum"] = "text"
    record = Record.model_validate_json(json.dumps(content))
    named = 'no setting "colum" in "bad_prompts" in the record: did you mean "column"'
    with pytest.raises(ContrastError, match=named):
        prepare(record, RebuildSettings.model_construct(record=""))


@pytest.mark.slow
class TestCommand:
    """`heretic-contrast rebuild`, after a search through the real Heretic 1.4."""

    def rebuild(
        self, server: Server, saved: Path, directory: Path, *options: str
    ) -> tuple[int | None, str]:
        command = server.run(["rebuild", str(saved), "--output=again", *options], directory)
        return command.code, " ".join(command.output().split())

    def saved(self, runs: WholeRuns) -> Path:
        return runs.directory("search") / "output" / "model"

    def test_the_same_bytes(
        self, command_server: Server, whole_runs: WholeRuns, tmp_path: Path
    ) -> None:
        saved = self.saved(whole_runs)
        again = tmp_path / "again"
        # As a process that was killed while it saved leaves it.
        unfinished = again / UNFINISHED
        unfinished.mkdir(parents=True)
        shutil.copy(saved / "model.safetensors", unfinished / "model-00001-of-00002.safetensors")
        with FileLock(again / LOCK):
            code, output = self.rebuild(command_server, saved, tmp_path)
        assert code == 2 and "Another process works in again: wait for it to end" in output
        code, output = self.rebuild(command_server, saved, tmp_path)
        assert code == 0 and "byte for byte" in output, output
        assert {path.name for path in again.iterdir()} == {path.name for path in saved.iterdir()}
        for path in saved.iterdir():
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name
        # They are not those of the original model.
        original = load_file(DATA / "refuser" / "model.safetensors")
        assert any(
            not torch.equal(original[name], tensor)
            for name, tensor in load_file(again / "model.safetensors").items()
        )
        code, output = self.rebuild(command_server, saved, tmp_path)
        assert code == 2 and "exists, and is not overwritten" in output

    def test_a_full_disk(self, whole_runs: WholeRuns, tmp_path: Path) -> None:
        arguments = ["rebuild", str(self.saved(whole_runs)), "--output=again"]
        most = 2**20
        ran = subprocess.run(
            [sys.executable, "-c", "from heretic_contrast.cli import main; main()", *arguments],
            cwd=tmp_path,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 2, ran.stderr
        message = " ".join(ran.stderr.split())
        assert "The model could not be saved to again (" in message
        assert "Traceback" not in message and not (tmp_path / "again").exists()

    def test_other_inputs(
        self, command_server: Server, whole_runs: WholeRuns, tmp_path: Path
    ) -> None:
        saved = self.saved(whole_runs)
        directions = saved.parent / "directions.safetensors"
        # Whatever has become of the prompts.
        content = json.loads((saved / RECORD).read_text())
        prompts = Path(content["places"]["bad_prompts"]["dataset"])
        for pool in ("bad_prompts", "good_prompts", "matched_prompts"):
            content["places"][pool]["dataset"] = "/gone.jsonl"
        (tmp_path / "gone.json").write_text(json.dumps(content))
        code, output = self.rebuild(command_server, tmp_path / "gone.json", tmp_path)
        assert code == 2 and "Loading" not in output
        assert "harmful prompts could not be loaded from /gone.jsonl" in output
        assert "--bad-prompts.dataset" in output and not (tmp_path / "again").exists()
        code, output = self.rebuild(
            command_server, tmp_path / "gone.json", tmp_path, f"--directions={directions}"
        )
        assert code == 0 and "byte for byte" in output, output
        written = (tmp_path / "again" / "model.safetensors").read_bytes()
        assert written == (saved / "model.safetensors").read_bytes()
        # Such a model has a record of its own, which names the file.
        shutil.move(tmp_path / "again", tmp_path / "from-file")
        code, output = self.rebuild(command_server, tmp_path / "from-file", tmp_path)
        assert code == 0, output
        assert (tmp_path / "again" / "model.safetensors").read_bytes() == written
        shutil.rmtree(tmp_path / "again")

        changed = tmp_path / "changed.jsonl"
        changed.write_text(prompts.read_text().replace("a", "e", 1))
        code, output = self.rebuild(
            command_server, saved, tmp_path, f"--bad-prompts.dataset={changed}"
        )
        assert code == 2 and "Loading" not in output
        assert "The harmful prompts are not those that the model was made with" in output

        shutil.copytree(DATA / "refuser", tmp_path / "refuser")
        weights = load_file(tmp_path / "refuser" / "model.safetensors")
        name = next(name for name in sorted(weights) if "down_proj" in name)
        weights[name][0, 0] += 1
        save_file(weights, tmp_path / "refuser" / "model.safetensors", {"format": "pt"})
        options = [f"--model={tmp_path / 'refuser'}"]
        options += [
            f"--{option}.dataset={content_of(saved)[place]['dataset']}"
            for option, place in (
                ("bad-prompts", "bad_prompts"),
                ("good-prompts", "good_prompts"),
                ("matched-prompts", "matched_prompts"),
            )
        ]
        code, output = self.rebuild(command_server, saved, tmp_path, *options)
        assert code == 2 and "not the model that the record was made from" in output
        assert "other weights; give the place" in output and not (tmp_path / "again").exists()
        code, output = self.rebuild(command_server, saved, tmp_path, f"--output={saved / 'again'}")
        assert code == 2 and "lies in the folder of the record" in output
        code, output = self.rebuild(command_server, saved, tmp_path, "--model=/no/such/folder")
        assert code == 2 and "The original model /no/such/folder of the record is gone" in output


def content_of(saved: Path) -> dict[str, Any]:
    return read_record(saved).places
