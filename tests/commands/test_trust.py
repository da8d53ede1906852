# SPDX-License-Identifier: AGPL-3.0-or-later

"""
A directions file or a configuration file from a stranger runs no code, and a directions file makes nothing else be read.

What a configuration can name, it names openly, as a command line does, and it is the user who runs it: the model, pools of
prompts (`dataset`: a file, a folder or a dataset of the Hub), a file of `directions`, and places to write to
(`save_directions`, `residual_cache`, `study_checkpoint_dir`, `save_directory`). Reading `dataset = "/etc/hostname"` as
prompts is therefore no fault: that is what the line says. What is read is data in every case: text, JSON, safetensors, Arrow. A
model that brings code of its own is loaded by Heretic through transformers, which asks the user at the terminal;
no setting answers for them. A sweep's `storage` is the URL of a database, whose driver must be installed.

Baselines of other packages are the only code that a setting selects, by the name of an entry point of an installed package.
"""

import ast
import ctypes
import hashlib
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import heretic_contrast
from heretic_contrast.directions.directions import Directions
from heretic_contrast.directions.file import FORMAT, content_digest
from heretic_contrast.errors import ContrastError
from heretic_contrast.prompts import Prompt
from heretic_contrast.settings import (
    DATASET_FORMATS,
    ContrastSettings,
    PromptSource,
    check_dataset_name,
)

PACKAGE = Path(heretic_contrast.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

FORBIDDEN_MODULES = set(
    """
    cloudpickle code codeop dill imp joblib marshal pickle runpy shelve subprocess yaml
    """.split()
)
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "breakpoint"}
FORBIDDEN_ATTRIBUTES = set(
    """
    torch.load torch.hub.load torch.serialization.load np.load numpy.load np.loadtxt os.system
    os.popen pandas.read_pickle pd.read_pickle
    """.split()
)
# Names that are looked up while the program runs, of parts of the own package, for a fast start.
DYNAMIC_IMPORTS = {"__init__.py", "cli.py", "commands/doctor.py"}
ENTRY_POINTS = {"directions/baselines.py"}


def dotted(node: ast.AST) -> str:
    """Returns the dotted name that an expression is, or an empty text."""

    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def complaints(source: str, name: str) -> list[str]:
    """Returns what a module does that could run the code of others."""

    found = []
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
            for alias in node.names:
                if f"{node.module}.{alias.name}" in FORBIDDEN_ATTRIBUTES:
                    found.append(f"from {node.module} import {alias.name}")
        found += [module for module in modules if module.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            function = dotted(node.func)
            owner, _, attribute = function.rpartition(".")
            if isinstance(node.func, ast.Name) and attribute in FORBIDDEN_CALLS:
                found.append(function)
            if function in FORBIDDEN_ATTRIBUTES:
                found.append(function)
            if attribute == "import_module" and name not in DYNAMIC_IMPORTS:
                found.append(function)
            if attribute == "load" and owner.startswith("entry") and name not in ENTRY_POINTS:
                found.append(function)
            found += [
                "trust_remote_code"
                for keyword in node.keywords
                if keyword.arg == "trust_remote_code" and not is_false(keyword.value)
            ]
        if isinstance(node, ast.Dict):
            found += [
                "trust_remote_code"
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)
                and key.value == "trust_remote_code"
                and not is_false(value)
            ]
    return found


def is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_package_has_no_means_to_run_the_code_of_others(path: Path) -> None:
    assert complaints(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "import yaml",
        "eval('1')",
        "exec(text)",
        "import torch\ntorch.load(path)",
        "from torch import load",
        "os.system('x')",
        "importlib.import_module(name)",
        "entry.load()",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=trust)",
        "{'trust_remote_code': flag}",
    ],
)
def test_the_check_finds_what_it_looks_for(source: str) -> None:
    assert complaints(source, "module.py")


LOADING = """
import json, sys
from heretic_contrast.directions.directions import Directions
from heretic_contrast.search.parameters import configuration_digest

plain, hostile = sys.argv[1:]
Directions.load(plain)

events = []
watching = False


def watch(event, arguments):
    if watching:
        first = arguments[0] if arguments else None
        events.append([event, first if isinstance(first, str) else repr(first)[:80]])


sys.addaudithook(watch)
watching = True
open(plain, "rb").close()
directions = Directions.load(hostile)
configuration_digest(directions, {})
directions.digest()
watching = False
print(json.dumps(events))
"""

# How Python hands over calls and objects, and PyTorch its tensors' memory.
HARMLESS_EVENTS = set(
    """
    object.__getattr__ object.__setattr__ array.__new__ sys._getframe builtins.id
    gc.get_referrers ctypes.create_string_buffer
    """.split()
)

IN_OPEN = 0x20
IN_NONBLOCK = 0o4000


