# SPDX-License-Identifier: AGPL-3.0-or-later

"""Writing files so that an interruption never leaves a partial one in place of a whole one."""

import csv
import glob
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import ContrastError

try:
    import fcntl
except ImportError:
    # Windows.
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".incomplete"
"""How the names of temporary files end."""


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """
    Writes `content` to `path` through a temporary file in the same directory.

    Either the old file or the whole new one exists at every moment. What killed processes left of earlier attempts at
    the same file is removed.

    Raises `ContrastError` when the directory cannot be created, or the file cannot be written.
    """

    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        descriptor, temporary = _open_temporary(path)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            # mkstemp makes the file private.
            os.chmod(temporary, usual_mode())
            if fcntl is None:
                # Windows moves no open file. Elsewhere the lock is kept until the file has its name.
                file.close()
            os.replace(temporary, path)
    except OSError as error:
        raise ContrastError(
            f"{path} could not be written ({error.strerror or error}): choose a writable place with enough room."
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def usual_mode() -> int:
    """Returns the mode that open() would give a new file."""

    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _open_temporary(path: Path) -> tuple[int, str]:
    """Returns the descriptor and the name of a new temporary file, locked for as long as it is open."""

    while True:
        descriptor, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=SUFFIX
        )
        if fcntl is not None:
            # Some file systems know no locks; leftovers stay there.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Another process may have taken it for a leftover before it was locked.
        if os.path.exists(temporary):
            return descriptor, temporary
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Removes the temporary files of `path` that no process holds."""

    if fcntl is None:
        return
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.????????{SUFFIX}"):
        with suppress(OSError), leftover.open("r+b") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def write_text_atomically(path: Path, content: str) -> None:
    """Writes `content` to `path` as UTF-8 text, as `write_bytes_atomically` does."""

    write_bytes_atomically(path, content.encode("utf-8"))


def json_text(value: Any, sort_keys: bool = True, indent: int | None = 2) -> str:
    """
    Returns JSON text; the same value gives the same bytes.

    JSON knows neither infinite numbers nor such that are none: they become null.
    """

    return json.dumps(
        _finite(value), indent=indent, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


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
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ContrastError(
            f"The output directory {path} cannot be written to ({error.strerror or error}): choose another one."
        ) from error


_made: list[Path] = []
"""The directories that this process has created before it had anything to write."""


def remove_empty_directories() -> None:
    """Removes those that `require_writable_directory` has created and nothing was written to."""

    for folder in sorted(_made, key=lambda folder: -len(folder.parts)):
        with suppress(OSError):
            folder.rmdir()
    _made.clear()


def require_writable_file(path: Path) -> None:
    """
    Checks that a file of this name can be made, and creates the directory that it will lie in.

    Raises `ContrastError` when `path` is a directory, or its directory cannot be written to.
    """

    if os.path.isdir(path):
        raise ContrastError(f"{path} is a directory: give the name of a file to write.")
    require_writable_directory(path.parent)


LARGE = 2**26
"""From how many bytes on a file is identified by its size, where reading it takes too long for what it is."""


def path_digest(
    path: Path, patterns: Sequence[str] = ("**/*",), ignored: Path | None = None
) -> str:
    """
    Returns a digest of a file, or of files in a folder with their names.

    `patterns`: which files of a folder. `ignored`: a folder whose files do not count. Of a large file, such as the weights of a
    model, only the size is looked at; what cannot be read is named by whoever needs it.
    """

    files = [path] if os.path.isfile(path) else []
    # Asked of a name that is too long, the methods of a path raise errors.
    if os.path.isdir(path):
        files = [file for part in patterns for file in path.glob(part)]
    found = []
    for file in files:
        with suppress(OSError):
            # A pipe would be waited for.
            if file.is_file() and (
                ignored is None or ignored.absolute() not in file.absolute().parents
            ):
                size = file.stat().st_size
                content = file_digest(file) if size < LARGE else str(size)
                found.append(f"{file.relative_to(path)} {content}")
    return hashlib.sha256("\n".join(sorted(found)).encode("utf-8", "replace")).hexdigest()


def file_digest(path: Path) -> str:
    """Returns a digest of a file's content. Raises `OSError` when it cannot be read."""

    status = path.stat()
    return _file_digest(str(path.resolve()), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _file_digest(path: str, size: int, time: int) -> str:
    """Reads a file once for as long as its size and its time stay the same."""

    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
