# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The one reader of prompts: rows of a dataset on the Hub, a saved dataset, a folder or a file, and their splits.

`datasets` reads the first two and says which files of a folder belong to which split; files are read by `formats`.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from ..errors import ContrastError, warn
from ..settings import PromptSource
from .rows import FILE_SUFFIXES, Rows, arrow_rows, labels_of, suffix_of

if TYPE_CHECKING:
    from datasets import Dataset

Setting = Callable[[str], str]
"""Returns what messages call a field of a source, such as "--contrast.bad-prompts.split" for "split"."""


def read_rows(source: PromptSource, columns: Collection[str], setting: Setting) -> Rows:
    """
    Returns the rows that a source names; Parquet and Arrow are read for the given columns alone.

    Raises `ContrastError` when a file is not what it seems, or is asked for what it does not have; what `datasets` raises
    is not caught.
    """

    path = Path(source.dataset)
    if not path.exists():
        return _read_hub(source, columns, setting)
    saved = path.is_dir() and any(
        (path / name).is_file() for name in ("state.json", "dataset_dict.json")
    )
    if source.commit is not None:
        raise ContrastError(
            f"{setting('commit')} is given, but {path} is not on the Hugging Face Hub: leave it out."
        )
    if source.config is not None and (saved or path.is_file()):
        raise ContrastError(
            f"{setting('config')} is given, but {path} has no configurations: leave it out."
        )
    if path.is_file():
        # Heretic's own pools are on the Hub, and read by `datasets`.
        from .formats import read_file

        rows = read_file(path, columns)
        # As in Heretic, the lines of a text file are of whatever split is asked for.
        return _take_split({"train": lambda: rows}, source, setting, rows.columns is None)
    if not saved:
        return _take_split(_folder(path, source.config, columns), source, setting)
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(path))
    parts = dataset if isinstance(dataset, DatasetDict) else {dataset.split or "train": dataset}
    for file in (file["filename"] for part in parts.values() for file in part.cache_files):
        _require_inside(path, file, path)
    return _take_split(
        {
            str(name): partial(_dataset_rows, part, str(path), columns)
            for name, part in parts.items()
        },
        source,
        setting,
        # As in Heretic, a dataset that does not know its split is of whatever split is asked for.
        not isinstance(dataset, DatasetDict) and dataset.split is None,
    )


def _take_split(
    splits: Mapping[str, Callable[[], Rows]],
    source: PromptSource,
    setting: Setting,
    any_name: bool = False,
) -> Rows:
    """
    Returns the rows of the split that a source asks for, such as "train[:400]", "[10:]" or "train[:10%]+test".

    `splits`: what reads each split. `any_name`: whether the only one may be asked for by any name.
    """

    names = list(splits)
    if source.split is None and len(names) > 1:
        raise ContrastError(
            f"{source.dataset} has the splits {', '.join(names)}: choose with {setting('split')}."
        )
    if source.split is None:
        return splits[names[0]]()
    from datasets import ReadInstruction

    read: dict[str, Rows] = {}
    parts = []
    for part in source.split.split("+"):
        name, bracket, piece = part.strip().partition("[")
        if len(names) == 1 and (any_name or not name):
            name = names[0]
        if name not in splits:
            raise ContrastError(
                f'{source.dataset} has no split "{name}", only {", ".join(names)}: correct {setting("split")}.'
            )
        if name not in read:
            read[name] = splits[name]()
        parts.append(name + bracket + piece)
    try:
        slices = ReadInstruction.from_spec("+".join(parts)).to_absolute(
            {name: len(rows.rows) for name, rows in read.items()}
        )
    except ValueError as error:
        raise ContrastError(
            f'{setting("split")} is "{source.split}", which cannot be read: write it like "train[:400]".'
        ) from error
    return _joined(
        source.dataset,
        [
            replace(read[piece.splitname], rows=read[piece.splitname].rows[piece.from_ : piece.to])
            for piece in slices
        ],
    )


