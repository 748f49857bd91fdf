"""Writing the online store: compact rows in batches, into SQLite or Redis.

A row never replaces one of a later cutoff, so partitions may be written in any order and again.
Rows of a feature set nobody reads yet are written beside those in use; `publish` turns the readers
to them in one step and removes the others.
"""

from __future__ import annotations

import importlib
import sqlite3
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import msgspec

from churn_assets.contract.online import (
    NAMESPACE,
    OnlineRowDamaged,
    OnlineState,
    RowCodec,
    decode_state,
    encode_state,
    is_redis,
    row_key,
    rows_table,
    state_key,
    to_microseconds,
)
from churn_assets.data.sources import shown
from churn_assets.errors import UserError

_BUSY_SECONDS = 30.0
_KEYS_A_CALL = 1_000
_PURGED_A_STEP = 10_000

# A header is the fingerprint, the same for both, and the cutoff, big-endian: bytes compare as time.
_UPSERT = """
INSERT INTO {table} (customer_id, row) VALUES (?, ?)
ON CONFLICT (customer_id) DO UPDATE SET row = excluded.row
WHERE substr(excluded.row, 1, 16) >= substr(row, 1, 16)
"""

# Lua compares strings by the locale, so the cutoffs are unpacked: a double holds microseconds.
_SET_NEWER = """
local held = redis.call('MGET', unpack(KEYS))
local newer = {}
for i, key in ipairs(KEYS) do
  local row = held[i]
  if not row or #row < 16 or struct.unpack('>i8', row, 9) <= struct.unpack('>i8', ARGV[i], 9) then
    newer[#newer + 1] = key
    newer[#newer + 1] = ARGV[i]
  end
end
if #newer > 0 then
  redis.call('MSET', unpack(newer))
end
"""

# One step over the keys of a namespace, where they are: shipping a million of them to be looked at
# here takes longer than writing their rows.
_SWEEP = """
local found = redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', 5000)
local keep, oldest, removed = ARGV[4], tonumber(ARGV[5]), 0
for _, key in ipairs(found[2]) do
  if key ~= ARGV[3] then
    if keep == '' or string.sub(key, 1, #keep) ~= keep then
      redis.call('UNLINK', key)
    elseif oldest then
      local cutoff = redis.call('GETRANGE', key, 8, 15)
      if #cutoff == 8 and struct.unpack('>i8', cutoff) < oldest then
        removed = removed + redis.call('UNLINK', key)
      end
    end
  end
end
return {found[1], removed}
"""


class OnlineWriter(Protocol):
    """Writes one namespace of a store. Every method raises UserError when the store fails."""

    def state(self) -> OnlineState | None:
        """What the store says of itself; None when nothing was published."""
        ...

    def write(
        self, codec: RowCodec, customer_ids: Sequence[str], rows: Sequence[bytes], newest: datetime
    ) -> None:
        """Put rows (encoded by `codec`) where they are not older than what is there.

        `newest` is their latest cutoff. The state of a store already turned to this feature set
        follows it, before any of the rows can be read.
        """
        ...

    def publish(self, state: OnlineState) -> None:
        """Turn the readers to the feature set of `state`; the rows of the one before are removed.

        Those of a load that was broken off may stay until the next purge. The cutoffs of a state do
        not go back while the feature set stays.
        """
        ...

    def purge(self, before: datetime) -> int:
        """Remove the rows whose cutoff is earlier than `before`, in batches; returns how many.

        Rows of the feature set the readers are turned to; the others go when it is published.
        """
        ...

    def remove(self) -> None:
        """Remove the namespace: its rows and its state."""
        ...

    def close(self) -> None:
        """Let go of the store."""
        ...


def open_writer(location: str, namespace: str = NAMESPACE) -> OnlineWriter:
    """A writer of the store at `location`: the path of a SQLite file, or a redis:// URL.

    Raises UserError when it cannot be opened.
    """
    if is_redis(location):
        return RedisOnlineWriter(location, namespace)
    return SqliteOnlineWriter(Path(location), namespace)


