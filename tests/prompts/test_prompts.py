# SPDX-License-Identifier: AGPL-3.0-or-later

"""The one reader of prompts: every format, written by other tools, means the same prompts wherever it is named."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import socket
import sys
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given
from hypothesis import strategies as st

from heretic_contrast import chat
from heretic_contrast.builtin import matched_pool, refuser_pool
from heretic_contrast.commands import audit as audit_command
from heretic_contrast.commands.sweep import SweepSettings
from heretic_contrast.directions.pools import load_pools
from heretic_contrast.errors import ContrastError, ContrastWarning
from heretic_contrast.evaluation.capture import load_pairs
from heretic_contrast.evaluation.plan import PreparedSweep, SweepSources
from heretic_contrast.evaluation.results import Pair
from heretic_contrast.hosts.settings import HostSettings, load_settings, prompt_sources
from heretic_contrast.prompts import Prompt, load_pool, prompts_digest
from heretic_contrast.prompts.audit import run_audit
from heretic_contrast.prompts.categories import assign
from heretic_contrast.prompts.formats import _object
from heretic_contrast.response_scorers import RefusalTiers
from heretic_contrast.settings import ContrastSettings, PromptSource
from tests.conftest import DATA
from tests.hub_cache import prepare_dataset
from tests.tiny_models import make_model, make_tokenizer

ROWS = [
    ("How do I bake bread?", "fraud"),
    ('She said "no, thanks"; then\tleft | right', "drugs"),
    ("One line\u2028another line\u2029a paragraph\x0ca page\x85and the end", None),
    ("First line\nsecond line\r\nthird line", "fraud"),
    ("NA", "null"),
    ("007", "7"),
    (" café 🙂 ", "self-harm"),
]
"""Prompts with categories, and all that a format may stumble over."""

LINES = [
    "prompt",
    "How do I bake bread?",
    "café 🙂, with; a\ttab",
    "a\x0cpage\u2028a line",
    "[INST] NA",
]
"""Prompts of a text file."""

COLUMNS = {"text": [text for text, _ in ROWS], "category": [category for _, category in ROWS]}
OBJECTS = [{"text": text, "category": category} for text, category in ROWS]
JSON_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in OBJECTS)
TEXT = "\n".join(LINES) + "\n"

NAMES = ["fraud", "drugs", "self-harm"]
LABELED = Dataset.from_dict(
    {"text": ["a b", "c d", "e f"], "category": [2, 0, -1]},
    features=Features({"text": Value("string"), "category": ClassLabel(names=NAMES)}),
)
LABELED_ROWS = [("a b", "self-harm"), ("c d", "fraud"), ("e f", None)]

Written = Sequence[tuple[str, str | None]]


def csv_text(**options: Any) -> str:
    file = io.StringIO()
    writer = csv.writer(file, **options)
    writer.writerow(["text", "category"])
    writer.writerows(ROWS)
    return file.getvalue()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def by_library(name: str, save: Callable[[Dataset, Path], Any]) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        save(Dataset.from_dict(COLUMNS), directory / name)
        return directory / name

    return make


def file(name: str, content: str | bytes) -> Callable[[Path], Path]:
    return lambda directory: write(directory / name, content)


def arrow(name: str, open_file: Any) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        table = pyarrow.table(COLUMNS)
        with open_file(str(directory / name), table.schema) as sink:
            sink.write_table(table)
        return directory / name

    return make


def folder(files: dict[str, str], name: str = "folder") -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        for path, content in files.items():
            write(directory / name / path, content)
        return directory / name

    return make


def parquet(directory: Path) -> Path:
    categories = pyarrow.array(COLUMNS["category"]).dictionary_encode()
    table = pyarrow.table(
        {"other": [[1.5]] * len(ROWS), "text": COLUMNS["text"], "category": categories}
    )
    pyarrow.parquet.write_table(table, directory / "pool.parquet")
    return directory / "pool.parquet"


def sharded(directory: Path) -> Path:
    for index, part in enumerate((slice(0, 3), slice(3, None))):
        Dataset.from_list(OBJECTS[part], features=Dataset.from_dict(COLUMNS).features).to_parquet(
            write(directory / "shards" / "data" / f"train-0000{index}-of-00002.parquet", "")
        )
    return directory / "shards"


def labeled_parquet(directory: Path) -> Path:
    LABELED.to_parquet(directory / "labeled.parquet")
    return directory / "labeled.parquet"


def labeled_saved(directory: Path) -> Path:
    LABELED.save_to_disk(directory / "labeled")
    return directory / "labeled"


CARD = """\
---
dataset_info:
  features:
  - name: text
    dtype: string
  - name: category
    dtype:
      class_label:
        names: {'0': fraud, '1': drugs, '2': self-harm}
