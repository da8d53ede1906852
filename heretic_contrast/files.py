# SPDX-License-Identifier: AGPL-3.0-or-later

"""Writing files so that an interruption never leaves a partial one in place of a whole one."""

import glob
import hashlib
import os
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

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
    if fcntl is None:
        return
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.????????{SUFFIX}"):
        with suppress(OSError), leftover.open("r+b") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def write_text_atomically(path: Path, content: str) -> None:
    """Writes `content` to `path` as UTF-8 text, as `write_bytes_atomically` does."""

    write_bytes_atomically(path, content.encode("utf-8"))


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
