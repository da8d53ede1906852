# SPDX-License-Identifier: AGPL-3.0-or-later

"""Many more examples of every property."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize(
    "name",
    [
        "test_properties_ablation.py",
        "test_properties_extraction.py",
        "test_properties_evaluation.py",
        "test_fuzzing.py",
    ],
)
def test_thoroughly(name: str) -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "not slow",
            "-n",
            "0",
            *map(str, TESTS.rglob(name)),
        ],
        cwd=TESTS.parent,
        env={**os.environ, "HERETIC_CONTRAST_PROPERTIES": "thorough"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-10_000:]
