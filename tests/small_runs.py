# SPDX-License-Identifier: AGPL-3.0-or-later

"""The smallest runs of extraction, search and sweep on the built-in refuser, and what they leave behind."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from tests.command_server import Command, Server
from tests.conftest import DATA

COMMON = [
    "--model=builtin:refuser",
    "--seed=3",
    "--response-prefix=",
    "--batch-size=32",
    "--max-response-length=8",
    "--contrast.method=som",
    "--contrast.classes=category",
    "--contrast.som-rows=1",
    "--contrast.som-columns=2",
    "--contrast.som-iterations=50",
]


def pools(directory: Path) -> list[str]:
    """Writes a few prompts of each pool, and returns the options that name them."""

    options = []
    for pool in ("harmful", "harmless", "matched"):
        name = {"harmful": "bad", "harmless": "good", "matched": "matched"}[pool]
        for split in ("train", "test"):
            lines = (DATA / "refuser_prompts" / pool / f"{split}.jsonl").read_text().splitlines()
            path = directory / f"{pool}-{split}.jsonl"
            path.write_text("\n".join(lines[:18]) + "\n")
            if split == "train":
                options.append(f"--contrast.{name}-prompts.dataset={path}")
            elif pool != "matched":
                # Heretic itself reads plain text.
                path = path.with_suffix(".txt")
                texts = [json.loads(line)["text"] for line in lines[:18]]
                path.write_text("\n".join(texts) + "\n")
                options.append(f"--{name}-evaluation-prompts.dataset={path}")
    return options


def pairs(directory: Path) -> str:
    """Writes two of the shipped prompt pairs."""

    path = directory / "pairs.jsonl"
    lines = (DATA / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:2]) + "\n")
    return f"--pairs={path}"


def files(directory: Path) -> dict[str, bytes]:
    """The content of all files below a directory."""

    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def study(directory: Path) -> list[dict[str, Any]]:
    """The trials of the one checkpoint below a directory, without times and processes."""

    (path,) = directory.glob("contrast-*/*.jsonl")
    loaded = optuna.load_study(
        # Optuna's own reader, since other tools read the file as well.
        study_name="heretic",
        storage=JournalStorage(JournalFileBackend(str(path))),
    )
    return [
        {
            "number": trial.number,
            "state": trial.state.name,
            "params": trial.params,
            "values": trial.values,
            "attributes": {k: v for k, v in trial.user_attrs.items() if k != "lease"},
        }
        for trial in loaded.trials
    ]


def extracted(directory: Path) -> dict[str, Any]:
    return files(directory / "output")


def searched(directory: Path) -> dict[str, Any]:
    return {**files(directory / "output"), "study": study(directory / "checkpoints")}


def swept(directory: Path) -> dict[str, Any]:
    found = files(directory / "output")
    # The journal holds times and processes.
    del found["sweep.journal"]
    return found


@dataclass(frozen=True)
class Case:
    """A command, and what must not depend on how often it was killed."""

    arguments: list[str]
    result: Callable[[Path], dict[str, Any]]
    middle: str
    """What it prints about in the middle of its work."""


def make_cases(directory: Path) -> dict[str, Case]:
    """Writes the prompts of the smallest runs to a directory, and returns the runs by name."""

    common = [*COMMON, *pools(directory)]
    return {
        "extract": Case(
            [
                "extract",
                "--output=output/directions.safetensors",
                "--contrast.preset=paper-matched",
                "--contrast.preset=arditi",
                *common,
            ],
            extracted,
            "Saved",
        ),
        "search": Case(
            [
                "--n-trials=3",
                "--n-startup-trials=2",
                "--study-checkpoint-dir=checkpoints",
                "--checkpoint-action=continue",
                "--trial-index=0",
                "--model-action=save",
                "--export-strategy=merge",
                "--save-directory=output/model",
                "--contrast.save-directions=output/directions.safetensors",
                *common,
            ],
            searched,
            "Running trial 2",
        ),
        "sweep": Case(
            [
                "sweep",
                "--output=output",
                "--layers=3,4,6",
                "--weights=[0.5]",
                "--strength=weight",
                "--n-harmful=9",
                "--n-canaries=2",
                "--n-references=4",
                "--kl-tokens=6",
                "--sweep-response-length=10",
                "--synergy-layers=3",
                "--no-random-control",
                pairs(directory),
                *common,
            ],
            swept,
            "Sweeping",
        ),
    }


class WholeRuns:
    """Each run as it goes when nothing happens to it, made when it is first asked for."""

    def __init__(self, server: Server, directory: Path) -> None:
        self._server = server
        self._directory = directory
        self._cases = make_cases(directory)
        self._found: dict[str, tuple[Command, dict[str, Any]]] = {}

    def get(self, name: str) -> tuple[Case, Command, dict[str, Any]]:
        """Returns a run, the process that it ran in, and its result."""

        case = self._cases[name]
        if name not in self._found:
            command = self._server.run(case.arguments, self._directory / name)
            assert command.code == 0, command.output()[-3000:]
            self._found[name] = command, case.result(self._directory / name)
        return case, *self._found[name]

    def directory(self, name: str) -> Path:
        """Returns where a run was made."""

        self.get(name)
        return self._directory / name
