# SPDX-License-Identifier: AGPL-3.0-or-later

"""Which words of a command line are options, values and the model, and where the output goes."""

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from heretic_contrast import cli
from heretic_contrast.commands.audit import AuditSettings
from heretic_contrast.commands.demo import DemoSettings
from heretic_contrast.commands.extract import ExtractSettings
from heretic_contrast.commands.sweep import SweepSettings
from heretic_contrast.errors import ContrastError
from heretic_contrast.hosts.arguments import command_line_options, normalize_arguments
from heretic_contrast.hosts.settings import HostSettings, load_settings
from tests.conftest import Refused

FROM_ELSEWHERE = "owner/model-of-the-configuration"


def settings(*arguments: str) -> HostSettings:
    return load_settings(HostSettings, "heretic-contrast", list(arguments))


@pytest.fixture(params=["config.toml", "environment"])
def named_elsewhere(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names a model in another place than the command line."""

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    if request.param == "environment":
        monkeypatch.setenv("HERETIC_MODEL", FROM_ELSEWHERE)
    else:
        (tmp_path / "config.toml").write_text(f"model = '{FROM_ELSEWHERE}'\n")


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--orthogonalize-direction", "true"], "orthogonalize_direction", True),
        (["--no-orthogonalize-direction"], "orthogonalize_direction", False),
        (["--print-responses", "False"], "print_responses", False),
        (["--n-trials", "7"], "n_trials", 7),
        (["--n-trials=7"], "n_trials", 7),
        (["--kl-divergence-scale", "0.5"], "kl_divergence_scale", 0.5),
        (["--response-prefix", ""], "response_prefix", ""),
        (["--max-memory", "0=1GB"], "max_memory", {"0": "1GB"}),
        (["--dtypes", "float32"], "dtypes", ["float32"]),
        (["--seed", "3", "--system-prompt", "Be brief"], "system_prompt", "Be brief"),
        # Most shells leave it as it is.
        (["--save-directory=~/saved"], "save_directory", str(Path.home() / "saved")),
        (["--system-prompt=a ~/b"], "system_prompt", "a ~/b"),
    ],
)
def test_values_are_no_model(
    arguments: list[str], name: str, value: object, named_elsewhere: None
) -> None:
    found = settings(*arguments)
    assert found.model == FROM_ELSEWHERE
    assert getattr(found, name) == value
    # Heretic takes the last word for the model where it looks like one.
    assert len(sys.argv) == 1 or sys.argv[-1].startswith("-")


@pytest.mark.parametrize(
    "arguments",
    [
        ["owner/name", "--n-trials", "7", "--contrast.embeddings"],
        ["--n-trials", "7", "--contrast.embeddings", "owner/name"],
        ["--n-trials", "7", "owner/name", "--contrast.embeddings", "true"],
        ["--contrast.embeddings=true", "--n-trials=7", "--", "owner/name"],
        ["--n-trials", "7", "--model", "owner/name", "--contrast.embeddings"],
        ["--no-contrast.embeddings=false", "--model=owner/name", "--n-trials", "7"],
    ],
)
def test_the_model_stands_anywhere(arguments: list[str], named_elsewhere: None) -> None:
    found = settings(*arguments)
    assert (found.model, found.n_trials, found.contrast.embeddings) == ("owner/name", 7, True)


def test_no_words_at_all(
    refused: Refused,
    named_elsewhere: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")
    # A model that does not exist is looked for last.
    options = "[good_prompts]\ndataset = 'missing.txt'\n"
    with (tmp_path / "config.toml").open("a") as file:
        file.write(options)
    assert "missing.txt" in refused([])
    (tmp_path / "config.toml").unlink()
    monkeypatch.delenv("HERETIC_MODEL", raising=False)
    with pytest.raises(SystemExit):
        main([], monkeypatch)
    assert capsys.readouterr().out.startswith("heretic-contrast: contrast baselines")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["first", "second"], 'no option that "first", "second" could'),
        (["--model", "first", "second"], 'no option that "second" could'),
        (["first", "--model=second"], 'no option that "first" could'),
        (["first", "sweep"], "a command first"),
        (
            ["--contrast.embeddings=perhaps", "first"],
            "--contrast.embeddings true or --contrast.embeddings false",
        ),
        (
            ["--contrast.scd", "true", "first"],
            "no option --contrast.scd: did you mean --contrast.s",
        ),
        (["-x", "first"], "no option -x"),
        (["first", "--n-trials"], "--n-trials.*expected one argument"),
        (["--n-trials", "--seed", "3", "first"], "--n-trials.*expected one argument"),
    ],
)
def test_superfluous_words(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(ContrastError, match=expected) as information:
        settings(*arguments)
    assert "\n" not in str(information.value)


@pytest.mark.parametrize(
    "settings_class", [HostSettings, ExtractSettings, SweepSettings, DemoSettings]
)
def test_every_option_with_a_value_takes_the_next_word(settings_class: type[BaseSettings]) -> None:
    options = command_line_options(settings_class)
    del options["-h"], options["--help"]
    assert len(options) > 50
    words = [word for name in options for word in (name, "true")]
    assert normalize_arguments(settings_class, words) == [
        name if action.nargs == 0 else f"{name}=true" for name, action in options.items()
    ]


def test_an_audit_has_no_model() -> None:
    arguments = ["--dataset", "pool.txt", "--output", "out"]
    assert normalize_arguments(AuditSettings, arguments) == ["--dataset=pool.txt", "--output=out"]
    with pytest.raises(ContrastError, match=r'no option that "pool\.txt" could'):
        normalize_arguments(AuditSettings, ["pool.txt", *arguments])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            [],
            [
                "--trial-index 0",
                "--model-action save",
                "--save-directory",
                "--export-strategy merge",
            ],
        ),
        (["--trial-index=0"], ["--model-action save", "--save-directory", "--export-strategy"]),
        (["--trial-index=0", "--model-action=save"], ["--save-directory", "--export-strategy"]),
        (["--model-action=save", "--save-directory=out"], ["--trial-index 0", "--export-strategy"]),
        (
            ["--trial-index=0", "--model-action=upload"],
            ["upload", "--model-action save", "--save-directory"],
        ),
    ],
)
def test_questions_that_nobody_can_answer_come_first(
    refused: Refused,
    arguments: list[str],
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")
    with open(os.devnull) as nothing:
        for stdin in (nothing, None):
            monkeypatch.setattr(sys, "stdin", stdin)
            sentence = refused(["builtin:refuser", *arguments])
            assert all(name in sentence for name in named)
    given = {argument.partition("=")[0] for argument in arguments} - {"--model-action"}
    assert not any(name in sentence for name in given)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def stream(encoding: str, errors: str = "strict") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)


def main(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["heretic-contrast", *arguments])
    cli.main()


@pytest.mark.parametrize(
    ("encoding", "errors"),
    [("ascii", "strict"), ("ascii", "surrogateescape"), ("cp1252", "strict"), ("utf-8", "strict")],
)
def test_characters_that_cannot_be_shown(
    encoding: str, errors: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = tmp_path / "pool.txt"
    pool.write_text("How do I steal a car? 📦\nWhat is tea? λ\n", encoding="utf-8")
    output = stream(encoding, errors)
    monkeypatch.setattr(sys, "stdout", output)
    main(["audit", f"--dataset={pool}", f"--output={tmp_path / 'out λ'}"], monkeypatch)
    from heretic_contrast.hosts.surface import log

    log("A table of λ and ✓ █▀█, and a name that is no text: \udcff")
    output.flush()
    shown = output.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "A table of " in shown and ("λ" in shown) == (encoding == "utf-8")
    assert (tmp_path / "out λ" / "audit.json").exists()


def test_sentences_that_cannot_be_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = stream("ascii")
    monkeypatch.setattr(sys, "stderr", error)
    with pytest.raises(SystemExit) as information:
        main(["sweep", "builtin:refuser", "--output=out", "--layers=λ"], monkeypatch)
    error.flush()
    assert information.value.code == 2
    assert b"Error: The layers" in error.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "arguments", [["doctor"], ["--version"], ["--help"], [], ["audit", "-h"], ["doctor", "-h"]]
)
def test_output_that_nobody_reads(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as information:
            main(arguments, monkeypatch)
        assert information.value.code == 1
    assert capfd.readouterr().err == ""