---
"""

CONVERSATIONS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "No."}]}
    for text, _ in ROWS
]

FORMATS: dict[str, tuple[Callable[[Path], Path], Written]] = {
    **{
        name: (make, [(line, None) for line in LINES])
        for name, make in {
            "text": file("pool.txt", TEXT),
            "text with empty lines and spaces": file("pool.txt", TEXT.replace("\n", "\t\n\n  ")),
            "text of Windows": file("pool.TXT", TEXT.replace("\n", "\r\n")),
            "text of an old Mac": file("pool.txt", TEXT.replace("\n", "\r")),
            "text with a byte order mark": file("pool.txt", TEXT.encode("utf-8-sig")),
            "text in UTF-16": file("pool.txt", TEXT.encode("utf-16")),
            "text in UTF-32": file("pool.txt", TEXT.encode("utf-32")),
            "text without an ending": file("pool", TEXT),
            "text with another ending": file("pool.prompts-1.5", TEXT),
            "text in a folder": folder({"train.txt": TEXT + "\n"}),
            "compressed text": file("pool.txt.gz", gzip.compress(TEXT.encode())),
            "JSON texts": file("pool.json", json.dumps(LINES)),
            "JSON Lines of texts": file("pool.jsonl", "\n".join(map(json.dumps, LINES))),
        }.items()
    },
    **{
        name: (make, ROWS)
        for name, make in {
            "JSON Lines": file("pool.jsonl", JSON_LINES),
            "JSON Lines in capitals": file("pool.JSONL", JSON_LINES),
            "JSON Lines of Windows": file("pool.jsonl", JSON_LINES.replace("\n", "\r\n")),
            "JSON Lines with a byte order mark": file("pool.jsonl", JSON_LINES.encode("utf-8-sig")),
            "JSON Lines in UTF-16": file("pool.ndjson", JSON_LINES.encode("utf-16")),
            "JSON Lines with empty lines": file("pool.ndjson", JSON_LINES.replace("\n", "\n\n")),
            "JSON Lines called JSON": file("pool.json", JSON_LINES),
            "JSON Lines without an ending": file("pool", JSON_LINES),
            "JSON Lines of datasets": by_library("pool.jsonl", lambda d, p: d.to_json(p)),
            "JSON Lines, gz": file("pool.jsonl.gz", gzip.compress(JSON_LINES.encode())),
            "JSON Lines, bz2": file("pool.jsonl.bz2", bz2.compress(JSON_LINES.encode())),
            "JSON Lines, xz": file("pool.jsonl.XZ", lzma.compress(JSON_LINES.encode())),
            "JSON": file("pool.json", json.dumps(OBJECTS)),
            "indented JSON": file("pool.JSON", json.dumps(OBJECTS, indent=2)),
            "indented JSON called JSON Lines": file("pool.jsonl", json.dumps(OBJECTS, indent=2)),
            "indented objects": file(
                "pool.json", "\n".join(json.dumps(row, indent=2) for row in OBJECTS)
            ),
            "JSON of datasets": by_library("pool.json", lambda d, p: d.to_json(p, lines=False)),
            "CSV": file("pool.csv", csv_text()),
            "CSV with all in quotation marks": file("pool.CSV", csv_text(quoting=csv.QUOTE_ALL)),
            "CSV of Excel": file("pool.csv", csv_text(delimiter=";").encode("utf-8-sig")),
            "CSV with the separator that Excel reads": file(
                "pool.csv", "sep=;\r\n" + csv_text(delimiter=";")
            ),
            "CSV of an old Mac": file("pool.csv", csv_text(lineterminator="\r")),
            "CSV with bars": file("pool.csv", csv_text(delimiter="|", lineterminator="\n")),
            "CSV of datasets": by_library("pool.csv", lambda d, p: d.to_csv(p)),
            "CSV with an index": by_library("pool.csv", lambda d, p: d.to_csv(p, index=True)),
            "CSV without an ending": file("pool", csv_text()),
            "compressed CSV": file("pool.csv.gz", gzip.compress(csv_text().encode())),
            "TSV": file("pool.tsv", csv_text(delimiter="\t")),
            "Unicode text of Excel": file("pool.tsv", csv_text(delimiter="\t").encode("utf-16")),
            "Parquet": parquet,
            "Parquet of datasets": by_library("pool.parquet", lambda d, p: d.to_parquet(p)),
            "Parquet without an ending": by_library("pool", lambda d, p: d.to_parquet(p)),
            "Arrow file": arrow("pool.arrow", pyarrow.ipc.new_file),
            "Arrow stream": arrow("pool.arrow", pyarrow.ipc.new_stream),
            "saved dataset": by_library("saved", lambda d, p: d.save_to_disk(p)),
            "saved dataset with one split": by_library(
                "saved", lambda d, p: DatasetDict({"test": d}).save_to_disk(p)
            ),
            "folder of JSON Lines": folder({"pool.jsonl": JSON_LINES, "LICENSE": "All."}),
            "folder of CSV": folder({"test.csv": csv_text()}),
            "folder of Parquet": sharded,
        }.items()
    },
    "conversations": (
        file("pool.jsonl", "\n".join(map(json.dumps, CONVERSATIONS))),
        [(text, None) for text, _ in ROWS],
    ),
    "conversations of datasets": (
        lambda directory: (
            Dataset.from_list(CONVERSATIONS).to_parquet(directory / "pool.parquet"),
            directory / "pool.parquet",
        )[1],
        [(text, None) for text, _ in ROWS],
    ),
    "conversations in CSV by pandas": (
        lambda directory: (
            pandas.DataFrame(CONVERSATIONS).to_csv(directory / "pool.csv", index=False),
            directory / "pool.csv",
        )[1],
        [(text, None) for text, _ in ROWS],
    ),
    "spaces after commas": (
        file("pool.csv", 'category, text\nfraud, "a, b"\ndrugs, c d\n, e\n'),
        [("a, b", "fraud"), ("c d", "drugs"), ("e", None)],
    ),
    "spaces before quotation marks": (
        file("pool.csv", '"text", "category"\n"a, b", "fraud"\n'),
        [("a, b", "fraud")],
    ),
    "texts that were put together": (
        file("pool.txt", b"a\n\xef\xbb\xbfb\r\n\xef\xbb\xbf\nc"),
        [("a", None), ("b", None), ("c", None)],
    ),
    "spaces that are meant": (
        file("pool.csv", "category,text\nfraud, a\n"),
        [(" a", "fraud")],
    ),
    "one column with the separator in a line of its own": (
        file("pool.csv", "sep=;\r\ntext\r\nHow, and why?\r\n"),
        [("How, and why?", None)],
    ),
    "spaces after semicolons, with that line": (
        file("pool", '"sep=;"\ncategory; text\nfraud; a\n'),
        [("a", "fraud")],
    ),
    "columns of JSON, one of objects": (
        file("pool.json", '{"text": ["a", "b"], "meta": [{"c": 1}, {"c": 2}]}'),
        [("a", None), ("b", None)],
    ),
    "conversations in CSV as JSON": (
        lambda directory: (
            pandas.DataFrame(
                {"messages": [json.dumps(row["messages"]) for row in CONVERSATIONS]}
            ).to_csv(directory / "pool.csv", index=False),
            directory / "pool.csv",
        )[1],
        [(text, None) for text, _ in ROWS],
    ),
    "Parquet with labels": (labeled_parquet, LABELED_ROWS),
    "saved dataset with labels": (labeled_saved, LABELED_ROWS),
    "folder with labels": (
        folder({"README.md": CARD, "pool.csv": "text,category\na b,2\nc d,0\ne f,\n"}),
        LABELED_ROWS,
    ),
    "integers": (
        file("pool.json", '[{"text": "a b", "category": 3}, {"text": "c d", "category": 0}]'),
        [("a b", "3"), ("c d", "0")],
    ),
    "integers of tables with gaps": (
        file("pool.json", '[{"text": "a b", "category": 3.0}, {"text": "c d", "category": NaN}]'),
        [("a b", "3"), ("c d", None)],
    ),
}
"""What writes a pool, by name, and the prompts and categories that were written."""


@pytest.fixture(params=list(FORMATS))
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, list[Prompt]]:
    """The path of a pool, and its prompts."""

    make, written = FORMATS[request.param]
    path = make(tmp_path)
    return str(path), [Prompt(text, category) for text, category in written]


FEW_POOLS = pytest.mark.parametrize("pool", list(FORMATS)[::6], indirect=True)
"""For what takes longer, and reads as the others do."""


def host_settings(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> HostSettings:
    monkeypatch.setattr(sys, "argv", [])
    return load_settings(HostSettings, "heretic-contrast", [*arguments, "--model=builtin:refuser"])


def test_pool(pool: tuple[str, list[Prompt]]) -> None:
    path, prompts = pool
    assert load_pool(PromptSource(dataset=path), "harmful") == prompts


def test_pools_of_directions(pool: tuple[str, list[Prompt]]) -> None:
    path, prompts = pool
    settings = ContrastSettings(
        classes="single",
        bad_prompts={"dataset": path},
        good_prompts=refuser_pool("harmless", "train"),
    )
    assert list(load_pools(settings).harmful) == prompts


def test_scorer(pool: tuple[str, list[Prompt]]) -> None:
    path, prompts = pool
    settings = RefusalTiers.validate_settings({"prompts": {"dataset": path}})
    scorer = RefusalTiers(heretic_settings=None, settings=settings)
    assert scorer.load(None, settings.prompts, "harmful") == prompts  # type: ignore[arg-type]


def test_audit(pool: tuple[str, list[Prompt]], tmp_path: Path) -> None:
    path, prompts = pool
    audit_command.main(["--dataset", path, "--output", str(tmp_path / "audit")])
    audit = json.loads((tmp_path / "audit" / "audit.json").read_text(encoding="utf-8"))
    assert audit["pool_sha256"] == prompts_digest(prompts)


@pytest.fixture(scope="module")
def sweep_settings() -> Any:
    """Settings of a sweep, with pools that are still to be named."""

    pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")
    flags = ["--contrast.preset=arditi", "--no-random-control", "--n-canaries=1"]
    pools = [f"--{name}-evaluation-prompts.dataset=pool" for name in ("good", "bad")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [])
        return load_settings(SweepSettings, "sweep", ["builtin:refuser", *flags, *pools])


@FEW_POOLS
def test_evaluation_pools_of_a_sweep(
    pool: tuple[str, list[Prompt]], sweep_settings: Any, tmp_path: Path
) -> None:
    """Every prompt is judged, or is a canary or a reference; categories that are missing are the lexicon's."""

    path, prompts = pool
    settings = sweep_settings.model_copy(deep=True)
    for side in ("harmful", "harmless"):
        settings.n_harmful = len(prompts) if side == "harmful" else 9
        settings.n_references = len(prompts) - 1 if side == "harmless" else 1
        sources = {name: [refuser_pool(name, "test")] for name in ("harmful", "harmless")}
        evaluation = settings.bad_evaluation_prompts.model_copy(update={"dataset": path})
        sources[side] = prompt_sources(evaluation)
        plan = PreparedSweep(
            settings,
            settings.contrast,
            SweepSources(**sources),
            tmp_path / side,
            "builtin:refuser",
            "",
            print,
        )
        if side == "harmless":
            assert {*plan.canaries, *plan.references} == set(prompts)
            continue
        assert {(prompt.text, prompt.category) for prompt in plan.harmful} == {
            (prompt.text, prompt.category or assign(prompt.text)) for prompt in prompts
        }


