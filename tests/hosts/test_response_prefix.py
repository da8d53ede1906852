# SPDX-License-Identifier: AGPL-3.0-or-later

"""Directions of a file are searched with as they were extracted, or it is said where they are not."""

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")

from heretic_contrast.hosts import heretic14
from heretic_contrast.hosts.settings import HostSettings, load_settings
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.modifier import ContrastAbliteration
from heretic_contrast.prompts import load_pool
from tests.conftest import small_pool
from tests.made_directions import make_directions, random_tensor


@pytest.mark.parametrize(
    ("made_with", "given", "used", "said"),
    [
        ({"response_prefix": "Well"}, [], "Well", "Response prefix of the directions file: 'Well'"),
        ({"response_prefix": ""}, [], "", "Response prefix of the directions file: ''"),
        (
            {"response_prefix": "Well"},
            ["--response-prefix=No"],
            "No",
            "were extracted with the response prefix 'Well', and are evaluated with 'No'.",
        ),
        (
            {"response_prefix": "", "system_prompt": "Be [b]rief."},
            ["--system-prompt=Be kind."],
            "",
            "were extracted with the system prompt 'Be [b]rief.', and are evaluated with 'Be kind.'.",
        ),
        ({}, [], None, None),
        ({}, ["--response-prefix=No"], "No", None),
    ],
)
def test_a_search_asks_as_its_directions_were_extracted(
    made_with: dict[str, Any],
    given: list[str],
    used: str | None,
    said: str | None,
    refuser: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "directions.safetensors"
    provenance = {"identity": refuser.identity(), **made_with}
    make_directions(random_tensor(9, 1, refuser.hidden_size), provenance=provenance).save(path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("COLUMNS", "500")
    settings = load_settings(
        HostSettings,
        "heretic-contrast",
        ["--model=builtin:refuser", f"--contrast.directions={path}", "--batch-size=2", *given],
    )
    host = heretic14.Host(settings, ContrastAbliteration)
    looked_at = host.sources.loaded[""]
    # Somebody extracts anew, to the same file.
    make_directions(random_tensor(9, 1, refuser.hidden_size, seed=1)).save(path)
    # Heretic looks for a prefix where there is none by then.
    assert host.model_class()(settings).settings.response_prefix == used
    host.modifier.init(host.context)
    assert host.modifier.directions.digest() == looked_at.digest()
    output = " ".join(capsys.readouterr().out.split())
    if said is not None:
        assert output.count(said) == 1
    assert output.count("were extracted with") == int(said is not None and "were" in said)


def test_a_search_ablates_as_its_directions_were_extracted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "som-sequential.safetensors"
    pools = [
        f"--contrast.{name}-prompts.dataset={small_pool(tmp_path, pool, 'train', 6)}"
        for name, pool in (("bad", "harmful"), ("good", "harmless"))
    ]
    preset = ["preset=som-sequential", "som-iterations=50", f"save-directions={path}"]
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("COLUMNS", "500")

    def start(*flags: str) -> ContrastAbliteration:
        common = ["--model=builtin:refuser", "--response-prefix=", "--batch-size=2"]
        settings = load_settings(HostSettings, "heretic-contrast", [*common, *flags])
        host = heretic14.Host(settings, ContrastAbliteration)
        host.model_class()(settings)
        host.modifier.init(host.context)
        return host.modifier

    expected = start(*(f"--contrast.{flag}" for flag in preset), *pools)
    file = f"--contrast.directions={path}"
    found = start(file)
    assert found.configuration == expected.configuration
    assert found.lora_rank == expected.lora_rank == 7
    said = 'file: embeddings = true, composition = "sequential", row_normalization = "none"'
    assert " ".join(capsys.readouterr().out.split()).count(said) == 1
    # Heretic's own flags come first, and a copy of the file says how the model was made.
    copy = f"{tmp_path / 'copy.safetensors'}"
    save = f"--contrast.save-directions={copy}"
    own = start(file, "--row-normalization=full", "--contrast.composition=sum", save)
    assert own.lora_rank == 9
    assert start(f"--contrast.directions={copy}").configuration == own.configuration


@pytest.mark.parametrize(("made_with", "reads"), [({"response_prefix": ""}, False), ({}, True)])
def test_no_prompts_are_read_to_look_for_a_prefix_that_is_known(
    made_with: dict[str, Any], reads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "directions.safetensors"
    make_directions(random_tensor(9, 1, 128), provenance=made_with).save(path)
    monkeypatch.setattr(sys, "argv", [])
    settings = load_settings(
        HostSettings,
        "heretic-contrast",
        [
            "--model=builtin:refuser",
            f"--contrast.directions={path}",
            f"--study-checkpoint-dir={tmp_path}",
            "--batch-size=2",
            "--model-action=none",
        ],
    )
    read: list[str] = []

    def remember(source: Any, name: str, where: str) -> Any:
        read.append(name)
        return load_pool(source, name, where)

    monkeypatch.setattr(heretic14, "load_pool", remember)
    monkeypatch.setattr("heretic.main.run", lambda: None)
    heretic14.run(settings, ContrastAbliteration)
    evaluated = ["harmful evaluation", "harmless evaluation"]
    assert sorted(read) == sorted([*evaluated, *["harmful", "harmless"][: 2 * reads]])
