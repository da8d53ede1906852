# SPDX-License-Identifier: AGPL-3.0-or-later

"""The plugin inside the real Heretic 1.4, from the command line."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests.conftest import DATA, small_pool

pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")

pytestmark = pytest.mark.slow


def arguments(directory: Path) -> list[str]:
    """A headless run that is as small as it can be."""

    return [
        "--seed=3",
        "--n-trials=2",
        "--n-startup-trials=2",
        "--batch-size=32",
        "--max-response-length=8",
        "--response-prefix=",
        f"--bad-evaluation-prompts.dataset={small_pool(directory, 'harmful', 'test', 2)}",
        f"--good-evaluation-prompts.dataset={small_pool(directory, 'harmless', 'test', 12)}",
        "--contrast.preset=paper-unmatched",
        "--contrast.som-iterations=200",
        f"--study-checkpoint-dir={directory / 'checkpoints'}",
    ]


def environment(directory: Path) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(directory),
        "HOME": str(directory),
        "COLUMNS": "200",
    }


def command(*extra: str) -> list[str]:
    return [sys.executable, "-c", "from heretic_contrast.cli import main; main()", *extra]


def terminal(directory: Path, *options: str) -> Any:
    """The program behind a pseudo-terminal."""

    return pexpect.spawn(
        sys.executable,
        command(*options)[1:],
        cwd=str(directory),
        # No terminal stands behind the pseudo-terminal that could answer where its cursor is.
        env={**environment(directory), "PROMPT_TOOLKIT_NO_CPR": "1"},
        dimensions=(50, 200),
        timeout=300,
        encoding="utf-8",
        logfile=(directory / "session.txt").open("w"),
    )


def answer(child: Any, question: str, keys: str) -> None:
    """Answers a question of a menu."""

    child.expect(question)
    # A menu shows its question before it reads keys.
    time.sleep(1)
    child.send(keys)


DOWN, UP, ENTER, CONTROL_C, CONTROL_D = "\x1b[B", "\x1b[A", "\r", "\x03", "\x04"


def test_a_study_without_a_terminal_goes_on_in_one(
    tmp_path: Path, command_server: Any, refuser_folder: Path
) -> None:
    options = [
        *arguments(tmp_path),
        f"--bad-prompts.dataset={small_pool(tmp_path, 'harmful', 'train', 3)}",
        f"--good-prompts.dataset={small_pool(tmp_path, 'harmless', 'train', 12)}",
        "--contrast.method=mean",
        f"--model={refuser_folder}",
    ]
    ran = command_server.run([*options, "--model-action=none"], tmp_path)
    assert ran.code == 0, ran.output()[-3000:]
    assert "The study is kept" in ran.output()
    # A notebook has no terminal, and may answer all the same; this one does not.
    unanswered = subprocess.run(
        command(*options),
        cwd=tmp_path,
        env={**environment(tmp_path), "COLAB_GPU": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert unanswered.returncode == 2 and "Traceback" not in unanswered.stderr
    assert "the study is kept" in unanswered.stderr.splitlines()[-1]
    # What an earlier model has left where the adapter is saved.
    saved = tmp_path / "saved [x]"
    shutil.copytree(refuser_folder, saved)
    (saved / "notes.txt").write_text("mine")
    child = terminal(tmp_path, *options)
    child.expect("How would you like to proceed")
    time.sleep(1)
    child.kill(signal.SIGTERM)
    child.expect("Interrupted. The trials that were finished are kept")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    child = terminal(tmp_path, *options)
    answer(child, "How would you like to proceed", ENTER)
    answer(child, "Which trial do you want to use", UP + UP + ENTER)
    answer(child, "How many additional trials", CONTROL_D)
    answer(child, "Which trial do you want to use", ENTER)
    for keys in (str(refuser_folder) + ENTER, CONTROL_D, f"~/{saved.name}" + ENTER):
        answer(child, "What do you want to do with the decensored model", ENTER)
        answer(child, "Path to the folder", keys)
        if keys.startswith(str(refuser_folder)):
            child.expect("choose another folder")
    answer(child, "How do you want to export the model", DOWN + ENTER)
    child.expect(r"Model saved to \S*" + re.escape(str(saved)))
    answer(child, "What do you want to do with the decensored model", UP + ENTER)
    answer(child, "Which trial do you want to use", CONTROL_C)
    child.expect("Interrupted. The trials that were finished are kept")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    assert sorted(path.name for path in saved.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "heretic-contrast.json",
        "notes.txt",
    ]


@pytest.fixture
def refuser_folder(tmp_path: Path) -> Path:
    """The built-in refuser in a folder of its own."""

    folder = tmp_path / "refuser"
    shutil.copytree(DATA / "refuser", folder)
    return folder