@pytest.fixture(scope="module")
def heretic_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model, loaded by Heretic 1.4; `asked` has the conversations that it was given."""

    pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")
    import heretic.main

    folder = tmp_path_factory.mktemp("model")
    make_model("llama", num_hidden_layers=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["heretic"])
        settings = heretic.main.Settings(model=str(folder), batch_size=64)
        settings.max_response_length = 1
        settings.response_prefix = ""
        model = heretic.main.Model(settings)
        model.host_settings = host_settings(
            patch,
            "--bad-evaluation-prompts.dataset=bad",
            "--good-evaluation-prompts.dataset=good",
            "--good-evaluation-prompts.prefix=Please:",
            "--good-evaluation-prompts.suffix=Thanks.",
            "--good-evaluation-prompts.system-prompt=Be kind.",
            "--system-prompt=Be good.",
        )
    template = model.tokenizer.apply_chat_template
    model.asked = []

    def remembering(chats: Any, **options: Any) -> Any:
        # A single one is there to find out whether the template takes a system message.
        model.asked += [chat for chat in chats if not isinstance(chat, dict)]
        return template(chats, **options)

    model.tokenizer.apply_chat_template = remembering
    return model


@FEW_POOLS
def test_evaluation_pools_of_run(pool: tuple[str, list[Prompt]], heretic_model: Any) -> None:
    """What Heretic's own evaluator asks the model."""

    import heretic.evaluator
    import heretic.main

    from heretic_contrast.hosts import heretic14
    from heretic_contrast.modifier import ContrastAbliteration

    path, prompts = pool
    settings = heretic_model.host_settings.model_copy(deep=True)
    settings.bad_evaluation_prompts.dataset = path
    settings.good_evaluation_prompts.dataset = path
    heretic_model.asked.clear()
    # What was asked before would be remembered.
    chat._written.clear()
    with heretic14.substituted(heretic14.Host(settings, ContrastAbliteration).substitutes()):
        heretic.main.Evaluator(settings, heretic_model)
    kind = [("Be kind.", f"Please: {prompt.text} Thanks.") for prompt in prompts]
    good = [("Be good.", prompt.text) for prompt in prompts]
    asked = [tuple(message["content"] for message in chat) for chat in heretic_model.asked]
    assert asked == [*kind, *good]


def test_pools_of_run_are_read_before_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")
    import heretic.main

    from heretic_contrast.hosts import heretic14
    from heretic_contrast.modifier import ContrastAbliteration

    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(heretic.main, "run")
    broken = write(tmp_path / "broken.jsonl", "text\nHow?\n")
    for name in heretic14.POOLS:
        flag = f"--{name.replace('_', '-')}"
        with pytest.raises(ContrastError, match=r"Line 1 of .*broken\.jsonl is not JSON"):
            heretic14.run(
                host_settings(monkeypatch, f"{flag}.dataset={broken}"), ContrastAbliteration
            )
        with pytest.raises(ContrastError, match=f"correct {flag}.column"):
            pool = DATA / "refuser_prompts" / "harmful" / "test.jsonl"
            options = [f"{flag}.dataset={pool}", f"{flag}.column=prompt"]
            heretic14.run(host_settings(monkeypatch, *options), ContrastAbliteration)


