# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Random and mutated configurations and directions files: success, or one sentence with exit code 2.

Never a traceback, and never a wait without end: pytest's timeout and the limits of each case see to that.
"""

import hashlib
import json
import math
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from heretic_contrast import cli
from heretic_contrast.directions.directions import Directions
from heretic_contrast.directions.file import FORMAT, content_digest
from heretic_contrast.errors import ContrastError, one_line
from heretic_contrast.search.parameters import configuration_digest
from heretic_contrast.settings import PRESETS, ContrastSettings
from tests.strategies import fewer, json_values

SECONDS = 20
"""No case takes a hundredth of this on an idle machine."""

Run = Callable[[list[str]], int]


@pytest.fixture
def command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """
    Runs the command line in a directory of its own, and returns the exit code.

    Where the settings are accepted, Heretic would load a model next: that is where it ends, with 0.
    """

    from heretic_contrast.hosts import heretic14

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(heretic14, "run", lambda settings, modifier_class: None)

    def run(arguments: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["heretic-contrast", *arguments])
        capsys.readouterr()
        started = time.monotonic()
        try:
            cli.main()
        except SystemExit as error:
            code = error.code
        else:
            code = 0
        assert time.monotonic() - started < SECONDS
        written = capsys.readouterr()
        assert "Traceback" not in written.out + written.err
        if code != 0:
            assert code == 2
            require_sentence(written.err)
        return int(code)

    return run


def require_sentence(error: str) -> None:
    """Checks that the standard error holds one sentence, on one line, without anything that steers a terminal."""

    assert error.startswith("Error: ") and error.endswith((".\n", "?\n"))
    assert error.count("\n") == 1
    assert not {"Cc", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, error[:-1]))


def toml(value: Any) -> str:
    """Returns a value as TOML."""

    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = "".join(
            f"\\U{ord(character):08X}" if character in '"\\' or ord(character) < 32 else character
            for character in value.encode("utf-8", "replace").decode().replace("\x7f", "?")
        )
        return f'"{escaped}"'
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return (
            f"{{{', '.join(f'{toml(str(key))} = {toml(inner)}' for key, inner in value.items())}}}"
        )
    return "1979-05-27T07:32:00Z" if value is None else str(value)


FIELDS = sorted(ContrastSettings.model_fields)
OTHERS = [
    "model",
    "contrast",
    "modifier",
    "modifiers",
    "scorers",
    "seed",
    "n_trials",
    "dtypes",
    "good_evaluation_prompts",
    "chain_of_thought_skips",
    "study_checkpoint_dir",
    "trial_index",
]
# Values that nearly fit, beside those that do not.
values = (
    json_values
    | st.sampled_from(
        [*PRESETS, "matched", "som", "unit", "sum", "none", "pandas", "a\0b", "\x1b[2J"]
    )
    | st.sampled_from([10**30, -1, 0, 1, math.inf, math.nan, 1e308, 5e-324, 2**63, 2**64])
    | st.sampled_from(
        [{"dataset": "x"}, {"dataset": "text", "split": 5}, ["REFUSE"], [["x"]], [{}]]
    )
    | st.integers(1, 1200).map(lambda depth: Literal("[" * depth + "]" * depth))
    | st.integers(1, 400).map(lambda depth: Literal("{a=" * depth + "1" + "}" * depth))
)


class Literal(str):
    """TOML as it is written."""


def entry(key: str, value: Any) -> str:
    written = str(value) if isinstance(value, Literal) else toml(value)
    return f"{key if key.isidentifier() and key.isascii() else toml(key)} = {written}\n"


keys = st.sampled_from(FIELDS) | st.text(max_size=10)
tables = st.dictionaries(keys, values, max_size=4).map(
    lambda table: "".join(entry(key, value) for key, value in table.items())
)
configurations = st.builds(
    lambda top, header, table: top + header + table,
    st.dictionaries(st.sampled_from(OTHERS) | st.text(max_size=10), values, max_size=2).map(
        lambda table: "".join(entry(key, value) for key, value in table.items())
    ),
    st.sampled_from(
        [
            "[modifier.ContrastAbliteration]\n",
            "[contrast]\n",
            "[[modifier.ContrastAbliteration]]\n",
            "[modifier.ContrastAbliteration.good_prompts]\n",
            "[" + ".".join(["modifier.ContrastAbliteration", *["seed"] * 2000]) + "]\n",
            "[modifier]\n",
            "",
        ]
    ),
    tables,
)

VALID = (
    b'modifiers = [{ plugin = "heretic_contrast.ContrastAbliteration" }]\nn_trials = 5\n'
    b'[modifier.ContrastAbliteration]\nbaseline = "mixed"\nmixing = 0.25\npreset = ["som-sequential"]\nsvd = true\n'
    b'exclude_categories = ["drugs", "fraud"]\n[modifier.ContrastAbliteration.bad_prompts]\ndataset = "bad.jsonl"\n'
)


@st.composite
def mutations(draw: st.DrawFn, content: bytes) -> bytes:
    """Draws a damaged copy: bits flipped, parts cut out, repeated or replaced."""

    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, max(0, len(changed) - 1)))
        length = draw(st.integers(0, 40))
        kind = draw(st.sampled_from(["flip", "cut", "drop", "repeat", "replace", "insert"]))
        if kind == "flip" and changed:
            changed[position] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[position:]
        elif kind == "drop":
            del changed[position : position + length]
        elif kind == "repeat":
            changed[position:position] = changed[position : position + length]
        elif kind == "replace":
            changed[position : position + length] = draw(st.binary(max_size=8))
        else:
            changed[position:position] = draw(st.binary(max_size=8))
    return bytes(changed)


@pytest.mark.slow
@given(configurations)
def test_random_configurations(command_line: Run, text: str) -> None:
    Path("config.toml").write_text(text, encoding="utf-8")
    command_line(["--model", "builtin:refuser"])


@given(mutations(VALID) | st.binary(max_size=200))
def test_mutated_configurations(command_line: Run, content: bytes) -> None:
    Path("config.toml").write_bytes(content)
    command_line(["--model", "builtin:refuser"])


def test_the_configuration_that_is_mutated_works(command_line: Run) -> None:
    Path("config.toml").write_bytes(VALID)
    assert command_line(["--model", "builtin:refuser"]) == 0


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b"\x00" * 64,
        b"a = 1\rb = 2\n",
        b"\xef\xbb\xbf[modifier.ContrastAbliteration]\n",
        b"seed = " + b"9" * 10_000,
        b"seed = " + b"[" * 200_000,
        b"[" + b".".join([b"a"] * 5_000) + b"]\nb = 1\n",
        b'[modifier.ContrastAbliteration]\n"' + b"x" * 500_000 + b'" = 1\n',
        b'[modifier.ContrastAbliteration]\nbaseline = "' + b"x" * 500_000 + b'"\n',
        b'[modifier.ContrastAbliteration]\npreset = [["som-sequential"]]\n',
        b"[modifier.ContrastAbliteration]\npreset = [{ a = 1 }]\n",
        b"[modifier.ContrastAbliteration]\nsom_iterations = 1000000000000000\n",
        b"[modifier.ContrastAbliteration]\nsom_sigma = inf\n",
        b"modifiers = 5\n",
        b"modifier = 5\n",
        b"contrast = 5\n[modifier.ContrastAbliteration]\nseed = 1\n",
        b'model = "a\\u0000b"\n',
        b'[modifier.ContrastAbliteration]\nsave_directions = "a\\u0000b"\n',
    ],
    ids=lambda content: repr(content[:40]),
)
def test_configurations_that_cannot_work(command_line: Run, content: bytes) -> None:
    Path("config.toml").write_bytes(content)
    assert command_line(["run"] if b"model =" in content else ["--model", "builtin:refuser"]) == 2


# The command line hands over no null characters, and what is no UTF-8 as lone surrogates.
texts = st.text(st.characters(exclude_characters="\0"), max_size=12)
flag_values = (
    texts
    | json_values.map(json.dumps)
    | st.sampled_from(
        [
            *PRESETS,
            "[[1]]",
            '["som-sequential"]',
            '{"dataset": "x"}',
            "{",
            '"',
            "-1",
            "nan",
            "\udcff",
        ]
    )
    | st.integers(1, 5_000).map(lambda depth: "[" * depth + "]" * depth)
)


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(
            st.sampled_from(FIELDS)
            | st.sampled_from(["good-prompts.dataset", "bad-prompts.split", "preset", "baselin"]),
            flag_values,
            st.booleans(),
        ),
        max_size=3,
    )
)
def test_random_flags(command_line: Run, flags: list[tuple[str, str, bool]]) -> None:
    arguments = []
    for name, value, joined in flags:
        flag = f"--contrast.{name.replace('_', '-')}"
        arguments += [f"{flag}={value}"] if joined else [flag, value]
    command_line([*arguments, "--model", "builtin:refuser"])


@pytest.mark.parametrize("name", ["exclude-categories", "bad-prompts", "preset", "seed"])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_deeply_nested_flags(command_line: Run, name: str, brackets: str) -> None:
    first, last = brackets
    value = (first + '"a":') * 5_000 if first == "{" else first * 5_000
    arguments = [f"--contrast.{name}={value}1{last * 5_000}", "--model", "builtin:refuser"]
    assert command_line(arguments) == 2


@pytest.mark.parametrize("name", ["baseline", "preset", "scale", "mixing", "bad-prompts"])
def test_flags_that_are_not_utf8(command_line: Run, name: str) -> None:
    arguments = [f"--contrast.{name}=\udcff", "--model", "builtin:refuser"]
    assert command_line(arguments) == 2


@fewer(2)
@given(
    st.dictionaries(
        st.sampled_from(["layers", "weights", "strength", "n-harmful", "storage", "synergy-size"]),
        flag_values,
        min_size=1,
        max_size=2,
    )
)
def test_random_flags_of_the_sweep(command_line: Run, flags: dict[str, str]) -> None:
    # Without an output, nothing is loaded whatever the flags say.
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    assert command_line(["sweep", "builtin:refuser", *arguments]) == 2


@given(st.data())
def test_random_tables_under_heretic_2(data: st.DataObject) -> None:
    """Heretic 2.0 hands over its raw tables, and a plugin's own table without a check."""

    import heretic_contrast
    from heretic_contrast.hosts.unused import PLUGINS

    plugin, namespace = data.draw(st.sampled_from(sorted(PLUGINS.items())))
    plugin_class = getattr(heretic_contrast, plugin)
    fields = sorted(plugin_class.settings_class.model_fields)
    table = st.dictionaries(st.sampled_from(fields), json_values)
    names = st.sampled_from([plugin, f"{plugin}_2", plugin.lower(), "Other"])
    tables = data.draw(json_values | st.dictionaries(names, json_values | table, max_size=2))
    raw = data.draw(json_values | table)
    given = SimpleNamespace(model_extra={namespace: tables})
    for check in (
        plugin_class(heretic_settings=given, settings=None).check_tables,
        lambda: plugin_class.validate_settings(raw),
    ):
        try:
            check()
        except ContrastError as error:
            require_sentence(f"Error: {one_line(str(error))}\n")


