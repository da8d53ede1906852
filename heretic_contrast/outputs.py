# SPDX-License-Identifier: AGPL-3.0-or-later

"""What commands write: JSON and CSV, and places that can be written to, which are looked at before long work."""

import csv
import io
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import ContrastError
from .files import SUFFIX, link_target


def json_values(value: Any) -> Any:
    """Returns JSON values of such or dataclasses. JSON knows neither infinite numbers nor such that are none: they become null."""

    # The command line, which imports this file, answers some questions without it.
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value, inf_nan_mode="null")


def json_text(value: Any, sort_keys: bool = True) -> str:
    """Returns `json_values` as text that ends its line; the same value gives the same bytes."""

    # `json.dumps` would keep a list of all pieces.
    buffer = io.StringIO()
    json.dump(json_values(value), buffer, indent=2, sort_keys=sort_keys, ensure_ascii=False)
    buffer.write("\n")
    return buffer.getvalue()


def json_lines(rows: Iterable[Any]) -> str:
    encode = json.JSONEncoder(ensure_ascii=False).encode
    return "".join(encode(json_values(row)) + "\n" for row in rows)


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Returns rows as CSV text; None becomes an empty cell."""

    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def require_writable_directory(path: Path) -> None:
    """
    Creates the directory `path` where it is missing, and checks that files can be made in it.

    Called before long work, so that hours are not lost to an output that cannot be written.

    Raises `ContrastError` when `path` is not a directory or cannot be written to.
    """

    try:
        _made.extend(folder for folder in (path, *path.parents) if not folder.exists())
        path.mkdir(parents=True, exist_ok=True)
        # On Windows, tempfile takes a refusal for a name that is taken, and tries others without end.
        probe = path / f".writable{SUFFIX}"
        probe.touch()
        # Another process may have removed it.
        with suppress(OSError):
            probe.unlink()
    except OSError as error:
        reason = "it is a file" if path.is_file() else error.strerror or error
        raise ContrastError(
            f"The output directory {path} cannot be written to ({reason}): choose another one."
        ) from error


_made: list[Path] = []
"""The directories that this process has created before it had anything to write."""


def remove_empty_directories() -> None:
    """Removes those that `require_writable_directory` has created and nothing was written to."""

    for folder in sorted(_made, key=lambda folder: -len(folder.parts)):
        with suppress(OSError):
            folder.rmdir()
    _made.clear()


def require_writable_file(path: Path, inputs: Iterable[str] = ()) -> None:
    """
    Checks that a file of this name can be made, and creates the directory that it will lie in.

    `inputs`: names of what is read, which may be files or folders. Raises `ContrastError` when `path` is one of them or a part
    of it, or is anything but a file, or its directory cannot be written to.
    """

    if os.path.isdir(path):
        raise ContrastError(f"{path} is a directory: give the name of a file to write.")
    if path.exists() and not path.is_file():
        # It would be replaced by a file.
        raise ContrastError(
            f"{path} is a device, a pipe or a socket: give the name of a file to write."
        )
    # Of safetensors in a folder, those of a model bear these names: others may be directions that were made from it.
    is_part = path.suffix != ".safetensors" or path.name.startswith(("model", "adapter_model"))
    folders = path.resolve().parents if is_part else ()
    for name in filter(os.path.exists, inputs):
        is_read = path.exists() and path.samefile(name)
        if is_read or Path(name).resolve() in folders:
            where = "is read" if is_read else f"lies in {name}, which is read"
            raise ContrastError(
                f"{path} {where}, so it cannot be written as well: give another name for what is written."
            )
    require_writable_directory(link_target(path).parent)