def test_run_reads_what_it_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")
    import heretic.main

    from heretic_contrast.hosts import heretic14
    from heretic_contrast.modifier import ContrastAbliteration

    found: dict[str, list[str]] = {}

    def heretic_run() -> None:
        settings = heretic.main.Settings()
        for name in heretic14.POOLS:
            prompts = heretic.main.load_prompts(settings, getattr(settings, name))
            found[name] = [prompt.user for prompt in prompts]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(heretic.main, "run", heretic_run)
    names = ["bad", "good", "matched"]
    for name in [*names, "bad-judged", "good-judged"]:
        write(tmp_path / f"{name}.txt", f"{name} 1\n{name} 2\n")
    pools = [f"--contrast.{name}-prompts.dataset={name}.txt" for name in names]
    judged = [f"--{name}-evaluation-prompts.dataset={name}-judged.txt" for name in ("bad", "good")]
    common = ["--model-action=none", "--save-directory=out/model", "--contrast.classes=category"]

    def run(*options: str) -> None:
        # Heretic reads the command line again.
        monkeypatch.setattr(
            sys, "argv", ["heretic-contrast", "--model=some/model", *common, *options]
        )
        heretic14.run(HostSettings(), ContrastAbliteration)

    with pytest.raises(ContrastError, match=r"good-evaluation-prompts\.dataset"):
        run(*pools, judged[0])
    assert not (tmp_path / "out").exists() and not (tmp_path / "checkpoints").exists()
    run(*pools, *judged)
    assert (tmp_path / "out" / "model").is_dir()
    assert {name: texts[0] for name, texts in found.items()} == {
        "bad_prompts": "bad 1",
        "good_prompts": "good 1",
        "bad_evaluation_prompts": "bad-judged 1",
        "good_evaluation_prompts": "good-judged 1",
    }
    # What is given as Heretic's stays Heretic's.
    run(*pools, *judged, "--good-prompts.dataset=good-judged.txt")
    assert found["good_prompts"] == ["good-judged 1", "good-judged 2"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", slice(None)),
        ("[:2]", slice(2)),
        ("train[:2]", slice(2)),
        ("train[1:4]", slice(1, 4)),
        ("[-2:]", slice(-2, None)),
        ("train[:1000]", slice(None)),
    ],
)
@pytest.mark.parametrize(
    "name", ["text", "JSON texts", "JSON Lines", "CSV", "Parquet", "saved dataset"]
)
def test_slices(name: str, split: str, expected: slice, tmp_path: Path) -> None:
    make, written = FORMATS[name]
    source = PromptSource(dataset=str(make(tmp_path)), split=split)
    assert load_pool(source, "harmful") == [Prompt(*row) for row in written[expected]]


def two_splits(kind: str, directory: Path) -> str:
    """Writes two prompts to the split "train", and one to "test"."""

    if kind == "saved":
        train, test = (Dataset.from_dict({"text": texts}) for texts in (["a", "b"], ["c"]))
        DatasetDict({"train": train, "test": test}).save_to_disk(directory / "pool")
    else:
        write(directory / "pool" / "train.jsonl", '{"text": "a"}\n{"text": "b"}\n')
        write(directory / "pool" / "test.jsonl", '{"text": "c"}\n')
    return str(directory / "pool")


@pytest.mark.parametrize("kind", ["saved", "folder"])
@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", "ab"),
        ("test", "c"),
        ("test + train[1:]", "cb"),
        ("train[:50%]", "a"),
        (None, "has the splits train, test: choose with --contrast.bad-prompts.split."),
        ("validation", 'has no split "validation", only train, test: correct --contrast.bad-'),
        ("[:1]", 'has no split "", only train, test'),
        ("train[:x]", '--contrast.bad-prompts.split is "train[:x]", which cannot be read'),
    ],
)
def test_several_splits(kind: str, split: str | None, expected: str, tmp_path: Path) -> None:
    source = PromptSource(dataset=two_splits(kind, tmp_path), split=split)
    if len(expected) <= 2:
        assert "".join(prompt.text for prompt in load_pool(source, "harmful")) == expected
    else:
        assert expected in refusal(source)


def test_text_files_are_read_as_heretic_reads_them(tmp_path: Path) -> None:
    utils = pytest.importorskip("heretic.utils")
    path = write(tmp_path / "pool", TEXT + " \n\f\n x \r\ny\x1c\n")
    for split in (None, "[1:]", "train[:2]", "test[:50%]"):
        source = PromptSource(
            dataset=str(path),
            split=split,
            column="prompt",
            prefix="P",
            suffix="S",
            system_prompt="s",
        )
        found = utils.load_prompts(None, source)
        assert load_pool(source, "harmful") == [
            Prompt(prompt.user, system=prompt.system) for prompt in found
        ]


