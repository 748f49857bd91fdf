"""Retention offers: into the lake, each once, and from there to the built-in shop."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from churn_assets.data.lake import Lake
from churn_assets.data.offers import (
    OFFERS,
    SCHEMA,
    offers_of,
    offers_table,
    read_offers,
    read_offers_file,
    record_offers,
)
from churn_assets.data.sources import ShopSourceConfig, open_source
from churn_assets.data.tables import TIMESTAMP
from churn_assets.errors import UserError
from churn_assets.simulator import Offer, Scenario, Shop, ShopParams

NOON = datetime(2024, 3, 1, 12, tzinfo=UTC)
NOW = datetime(2024, 6, 1, tzinfo=UTC)
START = date(2024, 1, 1)
PARAMS = ShopParams(customers=600)
DAY = timedelta(days=1)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "lake"))


def offer(customer: str, days: float = 0) -> Offer:
    return Offer(customer, NOON + days * DAY)


def record(lake: Lake, *offers: Offer) -> int:
    return record_offers(lake, offers_table(offers))


def file(path: Path, *rows: str, head: str = "customer_id,served_at") -> Path:
    path.write_text("\n".join([head, *rows, ""]), encoding="utf-8")
    return path


def test_offers_come_into_the_days_they_were_served_on(lake: Lake) -> None:
    assert read_offers(lake) is None
    assert offers_of(lake) == ()
    assert record(lake, offer("b", 2), offer("a"), offer("b", 2), offer("a", 0.25)) == 3
    assert lake.days(OFFERS) == [NOON.date(), (NOON + 2 * DAY).date()]
    assert lake.schema(OFFERS, NOON.date()).equals(SCHEMA)
    assert offers_of(lake) == (offer("a"), offer("a", 0.25), offer("b", 2))


def test_the_day_is_that_of_utc(lake: Lake) -> None:
    late = datetime.fromisoformat("2024-03-01T23:30:00-02:00")
    assert record(lake, Offer("a", late), Offer("a", late.astimezone(UTC))) == 1
    assert lake.days(OFFERS) == [date(2024, 3, 2)]


def test_what_is_there_stays_and_is_known(lake: Lake) -> None:
    assert record(lake, offer("a"), offer("b")) == 2
    before = lake.stamps(OFFERS)
    assert record(lake, offer("b"), offer("a")) == 0
    assert lake.stamps(OFFERS) == before
    assert record(lake, offer("c"), offer("b"), offer("a", 1)) == 2
    assert lake.stamps(OFFERS)[NOON.date()] != before[NOON.date()]
    assert offers_of(lake) == (offer("a"), offer("b"), offer("c"), offer("a", 1))


def test_in_any_parts_and_order_it_is_the_same(lake: Lake) -> None:
    rng = np.random.default_rng(3)
    drawn = [
        offer(f"c{customer}", float(days))
        for customer, days in zip(
            rng.integers(0, 9, 80), rng.choice([0, 0.5, 1, 1.25, 4], 80), strict=True
        )
    ]
    new = 0
    while drawn:
        part = [drawn.pop(rng.integers(len(drawn))) for _ in range(min(len(drawn), 7))]
        new += record(lake, *part, *part[:2])
        assert record(lake, *part) == 0
    found = offers_of(lake)
    assert len(found) == len(set(found)) == new
    assert list(found) == sorted(found, key=lambda one: (one.served_at, one.customer_id))


def test_stopped_half_way_nothing_is_lost(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    record(lake, offer("old", 1))
    wanted = [offer("a"), offer("b", 1), offer("c", 2)]
    write = Lake.write

    def stopped(self: Lake, table: str, first: date, *arguments: Any, **named: Any) -> Any:
        if first == (NOON + DAY).date():
            raise KeyboardInterrupt
        return write(self, table, first, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Lake, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            record(lake, *wanted)
    assert offers_of(lake) == (offer("a"), offer("old", 1))
    assert record(lake, *wanted) == 2
    assert set(offers_of(lake)) == {offer("old", 1), *wanted}


def test_another_writer_of_the_same_day_is_noticed(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Lake.write

    def overtaken(self: Lake, *arguments: Any, **named: Any) -> Any:
        done = write(self, *arguments, **named)
        day = NOON.date()
        write(self, OFFERS, day, day, offers_table([offer("other")]), day_of="served_at")
        return done

    with monkeypatch.context() as patched:
        patched.setattr(Lake, "write", overtaken)
        with pytest.raises(RuntimeError, match="another writer replaced the day"):
            record(lake, offer("a"))


def test_a_csv_file(tmp_path: Path) -> None:
    path = file(
        tmp_path / "offers.csv",
        "c-2,2024-03-01T13:00:00+01:00,mail",
        '"c-1",2024-03-01 12:00:00.25Z,',
        head="customer_id,served_at,channel",
    )
    found = read_offers_file(path, NOW)
    assert found.schema.equals(SCHEMA)
    assert found.to_pylist() == [
        {"customer_id": "c-2", "served_at": NOON},
        {"customer_id": "c-1", "served_at": NOON + timedelta(milliseconds=250)},
    ]


@pytest.mark.parametrize(
    ("ids", "times"),
    [
        (pa.array(["7"]), pa.array([NOON], TIMESTAMP)),
        (pa.array([7]), pa.array([NOON], pa.timestamp("ns", "Europe/Berlin"))),
        (pa.array(["7"], pa.large_string()), pa.array([NOON], pa.timestamp("ms", "UTC"))),
        (pa.array(["7"]), pa.array(["2024-03-01T12:00:00Z"])),
    ],
)
def test_a_parquet_file(tmp_path: Path, ids: pa.Array, times: pa.Array) -> None:
    path = tmp_path / "offers.parquet"
    pq.write_table(pa.table({"served_at": times, "customer_id": ids}), path)
    found = read_offers_file(path, NOW)
    assert found.schema.equals(SCHEMA)
    assert found.to_pylist() == [{"customer_id": "7", "served_at": NOON}]


GOOD = "c-1,2024-03-01T12:00:00Z"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, ",2024-03-01T12:00:00Z"], "row 2 below the header: customer_id is empty"),
        ([GOOD, '" ",2024-03-01T12:00:00Z'], "row 2 below the header: customer_id is empty"),
        (["c-1,"], "row 1 below the header: served_at is empty; write it like 2024-03-01T1"),
        ([GOOD, GOOD, "c-1,soon"], "row 3 below the header: served_at is 'soon', which is no"),
        (["c-1,2024-03-01T12:00:00"], "'2024-03-01T12:00:00', without a time zone; write it"),
        (["c-1,2024-03-01"], "without a time zone"),
        (["c-1,2024-02-30T12:00:00Z"], "which is no time"),
        (["c-1,0001-01-01T00:00:00+14:00"], "no calendar"),
        (["c-1,2224-03-01T12:00:00Z"], "which is still to come"),
        ([GOOD, GOOD + ",one,too"], "line 3: "),
    ],
)
def test_a_row_that_cannot_be_used(tmp_path: Path, rows: Sequence[str], message: str) -> None:
    path = file(tmp_path / "offers.csv", *rows)
    with pytest.raises(UserError, match=message) as refused:
        read_offers_file(path, NOW)
    assert str(refused.value).startswith(f"{path}, ")


def test_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        read_offers_file(tmp_path / "none.csv", NOW)
    path = file(tmp_path / "offers.csv", GOOD, head="customer,at")
    with pytest.raises(UserError, match=r"no column customer_id and no .*\(it has customer, at\)"):
        read_offers_file(path, NOW)
    path = file(tmp_path / "offers.json", GOOD)
    with pytest.raises(UserError, match="does not tell its format"):
        read_offers_file(path, NOW)
    path = tmp_path / "offers.parquet"
    naive = pa.array([NOON.replace(tzinfo=None)], pa.timestamp("us"))
    pq.write_table(pa.table({"customer_id": ["a"], "served_at": naive}), path)
    with pytest.raises(UserError, match="no time zone; write it in UTC"):
        read_offers_file(path, NOW)
    pq.write_table(pa.table({"customer_id": [1.5], "served_at": pa.array([NOON], TIMESTAMP)}), path)
    with pytest.raises(UserError, match="customer_id is double; write it as text"):
        read_offers_file(path, NOW)


def test_a_file_without_offers_is_none(tmp_path: Path, lake: Lake) -> None:
    found = read_offers_file(file(tmp_path / "offers.csv"), NOW)
    assert found.num_rows == 0
    assert record_offers(lake, found) == 0
    assert lake.days(OFFERS) == []


def everything(source: Any, first: date, last: date) -> dict[str, pa.Table]:
    return {table: source.read(table, first, last).events for table in source.tables}


def test_the_shop_reacts_to_offers_from_the_day_after(lake: Lake) -> None:
    source = open_source(ShopSourceConfig(PARAMS), START, lake=lake)
    plain = Shop(PARAMS, START)
    served = NOON.date()
    ids = plain.events("customers", START, START)["customer_id"].to_pylist()
    until, after = (START, served), (served + DAY, served + 60 * DAY)
    before = everything(source, *until) | {"later": source.read("orders", *after).events}
    for table in Shop.tables:
        assert before[table].equals(plain.events(table, *until))

    record(lake, *(offer(customer) for customer in ids))
    assert everything(source, *until) == {name: before[name] for name in Shop.tables}
    reacted = source.read("orders", *after).events
    assert reacted.num_rows > before["later"].num_rows
    told = [offer(customer) for customer in ids]
    assert reacted.equals(Shop(PARAMS, START, told).events("orders", *after))
    # More of them, on a later day: also what lies between stays.
    record(lake, *(offer(customer, 20) for customer in ids))
    between = served + DAY, served + 20 * DAY
    again = source.read("orders", *between).events
    assert again.equals(Shop(PARAMS, START, told).events("orders", *between))
    assert source.read("orders", *after).events.num_rows > reacted.num_rows


def test_the_shop_is_drawn_anew_only_when_offers_have_come(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    make = Shop.__init__

    def counted(self: Shop, *arguments: Any, **named: Any) -> None:
        drawn.append(arguments)
        make(self, *arguments, **named)

    monkeypatch.setattr(Shop, "__init__", counted)
    source = open_source(ShopSourceConfig(PARAMS), START, lake=lake)
    for _ in range(3):
        source.read("orders", START, START)
    assert len(drawn) == 1
    customer = source.read("customers", START, START).events["customer_id"][0].as_py()
    record(lake, offer(customer))
    for _ in range(3):
        source.read("orders", START, START)
    assert len(drawn) == 2
    record(lake, offer(customer))
    source.read("orders", START, START)
    assert len(drawn) == 2


def test_a_scenario_goes_on_when_offers_come(lake: Lake) -> None:
    scenario = Scenario("ticket_storm", NOON.date())
    source = open_source(ShopSourceConfig(PARAMS, scenario), START, lake=lake)
    customer = source.read("customers", START, START).events["customer_id"][0].as_py()
    record(lake, offer(customer))
    days = NOON.date() + DAY, NOON.date() + 5 * DAY
    found = source.read("support_tickets", *days).events
    assert found.equals(
        Shop(PARAMS, START, [offer(customer)], scenario).events("support_tickets", *days)
    )


def test_stamps_tell_every_write(lake: Lake) -> None:
    assert lake.stamps(OFFERS) == {}
    record(lake, offer("a"), offer("a", 1))
    before = lake.stamps(OFFERS)
    assert list(before) == lake.days(OFFERS)
    day = NOON.date()
    # As many rows, of as many bytes, and as old a file.
    path = lake.path(OFFERS, day)
    about = os.stat(path)
    lake.write(OFFERS, day, day, offers_table([offer("b")]), day_of="served_at")
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    after = lake.stamps(OFFERS)
    assert after[day] != before[day]
    assert after[day + DAY] == before[day + DAY]
