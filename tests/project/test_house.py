# SPDX-License-Identifier: AGPL-3.0-or-later

"""The rooms of the package: arrows between them point down, there are no circles, and libraries stay in their rooms."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "heretic_contrast"

ROOMS = [
    "__main__ cli commands",
    "scorers response_scorers modifier",
    "hosts",
    "report",
    "evaluation",
    "engine",
    "search",
    "ablation",
    "directions",
    "language_model identity greedy chat",
    "tiers",
    "prompts",
    "builtin settings",
    "journal leases weights offloading vectors files outputs processes errors",
]
"""From top to bottom. Modules of one line may import each other, but not in circles."""

LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms.split()}

KEPT_OUT = {
    "heretic": {room for room in LEVELS if room != "hosts"},
    "torch": {"tiers", "prompts", "settings", "report"},
    "transformers": {"tiers", "prompts", "settings", "report", "evaluation"},
    "numba": {"tiers", "prompts", "settings", "report", "evaluation", "ablation", "search"},
}
"""The rooms that a library is not imported in."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imports(module: str) -> Iterator[str]:
    """Yields what a module imports, anywhere in it, but for the sake of types alone."""

    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            if isinstance(child, ast.ImportFrom):
                parts = package[: len(package) + 1 - child.level] if child.level else []
                origin = ".".join([*parts, *filter(None, [child.module])])
                for alias in child.names:
                    name = f"{origin}.{alias.name}"
                    yield name if name in MODULES else origin
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


IMPORTS = {module: set(imports(module)) for module in MODULES}


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", sorted(set(MODULES) - {PACKAGE}))
def test_arrows_point_down(module: str) -> None:
    assert room(module) in LEVELS, "has no place in ROOMS"
    own = {name for name in IMPORTS[module] if name in MODULES and name != PACKAGE}
    assert not [name for name in own if LEVELS[room(name)] < LEVELS[room(module)]]
    libraries = {name.split(".")[0] for name in IMPORTS[module]} - {PACKAGE}
    assert not [name for name in libraries if room(module) in KEPT_OUT.get(name, ())]


INSIDES = [
    "past_key_values",
    "rope_deltas",
    "store_full_length_kv",
    "conv_states",
    "recurrent_states",
    "is_initialized",
]
"""Names of what a release of transformers may change."""


@pytest.mark.parametrize("module", sorted(MODULES))
def test_one_file_knows_the_insides_of_transformers(module: str) -> None:
    if module == f"{PACKAGE}.engine.compat" or room(f"{module}.") == "hosts":
        return
    # The kind of layer whose weight is transposed, for which PEFT asks in the same way.
    allowed = {"transformers.pytorch_utils"} if module == f"{PACKAGE}.weights" else set()
    inside = {name for name in IMPORTS[module] if name.startswith("transformers.")}
    assert inside <= allowed
    program = MODULES[module].read_text(encoding="utf-8")
    assert not [name for name in INSIDES if name in program]


def test_there_are_no_circles() -> None:
    order = TopologicalSorter(
        {
            module: {name for name in found if name in MODULES} - {module}
            for module, found in IMPORTS.items()
        }
    )
    order.prepare()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("cli", "torch heretic numba matplotlib"),
        ("settings", "torch heretic numba matplotlib"),
        ("tiers", "torch heretic numba matplotlib"),
        ("report", "torch heretic numba matplotlib"),
        pytest.param("evaluation.sweep", "heretic numba matplotlib", marks=pytest.mark.slow),
    ],
)
def test_what_an_import_loads(module: str, absent: str) -> None:
    code = f"import sys, {PACKAGE}.{module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert not set(absent.split()) & set(loaded.stdout.split())


@pytest.mark.parametrize(
    "script",
    sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").rglob("*.py")]),
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_what_scripts_import_exists(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            module = import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name) or import_module(f"{node.module}.{name.name}")
