"""The online store: one compact row a customer, and readers that need neither Feast nor pandas.

A row is fixed in width, big-endian: the fingerprint of the feature set it was encoded with (8
bytes), its cutoff (microseconds since the epoch, int64), then one int64 or float64 a feature, in
the contract's order. Rows of another feature set live under other keys, so they are never decoded
as these; and within a feature set the first bytes of two rows compare as their cutoffs do, which
lets a store keep the newer one by itself.

    SQLite  table "<namespace>:<fingerprint>" (customer_id, row), table state (namespace, state)
    Redis   key "<namespace>:<fingerprint>:<customer_id>" -> row, "<namespace>:state" -> state

What the store says of itself (the state) is one JSON record, replaced as a whole.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sqlite3
import struct
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from churn_assets.contract.features import Feature, features_named

NAMESPACE = "churn:customer_features"
REDIS_SCHEMES = ("redis://", "rediss://", "unix://")

_FORMAT = 1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_KINDS = {"int": "q", "float": "d"}
_NUMPY_KINDS = {"int": ">i8", "float": ">f8"}
_TIMEOUT_SECONDS = 0.25
_KEYS_A_QUERY = 500


class OnlineStoreError(Exception):
    """The online store cannot be used now: one line that says why."""


class OnlineStoreDown(OnlineStoreError):
    """Cannot be opened, reached or read in time, or nothing was ever written to it."""


class OnlineSchemaChanged(OnlineStoreError):
    """The store has turned to another feature set since the reader last asked for its state."""


class OnlineRowDamaged(OnlineStoreError):
    """A record that is not what its key says."""


class OnlineRow(NamedTuple):
    """A customer's features, in the order of the store's feature set, as of `cutoff` (UTC)."""

    cutoff: datetime
    values: tuple[float, ...]


class OnlineState(msgspec.Struct, frozen=True):
    """What a store says of itself.

    features: names, in the order of a row's values. fingerprint: of their definitions.
    newest_cutoff: of the newest partition written. data_time: the cutoff of the newest complete raw
    partition when that was written, for a source whose days lie in the past; None for a live one,
    whose data time is the wall clock.
    """

    features: tuple[str, ...]
    fingerprint: str
    newest_cutoff: datetime
    data_time: datetime | None = None


class OnlineReader(Protocol):
    """Reads one namespace of a store. Every method raises OnlineStoreError."""

    def state(self) -> OnlineState:
        """What the store says of itself now."""
        ...

    def read(self, customer_ids: Sequence[str]) -> list[OnlineRow | None]:
        """The rows of customers in the order asked; None for one who has none.

        Decoded as the state last asked for says (asked now, if never). Raises OnlineSchemaChanged
        when the store no longer says so.
        """
        ...

    def look_up(self, customer_ids: Sequence[str]) -> tuple[OnlineState, list[OnlineRow | None]]:
        """As `read`, with the state the store was in at that very moment."""
        ...

    def close(self) -> None:
        """Let go of the store."""
        ...


def feature_set_fingerprint(features: Sequence[Feature]) -> str:
    """16 hexadecimal digits that change with what a row of `features` means."""
    parts = [(f.name, f.dtype, f.unit, f.window_days, f.tables) for f in features]
    return hashlib.sha256(msgspec.json.encode((_FORMAT, parts))).hexdigest()[:16]


def to_microseconds(moment: datetime) -> int:
    """Microseconds since the epoch of a timezone-aware moment."""
    return (moment - _EPOCH) // _MICROSECOND


def from_microseconds(microseconds: int) -> datetime:
    """The UTC moment so many microseconds after the epoch."""
    return _EPOCH + microseconds * _MICROSECOND


class RowCodec:
    """Encodes and decodes the rows of one feature set."""

    def __init__(self, features: Sequence[Feature]) -> None:
        self.features = tuple(features)
        self.names = tuple(feature.name for feature in features)
        self.fingerprint = feature_set_fingerprint(features)
        self._head = bytes.fromhex(self.fingerprint)
        self._struct = struct.Struct(">8sq" + "".join(_KINDS[f.dtype] for f in features))
        fields = [("fingerprint", "V8"), ("cutoff", ">i8")]
        self._dtype = np.dtype(fields + [(f.name, _NUMPY_KINDS[f.dtype]) for f in features])
        self.row_bytes = self._struct.size

    def encode(self, cutoff: datetime, values: Mapping[str, float]) -> bytes:
        """One row. Raises ValueError as `encode_rows` does."""
        columns = {name: np.array([values[name]]) for name in self.names}
        return self.encode_rows(np.array([to_microseconds(cutoff)]), columns)[0]

    def encode_rows(
        self, cutoffs: NDArray[np.int64], columns: Mapping[str, NDArray[Any]]
    ) -> list[bytes]:
        """Rows of `cutoffs` (microseconds since the epoch) and one array a feature.

        Raises ValueError for a value that is not a finite number, a fraction in an int feature, or
        a cutoff before 1970; KeyError when a feature is missing.
        """
        rows: NDArray[Any] = np.empty(len(cutoffs), self._dtype)
        if len(cutoffs) and cutoffs.min() < 0:
            raise ValueError("a cutoff before 1970 cannot be kept online")
        rows["fingerprint"] = np.void(self._head)
        rows["cutoff"] = cutoffs
        for feature in self.features:
            values = np.asarray(columns[feature.name])
            if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
                raise ValueError(f"{feature.name} has a value that is not a finite number")
            rows[feature.name] = values
            if feature.dtype == "int" and (rows[feature.name] != values).any():
                raise ValueError(f"{feature.name} has a value that is not a whole number")
        buffer, size = rows.tobytes(), self.row_bytes
        return [buffer[start : start + size] for start in range(0, len(buffer), size)]

    def decode(self, row: bytes) -> OnlineRow:
        """One row. Raises OnlineRowDamaged when it is not one of this feature set."""
        if len(row) != self.row_bytes or row[:8] != self._head:
            raise self._damaged()
        _, cutoff, *values = self._struct.unpack(row)
        return OnlineRow(from_microseconds(cutoff), tuple(values))

    def decode_rows(
        self, rows: Sequence[bytes]
    ) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
        """Cutoffs (microseconds since the epoch) and one array a feature, of many rows at once.

        Raises OnlineRowDamaged as `decode` does.
        """
        if any(len(row) != self.row_bytes for row in rows):
            raise self._damaged()
        decoded: Any = np.frombuffer(b"".join(rows), self._dtype)
        if (decoded["fingerprint"] != np.void(self._head)).any():
            raise self._damaged()
        native = {f.name: decoded[f.name].astype(_NUMPY_KINDS[f.dtype][1:]) for f in self.features}
        return decoded["cutoff"].astype("i8"), native

    def _damaged(self) -> OnlineRowDamaged:
        return OnlineRowDamaged(
            f"a row is not one of feature set {self.fingerprint}; write the online features again"
        )


def encode_state(state: OnlineState) -> bytes:
    """The record a store keeps of itself."""
    return msgspec.json.encode(state)


def decode_state(record: bytes) -> OnlineState:
    """What `encode_state` encoded. Raises OnlineRowDamaged."""
    try:
        return msgspec.json.decode(record, type=OnlineState)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise OnlineRowDamaged(f"its state is not readable ({error})") from None


def rows_table(namespace: str, fingerprint: str) -> str:
    """The SQLite table with the rows of a feature set, quoted."""
    return '"' + f"{namespace}:{fingerprint}".replace('"', '""') + '"'


def row_key(namespace: str, fingerprint: str, customer_id: str) -> str:
    """The Redis key of a customer's row."""
    return f"{namespace}:{fingerprint}:{customer_id}"


