from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from churn_assets.contract.features import FEATURES, features_for, features_named
from churn_assets.contract.online import (
    NAMESPACE,
    OnlineReader,
    OnlineRowDamaged,
    OnlineSchemaChanged,
    OnlineState,
    OnlineStoreDown,
    RowCodec,
    SqliteOnlineReader,
    encode_state,
    feature_set_fingerprint,
    from_microseconds,
    open_reader,
    rows_table,
    to_microseconds,
)
from churn_assets.data.online_rows import open_writer

CODEC = RowCodec(FEATURES)
CUTOFF = datetime(2025, 3, 1, tzinfo=UTC)
STATE = OnlineState(CODEC.names, CODEC.fingerprint, CUTOFF, CUTOFF)
ROW = {
    "total_orders_30d": 3,
    "avg_order_value": 0.1 + 0.2,
    "days_since_last_order": 12,
    "support_tickets_90d": 0,
    "login_frequency_7d": 2 / 7,
}
VALUES = tuple(ROW[name] for name in CODEC.names)

whole = st.integers(-(2**63), 2**63 - 1)
real = st.floats(allow_nan=False, allow_infinity=False)
rows = st.tuples(*(whole if feature.dtype == "int" else real for feature in FEATURES))
moments = st.integers(0, to_microseconds(datetime(9999, 1, 1, tzinfo=UTC)))


def columns(values: list[tuple]) -> dict[str, np.ndarray]:
    dtypes = {"int": np.int64, "float": np.float64}
    return {
        feature.name: np.array([row[place] for row in values], dtypes[feature.dtype])
        for place, feature in enumerate(FEATURES)
    }


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(moments, rows), max_size=5))
def test_rows_come_back_to_the_last_bit_one_by_one_and_all_at_once(
    given: list[tuple[int, tuple]],
) -> None:
    cutoffs = np.array([cutoff for cutoff, _ in given], np.int64)
    encoded = CODEC.encode_rows(cutoffs, columns([values for _, values in given]))
    assert [len(row) for row in encoded] == [CODEC.row_bytes] * len(given)
    for row, (cutoff, values) in zip(encoded, given, strict=True):
        decoded = CODEC.decode(row)
        assert to_microseconds(decoded.cutoff) == cutoff
        assert decoded.values == values
        assert [type(value) for value in decoded.values] == [type(value) for value in values]
    found, decoded_columns = CODEC.decode_rows(encoded)
    assert found.tolist() == cutoffs.tolist()
    for name, column in columns([values for _, values in given]).items():
        assert decoded_columns[name].tolist() == column.tolist()
        assert decoded_columns[name].dtype == column.dtype


@settings(max_examples=50, deadline=None)
@given(moments, moments, rows)
def test_the_head_of_a_row_compares_as_its_cutoff_does(a: int, b: int, values: tuple) -> None:
    first, second = CODEC.encode_rows(np.array([a, b], np.int64), columns([values, values]))
    assert (first[:16] < second[:16]) == (a < b)
    assert (first[:16] == second[:16]) == (a == b)


@given(moments)
def test_microseconds(microseconds: int) -> None:
    assert to_microseconds(from_microseconds(microseconds)) == microseconds