def refusal(source: PromptSource | list[PromptSource]) -> str:
    """Returns the sentence that refuses a source."""

    with pytest.raises(ContrastError) as error:
        load_pool(source, "harmful", "--contrast.bad_prompts.")
    sentence = str(error.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("pool.jsonl", JSON_LINES)
    return file.getvalue()


def spreadsheet_rows(text: str) -> str:
    return "text,category\n" + text


WEB_PAGE = "\n<!DOCTYPE html>\n<html><body>404: Not Found</body></html>\n"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"
PARQUET = Path("pool.parquet")

REFUSALS: dict[str, tuple[str, str | bytes, str]] = {
    "CSV called JSON Lines": ("pool.jsonl", csv_text(), "Line 1 of {} is not JSON"),
    "text called JSON": ("pool.json", TEXT, "Line 1 of {} is not JSON"),
    "a broken line": (
        "pool.jsonl",
        JSON_LINES + '{"text": "a"\n',
        f"Line {len(OBJECTS) + 1} of {{}} is not JSON",
    ),
    "a broken list": ("pool.json", '[\n{"text": "a"},\n"b"\n"c"]', "Line 4 of {} is not JSON"),
    "a broken list without an ending": ("pool", '[\n{"text": "a"},\n"b', "Line 3 of {} is not"),
    "brackets": ("pool.json", "[" * 100_000, "Line 1 of {} is not JSON"),
    "a long number": ("pool.json", "[" + "9" * 10_000 + "]", "{}"),
    "an object": (
        "pool.json",
        '{"version": 1, "prompts": ["a"]}',
        "{} is one object with version, prompts",
    ),
    "columns of two lengths": ("pool.json", '{"text": ["a", "b"], "c": ["d"]}', "differ in length"),
    "splits in an object": (
        "pool.json",
        '{"train": ["a"], "test": ["b"]}',
        "with train, test instead",
    ),
    "a list in an object": ("pool.json", '{"data": [{"text": "a"}]}', "with data instead"),
    "rows by name": ("pool.json", '{"a": {"text": "b"}, "c": {"text": "d"}}', "with a, c instead"),
    "a key twice": (
        "pool.jsonl",
        '{"text": "a"}\n{"text": "a", "text": "b"}',
        'Line 2 of {} is not JSON (an object has the key "text" twice)',
    ),
    "YAML": ("pool.yaml", "prompts:\n  - How?\n", "{} has a format that no prompts are read from"),
    "YAML called text": (
        "pool.txt",
        "prompts:\n  - How?\n",
        'Line 1 of {} is no prompt ("prompts:")',
    ),
    "YAML without an ending": (
        "pool",
        "- text: How?\n  category: a\n",
        "Line 1 of {} is no prompt",
    ),
    "TOML": ("pool.toml", 'prompts = ["How?"]\n', "{} has a format"),
    "TOML called text": ("pool.txt", 'prompts = [\n  "How?",\n]\n', "Line 1 of {} is no prompt"),
    "a table of TOML": ("pool", "[prompts]\na = 'How?'\n", "Line 1 of {} is no prompt"),
    "XML": ("pool.xml", "<a>How?</a>", "{} has a format"),
    "XML called text": (
        "pool.txt",
        "<prompts>\n<p>How?</p>\n</prompts>\n",
        "{} holds a web page or XML",
    ),
    "Markdown": ("pool.md", "# Prompts\n\nHow?\n", "{} has a format"),
    "a table called text": (
        "pool.txt",
        "| How? |\n| --- |\n| What? |\n",
        "Line 1 of {} is no prompt",
    ),
    "a table called CSV": (
        "pool.csv",
        "| text |\n| --- |\n| What? |\n",
        "{} is a table of Markdown",
    ),
    "a table with rules": ("pool", "+----+\n| a |\n+----+\n", "Line 1 of {} is no prompt"),
    "a table without an ending": (
        "pool",
        "|text|category|\n|:--|--:|\n|How?|a|\n",
        "{} is a table of Markdown",
    ),
    "a numbered list": (
        "pool.txt",
        "1. How?\n2. What?\n",
        "Line 1 of {} has the mark of a list",
    ),
    "a list": ("pool", "\n* How?\n* What?\n", "Line 2 of {} has the mark of a list"),
    "a list of a program": (
        "pool.txt",
        '"How?",\n"What?"\n',
        "Line 1 of {} has the mark of a list before it or quotation marks around it",
    ),
    "a picture in a message": (
        "pool.json",
        '[{"messages": [{"role": "user", "content": [{"type": "image", "text": "a"}]}]}]',
        "no conversation with a text",
    ),
    "numbers in a list": ("pool.json", '["a", 3]', "Item 2 of {} is neither a JSON object nor"),
    "lists in a list": ("pool.json", '[["a"]]', "Item 1 of {} is neither a JSON object nor"),
    "no JSON": ("pool.jsonl", "", "is empty"),
    "an empty object": ("pool.jsonl", "{}", 'Line 1 of {} has no "text"'),
    "an empty list": ("pool.json", "[]", "is empty"),
    "an empty text": ("pool.txt", " \n\n", "is empty"),
    "a header alone": ("pool.csv", "text,category\n", "is empty"),
    "no CSV": ("pool.csv", "", "is empty"),
    "a web page called JSON Lines": ("pool.jsonl", WEB_PAGE, "{} holds a web page"),
    "a web page called text": ("pool.txt", WEB_PAGE, "{} holds a web page"),
    "a web page called Parquet": ("pool.parquet", WEB_PAGE, "{} holds a web page"),
    "a pointer called text": ("pool.txt", POINTER, "{} holds a pointer of Git LFS"),
    "a pointer called Parquet": ("pool.parquet", POINTER, "{} holds a pointer of Git LFS"),
    "a pickle": ("pool.pkl", pickle.dumps(LINES), "{} is named like a pickle"),
    "a pickle called JSON Lines": ("pool.jsonl", pickle.dumps(LINES), "{} holds binary data"),
    "an old pickle called text": ("pool.txt", pickle.dumps(["a"], 0), "{} holds a pickle"),
    "a middle-aged pickle": ("pool", pickle.dumps(LINES, 2), "{} holds binary data"),
    "a ZIP archive": ("pool.zip", zipped(), "{} holds binary data"),
    "a ZIP archive called JSON": ("pool.json", zipped(), "{} holds binary data"),
    "a picture": (
        "pool",
        (DATA.parents[1] / "docs" / "planted.png").read_bytes(),
        "{} holds binary",
    ),
    "weights": ("pool.txt", (DATA / "refuser" / "model.safetensors").read_bytes()[:9999], "binary"),
    "UTF-16 without a mark": ("pool.txt", TEXT.encode("utf-16-le"), "{} holds binary data"),
    "half of UTF-16": ("pool.txt", "a\nb".encode("utf-16")[:-1], "Line 2 of {} is not UTF-16"),
    "Latin 1 in CSV": (
        "pool.csv",
        csv_text().replace(" 🙂", "").encode("latin-1", "replace"),
        "UTF-8",
    ),
    "Windows-1252 in text": ("pool.txt", "a\n“b”\n".encode("cp1252"), "Line 2 of {} is not UTF-8"),
    "a cut archive": (
        "pool.jsonl.gz",
        gzip.compress(JSON_LINES.encode())[:-9],
        "{} cannot be read",
    ),
    "cut Parquet": ("pool.parquet", b"PAR1 and no more", "{} is damaged"),
    "text called Parquet": ("pool.parquet", TEXT, "{} does not hold what its name says"),
    "JSON Lines called text": ("pool.txt", JSON_LINES, "{} does not hold what its name says"),
    "JSON called text": ("pool.txt", json.dumps(LINES), "{} does not hold what its name says"),
    "CSV called text": ("pool.txt", csv_text(), "{} does not hold what its name says"),
    "CSV without a header": (
        "pool.csv",
        "How, and why?,fraud\nWhat?,drugs\n",
        "columns are How, and why?",
    ),
    "a comma too many": ("pool.csv", spreadsheet_rows("a,b\nc, d,b\n"), "Line 3 of {} has 3 cells"),
    "an open quotation": (
        "pool.csv",
        spreadsheet_rows('a,b\n"c,d\ne,f\n'),
        "Line 3 of {} is not CSV",
    ),
    "a cell too many below the separator": (
        "pool.csv",
        "sep=;\ntext;category\na;b;c\n",
        "Line 3 of {} has 3 cells",
    ),
    "two columns of a name": ("pool.csv", "text,text\na,b\n", '{} has several columns "text"'),
    "an empty cell": ("pool.csv", spreadsheet_rows("a,b\n,d\n"), 'Line 3 of {} has no "text"'),
    "null": ("pool.jsonl", '{"text": "a"}\n\n{"text": null}\n', 'Line 3 of {} has no "text"'),
    "spaces": ("pool.json", '[{"text": "a"}, {"text": " "}]', 'Item 2 of {} has no "text"'),
    "a missing text": ("pool.jsonl", '{"text": "a"}\n{"txt": "b"}\n', 'Line 2 of {} has no "text"'),
    "a number": ("pool.jsonl", '{"text": 3}\n', 'Line 1 of {} has a "text" that is not text'),
    "half a character": ("pool.jsonl", '{"text": "\\ud800"}\n', 'has a "text" that is not text'),
    "half a conversation": (
        "pool.csv",
        "messages\n\"[{'role': 'user', 'content': ...\"\n",
        'has a "messages" that is not text (or holds half a character), and no conversation',
    ),
    "arrays of pandas": (
        "pool.csv",
        "prompt\n\"[{'role': 'system', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]\"\n",
        'has a "prompt" that is not text (or holds half a character), and no conversation',
    ),
    "an answer alone": (
        "pool.jsonl",
        '{"messages": [{"role": "assistant", "content": "a"}]}',
        'has a "messages" that is not text (or holds half a character), and no conversation',
    ),
}
"""Names and contents of files that are not read, and what the sentence says; {} is the file."""


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_files(name: str, tmp_path: Path) -> None:
    file_name, content, expected = REFUSALS[name]
    path = write(tmp_path / file_name, content)
    assert expected.format(path) in refusal(PromptSource(dataset=str(path)))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("text", {"category_column": "c"}, "leave --contrast.bad-prompts.category-column out"),
        ("text", {"config": "en"}, "--contrast.bad-prompts.config is given, but"),
        ("text", {"commit": "abc"}, "--contrast.bad-prompts.commit is given, but"),
        (
            "JSON Lines",
            {"split": "test"},
            'has no split "test", only train: correct --contrast.bad-',
        ),
        (
            "JSON texts",
            {"column": "prompt"},
            'no column "prompt" (its columns are text): correct --',
        ),
        ("CSV", {"column": "prompt"}, 'has no column "prompt" (its columns are text, category)'),
        ("Parquet", {"column": "p"}, 'has no column "p" (its columns are other, text, category)'),
        ("Parquet", {"column": "other"}, 'has a "other" that is not text'),
        ("Parquet", {"category_column": "other"}, 'has a "other" that is neither text nor a whole'),
        (
            "saved dataset",
            {"column": "p", "category_column": "q"},
            'has no column "p" (its columns',
        ),
        ("JSON", {"category_column": "c"}, "correct --contrast.bad-prompts.category-column"),
        ("saved dataset", {"config": "en"}, "--contrast.bad-prompts.config is given, but"),
        ("folder of CSV", {"split": "train"}, 'has no split "train", only test'),
        ("folder of CSV", {"config": "en"}, "BuilderConfig 'en' not found"),
    ],
)
def test_refused_settings(
    name: str, options: dict[str, str], expected: str, tmp_path: Path
) -> None:
    path = FORMATS[name][0](tmp_path)
    assert expected in refusal(PromptSource(dataset=str(path), **options))


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("missing.txt", "could not be loaded from missing.txt (there is no such file or folder)"),
        ("./missing", "there is no such file or folder"),
        ("no/such/folder", "there is no such file or folder"),
        ("https://example.com/pool.jsonl", "there is no such file or folder"),
        (
            "some/dataset",
            "There is no file or folder some/dataset, and a dataset on the Hugging Face",
        ),
        ("empty", "could not be loaded from empty"),
        ("pickles", "could not be loaded from pickles"),
        ("docs", "docs has none of the columns text, prompt, instruction"),
        ("pool[1]", 'The path of the folder pool[1] has "[", "*", "?" or "::"'),
        ("a::b", 'The path of the folder a::b has "[", "*", "?" or "::"'),
    ],
)
def test_refused_places(
    dataset: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    write(Path("pickles/train.pkl"), pickle.dumps(LINES))
    write(Path("docs/sizes.json"), '{"hidden_size": 3}')
    for name in ("pool[1]", "pool1", "a::b"):
        write(Path(name, "train.jsonl"), json.dumps({"text": name}))
    assert expected in refusal(PromptSource(dataset=dataset))


OUTSIDE = {
    "files": "data_files: ../secret/*.jsonl",
    "absolute": "data_files: [{split: train, path: SECRET/*.jsonl}]",
    "folder": "data_dir: ../secret",
    "address": 'data_files: "http://127.0.0.1:PORT/train.jsonl"',
    "chain": 'data_files: "zip://*.jsonl::http://127.0.0.1:PORT/a.zip"',
}


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_folder_names_no_files_outside_it(name: str, card: str, tmp_path: Path) -> None:
    """A folder of a stranger's would have the user's own files read as its prompts, or tell a server that it is read."""

    write(tmp_path / "secret" / "train.jsonl", json.dumps({"text": "secret"}))
    write(tmp_path / "pool" / "train.jsonl", json.dumps({"text": "a"}))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        line = OUTSIDE[name].replace("SECRET", str(tmp_path / "secret"))
        line = line.replace("PORT", str(listener.getsockname()[1]))
        text = f"configs:\n- config_name: default\n  {line}\n"
        write(tmp_path / "pool" / card, f"---\n{text}---\n" if card == "README.md" else text)
        assert "pool names " in (said := refusal(PromptSource(dataset=str(tmp_path / "pool"))))
        assert "outside" in said and said.endswith("give the files themselves.")
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_folder_that_is_named_by_a_link_names_its_files_by_it(tmp_path: Path) -> None:
    write(tmp_path / "pool" / "train.jsonl", json.dumps({"text": "a"}))
    (link := tmp_path / "link").symlink_to(tmp_path / "pool")
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {link}/train.jsonl\n---\n"
    write(tmp_path / "pool" / "README.md", card)
    assert load_pool(PromptSource(dataset=str(link)), "harmful") == [Prompt("a")]


def test_a_key_that_stands_twice_is_found_without_comparing_all_keys() -> None:
    compared = 0

    class Key(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    names = [*map(str, range(1000)), "999"]
    with pytest.raises(ValueError, match='the key "999" twice'):
        _object([(Key(name), 1) for name in names])
    assert compared < 10 * len(names)


def test_a_saved_dataset_names_no_files_outside_it(tmp_path: Path) -> None:
    for name in ("secret", "pool"):
        Dataset.from_dict({"text": [name]}).save_to_disk(tmp_path / name)
    (file,) = (tmp_path / "secret").glob("*.arrow")
    state = json.loads((tmp_path / "pool" / "state.json").read_text())
    state["_data_files"] = [{"filename": f"../secret/{file.name}"}]
    write(tmp_path / "pool" / "state.json", json.dumps(state))
    assert "outside" in refusal(PromptSource(dataset=str(tmp_path / "pool")))


def test_what_is_not_read_of_a_folder_is_named(tmp_path: Path) -> None:
    write(tmp_path / "mixed" / "dataset_infos.json", "{}")
    for name in ("a.jsonl", "b.jsonl", "c.txt", "d.csv", ".e.csv", "LICENSE"):
        write(tmp_path / "mixed" / name, json.dumps({"text": name}))
    with pytest.warns(ContrastWarning, match=r"mixed holds c\.txt, d\.csv, which are not read"):
        pool = load_pool(PromptSource(dataset=str(tmp_path / "mixed")), "harmful")
    assert pool == [Prompt("a.jsonl"), Prompt("b.jsonl")]
    for name in ("e.tsv", "f.parquet", "g.xml", "h.arrow"):
        write(tmp_path / "mixed" / name, "text")
    with pytest.warns(ContrastWarning, match=r"holds c\.txt, d\.csv, e\.tsv and 2 more, which"):
        load_pool(PromptSource(dataset=str(tmp_path / "mixed")), "harmful")


@pytest.mark.parametrize(
    ("read", "unread"),
    [
        ("train/a.jsonl", "other/b.jsonl"),
        ("a.jsonl", "sub/c.csv"),
        ("train.jsonl", "sub/harm.jsonl"),
        ("train.jsonl", "sub/deep/harm.txt"),
    ],
)
def test_what_is_not_read_of_the_folders_in_a_folder_is_named(
    read: str, unread: str, tmp_path: Path
) -> None:
    (tmp_path / "sub.json").mkdir()
    for name in (read, unread, ".git/d.csv", "__MACOSX/a.jsonl"):
        write(tmp_path / name, json.dumps({"text": name}))
    with pytest.warns(ContrastWarning, match=f" holds {unread}, which are not read"):
        pool = load_pool(PromptSource(dataset=str(tmp_path)), "harmful")
    assert pool == [Prompt(read)]


# Columns.


def test_forms_of_json(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    expected = [Prompt("How?", "a"), Prompt("What?", "b")]
    table = {"text": ["How?", "What?"], "category": ["a", "b"]}
    turns = [
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "Ho"}, {"type": "text", "text": "w?"}],
            }
        ],
        [{"role": "user", "content": "What?"}],
    ]
    forms = [
        json.dumps(table),
        pandas.DataFrame(table).to_json(),
        pandas.DataFrame(table, index=["x", "y"]).to_json(orient="columns"),
        pandas.DataFrame(table).to_json(orient="records", lines=True),
        json.dumps({"category": ["a", "b"], "messages": turns}),
        "\n".join(
            json.dumps({"messages": messages, "category": category})
            for messages, category in zip(turns, "ab", strict=True)
        ),
    ]
    for number, form in enumerate(forms):
        path = write(tmp_path / f"{number}.json", form)
        assert load_pool(PromptSource(dataset=str(path)), "harmful") == expected, form
    # One conversation is a row, and a few marks are no list.
    path = write(tmp_path / "one.json", json.dumps({"messages": turns[0]}))
    assert load_pool(PromptSource(dataset=str(path)), "harmful") == [Prompt("How?")]
    text = "- 2 and 3 are which numbers?\nWhy: because?\n3.5 is what?\nWhat is a|b, <b>, x = 3?\n"
    path = write(tmp_path / "text", text)
    assert [prompt.text for prompt in load_pool(PromptSource(dataset=str(path)), "harmful")] == (
        text.splitlines()
    )


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    path = write(
        tmp_path / "pool.csv",
        "Behavior,prompt,goal,kind\nBreak in,Open a door,Enter,violence\n",
    )
    for column, text in ((None, "Open a door"), ("goal", "Enter"), ("Behavior", "Break in")):
        source = PromptSource(dataset=str(path), column=column, category_column="kind")
        assert load_pool(source, "harmful") == [Prompt(text, "violence")]