def state_key(namespace: str) -> str:
    """The Redis key of the state. Not that of any customer: a fingerprint has 16 digits."""
    return f"{namespace}:state"


class _Reader:
    """What the readers share: the state they were last told, and rows decoded accordingly."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._record: bytes | None = None
        self._state: OnlineState | None = None
        self._codec: RowCodec | None = None

    def state(self) -> OnlineState:
        """What the store says of itself now."""
        record = self._fetch_state()
        if record is None:
            raise OnlineStoreDown("it holds no features yet; materialize online_features")
        if self._state is None or record != self._record:
            state = decode_state(record)
            self._codec = _codec_of(state)
            self._record, self._state = record, state
        return self._state

    def read(self, customer_ids: Sequence[str]) -> list[OnlineRow | None]:
        """The rows of customers in the order asked; None for one who has none."""
        return self.look_up(customer_ids)[1]

    def look_up(self, customer_ids: Sequence[str]) -> tuple[OnlineState, list[OnlineRow | None]]:
        """As `read`, with the state the store was in at that very moment."""
        state = self._state or self.state()
        codec = self._codec
        assert codec is not None, "the state was read"
        record, rows = self._fetch_rows(codec.fingerprint, customer_ids)
        if record is None or not self._is_of(record, codec.fingerprint):
            raise OnlineSchemaChanged("it has turned to another feature set this moment")
        if record != self._record:
            state = decode_state(record)
            self._record, self._state = record, state
        return state, [None if row is None else codec.decode(row) for row in rows]

    def _is_of(self, record: bytes | None, fingerprint: str) -> bool:
        """Whether the store, by its state `record`, still has the feature set of `fingerprint`."""
        if record == self._record:
            return True
        return record is not None and decode_state(record).fingerprint == fingerprint

    def _fetch_state(self) -> bytes | None:
        raise NotImplementedError

    def _fetch_rows(
        self, fingerprint: str, customer_ids: Sequence[str]
    ) -> tuple[bytes | None, list[bytes | None]]:
        """The state record and the rows of a feature set, as of one moment."""
        raise NotImplementedError


class SqliteOnlineReader(_Reader):
    """Reads an online store in a SQLite file, which it never makes nor changes.

    Follows the path: a file that was replaced by another is opened anew.
    """

    def __init__(self, path: str | os.PathLike[str], namespace: str = NAMESPACE) -> None:
        super().__init__(namespace)
        self._path = Path(path)
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None

    def close(self) -> None:
        """Let go of the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _fetch_state(self) -> bytes | None:
        return self._fetch_rows(None, ())[0]

    def _fetch_rows(
        self, fingerprint: str | None, customer_ids: Sequence[str]
    ) -> tuple[bytes | None, list[bytes | None]]:
        try:
            connection = self._connect()
            # One transaction, so that state and rows are of one moment.
            connection.execute("BEGIN")
            try:
                record = self._select_state(connection)
                found: dict[str, bytes] = {}
                # The table of another feature set than the store's need not be there any more.
                if customer_ids and fingerprint and self._is_of(record, fingerprint):
                    table = rows_table(self._namespace, fingerprint)
                    found = _select_rows(connection, table, customer_ids)
            finally:
                connection.execute("ROLLBACK")
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise OnlineStoreDown(f"{self._path.name}: {error}") from None
        return record, [found.get(customer_id) for customer_id in customer_ids]

    def _select_state(self, connection: sqlite3.Connection) -> bytes | None:
        found = connection.execute(
            "SELECT state FROM state WHERE namespace = ?", (self._namespace,)
        ).fetchone()
        return found[0] if found else None

    def _connect(self) -> sqlite3.Connection:
        status = self._path.stat()
        inode = status.st_dev, status.st_ino
        if self._connection is None or inode != self._inode:
            self.close()
            self._connection = sqlite3.connect(
                f"{self._path.resolve().as_uri()}?mode=ro",
                uri=True,
                timeout=_TIMEOUT_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
            self._inode = inode
        return self._connection


class RedisOnlineReader(_Reader):
    """Reads an online store in Redis through `client`, anything with `get`, `mget` and `close`.

    `client` must answer bytes. `errors` are what it raises when it cannot.
    """

    def __init__(
        self,
        client: Any,
        namespace: str = NAMESPACE,
        errors: tuple[type[Exception], ...] = (OSError,),
    ) -> None:
        super().__init__(namespace)
        self._client = client
        self._errors = errors

    def close(self) -> None:
        """Close the client's connections."""
        self._client.close()

    def _fetch_state(self) -> bytes | None:
        try:
            return self._client.get(state_key(self._namespace))
        except self._errors as error:
            raise OnlineStoreDown(_one_line(error)) from None

    def _fetch_rows(
        self, fingerprint: str, customer_ids: Sequence[str]
    ) -> tuple[bytes | None, list[bytes | None]]:
        keys = [row_key(self._namespace, fingerprint, each) for each in customer_ids]
        try:
            record, *rows = self._client.mget([state_key(self._namespace), *keys])
        except self._errors as error:
            raise OnlineStoreDown(_one_line(error)) from None
        return record, rows


def is_redis(location: str) -> bool:
    """Whether `location` is a Redis URL rather than the path of a SQLite file."""
    return location.startswith(REDIS_SCHEMES)


def open_reader(location: str, namespace: str = NAMESPACE) -> OnlineReader:
    """A reader of the store at `location`: the path of a SQLite file, or a redis:// URL.

    Nothing is opened before the first read. Redis is given a quarter of a second and no second
    try. Raises OnlineStoreDown when `location` needs a package that is not there or is no URL.
    """
    if not is_redis(location):
        return SqliteOnlineReader(location, namespace)
    try:
        redis = importlib.import_module("redis")
        retry = importlib.import_module("redis.retry")
        backoff = importlib.import_module("redis.backoff")
        client = redis.Redis.from_url(
            location,
            socket_connect_timeout=_TIMEOUT_SECONDS,
            socket_timeout=_TIMEOUT_SECONDS,
            retry=retry.Retry(backoff.NoBackoff(), 0),
        )
    except ImportError:
        raise OnlineStoreDown("the package redis is not installed here") from None
    except ValueError as error:
        raise OnlineStoreDown(f"its URL is not one ({_one_line(error)})") from None
    return RedisOnlineReader(client, namespace, (redis.RedisError, OSError))


def _codec_of(state: OnlineState) -> RowCodec:
    """The codec of the feature set a store says it has.

    Raises OnlineSchemaChanged for a set this version of the contract does not define that way.
    """
    try:
        codec = RowCodec(features_named(state.features))
    except KeyError as error:
        raise OnlineSchemaChanged(f"it holds an {error.args[0]}") from None
    if codec.fingerprint != state.fingerprint or codec.names != state.features:
        raise OnlineSchemaChanged(
            f"it holds feature set {state.fingerprint}, which is {codec.fingerprint} here; "
            "write the online features again"
        )
    return codec


def _select_rows(
    connection: sqlite3.Connection, table: str, customer_ids: Sequence[str]
) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for start in range(0, len(customer_ids), _KEYS_A_QUERY):
        keys = customer_ids[start : start + _KEYS_A_QUERY]
        marks = ",".join("?" * len(keys))
        found.update(
            connection.execute(
                f"SELECT customer_id, row FROM {table} WHERE customer_id IN ({marks})", keys
            )
        )
    return found


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
