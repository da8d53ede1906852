# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The formats that files of prompts come in.

Text, JSON and CSV are read here, so that a file that is not what it seems is said to be, and "NA" or "007" stay what
they are. Nothing is unpickled.
"""

import csv
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import ContrastError, one_line
from ..settings import CATEGORY_COLUMN, PROMPT_COLUMNS
from .rows import (
    ANY_DELIMITER,
    ARROW_SUFFIXES,
    COMPRESSIONS,
    CSV_DELIMITERS,
    JSON_SUFFIXES,
    PICKLE_SUFFIXES,
    TEXT_SUFFIXES,
    Row,
    Rows,
    arrow_rows,
    suffix_of,
)

TEXT_FORMATS = frozenset(
    ".bib .cfg .conf .htm .html .ini .ipynb .js .log .markdown .md .org .py .rst .rtf .sql .tex .toml .xhtml .xml .yaml .yml".split()
)
"""Names of formats of text whose lines are no prompts."""

BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}

JSON_START = re.compile(r'\s*(\[\s*["{\]]|\{\s*["}])')
NO_PROMPTS = {
    "a web page or XML": re.compile(
        r"\s*<(!doctype|html|\?xml)|\s*<(\w+)[^>]*>\s*\n.*</\2>\s*\Z", re.IGNORECASE | re.DOTALL
    ),
    "a pointer of Git LFS": re.compile(r"version https://git-lfs"),
    "a pickle": re.compile(r"\([a-z]p\d+\r?\n"),
}
"""What text may be that is no prompts, by how it starts."""

NO_PROMPT = re.compile(
    # Punctuation alone, such as the rules of a table; keys and tables of YAML, TOML and the like; rows of a Markdown table.
    r"[!-/:-@\[-`{-~\s]+|[\w-]+:|\[[\w .-]+\]|\w+ *= *[\"'\[{].*|\|.*\|"
    rf"|(- )?[\"']?({'|'.join(PROMPT_COLUMNS)})[\"']?: .*"
)
"""A line of a file that is no text with one prompt per line."""

TABLE_RULE = re.compile(r"[\s:-]*-[\s:-]*")
LIST_MARKER = re.compile(r"([-*•]|\(?\d{1,4}[.)])\s+|([\"']).*\2,?$")
ONE_PER_LINE = "give text with one prompt per line and nothing else, JSON Lines, CSV or Parquet"

SEPARATOR = re.compile(rf'"?sep=([{ANY_DELIMITER}])"?(?=[\r\n])')
"""The line before the header that tells Excel how cells are separated."""

JSON_SPACE = re.compile(r"[ \t\n\r]*")
LINE_END = re.compile(r"(?:\r\n|\r|\n)\ufeff?")
"""The end of a line, with the byte order mark of another file that was put behind it."""


def read_file(path: Path, columns: Collection[str]) -> Rows:
    """
    Returns the rows of a file; Parquet and Arrow are read for the given columns alone.

    The name tells the format; where it does not, the content. Raises `ContrastError` when the file cannot be read, or is
    not what it seems.
    """

    suffix = suffix_of(path)
    if suffix in PICKLE_SUFFIXES:
        raise ContrastError(
            f"{path} is named like a pickle, which can run any code: save the prompts as JSON Lines."
        )
    if suffix in TEXT_FORMATS:
        raise ContrastError(f"{path} has a format that no prompts are read from: {ONE_PER_LINE}.")
    if not path.exists():
        raise ContrastError(f"There is no file {path}: give the name of one.")
    try:
        content = path.read_bytes()
        for start, decompress in COMPRESSIONS.values():
            if content.startswith(start):
                content = decompress(content)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise ContrastError(f"{path} cannot be read ({error}): give another file.") from error
    if content.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        return _read_arrow(content, path, columns)
    text = _decoded(content, path)
    for what, beginning in NO_PROMPTS.items():
        if beginning.match(text):
            raise ContrastError(f"{path} holds {what} instead of prompts: give the file itself.")
    if suffix in JSON_SUFFIXES:
        return _read_json(text, path, columns)
    delimiters = CSV_DELIMITERS.get(suffix, ANY_DELIMITER)
    if named := SEPARATOR.match(text):
        # The line's end stays, so that the others keep their numbers.
        delimiters, text = named[1], text[named.end() :]
    if suffix in CSV_DELIMITERS:
        return _read_csv(text, path, columns, delimiters)
    found = ""
    if JSON_START.match(text):
        found = ".jsonl"
    else:
        header = {*_csv_header(text, _delimiter(text, delimiters))} - {""}
        if len(header) > 1 and not header.isdisjoint(columns):
            found = ".csv"
    if suffix in ARROW_SUFFIXES or (found and suffix in TEXT_SUFFIXES):
        raise ContrastError(
            f"{path} does not hold what its name says: name it after what it holds"
            f"{f', such as {path.stem}{found}' if found else ''}."
        )
    if found:
        return (
            _read_json(text, path, columns)
            if found == ".jsonl"
            else _read_csv(text, path, columns, delimiters)
        )
    return _read_text(text, path)


def _read_text(text: str, path: Path) -> Rows:
    rows = [
        Row(f"Line {number} of {path}", {"text": line.strip()})
        for number, line in enumerate(LINE_END.split(text), 1)
        if line.strip()
    ]
    for place, cells in rows:
        if NO_PROMPT.fullmatch(cells["text"]):
            raise ContrastError(f'{place} is no prompt ("{cells["text"][:50]}"): {ONE_PER_LINE}.')
    marked = [row.place for row in rows if LIST_MARKER.match(row.cells["text"])]
    if len(marked) > 1 and len(marked) >= 0.9 * len(rows):
        raise ContrastError(
            f"{marked[0]} has the mark of a list before it or quotation marks around it, as most lines do, which would be part of the prompts: remove the marks."
        )
    return Rows(str(path), rows, None)


def _decoded(content: bytes, path: Path) -> str:
    """
    Returns the text of a file: UTF-8, or whatever a byte order mark says.

    Raises `ContrastError` when it is no such text; a guess of the encoding could be wrong without anyone seeing it.
    """

    encoding = next(
        (name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8"
    )
    is_binary = b"\0" in content and encoding.startswith("utf-8")
    try:
        text = "" if is_binary else content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ContrastError(
            f"Line {line} of {path} is not {encoding.removesuffix('-sig').upper()}: save the file with the encoding UTF-8."
        ) from error
    if is_binary or "\0" in text:
        raise ContrastError(
            f"{path} holds binary data instead of prompts: give text, JSON, CSV, Parquet or Arrow."
        )
    return text


def _read_arrow(content: bytes, path: Path, columns: Collection[str]) -> Rows:
    import pyarrow
    import pyarrow.parquet
    from datasets import Features

    try:
        if content.startswith(b"PAR1"):
            file = pyarrow.parquet.ParquetFile(io.BytesIO(content))
            names = file.schema_arrow.names
            table = file.read(columns=[name for name in names if name in columns])
        else:
            is_file = content.startswith(b"ARROW1")
            open_arrow = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
            table = open_arrow(content).read_all()
            names = table.column_names
            table = table.select([name for name in names if name in columns])
    except (pyarrow.ArrowException, OSError) as error:
        reason = one_line(str(error))
        raise ContrastError(f"{path} is damaged ({reason}): get it again.") from error
    return arrow_rows(table, tuple(names), Features.from_arrow_schema(table.schema), str(path))


def _read_json(text: str, path: Path, columns: Collection[str]) -> Rows:
    """
    Returns the rows of JSON: objects or texts one after the other (JSON Lines, say), one list of them, or an object of columns.

    Raises `ContrastError` when the text is not that.
    """

    # What is cut off ends in its own line, not in an empty one after it.
    text = text.rstrip()
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    values: list[tuple[str, Any]] = []
    line = 1
    start, end = 0, 0
    while (next_start := JSON_SPACE.match(text, end).end()) < len(text):  # type: ignore[union-attr]
        line += text.count("\n", start, next_start)
        start = next_start
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", line)
            reason = getattr(error, "msg", str(error))
            raise ContrastError(
                f"Line {line} of {path} is not JSON ({reason}): correct it, or name the file after what it holds."
            ) from error
        values.append((f"Line {line} of {path}", value))
    if len(values) == 1 and isinstance(values[0][1], dict):
        values = [(values[0][0], _rows_of_columns(values[0][1], path, columns))]
    if len(values) == 1 and isinstance(values[0][1], list):
        values = [
            (f"Item {number} of {path}", value) for number, value in enumerate(values[0][1], 1)
        ]
    rows = []
    for place, value in values:
        if not isinstance(value, dict | str):
            raise ContrastError(
                f'{place} is neither a JSON object nor a text: write it like {{"text": "..."}}.'
            )
        rows.append(Row(place, {"text": value} if isinstance(value, str) else value))
    return Rows(str(path), rows, tuple(dict.fromkeys(name for row in rows for name in row.cells)))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object. Raises `ValueError` where a key stands twice, of which one value would be lost."""

    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f'an object has the key "{twice}" twice')
    return found


