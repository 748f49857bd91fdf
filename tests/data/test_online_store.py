from __future__ import annotations

import os
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from churn_assets.contract.features import FEATURES, features_for
from churn_assets.contract.online import OnlineState, RowCodec, open_reader
from churn_assets.data.online_rows import OnlineWriter, open_writer
from churn_assets.errors import UserError

DAY = timedelta(days=1)
CUTOFF = datetime(2025, 3, 1, tzinfo=UTC)
CODEC = RowCodec(FEATURES)
FEWER = RowCodec(features_for(["orders"]))

Open = Callable[[str], OnlineWriter]


def redis_url() -> str:
    url = os.environ.get("CHURN_TEST_REDIS")
    if not url:
        pytest.skip("set CHURN_TEST_REDIS to the URL of a Redis database to run this")
    return url


@pytest.fixture(params=["sqlite", "redis"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return redis_url() if request.param == "redis" else str(tmp_path / "deep" / "online.db")


@pytest.fixture
def namespace() -> str:
    # With what means something in SQL and in a Redis pattern.
    return f'shop "[a-z]*?\\{uuid.uuid4().hex[:8]}:features'


@pytest.fixture
def writer(location: str, namespace: str) -> Iterator[OnlineWriter]:
    with closing(open_writer(location, namespace)) as writer:
        yield writer
        writer.remove()


def row(cutoff: datetime, orders: int, codec: RowCodec = CODEC) -> bytes:
    values = dict.fromkeys(CODEC.names, 1)
    return codec.encode(cutoff, values | {"total_orders_30d": orders})


def state(newest: datetime, data_time: datetime | None = None, codec: RowCodec = CODEC):
    return OnlineState(codec.names, codec.fingerprint, newest, data_time)


@pytest.fixture
def orders(location: str, namespace: str) -> Callable[..., list]:
    """What the service would find: orders and cutoff of customers."""

    def read(*customer_ids: str) -> list:
        with closing(open_reader(location, namespace)) as reader:
            return [row and (row.values[0], row.cutoff) for row in reader.read(customer_ids)]

    return read


def test_many_rows_are_written_and_read(writer: OnlineWriter, orders) -> None:
    ids = [f"c{n}" for n in range(2_500)]
    writer.write(CODEC, ids, [row(CUTOFF, n) for n in range(2_500)], CUTOFF)
    writer.publish(state(CUTOFF))
    assert orders(*ids, "nobody") == [*((n, CUTOFF) for n in range(2_500)), None]


def test_a_row_is_replaced_by_one_as_new_or_newer_and_never_by_an_older(
    writer: OnlineWriter, orders
) -> None:
    writer.publish(state(CUTOFF))
    for day, number, then in ((0, 1, 1), (0, 2, 2), (1, 3, 3), (0, 4, 3), (-400, 5, 3), (2, 6, 6)):
        cutoff = CUTOFF + day * DAY
        writer.write(CODEC, ["a"], [row(cutoff, number)], cutoff)
        assert orders("a")[0][0] == then


def test_nobody_sees_rows_before_they_are_published(writer: OnlineWriter, orders) -> None:
    writer.write(CODEC, ["a"], [row(CUTOFF, 1)], CUTOFF)
    assert writer.state() is None
    writer.publish(state(CUTOFF))
    assert orders("a") == [(1, CUTOFF)]


@pytest.mark.parametrize("data_time", [None, CUTOFF])
def test_the_state_follows_the_rows_and_does_not_go_back(
    writer: OnlineWriter, data_time: datetime | None
) -> None:
    writer.publish(state(CUTOFF, data_time))
    writer.write(CODEC, ["a"], [row(CUTOFF + DAY, 1)], CUTOFF + DAY)
    later = state(CUTOFF + DAY, data_time and CUTOFF + DAY)
    assert writer.state() == later
    writer.write(CODEC, ["a"], [row(CUTOFF, 1)], CUTOFF)
    writer.publish(state(CUTOFF - DAY, data_time and CUTOFF - DAY))
    assert writer.state() == later


def test_a_new_feature_set_takes_over_in_one_step_and_the_old_rows_go(
    writer: OnlineWriter, location: str, namespace: str, orders
) -> None:
    writer.write(CODEC, ["a", "b"], [row(CUTOFF, 1), row(CUTOFF, 2)], CUTOFF)
    writer.publish(state(CUTOFF))
    writer.write(FEWER, ["a"], [row(CUTOFF - DAY, 7, FEWER)], CUTOFF - DAY)
    assert writer.state() == state(CUTOFF), "the rows of another set leave the state alone"
    assert orders("a", "b") == [(1, CUTOFF), (2, CUTOFF)]
    writer.publish(state(CUTOFF - DAY, codec=FEWER))
    assert writer.state() == state(CUTOFF - DAY, codec=FEWER)
    assert orders("a", "b") == [(7, CUTOFF - DAY), None]
    writer.publish(state(CUTOFF))
    assert orders("a", "b") == [None, None]


def test_a_namespace_of_its_own(
    writer: OnlineWriter, location: str, namespace: str, orders
) -> None:
    other = namespace.replace("[a-z]", "x")
    writer.write(CODEC, ["a"], [row(CUTOFF, 1)], CUTOFF)
    writer.publish(state(CUTOFF))
    with closing(open_writer(location, other)) as theirs:
        theirs.write(CODEC, ["a"], [row(CUTOFF, 2)], CUTOFF)
        theirs.publish(state(CUTOFF))
        writer.publish(state(CUTOFF, codec=FEWER))
        writer.remove()
        assert writer.state() is None
        with closing(open_reader(location, other)) as reader:
            assert reader.read(["a"]) == [CODEC.decode(row(CUTOFF, 2))]
        theirs.remove()
        assert theirs.state() is None


def test_rows_of_customers_long_gone_are_removed(
    writer: OnlineWriter, namespace: str, location: str, orders
) -> None:
    assert writer.purge(CUTOFF) == 0, "nothing was published"
    ids = [f"c{n}" for n in range(2_500)]
    cutoffs = [CUTOFF + (n % 5) * DAY for n in range(2_500)]
    writer.publish(state(CUTOFF + 4 * DAY))
    writer.write(CODEC, ids, [row(cutoff, 1) for cutoff in cutoffs], CUTOFF + 4 * DAY)
    with closing(open_writer(location, namespace + "2")) as theirs:
        theirs.publish(state(CUTOFF))
        theirs.write(CODEC, ["c0"], [row(CUTOFF, 1)], CUTOFF)
        assert writer.purge(datetime(1969, 1, 1, tzinfo=UTC)) == 0
        assert writer.purge(CUTOFF + 2 * DAY) == 1_000
        assert theirs.purge(CUTOFF) == 0
        with closing(open_reader(location, namespace + "2")) as reader:
            assert reader.read(["c0"]) != [None]
        theirs.remove()
    assert orders(*ids) == [
        (1, cutoff) if cutoff >= CUTOFF + 2 * DAY else None for cutoff in cutoffs
    ]
    assert writer.state() == state(CUTOFF + 4 * DAY)
    assert writer.purge(CUTOFF + 2 * DAY) == 0


def test_a_batch_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "online.db"
    with closing(open_writer(str(path))) as writer:
        writer.write(CODEC, ["a"], [row(CUTOFF, 1)], CUTOFF)
        writer.publish(state(CUTOFF))
        later = CUTOFF + DAY
        with pytest.raises(UserError, match="cannot be written"):
            writer.write(CODEC, ["a", None], [row(later, 2), row(later, 2)], later)  # ty: ignore
        assert writer.state() == state(CUTOFF)
    with closing(open_reader(str(path))) as reader:
        assert reader.read(["a"]) == [CODEC.decode(row(CUTOFF, 1))]


def test_writers_take_turns(tmp_path: Path) -> None:
    path = str(tmp_path / "online.db")
    with closing(open_writer(path)) as one, closing(open_writer(path)) as two:
        one.publish(state(CUTOFF))
        two.write(CODEC, ["a"], [row(CUTOFF + DAY, 1)], CUTOFF + DAY)
        one.write(CODEC, ["b"], [row(CUTOFF, 1)], CUTOFF)
        assert one.state() == two.state() == state(CUTOFF + DAY)


def test_a_damaged_state_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "online.db"
    with closing(open_writer(str(path))) as writer:
        writer.publish(state(CUTOFF))
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("UPDATE state SET state = 'x'")
            connection.commit()
        assert writer.state() is None
        writer.publish(state(CUTOFF))
        assert writer.state() == state(CUTOFF)


def test_a_store_that_cannot_be_written_is_told_without_its_password(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="free the disk"):
        open_writer(str(tmp_path / "file" / "online.db"))
    (tmp_path / "foreign.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(UserError, match="not a database"):
        open_writer(str(tmp_path / "foreign.db"))
    with pytest.raises(UserError, match="not a Redis URL") as error:
        open_writer("redis://:secret@host:port")
    assert "secret" not in str(error.value)
    with (
        closing(open_writer("redis://:secret@127.0.0.1:1/0")) as writer,
        pytest.raises(UserError, match="that Redis is up") as error,
    ):
        writer.state()
    assert "secret" not in str(error.value)


HOSTILE = [
    "' OR '1'='1",
    "c1'; DROP TABLE state; --",
    'c1"; DELETE FROM state; --',
    "*",
    "?[a-z]",
    "%",
    "state",
    ":state",
    "../state",
    "c1\r\nFLUSHALL\r\n",
    "$3\r\nGET\r\n",
    "c1\0",
    "\0",
    "c1' \\",
    "'); redis.call('FLUSHALL'); --",
    "\u202ec1",
    "c1 ",
]


def test_an_id_is_neither_sql_nor_a_key_of_another(
    location: str, namespace: str, writer: OnlineWriter, orders
) -> None:
    """Each is the key of its own row, and of nobody else's, however it is spelled."""
    # One that the name of this one would match, were it a pattern.
    other = namespace.replace("[a-z]*?\\", "bcd")
    with closing(open_writer(location, other)) as theirs:
        theirs.write(CODEC, ["c1"], [row(CUTOFF, 99)], CUTOFF)
        theirs.publish(state(CUTOFF))
        writer.write(CODEC, ["c1"], [row(CUTOFF, 7)], CUTOFF)
        writer.publish(state(CUTOFF))
        assert orders("c1", *HOSTILE) == [(7, CUTOFF), *([None] * len(HOSTILE))]
        rows = [row(CUTOFF, number) for number in range(len(HOSTILE))]
        writer.write(CODEC, HOSTILE, rows, CUTOFF)
        assert orders("c1", *HOSTILE) == [(7, CUTOFF), *((n, CUTOFF) for n in range(len(HOSTILE)))]
        assert writer.state() == state(CUTOFF)
        writer.remove()
        writer.publish(state(CUTOFF))
        assert orders("c1", *HOSTILE) == [None] * (len(HOSTILE) + 1)
        with closing(open_reader(location, other)) as reader:
            (kept,) = reader.read(["c1"])
            assert kept is not None
            assert kept.values[0] == 99
        theirs.remove()
