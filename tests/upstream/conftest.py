# SPDX-License-Identifier: AGPL-3.0-or-later

"""What the checks of a Heretic checkout share, and the table that they end with."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import small_pool
from tests.upstream.checkout import Checkout

FOLDER = "tests/upstream/"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks all checks as slow, and gives each the time of several runs."""

    for item in items:
        if FOLDER in item.nodeid:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(1800))
            # They share whole runs.
            item.add_marker(pytest.mark.xdist_group("upstream"))


@pytest.fixture(scope="session")
def checkout() -> Checkout:
    """The checkout named by HERETIC_SOURCE."""

    source = os.environ.get("HERETIC_SOURCE")
    if not source:
        pytest.skip("needs a checkout of Heretic named by HERETIC_SOURCE")
    found = Checkout(Path(source).expanduser().resolve())
    if not (found.package / "main.py").is_file():
        pytest.fail(
            f"HERETIC_SOURCE is {source}, but there is no src/heretic/main.py in it: name the root of a checkout of Heretic."
        )
    if found.surface == "older":
        pytest.skip(
            f"this is Heretic {found.version}, which has no plugins and is older than 1.4, which the plugin can be hosted in"
        )
    return found


@pytest.fixture(scope="session")
def pools(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small pools of the built-in refuser: JSON Lines for our plugins, plain text for Heretic's."""

    directory = tmp_path_factory.mktemp("pools")
    found = {}
    for pool, split, per_category in (
        ("harmful", "train", 6),
        ("harmless", "train", 54),
        ("harmful", "test", 2),
        ("harmless", "test", 24),
    ):
        name = f"{pool}-{split}"
        found[name] = small_pool(directory, pool, split, per_category)
        lines = Path(found[name]).read_text(encoding="utf-8").splitlines()
        text = directory / f"{name}.txt"
        text.write_text("\n".join(json.loads(line)["text"] for line in lines) + "\n", "utf-8")
        found[f"{name}.txt"] = str(text)
    return found


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints a table that can be pasted into a review."""

    rows = list(table_rows(terminalreporter))
    checkout = Checkout(Path(os.environ.get("HERETIC_SOURCE", "")).expanduser().resolve())
    if not rows or not (checkout.package / "main.py").is_file():
        return
    write = terminalreporter.write_line
    terminalreporter.section("Heretic checkout")
    write(f"Heretic `{checkout.revision}` (surface {checkout.surface}), heretic-contrast checks:")
    write("")
    write("| Check | Result | Detail |")
    write("| :---- | :----: | :----- |")
    for row in rows:
        write("| " + " | ".join(row) + " |")
    write("")


def table_rows(terminalreporter: Any) -> Iterator[tuple[str, str, str]]:
    """Yields name, result and detail of each check."""

    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            if FOLDER not in report.nodeid:
                continue
            name = report.nodeid.partition("::test_")[2].removesuffix("@upstream").replace("_", " ")
            detail = "; ".join(f"{key}: {value}" for key, value in report.user_properties)
            if outcome == "skipped":
                detail = str(report.longrepr[2]).removeprefix("Skipped: ")
            elif outcome != "passed":
                lines = str(report.longrepr).splitlines()
                errors = [line[1:].strip() for line in lines if line.startswith("E ")]
                detail = (errors or lines or [""])[0]
            yield name, outcome, detail.replace("|", "\\|")