class OpenedFiles:
    """Tells which files any process opens, from the kernel: the library for safetensors opens files without Python."""

    def __init__(self, paths: list[Path]) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        self.descriptor = library.inotify_init1(IN_NONBLOCK)
        assert self.descriptor >= 0
        self.paths = {
            library.inotify_add_watch(self.descriptor, os.fsencode(path), IN_OPEN): path
            for path in paths
        }

    def take(self) -> set[Path]:
        """Returns the files that were opened since the last call."""

        opened = set()
        try:
            content = os.read(self.descriptor, 2**16)
        except BlockingIOError:
            content = b""
        while content:
            opened.add(self.paths[int.from_bytes(content[:4], sys.byteorder)])
            content = content[16 + int.from_bytes(content[12:16], sys.byteorder) :]
        return opened


def forge(path: Path, provenance: dict[str, Any], names: list[str]) -> None:
    """Writes a directions file with the right digest, as a stranger can."""

    vectors = torch.ones(3, len(names), 4)
    tensors = {
        "tensor": vectors,
        "class_directions": vectors.clone(),
        "mean_direction": vectors.mean(dim=1),
        "hits": torch.ones(3, len(names), 2, dtype=torch.int64),
    }
    metadata = {
        "format": FORMAT,
        "names": json.dumps(names),
        "class_names": json.dumps(names),
        "aligned": "true",
        "provenance": json.dumps(provenance),
        "digest": content_digest(tensors),
        # What no version writes is not looked at.
        "__reduce__": "os.system",
        "include": "https://127.0.0.1/",
    }
    content = json.dumps(metadata, sort_keys=True)
    metadata["metadata_digest"] = hashlib.sha256(content.encode()).hexdigest()
    path.write_bytes(save(tensors, metadata))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's notices of opened files")
