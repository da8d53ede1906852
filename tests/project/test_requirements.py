# SPDX-License-Identifier: AGPL-3.0-or-later

"""The package's requirements beside those of Heretic 1.4 and of Heretic 2.0's development state."""

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[2]

HERETIC_14 = [
    "accelerate~=1.13",
    "bitsandbytes~=0.49",
    "datasets~=4.7",
    "huggingface-hub~=1.7",
    "immutabledict~=4.3",
    "langdetect~=1.0",
    "lm-eval[hf]~=0.4",
    "numpy~=2.2",
    "optuna~=4.7",
    "peft~=0.19",
    "psutil~=7.2",
    "py-cpuinfo~=9.0",
    "pydantic-settings~=2.13",
    "questionary~=2.1",
    "rich~=14.3",
    "tomli-w~=1.2",
    "tqdm~=4.67",
    "transformers[kernels]~=5.6",
]
"""What the release 1.4.0 of heretic-llm requires."""

HERETIC_20 = [
    {
        "datasets~=4.7": "datasets~=5.0",
        "optuna~=4.7": "optuna~=5.0",
        "rich~=14.3": "rich~=15.0",
    }.get(text, text)
    for text in HERETIC_14
]
"""What 2.0.0.dev0 requires."""


def own_requirements() -> dict[str, Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(text) for text in project["dependencies"]]
    return {requirement.name: requirement for requirement in requirements}


@pytest.mark.parametrize(
    ("version", "theirs"), [("1.4.0", HERETIC_14), ("2.0.0.dev0", HERETIC_20)], ids=["1.4", "2.0"]
)
def test_ranges_hold_beside_heretic(version: str, theirs: list[str]) -> None:
    """There are versions of each shared package that both take: the lowest one that either does, at least."""

    own = own_requirements()
    assert own["heretic-llm"].specifier.contains(version, prereleases=True)
    shared = [requirement for text in theirs if (requirement := Requirement(text)).name in own]
    assert {"datasets", "optuna", "rich", "transformers", "peft"} <= {r.name for r in shared}
    for requirement in shared:
        both = requirement.specifier & own[requirement.name].specifier
        lowest = max(Version(part.version) for part in both if part.operator in (">=", "~="))
        assert both.contains(lowest), f"{requirement} against {own[requirement.name]}"


@pytest.mark.slow
def test_installs_beside_a_checkout_of_heretic_2(tmp_path: Path) -> None:
    """pip finds versions for `pip install . HERETIC_SOURCE`, with a package of 2.0's name and requirements as the checkout."""

    (tmp_path / "heretic").mkdir()
    (tmp_path / "heretic" / "__init__.py").write_text("")
    (tmp_path / "pyproject.toml").write_text(
        f"""
        [build-system]
        requires = ["hatchling"]
        build-backend = "hatchling.build"
        [project]
        name = "heretic-llm"
        version = "2.0.0.dev0"
        dependencies = {HERETIC_20}
        [tool.hatch.build.targets.wheel]
        packages = ["heretic"]
        """
    )
    finished = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", ".", tmp_path],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if "No matching distribution found for hatchling" in finished.stderr:
        pytest.skip("needs PyPI")
    assert finished.returncode == 0, finished.stderr[-2000:]
    chosen = finished.stdout.rpartition("Would install ")[2]
    assert "heretic-llm-2.0.0.dev0" in chosen and "optuna-5." in chosen and "rich-15." in chosen