def _rows_of_columns(
    table: dict[str, Any], path: Path, columns: Collection[str]
) -> dict[str, Any] | list[dict[str, Any]]:
    """
    Returns the rows of an object of columns, each a list, or an object of values by row as pandas writes it; another object
    is a row.

    Raises `ContrastError` when columns differ in length, or the object holds prompts in a way that is not read.
    """

    values = {
        name: list(value.values()) if isinstance(value, dict) else value
        for name, value in table.items()
        if isinstance(value, dict | list)
    }
    # The turns of one conversation are no column of prompts.
    turns = {
        name
        for name, value in table.items()
        if isinstance(value, list) and any(isinstance(item, dict) for item in value)
    }
    if not (set(columns) - {CATEGORY_COLUMN} - turns).isdisjoint(values):
        rows = {
            tuple(value) if isinstance(value, dict) else len(value)
            for value in table.values()
            if isinstance(value, dict | list)
        }
        if len(values) < len(table) or len(rows) > 1:
            raise ContrastError(
                f"{path} is an object of columns that differ in length, or are none: correct it."
            )
        return [
            dict(zip(values, cells, strict=True)) for cells in zip(*values.values(), strict=True)
        ]
    if set(columns).isdisjoint(table) and any(
        isinstance(value, list | dict) for value in table.values()
    ):
        raise ContrastError(
            f"{path} is one object with {', '.join(table)} instead of prompts: give one list of objects or texts, JSON Lines, or an "
            "object of columns; splits as a file each."
        )
    return table


