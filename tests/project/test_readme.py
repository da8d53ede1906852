# SPDX-License-Identifier: AGPL-3.0-or-later

"""The README against the code."""

import re
import runpy
from pathlib import Path

from heretic_contrast.settings import PRESETS, ContrastSettings

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_options_table_is_current() -> None:
    rows = runpy.run_path(str(ROOT / "examples" / "options_table.py"))["rows"]()
    assert "\n".join(rows) in README


def test_every_preset_is_explained() -> None:
    for name in PRESETS:
        assert f"| `{name}` |" in README
        assert ContrastSettings(preset=[name]).preset == [name]


def test_commands_that_are_run_by_continuous_integration_are_single_lines() -> None:
    for label in ("demo", "test"):
        blocks = re.findall(rf"<!-- command: {label} -->\n```sh\n(.*?)\n```", README, re.DOTALL)
        assert len(blocks) == 1 and "\n" not in blocks[0]


def test_sources_name_their_license_and_no_absolute_paths() -> None:
    for folder in ("heretic_contrast", "tests", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert text.startswith("# SPDX-License-Identifier: AGPL-3.0-or-later\n"), path
            assert "/home/" not in text.replace('"/home/"', ""), path
