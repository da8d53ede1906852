# SPDX-License-Identifier: AGPL-3.0-or-later

"""Which process something belongs to, whether that process is gone, and what this one does on a signal."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from filelock import FileLock, Timeout

from .errors import ContrastError

LOCK = ".lock"
"""The file in a folder that says that a process works there."""


def _host() -> str:
    """Returns the name of the host and, on Linux, the number of the namespace in which its processes have their numbers."""

    with suppress(OSError):
        # Containers may bear one name, and number their processes each by itself.
        return f"{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def this_process() -> str:
    """Returns the name of the host, as `_host`, and the number of this process, separated by a space."""

    return f"{_host()} {os.getpid()}"


def is_dead(process: str) -> bool:
    """
    Returns whether a process, named as by `this_process`, is known to have ended.

    Nothing is known of processes on other machines and in other containers.
    """

    host, _, number = process.rpartition(" ")
    if host != _host() or not number.isdecimal():
        return False
    try:
        # No signal of its own: on Windows, number 0 is Ctrl+C and reaches the process.
        return not psutil.pid_exists(int(number))
    except OverflowError:
        return False


@contextmanager
def alone_in(folder: Path, advice: str) -> Iterator[None]:
    """
    Keeps a folder to this process for as long as the context lasts; the operating system takes it from a process that died.

    Raises `ContrastError` when another process has it. `advice`: what to do then but wait.
    """

    lock = FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise ContrastError(
            f"Another process works in {folder}: wait for it to end, or {advice}."
        ) from error
    except (OSError, NotImplementedError):
        # On a file system that knows no locks nobody is noticed.
        pass
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
        lock.release()


@contextmanager
def handling(number: int, handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Handles a signal for as long as the context lasts, in the main thread, which alone may."""

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)