def _delimiter(text: str, delimiters: str) -> str:
    """Returns the delimiter that makes most columns of the header, the first of several."""

    return max(delimiters, key=lambda delimiter: len(_csv_header(text, delimiter)))


def _csv_header(text: str, delimiter: str) -> list[str]:
    try:
        # A quotation may begin after a space.
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True
        )
        cells = next(filter(None, reader), [])
    except csv.Error:
        return []
    return [cell.strip() for cell in cells]


def _read_csv(text: str, path: Path, columns: Collection[str], delimiters: str) -> Rows:
    """
    Returns the rows of CSV with a header.

    Raises `ContrastError` when a quotation is not closed, a row has more cells than the header, or a column is ambiguous.
    """

    delimiter = _delimiter(text, delimiters)
    header = _csv_header(text, delimiter)
    # Whoever writes a space after each comma means no text that begins with one.
    is_spaced = (
        re.match(rf"[\r\n]*[^{re.escape(delimiter)}\n]*{re.escape(delimiter)} ", text) is not None
    )
    for name in columns:
        if header.count(name) > 1:
            raise ContrastError(f'{path} has several columns "{name}": rename all but one.')
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=is_spaced, strict=True
    )
    rows = []
    line = 1
    try:
        for cells in reader:
            if len(cells) > len(header):
                raise ContrastError(
                    f"Line {line} of {path} has {len(cells)} cells where the header has {len(header)}: "
                    "put texts that hold a comma or a quotation mark into quotation marks."
                )
            if cells:
                rows.append(Row(f"Line {line} of {path}", dict(zip(header, cells, strict=False))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ContrastError(f"Line {line} of {path} is not CSV ({error}): correct it.") from error
    if rows[1:] and delimiter == "|" and TABLE_RULE.fullmatch("".join(rows[1].cells.values())):
        raise ContrastError(f"{path} is a table of Markdown: {ONE_PER_LINE}.")
    return Rows(str(path), rows[1:], tuple(header))