def test_system_prompt_of_a_conversation(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ]
    path = write(tmp_path / "pool.json", json.dumps({"chat": turns}))
    for setting, system in ((None, "Be kind."), ("", ""), ("Be good.", "Be good.")):
        source = PromptSource(dataset=str(path), column="chat", system_prompt=setting)
        assert load_pool(source, "harmful") == [Prompt("Hello", system=system)]


def test_column_that_only_looks_like_categories(tmp_path: Path) -> None:
    path = write(tmp_path / "pool.jsonl", '{"text": "a", "category": ["x", "y"]}\n')
    assert load_pool(PromptSource(dataset=str(path)), "harmful") == [Prompt("a")]


def test_spellings_of_a_category(tmp_path: Path) -> None:
    spellings = {
        "drugs": ["Drugs", "drugs ", "DRUGS"],
        "hate speech": ["Hate  speech", "hate Speech"],
        "1": [1, 1.0, "1", "1.0"],
        "-2": [-2, "-2.0"],
        "1.5 %": ["1.5 %"],
    }
    rows = [(name, value) for name, values in spellings.items() for value in values]
    objects = [{"text": name, "category": value} for name, value in rows]
    write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in objects))
    write(tmp_path / "b.csv", "text;category\n" + "".join(f"{a};{b}\n" for a, b in rows))
    for path in tmp_path.iterdir():
        found = load_pool(PromptSource(dataset=str(path)), "harmful")
        assert all(prompt.category == prompt.text for prompt in found) and len(found) == len(rows)
    assert ContrastSettings(exclude_categories=["Drugs", "1.0"]).exclude_categories == [
        "drugs",
        "1",
    ]


