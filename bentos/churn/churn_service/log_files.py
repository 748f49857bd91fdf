"""The prediction log in SQLite: one file a worker process, which nobody else adds rows to.

Committed rows survive SIGKILL without any fsync: they are in the kernel's page cache. What survives
a power cut is only what was synced, so `power` syncs the write-ahead log at every commit.
"""

from __future__ import annotations

import os
import sqlite3
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple, Protocol

from churn_assets.contract.logged import (
    CREATE_FILE,
    FILE_SUFFIX,
    FORMAT,
    LOCK_SUFFIX,
    Durability,
    LoggedPrediction,
    decode_logged,
    hold,
)

RETRY_SECONDS = 1.0
# A look at the path costs as much as an eighth of a commit.
LOOK_SECONDS = 0.1
# A commit writes every page it changed as a whole; smaller ones are split more often.
_PAGE_BYTES = 2048
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_INSERT = "INSERT INTO prediction VALUES (?, ?)"
_OLDEST = "SELECT number, record FROM prediction ORDER BY number LIMIT 1"


def moment_of(prediction: LoggedPrediction) -> datetime:
    """When it was answered."""
    return _EPOCH + timedelta(microseconds=prediction.at)


class LogBroken(Exception):
    """The log cannot be written now: one line that says why."""


class LogBusy(Exception):
    """Somebody else is writing to the log; soon nobody is."""


class Waiting(NamedTuple):
    """The rows that nobody has ingested yet, and when the oldest of them was answered."""

    rows: int
    oldest: datetime | None


class LogStore(Protocol):
    """Where records are kept. Opened at the first use and, after a failure, again by itself."""

    @property
    def place(self) -> str:
        """Where it is, without any password."""
        ...

    @property
    def durability(self) -> Durability:
        """What kept records survive."""
        ...

    def write(self, records: Sequence[bytes]) -> None:
        """Return when all of `records` are durable. Raises LogBroken (none is) or LogBusy."""
        ...

    def waiting(self) -> Waiting:
        """What is waiting to be ingested. Raises LogBroken."""
        ...

    def close(self) -> None:
        """Let go of the store."""
        ...


class SqliteLog:
    """A file in `directory`. Raises OSError when that cannot be made.

    A file that failed once is never written again, as nobody knows what is wrong with it; a new one
    is begun, `RETRY_SECONDS` later at the earliest.
    """

    def __init__(self, directory: Path, durability: Durability):
        # Only once: where a volume has gone, a new folder would be on another disk.
        directory.mkdir(parents=True, exist_ok=True)
        self.place, self.durability = str(directory), durability
        self._directory = directory
        self._connection: sqlite3.Connection | None = None
        self._lock: int | None = None
        self._path, self._inode, self._look_at = directory, 0, 0.0
        self._next = 1
        self._reason, self._retry_at = "", 0.0

    def write(self, records: Sequence[bytes]) -> None:
        """See LogStore."""
        connection = self._open()
        try:
            self._check_path()
            if len(records) == 1:
                connection.execute(_INSERT, (self._next, records[0]))
            else:
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany(_INSERT, enumerate(records, self._next))
                connection.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            if _is_busy(error):
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise LogBusy from None
            raise self._broken(error) from None
        self._next += len(records)

    def waiting(self) -> Waiting:
        """See LogStore. The rows of this worker."""
        connection = self._open()
        try:
            self._check_path()
            oldest = connection.execute(_OLDEST).fetchone()
        except (sqlite3.Error, OSError) as error:
            raise self._broken(error) from None
        if oldest is None:
            return Waiting(0, None)
        # Numbers have no gaps, and rows are removed from the oldest on.
        return Waiting(self._next - oldest[0], moment_of(decode_logged(oldest[1])))

    def close(self) -> None:
        """See LogStore."""
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            if self._next == 1:
                _remove(self._path)
        if self._lock is not None:
            os.close(self._lock)
        self._connection, self._lock = None, None

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        if time.monotonic() < self._retry_at:
            raise LogBroken(self._reason)
        path = self._directory / f"{uuid.uuid4().hex}{FILE_SUFFIX}"
        try:
            # Before the file, so that it never looks like that of a dead worker.
            self._lock = hold(path.with_suffix(LOCK_SUFFIX))
            if self._lock is None:
                raise BlockingIOError(f"{path.with_suffix(LOCK_SUFFIX)} is locked")
            self._path, self._next = path, 1
            self._connection = _create(path, self.durability)
            self._inode = path.stat().st_ino
        except (sqlite3.Error, OSError) as error:
            _remove(path)
            raise self._broken(error) from None
        return self._connection

    def _check_path(self) -> None:
        """Raise OSError when the file has been removed: what is written to it is lost."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_SECONDS
        if os.stat(self._path).st_ino != self._inode:
            raise FileNotFoundError(f"{self._path} has been replaced")

    def _broken(self, error: Exception) -> LogBroken:
        self.close()
        self._reason = " ".join(f"{type(error).__name__}: {error}".split())
        self._retry_at = time.monotonic() + RETRY_SECONDS
        return LogBroken(self._reason)


def _create(path: Path, durability: Durability) -> sqlite3.Connection:
    # Who waits for the lock of a file is the event loop, so nobody waits.
    connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {'FULL' if durability == 'power' else 'OFF'}")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(CREATE_FILE)
        connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


def _is_busy(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF == sqlite3.SQLITE_BUSY


def _remove(path: Path) -> None:
    """Remove a file that holds nothing, with what SQLite and the worker have beside it."""
    for name in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))):
        with suppress(OSError):
            name.unlink(missing_ok=True)
    with suppress(OSError):
        path.with_suffix(LOCK_SUFFIX).unlink(missing_ok=True)