class SqliteOnlineWriter:
    """An online store in one SQLite file, in WAL mode: its readers never wait for the writer."""

    def __init__(self, path: Path, namespace: str = NAMESPACE) -> None:
        self._path = path
        self._namespace = namespace
        with self._reaching():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS state "
                "(namespace TEXT PRIMARY KEY, state BLOB) WITHOUT ROWID"
            )

    def state(self) -> OnlineState | None:
        """What the store says of itself; None when nothing was published."""
        with self._reaching():
            return self._state()

    def write(
        self, codec: RowCodec, customer_ids: Sequence[str], rows: Sequence[bytes], newest: datetime
    ) -> None:
        """Put rows where they are not older than what is there, all of them or none."""
        table = rows_table(self._namespace, codec.fingerprint)
        with self._transaction() as connection:
            self._create(table)
            connection.executemany(
                _UPSERT.format(table=table), zip(customer_ids, rows, strict=True)
            )
            state = _following(self._state(), codec.fingerprint, newest)
            if state is not None:
                self._put_state(state)

    def publish(self, state: OnlineState) -> None:
        """Turn the readers to the feature set of `state`; the rows of any other are removed."""
        mine = rows_table(self._namespace, state.fingerprint)
        with self._transaction() as connection:
            self._create(mine)
            self._put_state(_merged(self._state(), state))
            for table in self._tables():
                if table != mine:
                    connection.execute(f"DROP TABLE {table}")

    def purge(self, before: datetime) -> int:
        """Remove the rows whose cutoff is earlier than `before`, and return how many there were."""
        state = self.state()
        if state is None:
            return 0
        table = rows_table(self._namespace, state.fingerprint)
        # The cutoff again, because a customer may have come back since they were looked at.
        delete = f"DELETE FROM {table} WHERE customer_id = ? AND substr(row, 9, 8) < ?"
        oldest = max(to_microseconds(before), 0).to_bytes(8, "big")
        removed = 0
        with self._reaching():
            self._create(table)
            old = self._connection.execute(
                f"SELECT customer_id FROM {table} WHERE substr(row, 9, 8) < ?", (oldest,)
            ).fetchall()
        for start in range(0, len(old), _PURGED_A_STEP):
            with self._transaction() as connection:
                batch = ((each, oldest) for (each,) in old[start : start + _PURGED_A_STEP])
                removed += connection.executemany(delete, batch).rowcount
        return removed

    def remove(self) -> None:
        """Remove the namespace: its rows and its state."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM state WHERE namespace = ?", (self._namespace,))
            for table in self._tables():
                connection.execute(f"DROP TABLE {table}")

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        with self._reaching():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextmanager
    def _reaching(self) -> Generator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"the online store {self._path} cannot be written ({error}); free the disk, stop "
                "what holds the file, or remove it and materialize online_features again"
            ) from error

    def _state(self) -> OnlineState | None:
        found = self._connection.execute(
            "SELECT state FROM state WHERE namespace = ?", (self._namespace,)
        ).fetchone()
        return _decoded(found[0] if found else None)

    def _put_state(self, state: OnlineState) -> None:
        self._connection.execute(
            "INSERT OR REPLACE INTO state VALUES (?, ?)", (self._namespace, encode_state(state))
        )

    def _create(self, table: str) -> None:
        self._connection.execute(
            f"CREATE TABLE IF NOT EXISTS {table} "
            "(customer_id TEXT PRIMARY KEY, row BLOB NOT NULL) WITHOUT ROWID"
        )

    def _tables(self) -> list[str]:
        names = self._connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
        prefix = f"{self._namespace}:"
        return [
            rows_table(self._namespace, name.removeprefix(prefix))
            for (name,) in names.fetchall()
            if name.startswith(prefix)
        ]


class RedisOnlineWriter:
    """An online store in Redis, one key a customer. Not for Redis Cluster: calls span keys."""

    def __init__(self, url: str, namespace: str = NAMESPACE) -> None:
        self._shown = shown(url)
        self._namespace = namespace
        redis = importlib.import_module("redis")
        self._errors: tuple[type[Exception], ...] = (redis.RedisError, OSError)
        try:
            self._client: Any = redis.Redis.from_url(
                url, socket_connect_timeout=5, socket_timeout=_BUSY_SECONDS
            )
        except ValueError as error:
            raise UserError(
                f"online_store.url {self._shown} is not a Redis URL ({error}); write it like "
                "redis://host:6379/0"
            ) from None
        self._set_newer = self._client.register_script(_SET_NEWER)
        self._sweep_step = self._client.register_script(_SWEEP)

    def state(self) -> OnlineState | None:
        """What the store says of itself; None when nothing was published."""
        with self._reaching():
            return _decoded(self._client.get(state_key(self._namespace)))

    def write(
        self, codec: RowCodec, customer_ids: Sequence[str], rows: Sequence[bytes], newest: datetime
    ) -> None:
        """Put rows where they are not older than what is there, a thousand in a step."""
        with self._reaching():
            self._change_state(lambda state: _following(state, codec.fingerprint, newest))
            head = row_key(self._namespace, codec.fingerprint, "")

            def put(start: int) -> None:
                keys = [head + each for each in customer_ids[start : start + _KEYS_A_CALL]]
                self._set_newer(keys=keys, args=rows[start : start + _KEYS_A_CALL])

            # Two calls at a time: Redis works on one while the other is put into bytes here.
            with ThreadPoolExecutor(2) as pool:
                for _ in pool.map(put, range(0, len(rows), _KEYS_A_CALL)):
                    pass

    def publish(self, state: OnlineState) -> None:
        """Turn the readers to the feature set of `state`; the rows of any other are removed."""
        with self._reaching():
            before = self.state()
            self._change_state(lambda old: _merged(old, state))
            # Else there are rows of another only where a load was broken off; the purge finds them.
            if before is not None and before.fingerprint != state.fingerprint:
                self._sweep(keep=row_key(self._namespace, state.fingerprint, ""))

    def purge(self, before: datetime) -> int:
        """Remove the rows whose cutoff is earlier than `before`, and return how many there were."""
        with self._reaching():
            state = self.state()
            if state is None:
                return 0
            keep = row_key(self._namespace, state.fingerprint, "")
            return self._sweep(keep, str(to_microseconds(before)))

    def remove(self) -> None:
        """Remove the namespace: its rows and its state."""
        with self._reaching():
            self._client.delete(state_key(self._namespace))
            self._sweep()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _change_state(self, change: Callable[[OnlineState | None], OnlineState | None]) -> None:
        key = state_key(self._namespace)

        def attempt(pipe: Any) -> None:
            state = change(_decoded(pipe.get(key)))
            pipe.multi()
            if state is not None:
                pipe.set(key, encode_state(state))

        # Tried again when another writer changed the state in between.
        self._client.transaction(attempt, key)

    def _sweep(self, keep: str = "", oldest: str = "") -> int:
        """Remove the rows without the prefix `keep`, and of the others those before `oldest`.

        Returns how many of the others there were. Keys that come and go meanwhile may be missed.
        """
        pattern, state = f"{_literal(self._namespace)}:*", state_key(self._namespace)
        cursor, removed = b"0", 0
        while True:
            cursor, more = self._sweep_step(args=[cursor, pattern, state, keep, oldest])
            removed += more
            if cursor == b"0":
                return removed

    @contextmanager
    def _reaching(self) -> Generator[None]:
        try:
            yield
        except self._errors as error:
            raise UserError(
                f"the online store {self._shown} cannot be written ({type(error).__name__}: "
                f"{error}); check online_store.url and that Redis is up"
            ) from error


def _following(state: OnlineState | None, fingerprint: str, newest: datetime) -> OnlineState | None:
    """`state` with rows of `newest` in the store; None when it has another feature set."""
    if state is None or state.fingerprint != fingerprint:
        return None
    return msgspec.structs.replace(
        state,
        newest_cutoff=max(state.newest_cutoff, newest),
        # Or rows would lie ahead of their time until the load is over.
        data_time=state.data_time and max(state.data_time, newest),
    )


def _merged(old: OnlineState | None, new: OnlineState) -> OnlineState:
    if old is None or old.fingerprint != new.fingerprint:
        return new
    return msgspec.structs.replace(
        new,
        newest_cutoff=max(old.newest_cutoff, new.newest_cutoff),
        data_time=new.data_time and max(old.data_time or new.data_time, new.data_time),
    )


def _decoded(record: bytes | None) -> OnlineState | None:
    if record is None:
        return None
    try:
        return decode_state(record)
    except OnlineRowDamaged:
        # Not worth keeping: the next publication replaces it.
        return None


def _literal(text: str) -> str:
    """`text` with the characters escaped that mean something in a Redis pattern."""
    return "".join(f"\\{character}" if character in "*?[]^\\" else character for character in text)
