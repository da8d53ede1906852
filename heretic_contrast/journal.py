# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Journals of Optuna studies that survive interrupted writes, and whose damage is noticed.

The format is that of Optuna's own `JournalFileBackend`, one JSON object per line, with a checksum behind each. Either
backend reads what the other wrote.

What Optuna's does not do: a process that is killed in the middle of a write, or runs out of disk, leaves half a line there,
to which the next one appends; and a number in which a bit has flipped is read as if it had been measured.
"""

import glob
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend, JournalFileOpenLock

from .errors import ContrastError

CHECKSUM = re.compile(rb'(.*),"crc32":"([0-9a-f]{8})"\}\n', re.DOTALL)
"""A line with its checksum, which is taken of everything before it."""


READING = "could not be read ({}): make it readable, or choose another place."
WRITING = "could not be written ({}): what it holds is kept; choose a writable place with enough room, or make room and resume."


def remove_locks(path: Path) -> None:
    """Removes the lock of a journal, and what killed processes left of it, where no other process can be alive."""

    for lock in path.parent.glob(f"{glob.escape(path.name)}.lock*"):
        lock.unlink(missing_ok=True)


class CheckedJournal(BaseJournalBackend):
    """
    A journal file. The arguments are those of Optuna's `JournalFileBackend`.

    Reading and writing raise `ContrastError` when a line is damaged, or the file cannot be read or written.
    """

    def __init__(self, file_path: str, lock_obj: JournalFileOpenLock | None = None) -> None:
        self._path = file_path
        self._lock = lock_obj or JournalFileOpenLock(file_path)
        # Where each line starts, so that only new ones are read.
        self._offsets = {0: 0}
        with _named(self._path, WRITING), open(self._path, "ab"):
            pass

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yields the entries from a number on."""

        number = log_number_from if log_number_from in self._offsets else 0
        with _named(self._path, READING), open(self._path, "rb") as file:
            file.seek(self._offsets[number])
            for line in file:
                if not line.endswith(b"\n"):
                    # Another process is writing it, or never finished it.
                    return
                entry = self._decode(line, number + 1)
                self._offsets[number + 1] = self._offsets[number] + len(line)
                number += 1
                if number > log_number_from:
                    yield entry

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Appends entries, all of them or none."""

        content = b"".join(map(_encode, logs))
        with (
            _named(self._path, WRITING),
            self._locked(),
            open(self._path, "r+b", buffering=0) as file,
        ):
            end = _end_of_last_line(file)
            # Nobody else writes as long as the lock is held, so that half a line is a leftover.
            file.truncate(end)
            file.seek(end)
            try:
                rest = memoryview(content)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(end)
                raise

    def _decode(self, line: bytes, number: int) -> dict[str, Any]:
        """Returns an entry; one that Optuna wrote has no checksum."""

        checked = CHECKSUM.fullmatch(line)
        if checked is None or zlib.crc32(checked[1]) == int(checked[2], 16):
            with suppress(ValueError, RecursionError):
                entry = json.loads(line)
                if isinstance(entry, dict) and "op_code" in entry:
                    return entry
        if number == 1 and b"op_code" not in line and b"crc32" not in line:
            advice = "give the name of a new file, or that of a journal, or move a damaged one away to start from scratch"
            if line.startswith(b"SQLite format 3\0"):
                advice = f"it is a database, so give sqlite:///{self._path}"
            raise ContrastError(f"{self._path} holds no journal of a study: {advice}.")
        raise ContrastError(
            f"{self._path} is damaged in line {number}: delete that line and all after it to resume from what was "
            "finished before, or move the file away to start from scratch."
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._lock.acquire()
        try:
            yield
        finally:
            # Somebody may have given up on this process, which has finished all the same.
            with suppress(RuntimeError):
                self._lock.release()


@contextmanager
def _named(path: str, advice: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ContrastError(f"{path} {advice.format(error.strerror or error)}") from error


def _encode(entry: dict[str, Any]) -> bytes:
    content = json.dumps(entry, separators=(",", ":")).encode()[:-1]
    return content + b',"crc32":"%08x"}\n' % zlib.crc32(content)


def _end_of_last_line(file: FileIO) -> int:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 1, 0))
    if file.read(1) == b"\n":
        return size
    file.seek(0)
    return file.readall().rfind(b"\n") + 1