def test_a_row_is_small() -> None:
    assert CODEC.row_bytes == 8 * (2 + len(FEATURES))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("avg_order_value", float("nan"), "avg_order_value has a value that is not a finite"),
        ("avg_order_value", float("inf"), "avg_order_value has a value that is not a finite"),
        ("total_orders_30d", 1.5, "total_orders_30d has a value that is not a whole"),
        ("total_orders_30d", None, "total_orders_30d has a value that is not a finite"),
    ],
)
def test_what_cannot_be_kept_is_refused(name: str, value: float, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CODEC.encode(CUTOFF, ROW | {name: value})


def test_a_cutoff_before_1970_and_a_missing_feature_are_refused() -> None:
    with pytest.raises(ValueError, match="before 1970"):
        CODEC.encode(datetime(1969, 12, 31, tzinfo=UTC), ROW)
    with pytest.raises(KeyError, match="login_frequency_7d"):
        CODEC.encode(CUTOFF, {k: v for k, v in ROW.items() if k != "login_frequency_7d"})


@pytest.mark.parametrize(
    "damage", [lambda row: row[:-1], lambda row: row + b"\0", lambda row: b"\0" + row[1:], bytes]
)
def test_a_row_of_another_kind_is_never_decoded(damage) -> None:
    row = CODEC.encode(CUTOFF, ROW)
    damaged = bytes(damage(row)) if damage is not bytes else b""
    with pytest.raises(OnlineRowDamaged):
        CODEC.decode(damaged)
    with pytest.raises(OnlineRowDamaged):
        CODEC.decode_rows([row, damaged])


def test_the_row_of_a_smaller_feature_set_is_not_decoded_as_one_of_this() -> None:
    fewer = RowCodec(features_for(["orders"]))
    row = fewer.encode(CUTOFF, ROW)
    assert fewer.decode(row).values == VALUES[:3]
    with pytest.raises(OnlineRowDamaged, match=CODEC.fingerprint):
        CODEC.decode(row + b"\0" * (CODEC.row_bytes - len(row)))


def test_the_fingerprint_follows_what_a_row_means_and_not_how_it_is_told() -> None:
    replace, first = msgspec.structs.replace, FEATURES[0]

    def of(feature) -> str:
        return feature_set_fingerprint([feature, *FEATURES[1:]])

    mine = of(first)
    assert mine == CODEC.fingerprint
    assert of(replace(first, meaning="Said otherwise", maximum=7)) == mine
    others = {
        of(replace(first, name="orders_30d")),
        of(replace(first, dtype="float")),
        of(replace(first, unit="baskets")),
        of(replace(first, window_days=28)),
        of(replace(first, tables=("logins",))),
        feature_set_fingerprint(FEATURES[::-1]),
        feature_set_fingerprint(FEATURES[:-1]),
    }
    assert len(others) == 7
    assert mine not in others


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with customer `a`."""
    path = tmp_path / "online.db"
    put(path, {"a": ROW})
    return path


def values(reader: OnlineReader, customer_id: str) -> tuple[float, ...]:
    (row,) = reader.read([customer_id])
    assert row is not None
    return row.values


def put(path: Path, stored: dict[str, dict], state: OnlineState = STATE) -> None:
    codec = RowCodec(features_named(state.features))
    with closing(open_writer(str(path))) as writer:
        encoded = [codec.encode(state.newest_cutoff, row) for row in stored.values()]
        writer.write(codec, list(stored), encoded, state.newest_cutoff)
        writer.publish(state)


def test_the_reader_finds_rows_in_the_order_asked(path: Path) -> None:
    many = {f"c{n}": ROW | {"total_orders_30d": n} for n in range(1200)}
    put(path, many)
    with closing(open_reader(str(path))) as reader:
        assert reader.state() == STATE
        asked = [*reversed(many), "nobody", "a", "c7", "c7", "it's", "\U0001f600"]
        found = reader.read(asked)
        assert [row and row.values[0] for row in found] == [
            *reversed(range(1200)), None, 3, 7, 7, None, None,
        ]  # fmt: skip
        assert {row.cutoff for row in found if row} == {CUTOFF}
        assert reader.read([]) == []


def test_a_file_that_is_not_there_is_told_and_not_made(tmp_path: Path) -> None:
    path = tmp_path / "none" / "online.db"
    with closing(open_reader(str(path))) as reader:
        for ask in (reader.state, lambda: reader.read(["a"])):
            with pytest.raises(OnlineStoreDown, match="No such file"):
                ask()
    assert not path.parent.exists()


def test_a_reader_changes_nothing(path: Path) -> None:
    with closing(SqliteOnlineReader(path)) as reader:
        reader.read(["a"])
        connection = reader._connection
        assert connection is not None
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            connection.execute("DELETE FROM state")


def test_a_reader_does_not_wait_for_a_writer(path: Path) -> None:
    codec_table = rows_table(NAMESPACE, CODEC.fingerprint)
    with closing(sqlite3.connect(path, isolation_level=None)) as busy:
        busy.execute("BEGIN IMMEDIATE")
        busy.execute(f"DELETE FROM {codec_table}")
        with closing(open_reader(str(path))) as reader:
            assert values(reader, "a") == VALUES
            busy.execute("COMMIT")
            assert reader.read(["a"]) == [None]


def test_a_file_replaced_by_another_is_noticed(path: Path, tmp_path: Path) -> None:
    with closing(open_reader(str(path))) as reader:
        assert reader.read(["b"]) == [None]
        put(tmp_path / "other.db", {"b": ROW})
        (tmp_path / "other.db").replace(path)
        assert values(reader, "b") == VALUES


def test_an_empty_store_and_a_file_of_another_kind_are_down(tmp_path: Path) -> None:
    empty, foreign = tmp_path / "empty.db", tmp_path / "foreign.db"
    open_writer(str(empty)).close()
    foreign.write_bytes(b"not a database, but long enough to be read as one" * 100)
    with (
        closing(open_reader(str(empty))) as reader,
        pytest.raises(OnlineStoreDown, match="no feat"),
    ):
        reader.state()
    with (
        closing(open_reader(str(foreign))) as reader,
        pytest.raises(OnlineStoreDown, match="not a"),
    ):
        reader.state()


def test_features_the_contract_does_not_have_or_has_otherwise_are_refused(path: Path) -> None:
    def becomes(record: bytes) -> None:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("UPDATE state SET state = ?", (record,))
            connection.commit()

    replace = msgspec.structs.replace
    with closing(open_reader(str(path))) as reader:
        becomes(encode_state(replace(STATE, features=("shoe_size",))))
        with pytest.raises(OnlineSchemaChanged, match="unknown feature 'shoe_size'"):
            reader.state()
        becomes(encode_state(replace(STATE, fingerprint="0" * 16)))
        with pytest.raises(OnlineSchemaChanged, match="0000000000000000"):
            reader.state()
        becomes(b"{")
        with pytest.raises(OnlineRowDamaged, match="its state"):
            reader.state()


def test_a_store_that_turns_to_another_feature_set_is_not_read_as_before(path: Path) -> None:
    fewer = RowCodec(features_for(["orders"]))
    with closing(open_reader(str(path))) as reader:
        assert values(reader, "a") == VALUES
        later = CUTOFF + timedelta(days=1)
        put(path, {"a": ROW}, OnlineState(fewer.names, fewer.fingerprint, later, later))
        with pytest.raises(OnlineSchemaChanged, match="another feature set"):
            reader.read(["a"])
        assert reader.state().features == fewer.names
        assert values(reader, "a") == VALUES[:3]


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "redis://:secret@127.0.0.1:1/0"])
def test_a_redis_that_is_down_is_told_without_its_password(url: str) -> None:
    with (
        closing(open_reader(url)) as reader,
        pytest.raises(OnlineStoreDown, match=r"127\.0\.0\.1:1") as e,
    ):
        reader.read(["a"])
    assert "secret" not in str(e.value)


def test_a_redis_url_that_is_none_is_told() -> None:
    with pytest.raises(OnlineStoreDown, match="URL"):
        open_reader("redis://host:port/0")