def make_tensors(layers: int = 3, n: int = 2, hidden: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(layers + 1, n, hidden, generator=generator)
    return {
        "tensor": vectors,
        "class_directions": vectors,
        "mean_direction": vectors.mean(dim=1),
        "hits": torch.ones(layers + 1, n, 3, dtype=torch.int64),
    }


NAMES = ("drugs", "fraud")
PROVENANCE = {"model": "x", "fingerprint": "f", "settings": {"baseline": "matched"}}


def write_valid(path: Path) -> bytes:
    Directions(
        **make_tensors(), names=NAMES, aligned=True, class_names=NAMES, provenance=PROVENANCE
    ).save(path)
    return path.read_bytes()


def load(path: Path) -> Directions | None:
    """Loads directions, or returns None where they are refused in one sentence; what was loaded can be used."""

    started = time.monotonic()
    try:
        directions = Directions.load(path)
    except ContrastError as error:
        assert str(path) in str(error) and str(error).endswith(".")
        directions = None
    else:
        # Whatever comes later reads these.
        configuration_digest(directions, {})
        json.dumps(directions.provenance, ensure_ascii=False, allow_nan=False).encode()
        assert directions.n_directions == len(directions.names) > 0
        assert len(directions.tensor) > 1 and bool(directions.tensor.isfinite().all())
        assert directions.class_directions.shape[1] % len(directions.class_names) == 0
        again = path.with_suffix(".again")
        directions.save(again)
        assert Directions.load(again).provenance == directions.provenance
    assert time.monotonic() - started < SECONDS
    return directions


@given(st.data())
def test_mutated_directions_files(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "directions.safetensors"
    content = write_valid(path)
    expected = make_tensors()
    # Most of the file is the header.
    part = data.draw(st.sampled_from(["anywhere", "header", "length"]))
    length = int.from_bytes(content[:8], "little")
    ends = {"anywhere": (0, len(content)), "header": (8, 8 + length), "length": (0, 8)}
    start, end = ends[part]
    path.write_bytes(content[:start] + data.draw(mutations(content[start:end])) + content[end:])
    found = load(path)
    if found is not None:
        # What is damaged is either noticed, or makes no difference to the numbers.
        for name, tensor in expected.items():
            assert torch.equal(getattr(found, name), tensor)


dtypes = st.sampled_from(
    "float32 float64 float16 bfloat16 float8_e4m3fn int8 int64 uint16 bool complex64".split()
).map(lambda name: getattr(torch, name))
shapes = st.lists(st.integers(0, 5), max_size=4)
nested = st.integers(1, 3000).map(lambda depth: '{"a":' * depth + "1" + "}" * depth)
texts_of_metadata = (
    json_values.map(json.dumps)
    | nested
    | nested.map(lambda text: f'{{"settings": {text}}}')
    | st.sampled_from(
        [
            "",
            "{",
            "NaN",
            '{"settings": 5}',
            '{"settings": {"x": 1e999}}',
            '["\\ud800", "b"]',
            '["a", "a"]',
            '["a", "b"]',
            '"ab"',
            "[[], []]",
            "1" * 5000,
            '{"fingerprint": [1]}',
        ]
    )
)


def forge(path: Path, tensors: dict[str, torch.Tensor], metadata: Mapping[str, str | None]) -> None:
    """Writes a file whose digests are right, as whoever forges one can make it."""

    try:
        digest = content_digest(tensors)
    except TypeError:
        digest = ""
    texts = {
        "format": FORMAT,
        "names": json.dumps(NAMES),
        "class_names": json.dumps(NAMES),
        "aligned": "true",
        "provenance": json.dumps(PROVENANCE),
        "digest": digest,
        **metadata,
    }
    written = {name: text for name, text in texts.items() if text is not None}
    content = json.dumps(written, sort_keys=True).encode()
    written["metadata_digest"] = hashlib.sha256(content).hexdigest()
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    path.write_bytes(save(tensors, written))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names", '["a", "a"]'),
        ("names", '["a"]'),
        ("names", '"ab"'),
        ("names", '["\\ud800", "b"]'),
        ("names", "[1, 2]"),
        ("class_names", "[]"),
        ("class_names", '["a", "b", "c"]'),
        ("aligned", "1"),
        ("provenance", "[]"),
        ("provenance", '{"settings": 5}'),
        ("provenance", '{"ablation": 5}'),
        ("provenance", '{"x": NaN}'),
        ("provenance", '{"x": 1e999}'),
        ("provenance", '{"x": "\\udfff"}'),
        ("provenance", '{"a":' * 200 + "1" + "}" * 200),
        ("provenance", '{"a":' * 5_000 + "1" + "}" * 5_000),
        ("provenance", '{"a": ' + "[" * 100_000),
        ("provenance", None),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_forged_metadata_is_refused(tmp_path: Path, name: str, text: str | None) -> None:
    path = tmp_path / "directions.safetensors"
    forge(path, make_tensors(), {})
    assert load(path) is not None
    forge(path, make_tensors(), {name: text})
    assert load(path) is None


@given(
    st.dictionaries(st.sampled_from(list(make_tensors())), st.tuples(dtypes, shapes), max_size=2),
    st.dictionaries(
        st.sampled_from(["names", "class_names", "aligned", "provenance", "format", "digest"]),
        st.none() | texts_of_metadata,
        max_size=2,
    ),
    st.sampled_from([None, math.nan, math.inf, 3e38]),
)
def test_forged_directions_files(
    tmp_path: Path,
    replaced: dict[str, tuple[torch.dtype, list[int]]],
    metadata: dict[str, str | None],
    number: float | None,
) -> None:
    tensors = make_tensors()
    for name, (dtype, shape) in replaced.items():
        tensors[name] = torch.ones(shape).to(dtype)
    if number is not None and "tensor" not in replaced:
        tensors["tensor"] = tensors["tensor"].clone()
        tensors["tensor"].view(-1)[0] = number
    path = tmp_path / "directions.safetensors"
    forge(path, tensors, metadata)
    found = load(path)
    if not replaced and not metadata and number in (None, 3e38):
        assert found is not None
    if number is not None and not math.isfinite(number) and "tensor" not in replaced:
        assert found is None


@given(st.binary(max_size=64), st.integers(0, 2**64 - 1))
def test_random_bytes_as_directions_file(tmp_path: Path, content: bytes, length: int) -> None:
    path = tmp_path / "directions.safetensors"
    for raw in (
        content,
        len(content).to_bytes(8, "little") + content,
        length.to_bytes(8, "little") + content,
        (2).to_bytes(8, "little") + b"{}" + content,
    ):
        path.write_bytes(raw)
        assert load(path) is None


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "missing"):
        assert load(path) is None


def start(arguments: list[str], directory: Path) -> str:
    """Runs the command line as a process of its own; returns its standard error, after it has ended with 2."""

    result = subprocess.run(
        [sys.executable, "-m", "heretic_contrast", *arguments],
        cwd=directory,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 2
    output = (result.stdout + result.stderr).decode("utf-8", "replace")
    assert "Traceback" not in output
    lines = result.stderr.decode("utf-8", "replace").splitlines()
    (line,) = (line for line in lines if line.startswith("Error: "))
    require_sentence(line + "\n")
    return line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff\xfe", "config.toml in the current directory cannot be read"),
        (
            b'[modifier.ContrastAbliteration]\n"a\\nb\\u001b[2J" = 1\n',
            r'There is no setting "a b\x1b[2J"',
        ),
    ],
)
def test_processes_end_with_one_sentence(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    assert expected in start(["--model", "builtin:refuser"], tmp_path)