def _joined(name: str, pieces: Sequence[Rows]) -> Rows:
    columns = dict.fromkeys(column for piece in pieces for column in piece.columns or ())
    return Rows(
        name,
        [row for piece in pieces for row in piece.rows],
        None if all(piece.columns is None for piece in pieces) else tuple(columns),
        {column: names for piece in pieces for column, names in piece.labels.items()},
    )


def _read_hub(source: PromptSource, columns: Collection[str], setting: Setting) -> Rows:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(source.dataset)
        is_path = suffix_of(Path(source.dataset)) in FILE_SUFFIXES
    except HFValidationError:
        is_path = True
    if is_path:
        raise FileNotFoundError("there is no such file or folder")
    for name, example in (("split", "train[:400]"), ("column", "text")):
        if getattr(source, name) is None:
            raise ContrastError(
                f"There is no file or folder {source.dataset}, and a dataset on the Hugging Face Hub is not used without a "
                f'{name}: give {setting(name)}, such as "{example}", or correct the path.'
            )
    from datasets import load_dataset

    dataset = load_dataset(
        source.dataset, source.config, revision=source.commit, split=source.split
    )
    rows = _dataset_rows(dataset, f"{source.dataset} ({source.split})", columns)
    if dataset.info.builder_name == "text":
        # As in a text file, empty lines are no prompts.
        return replace(rows, rows=[row for row in rows.rows if row.cells["text"].strip()])
    return rows


def _folder(
    path: Path, config: str | None, columns: Collection[str]
) -> dict[str, Callable[[], Rows]]:
    """Returns what reads each split of a folder of data files; `datasets` says which files belong to which."""

    import datasets.data_files
    from datasets import load_dataset_builder

    from .formats import read_file

    place = path.resolve()
    if re.search(r"[\[*?]|::", str(place)):
        raise ContrastError(
            f'The path of the folder {path} has "[", "*", "?" or "::", a pattern that another folder may fit: rename it, or give files.'
        )
    resolve = datasets.data_files.resolve_pattern

    def resolve_inside(pattern: str, base_path: str, *others: Any, **options: Any) -> list[str]:
        _require_inside(place, os.path.join(base_path, pattern), path)
        return resolve(pattern, base_path, *others, **options)

    # All that the folder's README.md and its like name comes there, before anything is looked for.
    with patch.object(datasets.data_files, "resolve_pattern", resolve_inside):
        builder = load_dataset_builder(str(place), config)
    files = {Path(file).resolve() for split in builder.config.data_files.values() for file in split}
    others = (file for file in place.rglob("*") if file.is_file() and file.resolve() not in files)
    unread = sorted(
        name
        for name in (file.relative_to(place).as_posix() for file in others)
        # What is hidden, and folders like __MACOSX, `datasets` never looks at.
        if suffix_of(Path(name)) in FILE_SUFFIXES
        and not re.search(r"(^|/)(\.|__[^/]*/|dataset_info)", name)
    )
    # One of several configurations is not meant to read them all.
    if unread and builder.config.name == "default":
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        warn(
            f"{path} holds {', '.join(unread[:3])}{more}, which are not read: give each as a source."
        )
    labels = labels_of(builder.info.features or {})

    def read(files: Sequence[str]) -> Rows:
        rows = _joined(str(path), [read_file(Path(file), columns) for file in files])
        return replace(rows, labels={**rows.labels, **labels})

    return {str(name): partial(read, files) for name, files in builder.config.data_files.items()}


def _require_inside(place: Path, file: str, name: Path) -> None:
    """Raises `ContrastError` when a folder names a file, or a pattern of files, that does not lie in it."""

    # It may be named by a link.
    folders = {Path(os.path.abspath(folder)) for folder in (place, name)}
    inside = not folders.isdisjoint(Path(os.path.abspath(file)).parents)
    if "://" in file or not inside:
        raise ContrastError(
            f"The folder {name} names {file}, which lies outside it: give the files themselves."
        )


def _dataset_rows(dataset: "Dataset", name: str, columns: Collection[str]) -> Rows:
    kept = [column for column in dataset.column_names if column in columns]
    table = dataset.select_columns(kept).with_format("arrow")[:]
    return arrow_rows(table, tuple(dataset.column_names), dataset.features, name)
