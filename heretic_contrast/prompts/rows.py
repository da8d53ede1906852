# SPDX-License-Identifier: AGPL-3.0-or-later

"""Rows of a file or dataset, and the names of files."""

import bz2
import gzip
import lzma
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pyarrow
    from datasets import Features

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
ANY_DELIMITER = ",;\t|"
CSV_DELIMITERS = {".csv": ANY_DELIMITER, ".tsv": "\t", ".tab": "\t"}
TEXT_SUFFIXES = (".txt", ".text")
ARROW_SUFFIXES = (".parquet", ".arrow")
PICKLE_SUFFIXES = (".pkl", ".pickle")
FILE_SUFFIXES = {
    *JSON_SUFFIXES,
    *CSV_DELIMITERS,
    *TEXT_SUFFIXES,
    *ARROW_SUFFIXES,
    *PICKLE_SUFFIXES,
}

COMPRESSIONS: dict[str, tuple[bytes, Callable[[bytes], bytes]]] = {
    ".gz": (b"\x1f\x8b", gzip.decompress),
    ".bz2": (b"BZh91AY&SY", bz2.decompress),
    ".xz": (b"\xfd7zXZ\x00", lzma.decompress),
}
"""Endings of compressed files: what the files start with, and what decompresses them."""


class Row(NamedTuple):
    """A row: where it stands, as messages say it, and its cells by column."""

    place: str
    cells: Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """
    The rows of a file, or of a split of a dataset.

    `name` is what messages call it. `columns` is None for the lines of a text file, which stand under "text".
    `labels` has the names of the integer labels of a column, where the file knows them.
    """

    name: str
    rows: Sequence[Row]
    columns: tuple[str, ...] | None
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def listed_columns(self) -> str:
        names = [name for name in self.columns or () if name]
        return f"its columns are {', '.join(names)}" if names else "it has no columns"


def arrow_rows(
    table: "pyarrow.Table", columns: tuple[str, ...], features: "Features", name: str
) -> Rows:
    rows = [
        Row(f"Row {number} of {name}", cells) for number, cells in enumerate(table.to_pylist(), 1)
    ]
    return Rows(name, rows, columns, labels_of(features))


def labels_of(features: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    from datasets import ClassLabel

    return {
        column: feature.names
        for column, feature in features.items()
        if isinstance(feature, ClassLabel)
    }


def suffix_of(path: Path) -> str:
    """Returns how the name of a file ends, in lower case, with the ending of a compression looked through."""

    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""
