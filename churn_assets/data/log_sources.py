"""Where services keep what they answer until the lake has it: files of a directory, or a table.

What is read is trimmed only when told to, and rows are known by numbers that are never used again,
so a pass that ends anywhere is made good by the next.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

from churn_assets.contract.logged import (
    FILE_SUFFIX,
    FORMAT,
    INGEST_LOCK,
    LOCK_SUFFIX,
    TABLE,
    hold,
    is_postgres,
    without_password,
)
from churn_assets.errors import UserError

# Unlike a worker's lock, so that it is not taken for one.
_INGESTING = "ingesting"
# A worker that wants to write waits for a transaction, so these are small and leave gaps.
_TRIMMED_AT_ONCE = 500
_GAP_SECONDS = 0.002
_TIMEOUT_SECONDS = 10.0
_ANY_TABLE = TABLE.rpartition("v")[0]


@dataclass(frozen=True)
class Rows:
    """Records of one writer, with their numbers in ascending order."""

    writer: str
    numbers: list[int]
    records: list[bytes]

    @property
    def keys(self) -> list[str]:
        """What no other prediction is ever called."""
        return [f"{self.writer}-{number}" for number in self.numbers]


class OpenLog(Protocol):
    """A log that is held for one pass over it. `left_alone` says what was not read, and why."""

    left_alone: dict[str, str]

    def read(self, limit: int) -> list[Rows]:
        """The next rows, at most `limit` of them; nothing when all have been read."""
        ...

    def trim(self, rows: Rows) -> int:
        """Remove rows that were read, the oldest of their writer first; how many there were."""
        ...

    def clear(self) -> list[str]:
        """Remove what workers that have ended left behind without rows; its names."""
        ...

    def skip(self, rows: Rows, reason: str) -> None:
        """Leave the writer of `rows` alone from now on."""
        ...


class LogSource(Protocol):
    """A log that services write to."""

    @property
    def place(self) -> str:
        """Where it is, without any password."""
        ...

    def open(self) -> AbstractContextManager[OpenLog]:
        """Hold the log for one pass. Raises UserError when another pass does, or it is down."""
        ...


def open_log_source(location: str) -> LogSource:
    """The log at a directory or a postgresql:// URL."""
    return LogServer(location) if is_postgres(location) else LogFiles(Path(location))


@dataclass(frozen=True)
class LogFiles:
    """The files of a directory, one a worker; there need not be any."""

    directory: Path

    @property
    def place(self) -> str:
        """See LogSource."""
        return str(self.directory)

    @contextmanager
    def open(self) -> Generator[OpenLog]:
        """See LogSource."""
        if not self.directory.is_dir():
            yield _Files([])
            return
        try:
            held = hold(self.directory / _INGESTING)
        except OSError as error:
            raise UserError(
                f"the prediction log {self.place} cannot be written ({error.strerror}); run this "
                "as the user who owns it"
            ) from None
        if held is None:
            raise UserError(f"the prediction log {self.place} is being ingested by another run")
        try:
            yield _Files(sorted(self.directory.glob(f"*{FILE_SUFFIX}")))
        finally:
            os.close(held)


class _UnknownFormat(Exception):
    """A file that another version of the service has written."""


@dataclass
class _Files:
    """See OpenLog. `_ends` bound the pass: rows that come later are left for the next."""

    paths: list[Path]
    left_alone: dict[str, str] = field(default_factory=dict)
    _ends: dict[Path, int] = field(default_factory=dict)
    _read_up_to: dict[Path, int] = field(default_factory=dict)

    def read(self, limit: int) -> list[Rows]:
        """See OpenLog."""
        read: list[Rows] = []
        for path in self.paths:
            if limit > 0 and path.name not in self.left_alone:
                rows = self._read(path, limit)
                limit -= len(rows.numbers)
                read += [rows] if rows.numbers else []
        return read

    def trim(self, rows: Rows) -> int:
        """See OpenLog. The worker gets its turn every few hundred rows."""
        removed = 0
        with closing(_connect(self._path(rows))) as connection:
            for start in range(0, len(rows.numbers), _TRIMMED_AT_ONCE):
                numbers = rows.numbers[start : start + _TRIMMED_AT_ONCE]
                between = "DELETE FROM prediction WHERE number BETWEEN ? AND ?"
                removed += connection.execute(between, (numbers[0], numbers[-1])).rowcount
                time.sleep(_GAP_SECONDS)
        return removed

    def clear(self) -> list[str]:
        """See OpenLog."""
        return [
            path.name
            for path in self.paths
            if path.name not in self.left_alone and path.exists() and self._clear(path)
        ]

    def skip(self, rows: Rows, reason: str) -> None:
        """See OpenLog."""
        self.left_alone[self._path(rows).name] = reason

    def _path(self, rows: Rows) -> Path:
        return next(path for path in self.paths if path.stem == rows.writer)

    def _read(self, path: Path, limit: int) -> Rows:
        found: list[tuple[int, bytes]] = []
        try:
            with closing(_connect(path)) as connection:
                if path not in self._ends:
                    self._ends[path] = _newest(connection)
                if self._ends[path]:
                    bounds = (self._read_up_to.get(path, 0), self._ends[path], limit)
                    found = connection.execute(_NEXT, bounds).fetchall()
        except (sqlite3.Error, _UnknownFormat) as error:
            # A worker removes a file of its own that it could not begin.
            if path.exists():
                self.left_alone[path.name] = str(error)
        if found:
            self._read_up_to[path] = found[-1][0]
        return Rows(path.stem, [number for number, _ in found], [record for _, record in found])

    def _clear(self, path: Path) -> bool:
        lock = path.with_suffix(LOCK_SUFFIX)
        held = hold(lock)
        if held is None:
            return False
        try:
            # The last connection that closes takes with it what SQLite has beside the file.
            with closing(_connect(path)) as connection:
                if _newest(connection):
                    return False
            path.unlink()
            lock.unlink()
        except (sqlite3.Error, _UnknownFormat) as error:
            self.left_alone[path.name] = str(error)
            return False
        finally:
            os.close(held)
        return True