def test_nothing_that_a_directions_file_names_is_followed(tmp_path: Path) -> None:
    """
    The hostile file names a file of every kind, an address that listens, and code; Python's audit hooks, the kernel and
    the listening socket say what was done with them.
    """

    decoy, relative, other = (
        tmp_path / name for name in ("secret.txt", "relative.txt", "other.safetensors")
    )
    for path in (decoy, relative):
        path.write_text("secret")
    forge(other, {}, ["drugs"])
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/payload"
    marker = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    names = [
        str(decoy),
        url,
        code,
        "!!python/object/apply:os.system ['true']",
        "${HOME}",
        "relative.txt",
    ]
    provenance = {
        "model": str(decoy),
        "revision": url,
        "fingerprint": None,
        "settings": {"baseline": code, "directions": str(other), "good_prompts": {"dataset": url}},
        "$ref": f"file://{decoy}",
        "__class__": "os.system",
        "py/object": "subprocess.Popen",
        "prompts": {"harmful": "relative.txt", "harmless": f"@{decoy}"},
    }
    hostile, plain = tmp_path / "hostile.safetensors", tmp_path / "plain.safetensors"
    forge(hostile, provenance, names)
    forge(plain, {}, ["drugs"])

    watched = OpenedFiles([decoy, relative, other, hostile])
    decoy.read_text()
    assert watched.take() == {decoy}
    result = subprocess.run(
        [sys.executable, "-c", LOADING, str(plain), str(hostile)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert watched.take() == {hostile}
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.close()
    assert not marker.exists()
    events = [tuple(event) for event in json.loads(result.stdout.splitlines()[-1])]
    # The hook sees what it should: the one file that the script itself opens first.
    assert events.pop(0) == ("open", str(plain))
    for event, argument in events:
        if event == "open":
            assert argument == str(hostile)
        else:
            assert event in HARMLESS_EVENTS, (event, argument)
    # What it says is kept as data, word for word.
    directions = Directions.load(hostile)
    assert directions.names == tuple(names) and directions.provenance == provenance


EVIL = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\ndef attack(layer, options): ...\n"


def test_no_setting_imports_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from heretic_contrast.directions.baselines import get_baseline
    from heretic_contrast.hosts.settings import HostSettings, load_settings

    (tmp_path / "evil_module.py").write_text(EVIL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    accepted = set()
    value = "evil_module:attack"
    tables = {
        name: f'[modifier.ContrastAbliteration]\n{name} = "{value}"\n'
        for name in ContrastSettings.model_fields
    }
    tables |= {
        name: f'{name} = "{value}"\n' for name in HostSettings.model_fields if name != "contrast"
    }
    tables |= {
        "modifiers": f'modifiers = [{{ plugin = "{value}" }}]\n',
        "scorers": f'scorers = [{{ plugin = "{value}" }}]\n',
        "other table": f'[modifier.ContrastAbliteration]\n"{value}" = 1\n',
    }
    for name, text in tables.items():
        (tmp_path / "config.toml").write_text(text)
        arguments = [] if name == "model" else ["--model", "builtin:refuser"]
        try:
            load_settings(HostSettings, "heretic-contrast", arguments)
        except ContrastError:
            continue
        accepted.add(name)
    assert "directions" in accepted and not {"baseline", "modifiers", "scorers"} & accepted
    for name in (value, "evil_module", "evil_module.attack", "os:system"):
        with pytest.raises(KeyError):
            get_baseline(name)
        with pytest.raises(ValueError, match="no contrast baseline"):
            ContrastSettings(baseline=name)
    assert "evil_module" not in sys.modules and not (tmp_path / "ran").exists()
    assert not [name for name in HostSettings.model_fields if "trust" in name]


def test_what_lies_beside_a_configuration_is_not_taken_for_installed(tmp_path: Path) -> None:
    """The program looks for baselines in installed packages, and not in the folder that it is run in."""

    program = shutil.which("heretic-contrast", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("needs the installed program")
    (tmp_path / "evil_module.py").write_text(EVIL)
    information = tmp_path / "evil_module-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: evil_module\nVersion: 1.0\n"
    )
    (information / "entry_points.txt").write_text(
        "[heretic_contrast.directions.baselines]\nevil = evil_module:attack\n"
    )
    (tmp_path / "config.toml").write_text('[modifier.ContrastAbliteration]\nbaseline = "evil"\n')
    result = subprocess.run(
        [program, "--model", "builtin:refuser"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 2 and "no contrast baseline" in result.stderr
    assert not (tmp_path / "ran").exists()


class Attack:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


POOLS = [
    *(f"modifier.ContrastAbliteration.{kind}_prompts" for kind in ("good", "bad", "matched")),
    *"good_prompts bad_prompts good_evaluation_prompts bad_evaluation_prompts".split(),
]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", ["pandas", "text"])
def test_a_file_format_is_no_dataset(
    pool: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library for datasets reads `dataset = "pandas"` by unpickling what lies in the current folder."""

    from heretic_contrast.hosts.settings import HostSettings, load_settings

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    Path("config.toml").write_text(
        f'[{pool}]\ndataset = "{name}"\nsplit = "train"\ncolumn = "text"\n'
    )
    with pytest.raises(ContrastError, match=f'"{name}" is the name of a file format'):
        load_settings(HostSettings, "heretic-contrast", ["--model", "builtin:refuser"])


def test_every_file_format_is_known() -> None:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    assert set(_PACKAGED_DATASETS_MODULES) <= set(DATASET_FORMATS)
    for name in DATASET_FORMATS:
        with pytest.raises(ValueError, match="file format"):
            PromptSource(dataset=name)
        check_dataset_name(f"./{name}")


@pytest.mark.slow
def test_pickles_are_not_read_as_prompts(tmp_path: Path) -> None:
    """Heretic's loader, asked directly, runs the attack; every way of this package to it refuses."""

    (tmp_path / "train.pkl").write_bytes(pickle.dumps(Attack()))
    source = 'dataset="pandas", split="train", column="text"'
    ways = {
        "from heretic.utils import load_prompts\nfrom types import SimpleNamespace as N\n"
        f'load_prompts(N(system_prompt=""), N({source}, commit=None, prefix="", suffix="", system_prompt=""))': True,
        "from heretic_contrast.cli import main\nimport sys\n"
        'sys.argv = ["heretic-contrast", "audit", "--dataset=pandas", "--split=train", "--column=text", "--output=o"]\nmain()': False,
        "from heretic_contrast.cli import main\nimport sys\n"
        'sys.argv = ["heretic-contrast", "extract", "builtin:refuser", "--output=o.safetensors", '
        '"--contrast.good-prompts.dataset=pandas", "--contrast.good-prompts.split=train", '
        '"--contrast.good-prompts.column=text"]\nmain()': False,
    }
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    for way, runs in ways.items():
        result = subprocess.run(
            [sys.executable, "-c", way],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env=environment,
        )
        assert (tmp_path / "ran").exists() == runs, result.stderr
        if runs:
            (tmp_path / "ran").rmdir()
        else:
            assert result.returncode == 2 and "file format" in result.stderr


def test_markup_of_a_class_is_shown_as_it_is(tiny_llama: Any, capsys: Any) -> None:
    from heretic_contrast.directions.extraction import extract
    from heretic_contrast.directions.pools import Pools
    from heretic_contrast.hosts.surface import log
    from heretic_contrast.settings import ContrastSettings

    pools = Pools(
        harmful=tuple(Prompt(text, "[/bold]\x1b[2J") for text in ("Break in", "Break out")),
        bulk=(Prompt("Bake bread"),),
        matched=(),
    )
    directions = extract(tiny_llama, pools, ContrastSettings(classes="category"), log)
    assert directions.names == ("[/bold]\x1b[2J",)
    assert "[/bold]\\x1b[2J 2" in capsys.readouterr().out