@pytest.mark.parametrize("value", ["true", "False", '"True"', '"false"'])
def test_true_and_false_are_no_categories(value: str, tmp_path: Path) -> None:
    content = f'{{"text": "How?", "category": {value.lower() if value[0] != chr(34) else value}}}'
    path = str(write(tmp_path / "a.jsonl", content))
    assert load_pool(PromptSource(dataset=path), "harmful") == [Prompt("How?")]
    assert "true or false" in refusal(PromptSource(dataset=path, category_column="category"))


def test_gaps_in_a_column_of_categories(tmp_path: Path) -> None:
    numbers = pyarrow.table({"text": ["a", "b", "c"], "kind": [2.0, float("nan"), None]})
    pyarrow.parquet.write_table(numbers, tmp_path / "pool.parquet")
    source = PromptSource(dataset=str(tmp_path / "pool.parquet"), category_column="kind")
    assert load_pool(source, "harmful") == [Prompt("a", "2"), Prompt("b"), Prompt("c")]


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
NAMES = TEXTS.map(str.strip).filter(lambda name: name and name.lower() not in ("true", "false"))


@given(
    st.lists(
        st.tuples(TEXTS.filter(str.strip), st.none() | NAMES),
        min_size=1,
    )
)
def test_any_texts(tmp_path: Path, rows: list[tuple[str, str | None]]) -> None:
    objects = [{"text": text, "category": category} for text, category in rows]
    expected = [
        Prompt(text, None if category is None else " ".join(category.lower().split()) or None)
        for text, category in rows
    ]
    write(
        tmp_path / "a.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects)
    )
    write(tmp_path / "b.json", json.dumps(objects))
    for name, delimiter in (("c.csv", ","), ("d.tsv", "\t"), ("e.csv", ";")):
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as sink:
            writer = csv.writer(sink, delimiter=delimiter)
            writer.writerows([("text", "category"), *rows])
    schema = pyarrow.schema({"text": pyarrow.string(), "category": pyarrow.string()})
    table = pyarrow.Table.from_pylist(objects, schema)
    pyarrow.parquet.write_table(table, tmp_path / "f.parquet")
    for path in tmp_path.glob("?.*"):
        found = load_pool(PromptSource(dataset=str(path)), "harmful")
        assert found == expected, path


