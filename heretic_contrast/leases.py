# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Studies that several processes share, on any machines that reach their storage.

Whoever takes a trial renews a lease on it for as long as it lives; the trials of a process that died are nobody's when its
lease has ended.
"""

import re
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileOpenLock
from optuna.trial import FrozenTrial

from .errors import ContrastError, one_line
from .journal import CheckedJournal
from .processes import is_dead, this_process

LEASE_SECONDS = 60.0
"""How long the trials of a process that does not renew its lease are left alone, or has none yet while it draws parameters."""

LOCK_SECONDS = 10
"""After which time a lock that a killed process left behind is given up."""

_at_work: set[str] = set()
"""The workers of this process that are computing at this moment."""


def without_password(storage: str | None) -> str:
    """Returns a storage's URL as it may be shown."""

    return re.sub(r"://([^:/@]*):[^@]*@", r"://\1:***@", str(storage))


def open_storage(storage: str | None) -> BaseStorage:
    """Opens a storage: a URL that Optuna knows, the path of a journal file, or memory."""

    if storage is None:
        return InMemoryStorage()
    if "://" in storage:
        try:
            return optuna.storages.get_storage(storage)
        except Exception:
            # Of processes that start at once, one makes the tables of a new database.
            time.sleep(1)
            return optuna.storages.get_storage(storage)
    path = Path(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileOpenLock(str(path), grace_period=LOCK_SECONDS)
    return JournalStorage(CheckedJournal(str(path), lock_obj=lock))


@contextmanager
def readable(storage: str | None, away: str) -> Iterator[None]:
    """
    Raises `ContrastError` when a storage cannot be read in the context: database drivers and the journal raise errors of their own.

    `away`: where a damaged file is to be moved.
    """

    try:
        yield
    except ContrastError:
        raise
    except Exception as error:
        reason = without_password(one_line(str(error))) or type(error).__name__
        raise ContrastError(
            f"The storage {without_password(storage)} cannot be read ({reason[:200]}): correct its URL, or move a damaged file {away}."
        ) from error


class Leases:
    """The leases of one worker of this process on running trials of a storage."""

    def __init__(self, storage: BaseStorage) -> None:
        self.worker = f"{this_process()} {uuid.uuid4().hex[:8]}"
        self._storage = storage

    @contextmanager
    def working(self) -> Iterator[None]:
        """For as long as the context lasts, this worker is alive."""

        _at_work.add(self.worker)
        try:
            yield
        finally:
            _at_work.discard(self.worker)

    def take(self, trial_id: int) -> None:
        lease = {"worker": self.worker, "until": time.time() + LEASE_SECONDS}
        # Another process may have given up on this one, which is no harm.
        with suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(trial_id, "lease", lease)

    @contextmanager
    def renewed(self, trial_ids: Sequence[int]) -> Iterator[None]:
        """Renews the leases of trials in the background, for as long as the context lasts."""

        stop = threading.Event()

        def keep() -> None:
            while not stop.wait(LEASE_SECONDS / 4):
                # A storage that fails here fails again when results are stored, which says so.
                with suppress(Exception):
                    for trial_id in trial_ids:
                        self.take(trial_id)

        thread = threading.Thread(target=keep, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def is_abandoned(self, trial: FrozenTrial) -> bool:
        lease: dict[str, Any] | None = trial.user_attrs.get("lease")
        if lease is None:
            # Killed between taking it and the lease.
            started = trial.datetime_start
            return started is None or time.time() - started.timestamp() > LEASE_SECONDS
        worker = lease["worker"]
        process, _, _ = worker.rpartition(" ")
        if process == this_process():
            # An attempt that failed, for example because the disk was full, and could not give its trials back.
            return worker not in _at_work
        return is_dead(process) or bool(time.time() > lease["until"])
