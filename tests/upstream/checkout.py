# SPDX-License-Identifier: AGPL-3.0-or-later

"""A checkout of Heretic, and runs of its own `main()` in processes of their own."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from tests.conftest import DATA

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = str(DATA / "refuser")
TAIL = 60
"""Lines of output that a failure shows."""

HERETIC = "import heretic.main; print('Running', heretic.main.__file__); heretic.main.main()"
LAUNCHER = "import heretic.main; print('Running', heretic.main.__file__); from heretic_contrast.cli import main; main()"


@dataclass(frozen=True)
class Checkout:
    """
    A checkout of Heretic.

    `surface`: "2.0" (modifiers and scorers), "scorers" (its development state before modifiers), "1.4", or "older", which the
    plugin cannot be run in.
    """

    root: Path

    @property
    def package(self) -> Path:
        return self.root / "src" / "heretic"

    @property
    def surface(self) -> str:
        if (self.package / "modifier.py").is_file():
            return "2.0"
        if (self.package / "scorer.py").is_file():
            return "scorers"
        settings = (self.package / "config.py").read_text(encoding="utf-8")
        return "1.4" if "export_strategy" in settings else "older"

    @property
    def version(self) -> str:
        """The version that the checkout gives itself."""

        project = (self.root / "pyproject.toml").read_text(encoding="utf-8")
        found = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
        return "of an unknown version" if found is None else found[1]

    @property
    def revision(self) -> str:
        """The commit, or "unknown" where the checkout is no Git repository of its own."""

        if not (self.root / ".git").exists():
            return "unknown"
        found = subprocess.run(
            ["git", "-C", str(self.root), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
        )
        return found.stdout.strip() or "unknown"

    def environment(self, directory: Path) -> dict[str, str]:
        """The environment of a run: the checkout in front of any installed Heretic, nothing looked up."""

        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.root / "src"), str(REPOSITORY)]),
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": str(directory / "cache"),
            "COLUMNS": "200",
            "PYTHONUTF8": "1",
        }

    def python(self, directory: Path, *arguments: str) -> str:
        """Runs Python in a directory, and returns its output; fails with command and output's end."""

        directory.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *arguments]
        finished = subprocess.run(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=self.environment(directory),
        )
        if finished.returncode != 0:
            raise AssertionError(
                self.failure(directory, command, finished.returncode, finished.stdout)
            )
        return finished.stdout

    def failure(self, directory: Path, command: Sequence[str], code: int, output: str) -> str:
        """Says precisely what was run and how it ended."""

        shown = " ".join(json.dumps(part) if " " in part else part for part in command)
        config = directory / "config.toml"
        text = config.read_text(encoding="utf-8") if config.is_file() else "(none)\n"
        end = "\n".join(output.splitlines()[-TAIL:])
        return (
            f"Heretic at {self.root} ({self.revision}, surface {self.surface}) ended with exit code {code}.\n"
            f"Directory: {directory}\nCommand: {shown}\nconfig.toml:\n{text}\nEnd of the output:\n{end}"
        )

    def contrast(self, directory: Path, *arguments: str) -> str:
        """Runs a command of heretic-contrast with the checkout, and returns its output."""

        output = self.python(directory, "-c", LAUNCHER, *arguments)
        self.require_own_code(output)
        return output

    def require_own_code(self, output: str) -> None:
        """Fails where what ran was not the checkout."""

        assert f"Running {self.package}" in output, (
            f"Heretic was not imported from {self.package}: is another one in front of it?\n{output[:500]}"
        )

    def heretic(
        self, directory: Path, config: Mapping[str, Any], *flags: str, launcher: bool = False
    ) -> str:
        """
        Runs Heretic headless on the built-in refuser, and returns its output.

        `config` becomes config.toml. With `launcher`, heretic-contrast runs it.
        """

        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.toml").write_text(toml(config), encoding="utf-8")
        output = self.python(
            directory,
            "-c",
            LAUNCHER if launcher else HERETIC,
            "--model",
            MODEL,
            "--seed=3",
            "--n-trials=2",
            "--n-startup-trials=2",
            "--batch-size=64",
            "--max-response-length=12",
            "--response-prefix=",
            *flags,
        )
        self.require_own_code(output)
        return output


def toml(table: Mapping[str, Any]) -> str:
    """Returns a table of JSON values as TOML."""

    return "".join(f"{name} = {toml_value(value)}\n" for name, value in table.items())


def toml_value(value: Any) -> str:
    """Returns a JSON value as a TOML value; tables are written inline."""

    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(value)


def stored_trials(directory: Path) -> list[dict[str, Any]]:
    """Returns what the study's checkpoint keeps of each finished trial."""

    journals = sorted((directory / "checkpoints").rglob("*.jsonl"))
    assert len(journals) == 1, f"There should be one checkpoint below {directory}: {journals}"
    study = optuna.load_study(
        study_name="heretic", storage=JournalStorage(JournalFileBackend(str(journals[0])))
    )
    return [
        {"values": trial.values, "params": trial.params, **trial.user_attrs}
        for trial in study.trials
        if trial.state is optuna.trial.TrialState.COMPLETE
    ]
