# SPDX-License-Identifier: AGPL-3.0-or-later

"""The table from the paper to the code: every name exists, and its documentation says the section."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

ROWS = re.findall(
    r"^\| ([^|]+) \| .* \| `([\w/.]+):([\w.]+)` \|$",
    (ROOT / "docs" / "paper.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)

SECTIONS = {"2.1", "2.2", "3.1", "3.2", "3.3", "4.1", "4.4", "5.1", "5.2", "6"}
TABLES = {"Table 1", "Tables 2 and 3", "Table 4"}


def documentation(body: list[ast.stmt], name: str) -> str:
    """Returns the docstring of a class, a function, or of the text that follows a constant."""

    first, _, rest = name.partition(".")
    for node, following in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == first:
            return documentation(node.body, rest) if rest else ast.get_docstring(node) or ""
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if any(isinstance(target, ast.Name) and target.id == first for target in targets):
            assert isinstance(following, ast.Expr), f"{name} is not documented"
            return str(ast.literal_eval(following.value))
    raise AssertionError(f"there is no {name}")


@pytest.mark.parametrize(("section", "file", "name"), ROWS)
def test_names_say_their_section(section: str, file: str, name: str) -> None:
    source = (ROOT / "heretic_contrast" / file).read_text(encoding="utf-8")
    said = section if section.startswith("Table") else f"section {section}"
    assert re.search(rf"{said}(?!\.?\d)", documentation(ast.parse(source).body, name))


def test_every_section_is_there() -> None:
    sections = {section.rstrip(" abc") for section, _, _ in ROWS if section not in TABLES}
    assert sections == SECTIONS
    assert {section for section, _, _ in ROWS if section in TABLES} == TABLES
