# SPDX-License-Identifier: AGPL-3.0-or-later

"""Writing files so that an interruption never leaves a partial one in place of a whole one."""

import os
import tempfile
from pathlib import Path

from .errors import ContrastError


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """
    Writes `content` to `path` through a temporary file in the same directory.

    Either the old file or the whole new one exists at every moment.

    Raises `ContrastError` when the directory cannot be created, or the file cannot be written.
    """

    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; give it the mode that open() would have given it.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        raise ContrastError(
            f"{path} could not be written ({error.strerror or error}): choose a writable place with enough room."
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def write_text_atomically(path: Path, content: str) -> None:
    """Writes `content` to `path` as UTF-8 text, as `write_bytes_atomically` does."""

    write_bytes_atomically(path, content.encode("utf-8"))


def require_writable_directory(path: Path) -> None:
    """
    Creates the directory `path` where it is missing, and checks that files can be made in it.

    Called before long work, so that hours are not lost to an output that cannot be written.

    Raises `ContrastError` when `path` is not a directory or cannot be written to.
    """

    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ContrastError(
            f"The output directory {path} cannot be written to ({error.strerror or error}): choose another one."
        ) from error
