# SPDX-License-Identifier: AGPL-3.0-or-later

"""Which process something belongs to, whether that process is gone, and what this one does on a signal."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import psutil


def this_process() -> str:
    """Returns the name of the host and the number of this process, separated by a space."""

    return f"{socket.gethostname()} {os.getpid()}"


def _number_here(process: str) -> int | None:
    """Returns the number of a process, named as by `this_process`, of this machine; None for those of others."""

    host, _, number = process.rpartition(" ")
    return int(number) if host == socket.gethostname() and number.isdecimal() else None


def is_dead(process: str) -> bool:
    """
    Returns whether a process, named as by `this_process`, is known to have ended.

    Nothing is known of processes on other machines.
    """

    number = _number_here(process)
    try:
        # No signal of its own: on Windows, number 0 is Ctrl+C and reaches the process.
        return number is not None and not psutil.pid_exists(number)
    except OverflowError:
        return False


def runs_since(process: str, moment: float) -> bool:
    """Returns whether a process, named as by `this_process`, is known to run that had begun by a moment, in seconds since 1970."""

    number = _number_here(process)
    if number is None:
        return False
    try:
        found = psutil.Process(number)
        # The number may have been given to another process since.
        return found.status() != psutil.STATUS_ZOMBIE and bool(found.create_time() <= moment)
    except (psutil.Error, OverflowError):
        return False


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