_NEXT = (
    "SELECT number, record FROM prediction WHERE number > ? AND number <= ? ORDER BY number LIMIT ?"
)


def _connect(path: Path) -> sqlite3.Connection:
    """A connection to a file that is there. NORMAL: a checkpoint is synced, a trim is not."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=_TIMEOUT_SECONDS,
        isolation_level=None,
    )
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _newest(connection: sqlite3.Connection) -> int:
    """The number of the newest row, 0 when there is none. Raises _UnknownFormat."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0 and not connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
        # Its worker has just begun it, or ended there.
        return 0
    if version != FORMAT:
        raise _UnknownFormat(f"its format is {version}, known here is {FORMAT}")
    return connection.execute("SELECT max(number) FROM prediction").fetchone()[0] or 0


@dataclass(frozen=True)
class LogServer:
    """The table of a Postgres server; it need not be there yet."""

    url: str

    @property
    def place(self) -> str:
        """See LogSource."""
        return without_password(self.url)

    @contextmanager
    def open(self) -> Generator[OpenLog]:
        """See LogSource."""
        import psycopg

        try:
            with psycopg.connect(self.url, autocommit=True, connect_timeout=10) as connection:
                asked = connection.execute("SELECT pg_try_advisory_lock(%s)", (INGEST_LOCK,))
                if asked.fetchone() != (True,):
                    raise UserError(
                        f"the prediction log {self.place} is being ingested by another run"
                    )
                yield _Table(connection)
        except psycopg.Error as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"the prediction log {self.place} cannot be used ({reason[0]}); check "
                "serving.prediction_log.store"
            ) from None


@dataclass
class _Table:
    """See OpenLog."""

    connection: Any
    left_alone: dict[str, str] = field(default_factory=dict)
    _read_up_to: tuple[str, int] = ("", 0)

    def __post_init__(self) -> None:
        found = self.connection.execute(
            "SELECT tablename FROM pg_tables WHERE schemaname = current_schema() "
            "AND tablename LIKE %s",
            (f"{_ANY_TABLE}%",),
        )
        tables = {name for (name,) in found}
        self._there = TABLE in tables
        for other in tables - {TABLE}:
            self.left_alone[other] = f"its format is not {FORMAT}, the one known here"

    def read(self, limit: int) -> list[Rows]:
        """See OpenLog."""
        if not self._there:
            return []
        found = self.connection.execute(
            f"SELECT writer, number, record FROM {TABLE} WHERE (writer, number) > (%s, %s) "
            "ORDER BY writer, number LIMIT %s",
            (*self._read_up_to, limit),
        ).fetchall()
        if found:
            self._read_up_to = found[-1][:2]
        by_writer = groupby(found, key=itemgetter(0))
        rows = [(writer, list(group)) for writer, group in by_writer]
        return [
            Rows(writer, [number for _, number, _ in part], [record for *_, record in part])
            for writer, part in rows
            if writer not in self.left_alone
        ] or (self.read(limit) if found else [])

    def trim(self, rows: Rows) -> int:
        """See OpenLog."""
        return self.connection.execute(
            f"DELETE FROM {TABLE} WHERE writer = %s AND number = ANY(%s)",
            (rows.writer, rows.numbers),
        ).rowcount

    def clear(self) -> list[str]:
        """See OpenLog. A table has nothing to clear."""
        return []

    def skip(self, rows: Rows, reason: str) -> None:
        """See OpenLog."""
        self.left_alone[rows.writer] = reason
