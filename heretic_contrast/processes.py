# SPDX-License-Identifier: AGPL-3.0-or-later

"""Which process something belongs to, and whether that process is gone."""

import os
import socket


def this_process() -> str:
    """Returns the name of the host and the number of this process, separated by a space."""

    return f"{socket.gethostname()} {os.getpid()}"


def is_dead(process: str) -> bool:
    """
    Returns whether a process, named as by `this_process`, is known to have ended.

    Nothing is known of processes on other machines.
    """

    host, _, number = process.rpartition(" ")
    if host != socket.gethostname() or not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
