# SPDX-License-Identifier: AGPL-3.0-or-later

"""Writing files so that an interruption never leaves a partial one in place of a whole one, and digests of what is kept."""

import glob
import hashlib
import json
import os
import time
import uuid
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import ContrastError
from .processes import is_dead, this_process

SUFFIX = ".incomplete"
"""How the names of temporary files end."""


def link_target(path: Path) -> Path:
    """Returns what is written where a file is a link, which stays one; any other path unchanged."""

    return Path(os.path.realpath(path)) if path.is_symlink() else path


def replace(source: Path, target: Path) -> None:
    """Does what `os.replace` does. Windows refuses it while somebody looks at the file, so that it is tried for 2 s there."""

    for _ in range(10 if os.name == "nt" else 0):
        with suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.2)
    os.replace(source, target)


def write_bytes_atomically(path: Path, *content: bytes | memoryview) -> None:
    """
    Writes `content`, one piece after the other, to `path` through a temporary file in the same directory.

    Either the old file or the whole new one exists at every moment. What killed processes left of earlier attempts at
    the same file is removed.

    Raises `ContrastError` when the directory cannot be created, or the file cannot be written.
    """

    path = link_target(path)
    # Its name says whose it is, so that what was left can be told from what is being written.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{this_process()}{SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.????????.*{SUFFIX}"):
            if is_dead(leftover.name[len(path.name) + 11 : -len(SUFFIX)]):
                leftover.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except OSError as error:
        raise ContrastError(
            f"{path} could not be written ({error.strerror or error}): choose a writable place with enough room, or close it where it is open."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def usual_mode() -> int:
    """Returns the mode that open() would give a new file."""

    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_text_atomically(path: Path, content: str) -> None:
    write_bytes_atomically(path, content.encode("utf-8"))


def digest(content: Any) -> str:
    """Returns a digest of JSON values; what is none is taken as text."""

    text = json.dumps(content, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_digest(path: Path) -> str:
    """Returns a digest of a file's content. Raises `OSError` when it cannot be read."""

    status = path.stat()
    return _file_digest(str(path.resolve()), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _file_digest(path: str, size: int, time: int) -> str:
    """Reads a file once for as long as its size and its time stay the same."""

    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            found.update(chunk)
    return found.hexdigest()
