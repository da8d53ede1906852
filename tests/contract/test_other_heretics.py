# SPDX-License-Identifier: AGPL-3.0-or-later

"""What is said where the installed Heretic is not the one that is needed."""

import subprocess
import sys
from pathlib import Path

import heretic.config
import pytest

from tests.upstream.checkout import REPOSITORY


def python(directory: Path, code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:0] = [{str(directory)!r}, {str(REPOSITORY)!r}]; {code}",
            *arguments,
        ],
        cwd=directory,
        capture_output=True,
        text=True,
    )


def test_import_needs_no_heretic(tmp_path: Path) -> None:
    """The package can be imported, and lists its names, whatever Heretic is installed."""

    (tmp_path / "heretic").mkdir()
    (tmp_path / "heretic" / "__init__.py").write_text("raise ImportError('must not be imported')")
    finished = python(
        tmp_path,
        "import heretic_contrast; print(len(heretic_contrast.__all__), 'torch' in sys.modules)",
    )
    assert finished.returncode == 0, finished.stderr
    count, torch_is_loaded = finished.stdout.split()
    assert int(count) >= 7
    assert torch_is_loaded == "False"


@pytest.mark.skipif(
    "scorers" in heretic.config.Settings.model_fields, reason="the installed Heretic has scorers"
)
def test_scorers_in_the_configuration_of_heretic_14(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        'scorers = [{ plugin = "heretic_contrast.RefusalTiers", optimization = "minimize" }]\n'
    )
    finished = python(tmp_path, "from heretic_contrast.cli import main; main()", "some/model")
    assert finished.returncode == 2
    assert finished.stderr.startswith(
        "Error: config.toml configures scorers, which only Heretic 2.0 has"
    )
    assert finished.stderr.count("\n") == 1