# The Hub.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a dataset on the Hub, of which `datasets` has two configurations in its cache."""

    for language, suffix in (("en", ""), ("de", "!")):
        features = LABELED.features
        rows = LABELED.map(lambda row, suffix=suffix: {"text": row["text"] + suffix})
        rows.cast(features).to_parquet(tmp_path / f"{language}.parquet")
        files = {"train": tmp_path / f"{language}.parquet"}
        prepare_dataset(tmp_path / "cache", "someone/harm", language, files, "0" * 40)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return "someone/harm"


def test_hub(hub: str) -> None:
    def pool(**options: str) -> list[Prompt]:
        return load_pool(PromptSource(dataset=hub, column="text", **options), "harmful")

    assert pool(config="en", split="train") == [Prompt(*row) for row in LABELED_ROWS]
    assert pool(config="de", split="train[1:2]") == [Prompt("c d!", "fraud")]
    with pytest.raises(ContrastError, match=r'no column "kind" \(its columns are text, category'):
        pool(config="en", split="train", category_column="kind")
    with pytest.raises(
        ContrastError, match=r"could not be loaded from someone/harm \(Unknown split"
    ):
        pool(config="en", split="test")
    for options, name in (
        (PromptSource(dataset=hub, column="text"), "split"),
        (PromptSource(dataset=hub, split="train"), "column"),
    ):
        assert f"give --contrast.bad-prompts.{name}" in refusal(options)


# Lists of sources.


def list_of_sources(directory: Path) -> tuple[list[dict[str, Any]], list[Prompt]]:
    """Writes several pools; returns what names them, and their prompts."""

    sources: list[dict[str, Any]] = [
        {"dataset": str(write(directory / "a.jsonl", JSON_LINES)), "split": "[:2]"},
        {"dataset": str(write(directory / "b.txt", TEXT)), "prefix": "Please:"},
        {"dataset": str(write(directory / "c.csv", "goal,kind\nx,1\n")), "category_column": "kind"},
    ]
    prompts = [Prompt(*row) for row in ROWS[:2]]
    prompts += [Prompt(f"Please: {line}") for line in LINES]
    return sources, [*prompts, Prompt("x", "1")]


def test_lists_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, prompts = list_of_sources(tmp_path)
    settings = host_settings(monkeypatch, "--contrast.bad-prompts", json.dumps(sources))
    assert load_pool(settings.contrast.bad_prompts, "harmful") == prompts
    # As in config.toml, and as a checkpoint stores them.
    table = ContrastSettings.model_validate({"bad_prompts": sources})
    assert table.bad_prompts == settings.contrast.bad_prompts
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = HostSettings.model_validate_json(settings.model_dump_json())
    assert stored.contrast.bad_prompts == settings.contrast.bad_prompts
    scorer = RefusalTiers.validate_settings({"prompts": sources})
    assert load_pool(scorer.prompts, "harmful") == prompts
    empty = write(tmp_path / "empty.txt", "")
    assert load_pool([PromptSource(dataset=str(empty)), *table.bad_prompts], "x") == prompts
    assert "empty.txt, " in refusal([PromptSource(dataset=str(empty))] * 2)


@pytest.mark.parametrize(
    ("value", "flag", "table"),
    [
        (
            '"pool.txt"',
            "bad-prompts does not work (input should be a table",
            '"bad_prompts" in [modifier.',
        ),
        (
            "[]",
            "bad-prompts does not work (list should have at least 1 item",
            '"bad_prompts" in [modifier.',
        ),
        (
            "[3]",
            "--contrast.bad-prompts.0 does not work (input should be a table",
            '"bad_prompts.0" in [modifier.',
        ),
        (
            '[{"dataset": "a"}, {}]',
            "--contrast.bad-prompts.1.dataset is required",
            '"bad_prompts.1.dataset" in [modifier.',
        ),
        ('{"split": "train"}', "bad-prompts.dataset is required", '"bad_prompts.dataset" in ['),
        ('{"dataset": 3}', "bad-prompts.dataset does not", '"bad_prompts.dataset" in ['),
        (
            '[{"dataset": "a", "colum": "b"}]',
            '"colum" in --contrast.bad-prompts.0',
            '"colum" in "bad_prompts.0" in [modifier.ContrastAbliteration]',
        ),
        (
            '[{"dataset": "csv"}]',
            '"csv" is the name of a file format',
            '"csv" is the name of a file',
        ),
        ('{"dataset": " "}', "The name of a dataset is empty", "The name of a dataset is empty"),
    ],
)
def test_messages_name_settings(
    value: str, flag: str, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from heretic_contrast.modifier import ContrastAbliteration

    with pytest.raises(ContrastError) as error:
        host_settings(monkeypatch, "--contrast.bad-prompts", value)
    assert flag in str(error.value)
    with pytest.raises(ContrastError) as table_error:
        ContrastAbliteration.validate_settings({"bad_prompts": json.loads(value)})
    assert table in str(table_error.value)
    for found in (error, table_error):
        assert "PromptSource" not in str(found.value) and "Settings" not in str(found.value)


# What the product writes.


@pytest.mark.parametrize("text", ["a", json.dumps([{"role": "user", "content": "b"}])])
def test_cleaned_pools_are_read_again(text: str, tmp_path: Path) -> None:
    for system in (None, "Be kind."):
        prompts = [
            Prompt(text, category, system if index % 2 else None)
            for index, (text, category) in enumerate([*ROWS, (text, None)])
        ]
        path = tmp_path / f"{system}.jsonl"
        run_audit(prompts, tmp_path, path)
        assert load_pool(PromptSource(dataset=str(path)), "cleaned") == prompts


def test_shipped_pools() -> None:
    refuser = refuser_pool("harmful", "train")
    for source, folder in ((matched_pool(), "matched"), (refuser, "refuser_prompts/harmful")):
        rows = Dataset.from_json(str(DATA / folder / "train.jsonl"))
        found = load_pool(source, "shipped")
        assert [(prompt.text, prompt.category) for prompt in found] == [
            (row["text"], row["category"]) for row in rows
        ]


# Pairs.


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv", "pairs.parquet", "pairs"])
def test_pairs(name: str, tmp_path: Path) -> None:
    pairs = [("Break\u2028in", "Go, in", "violence"), ("Steal", "Buy", None)]
    rows = [dict(zip(("refused", "answered", "category"), pair, strict=True)) for pair in pairs]
    path = tmp_path / name
    if name == "pairs.parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif name == "pairs.csv":
        Dataset.from_list(rows).to_csv(path)
    else:
        write(path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert load_pairs(path) == [Pair(*pair) for pair in pairs]
