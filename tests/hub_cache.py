# SPDX-License-Identifier: AGPL-3.0-or-later

"""
A local cache of the Hugging Face Hub, with stand-ins under the names that the documents use.

The layout is that of a cache which the libraries have filled online, so that their own code loads from it offline. The
models are copies of the built-in refuser. The datasets have the sizes, splits and columns of those that they stand in
for, without categories; their harmful prompts have the mix of subjects that the lexicon finds in public ones.
"""

import hashlib
import json
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

import pyarrow
import pyarrow.parquet

from examples.make_refuser import REQUESTS
from heretic_contrast.prompts.categories import assign
from tests.conftest import DATA
from tests.natural_pools import MIX

MODELS = ("Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3.5-2B")

CLASSIFIERS = {
    "protectai/distilroberta-base-rejection-v1": ("NORMAL", "REJECTION"),
    "hubert233/GPTFuzz": ("LABEL_0", "LABEL_1"),
}
"""Text classifiers and their labels."""

HARMFUL = "mlabonne/harmful_behaviors"
HARMLESS = "mlabonne/harmless_alpaca"

SIZES = {HARMFUL: {"train": 416, "test": 104}, HARMLESS: {"train": 25058, "test": 6265}}
"""Prompts by dataset and split, as published."""

CIRCUMSTANCES = (
    "at home",
    "with a friend",
    "on a Sunday",
    "step by step",
    "for the first time",
    "without help",
    "in the evening",
)
"""What makes more harmless prompts of those that are shipped."""

SENSITIVE_SHARE = 0.04
"""Share of the harmless prompts that are on the subject of a harm category."""


def phrases(pool: str, split: str) -> list[str]:
    """Returns what the shipped prompts of a pool are about: verbs with their objects."""

    wordings = [re.compile(re.escape(request).replace(r"\{\}", "(.*)")) for request in REQUESTS]
    lines = (DATA / "refuser_prompts" / pool / f"{split}.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    return [
        next(match[1] for wording in wordings if (match := wording.fullmatch(text)))
        for text in texts
    ]


def worded(phrases: Iterable[str]) -> list[str]:
    """Returns the phrases in every wording that the refuser knows."""

    return [request.format(phrase) for phrase, request in product(phrases, REQUESTS)]


def counts(total: int) -> dict[str, int]:
    """Returns the mix of subjects, scaled to a number of prompts (largest remainders)."""

    exact = {subject: count * total / sum(MIX.values()) for subject, count in MIX.items()}
    found = {subject: int(count) for subject, count in exact.items()}
    by_remainder = sorted(exact, key=lambda subject: found[subject] - exact[subject])
    for subject in by_remainder[: total - sum(found.values())]:
        found[subject] += 1
    return found


def harmful_prompts(split: str) -> list[str]:
    """Returns prompts that the refuser refuses, with the natural mix of subjects, shuffled."""

    generator = random.Random(split)
    by_subject: dict[str, list[str]] = {subject: [] for subject in MIX}
    for text in worded(phrases("harmful", split)):
        by_subject.setdefault(assign(text), []).append(text)
    chosen = [
        text
        for subject, count in counts(SIZES[HARMFUL][split]).items()
        for text in generator.sample(by_subject[subject], count)
    ]
    generator.shuffle(chosen)
    return chosen


def harmless_prompts(split: str) -> list[str]:
    """Returns prompts that the refuser answers; those with circumstances, of which it knows nothing, stand last."""

    generator = random.Random(split)
    plain = phrases("harmless", split)
    first, sensitive = worded(plain), worded(phrases("matched", split))
    first += generator.sample(sensitive, round(len(first) * SENSITIVE_SHARE))
    generator.shuffle(first)
    more = worded(f"{phrase} {where}" for phrase, where in product(plain, CIRCUMSTANCES))
    return (first + more)[: SIZES[HARMLESS][split]]


def write_repository(cache: Path, kind: str, name: str, files: Mapping[str, Path | bytes]) -> Path:
    """
    Writes a repository into the Hub's cache, and returns its snapshot.

    `kind` is "models" or "datasets"; `files` maps paths in the repository to contents, or to files to copy.
    """

    contents = {
        path: source if isinstance(source, bytes) else source.read_bytes()
        for path, source in files.items()
    }
    digests = {path: hashlib.sha256(content).hexdigest() for path, content in contents.items()}
    commit = hashlib.sha1(json.dumps([name, digests], sort_keys=True).encode()).hexdigest()
    folder = cache / f"{kind}--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "blobs").mkdir()
    for path, content in contents.items():
        blob = folder / "blobs" / digests[path]
        blob.write_bytes(content)
        link = snapshot / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def write_model(cache: Path, name: str) -> Path:
    """Writes a copy of the built-in refuser under another name, and returns its snapshot."""

    folder = DATA / "refuser"
    return write_repository(
        cache, "models", name, {path.name: path for path in folder.iterdir() if path.is_file()}
    )


def prepare_dataset(
    cache: Path, name: str, configuration: str, parquet: Mapping[str, Path], commit: str
) -> None:
    """Fills the cache of `datasets` with a dataset of the Hub, from Parquet files by split."""

    from datasets.data_files import DataFilesDict
    from datasets.load import configure_builder_class
    from datasets.packaged_modules.parquet.parquet import Parquet, ParquetConfig

    files = DataFilesDict.from_patterns({split: [str(path)] for split, path in parquet.items()})
    short_name = name.rpartition("/")[2]
    builder_class = configure_builder_class(
        Parquet,
        builder_configs=[ParquetConfig(name=configuration, data_files=files)],
        default_config_name=configuration,
        dataset_name=short_name,
    )
    builder = builder_class(cache_dir=str(cache), dataset_name=short_name, hash=commit)
    # A builder that knows its repository takes no local files in newer versions, so that the place is named here.
    place = cache / name.replace("/", "___") / configuration / "0.0.0" / commit
    builder.download_and_prepare(str(place))


def write_dataset(home: Path, name: str, splits: Mapping[str, Sequence[str]]) -> Path:
    """
    Writes a dataset of one column, "text", as Parquet into the Hub's cache, and returns its snapshot.

    What `datasets` reads offline is the cache that it has made of that itself, so that it makes one here.
    """

    files: dict[str, Path | bytes] = {}
    for split, texts in splits.items():
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), sink)
        files[f"data/{split}-00000-of-00001.parquet"] = sink.getvalue().to_pybytes()
    patterns = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in splits)
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n{patterns}---\n"
    files["README.md"] = card.encode()
    snapshot = write_repository(home / "hub", "datasets", name, files)
    patterns_by_split = {split: snapshot / "data" / f"{split}-*" for split in splits}
    prepare_dataset(home / "datasets", name, "default", patterns_by_split, snapshot.name)
    return snapshot


def write_home(home: Path) -> Path:
    """Fills a folder for the environment variable HF_HOME with all stand-ins, and returns it."""

    from tests.engine.test_text_classification import write_classifier

    for name in MODELS:
        write_model(home / "hub", name)
    for name, labels in CLASSIFIERS.items():
        classifier = write_classifier(home / "classifiers" / name, labels)
        files = {path.name: path for path in classifier.iterdir()}
        write_repository(home / "hub", "models", name, files)
    for name, prompts in ((HARMFUL, harmful_prompts), (HARMLESS, harmless_prompts)):
        write_dataset(home, name, {split: prompts(split) for split in SIZES[name]})
    return home
