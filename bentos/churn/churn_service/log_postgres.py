"""The prediction log in Postgres, for services without a volume: one table for all workers.

What the server has committed it has synced, so it survives a power cut whatever was asked for.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from churn_assets.contract.logged import (
    CREATE_TABLE,
    LOG_APPLICATION,
    TABLE,
    TABLE_LOCK,
    Durability,
    decode_logged,
    one_line_without_password,
    without_password,
)
from churn_service.log_files import RETRY_SECONDS, LogBroken, Waiting, moment_of

_CONNECT_SECONDS = 2
_ANSWER_MS = 2000
# The count of a long table takes time; beyond it the answer is "at least".
MOST_COUNTED = 100_000
# A row sent again, as nobody knew what became of it, is the same row.
_INSERT = (
    f"INSERT INTO {TABLE} SELECT %s, * FROM unnest(%s::bigint[], %s::bytea[]) "
    "ON CONFLICT DO NOTHING"
)
_COUNT = f"SELECT count(*) FROM (SELECT 1 FROM {TABLE} LIMIT {MOST_COUNTED}) counted"
_OWN_OLDEST = f"SELECT record FROM {TABLE} WHERE writer = %s ORDER BY number LIMIT 1"


class PostgresLog:
    """The table at `url`, made where it is missing. Raises ImportError without psycopg."""

    durability: Durability = "power"

    def __init__(self, url: str):
        import psycopg

        self._psycopg = psycopg
        self.place = without_password(url)
        self._url, self._writer, self._next = url, uuid.uuid4().hex, 1
        self._connection: psycopg.Connection[Any] | None = None
        self._reason, self._retry_at = "", 0.0

    def write(self, records: Sequence[bytes]) -> None:
        """See LogStore. A connection that was lost while nobody used it is made anew at once."""
        numbers = list(range(self._next, self._next + len(records)))
        # Also when this fails: it may have been committed.
        self._next += len(records)
        self._run(_INSERT, (self._writer, numbers, list(records)))

    def waiting(self) -> Waiting:
        """See LogStore. The rows of all workers, up to MOST_COUNTED; the oldest of this one."""
        counted = self._run(_COUNT, ())
        oldest = self._run(_OWN_OLDEST, (self._writer,))
        answered = moment_of(decode_logged(oldest[0][0])) if oldest else None
        return Waiting(counted[0][0], answered)

    def close(self) -> None:
        """See LogStore."""
        if self._connection is not None:
            with suppress(self._psycopg.Error):
                self._connection.close()
        self._connection = None

    def _run(self, statement: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
        """The rows of a statement that may be sent twice. Raises LogBroken."""
        fresh = self._connection is None
        connection = self._open()
        try:
            cursor = connection.execute(statement, values, prepare=True)
            return cursor.fetchall() if cursor.description else []
        except self._psycopg.Error as error:
            if fresh or not connection.closed:
                raise self._broken(error) from None
            self.close()
            return self._run(statement, values)

    def _open(self) -> Any:
        if self._connection is not None:
            return self._connection
        if time.monotonic() < self._retry_at:
            raise LogBroken(self._reason)
        try:
            self._connection = self._psycopg.connect(
                self._url,
                autocommit=True,
                connect_timeout=_CONNECT_SECONDS,
                application_name=LOG_APPLICATION,
                # A server that has gone without a word.
                tcp_user_timeout=2 * _ANSWER_MS,
            )
            self._connection.execute(f"SET statement_timeout = {_ANSWER_MS}")
            with self._connection.transaction():
                # Two workers that make the same table at once would fail.
                self._connection.execute("SELECT pg_advisory_xact_lock(%s)", (TABLE_LOCK,))
                self._connection.execute(CREATE_TABLE)
        except self._psycopg.Error as error:
            raise self._broken(error) from None
        return self._connection

    def _broken(self, error: Exception) -> LogBroken:
        self.close()
        self._reason = one_line_without_password(error, self._url)
        self._retry_at = time.monotonic() + RETRY_SECONDS
        return LogBroken(self._reason)
