# SPDX-License-Identifier: AGPL-3.0-or-later

"""What a default plugin of Heretic would consist of: the files that docs/upstream.md lists, and nothing else."""

import ast
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "heretic_contrast"
LIST = runpy.run_path(str(ROOT / "examples" / "upstream_files.py"))
TABLES: list[dict[str, str]] = [
    LIST[name] for name in ("MATHEMATICS", "SUPPORT", "OPTIONAL", "SCORERS")
]
OPTIONAL, SCORERS = TABLES[2:]
FILES = {**TABLES[0], **TABLES[1]}

ENGINE = {"compat", "plain", "decoder", "drafts", "teacher_forcing", "layers", "sweep"}
HEAVY = {"numba", "matplotlib", "minisom"}
FOLDERS = {"/__init__.py"} | {
    path.relative_to(PACKAGE).as_posix()
    for path in PACKAGE.rglob("__init__.py")
    if len(ast.parse(path.read_text(encoding="utf-8")).body) < 2
}
"""What has no code of its own."""


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def module_file(parts: tuple[str, ...]) -> str | None:
    """Returns the file of a module of this package; None where the parts name no module, or a folder that only holds others."""

    name = "/".join(parts)
    for file in (f"{name}.py", f"{name}/__init__.py"):
        if (PACKAGE / file).is_file() and file not in FOLDERS:
            return file
    return None


def imported(node: ast.AST, folder: tuple[str, ...]) -> set[str]:
    """Returns what one import statement loads: files of this package, and the names of other packages."""

    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    assert isinstance(node, ast.ImportFrom)
    module = tuple((node.module or "").split(".")) if node.module else ()
    if node.level:
        base = (*folder[: len(folder) - node.level + 1], *module)
    elif module[0] == PACKAGE.name:
        base = module[1:]
    else:
        return {module[0]}
    # Names of the package itself, such as its version, are no module.
    found = [module_file((*base, alias.name)) for alias in node.names] + [module_file(base)]
    return {file for file in found if file is not None}


@cache
def imports(file: str) -> tuple[frozenset[str], frozenset[str]]:
    """Returns what a file of the package imports when it is loaded, and what it imports later."""

    at_once: set[str] = set()
    later: set[str] = set()

    def visit(node: ast.AST, inside_function: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                (later if inside_function else at_once).update(
                    imported(child, tuple(file.split("/")[:-1]))
                )
            elif not is_for_types(child):
                visit(child, inside_function or isinstance(child, ast.FunctionDef))

    visit(ast.parse((PACKAGE / file).read_text(encoding="utf-8")), False)
    return frozenset(at_once), frozenset(later)


def loaded(file: str) -> set[str]:
    """Returns everything that is loaded with a file."""

    found: set[str] = set()
    waiting = [file]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        if name.endswith(".py"):
            waiting.extend(imports(name)[0])
    return found


@pytest.mark.parametrize("file", ["modifier.py", "response_scorers.py"])
def test_no_engine_is_loaded(file: str) -> None:
    found = loaded(file)
    assert len(found) > 10
    assert not found & HEAVY
    assert not [name for name in found if name.startswith("report/")]
    assert not [name for name in found if Path(name).stem in ENGINE]


def test_list_is_closed_under_imports() -> None:
    own = {name for name in loaded("modifier.py") if name.endswith(".py")}
    # The bases are only loaded where Heretic has none.
    assert own - {"hosts/base.py"} == set(FILES) - {"directions/som_kernel.py"}
    responses = {name for name in loaded("response_scorers.py") if name.endswith(".py")}
    assert responses - set(FILES) - set(OPTIONAL) == set(SCORERS)
    listed = {*FILES, *OPTIONAL}
    for file in listed:
        at_once, later = imports(file)
        files = {name for name in at_once | later if name.endswith(".py")}
        assert files <= listed, f"{file} imports {files - listed}"


def test_lines_are_those_of_the_files() -> None:
    document = (ROOT / "docs" / "upstream.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \| (.*) \|$", document, re.MULTILINE)
    assert {name: what for name, _, what in listed} == {**FILES, **OPTIONAL, **SCORERS}
    for name, shown, _ in listed:
        n_lines = len((PACKAGE / name).read_text(encoding="utf-8").splitlines())
        assert abs(int(shown) - n_lines) <= max(20, n_lines / 10), (
            f"{name} has {n_lines} lines: run python examples/upstream_files.py, and copy its tables to docs/upstream.md."
        )
    totals = [
        int(total) for total in re.findall(r"^\| together \| (\d+) \|", document, re.MULTILINE)
    ]
    shown = {name: int(lines) for name, lines, _ in listed}
    assert totals == [sum(shown[name] for name in files) for files in TABLES]


def test_data_is_that_of_the_files() -> None:
    document = (ROOT / "docs" / "upstream.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(data/[\w./]+)` \| (\d+) \| (.*) \|$", document, re.MULTILINE)
    assert {name: what for name, _, what in listed} == LIST["DATA"]
    for name, shown, _ in listed:
        assert abs(int(shown) - (PACKAGE / name).stat().st_size / 1024) <= max(2, int(shown) / 10)
    # All but the built-in refuser and the sweep's pairs.
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in (PACKAGE / "data").rglob("*")
        if path.is_file() and not {"refuser", "refuser_prompts", "pairs.jsonl"} & set(path.parts)
    }
    assert set(LIST["DATA"]) == found
    needed, everything = map(int, re.findall(r"has (\d+) lines, and (\d+) with", document)[0])
    lines = [
        int(total) for total in re.findall(r"^\| together \| (\d+) \|", document, re.MULTILINE)
    ]
    assert (needed, everything) == (sum(lines[:2]), sum(lines))


@pytest.mark.slow
@pytest.mark.parametrize("plugin", ["ContrastAbliteration", "RefusalTiers"])
def test_python_loads_what_the_files_say(plugin: str) -> None:
    code = (
        f"import sys, heretic_contrast; heretic_contrast.{plugin}\n"
        "print([name for name in sys.modules if name.startswith('heretic_contrast.')])\n"
        f"print([name for name in {sorted(HEAVY)} if name in sys.modules])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    own, heavy = map(ast.literal_eval, finished.stdout.splitlines()[-2:])
    file = "modifier.py" if plugin == "ContrastAbliteration" else "response_scorers.py"
    packages = {path.parent.name for path in PACKAGE.rglob("__init__.py")}
    expected = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in loaded(file)
        if name.endswith(".py")
    }
    assert {name.partition(".")[2] for name in own} - packages == expected - packages
    assert heavy == []
