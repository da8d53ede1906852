# SPDX-License-Identifier: AGPL-3.0-or-later

"""The script for GPUs runs whole on a CPU, in its small form."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "benchmarks" / "gpu.py"


def run(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=500,
    ).stdout


@pytest.mark.slow
def test_all_sections_measure_something_on_a_cpu(tmp_path: Path) -> None:
    printed = run("--device", "cpu", "--small", "--output", str(tmp_path))
    content = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert len(content["sections"]) >= 20
    for name, section in content["sections"].items():
        assert "error" not in section and "skipped" not in section, name
        assert section["rows"], name
        # What must be equal is so on a CPU as well, and speed has no aims there.
        missed = [row for row in section["rows"] if not row.get("met", True)]
        assert not missed, (name, missed)
        assert f"| {name} |" in printed
    short = run("--table", str(tmp_path / "gpu.json"))
    assert 20 < len(short.splitlines()) < len(printed.splitlines())
