from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import ibis
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from churn_assets.contract.features import FEATURES, features_for
from churn_assets.data.features import scan_look_back
from churn_assets.data.lake import Lake
from churn_assets.data.leaks import check_no_event_after_cutoff
from churn_assets.data.quarantine import UNDATED, read_quarantine, store_quarantine
from churn_assets.data.ranges import CustomerRange, customer_ranges
from churn_assets.data.refresh import (
    check_feature_schema,
    check_label_windows,
    chunks,
    refresh_features,
    refresh_labels,
    refresh_raw,
)
from churn_assets.data.sources import ShopSource, SourceRead
from churn_assets.data.validation import QUARANTINE_SCHEMA, ValidationPolicy
from churn_assets.data.windows import Windows
from churn_assets.errors import UserError
from churn_assets.simulator.params import ShopParams
from churn_assets.simulator.shop import Shop

START, LAST = date(2024, 1, 1), date(2024, 5, 9)
FIRST_FEATURES = date(2024, 3, 30)
FIRST_LABELS = date(2024, 4, 29)
WINDOWS = Windows()
NOW = datetime(2026, 1, 1, tzinfo=UTC)
TABLES = ("customers", "orders", "support_tickets", "logins")


class Faulty:
    """The shop, with some rows of its orders spoilt."""

    tables = TABLES

    def __init__(self, shop: Shop) -> None:
        self._shop = shop

    def read(self, table: str, first: date, last: date, now: datetime | None = None) -> SourceRead:
        events = self._shop.events(table, first, last)
        if table == "orders":
            amounts = events["amount_minor"].to_pylist()
            amounts[0], amounts[-1] = -1, None
            place = events.schema.get_field_index("amount_minor")
            events = events.set_column(place, "amount_minor", pa.array(amounts, pa.int64()))
        undated = pa.table(
            {
                "table": [table],
                "day": pa.nulls(1, pa.date32()),
                "reason": ["unreadable_time"],
                "detail": ["occurred_at is not a time"],
                "row": ["{}"],
            },
            schema=QUARANTINE_SCHEMA,
        )
        return SourceRead(events, undated, events.num_rows + 1, events.num_rows)


@pytest.fixture(scope="module")
def shop() -> Shop:
    return Shop(ShopParams(customers=300), START)


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory, shop: Shop) -> Lake:
    lake = Lake(str(tmp_path_factory.mktemp("lake")))
    for table in TABLES:
        refresh_raw(lake, ShopSource(shop), table, START, LAST, now=NOW)
    con = ibis.duckdb.connect()
    refresh_features(lake, con, FEATURES, TABLES, FIRST_FEATURES, LAST, WINDOWS, data_start=START)
    refresh_labels(lake, con, FIRST_LABELS, LAST, WINDOWS)
    con.disconnect()
    return lake


def test_unusable_rows_go_to_quarantine_and_the_rest_to_the_lake(tmp_path: Path, shop: Shop):
    lake = Lake(str(tmp_path))
    done = refresh_raw(lake, Faulty(shop), "orders", START, LAST, now=NOW)
    assert done.quarantined == {
        "negative_amount_minor": 1,
        "missing_amount_minor": 1,
        "unreadable_time": 1,
    }
    assert sum(done.rows.values()) == done.rows_read - 3
    assert len(done.rows) == (LAST - START).days + 1
    kept = read_quarantine(lake, "orders")
    assert sorted(kept["reason"].to_pylist()) == sorted(done.quarantined)
    assert pc.min(lake.read("orders")["amount_minor"]).as_py() >= 0


def test_a_mended_source_empties_the_quarantine(tmp_path: Path, shop: Shop):
    lake = Lake(str(tmp_path))
    refresh_raw(lake, Faulty(shop), "orders", START, LAST, now=NOW)
    done = refresh_raw(lake, ShopSource(shop), "orders", START, LAST, now=NOW)
    assert done.quarantined == {}
    assert read_quarantine(lake, "orders").num_rows == 0


def test_refreshing_a_day_leaves_the_quarantine_of_other_days(tmp_path: Path, shop: Shop):
    lake = Lake(str(tmp_path))
    refresh_raw(lake, Faulty(shop), "orders", START, LAST, now=NOW)
    middle = START + timedelta(days=20)
    refresh_raw(lake, ShopSource(shop), "orders", middle, middle, now=NOW)
    assert set(read_quarantine(lake, "orders")["reason"].to_pylist()) == {
        "negative_amount_minor",
        "missing_amount_minor",
    }


def test_a_row_without_a_day_is_kept_apart(tmp_path: Path):
    lake = Lake(str(tmp_path))
    row = {"table": "orders", "day": None, "reason": "r", "detail": "d", "row": "{}"}
    store_quarantine(
        lake, "orders", START, LAST, pa.Table.from_pylist([row], schema=QUARANTINE_SCHEMA)
    )
    assert lake.days("quarantine/orders") == [UNDATED]
    assert read_quarantine(lake, "orders").num_rows == 1


def test_features_and_labels_of_every_day_are_there(lake: Lake):
    assert lake.days("customer_features")[0] == FIRST_FEATURES
    assert lake.days("churn_labels")[0] == FIRST_LABELS
    features = lake.read("customer_features", FIRST_FEATURES, FIRST_FEATURES)
    labels = lake.read("churn_labels", FIRST_LABELS, FIRST_LABELS)
    assert features.num_rows == labels.num_rows > 100
    assert set(features["customer_id"].to_pylist()) == set(labels["customer_id"].to_pylist())
    assert 0 < pc.mean(labels["churned"]).as_py() < 1


def test_features_in_chunks_are_those_at_once(
    lake: Lake, tmp_path: Path, shop: Shop, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("churn_assets.data.refresh.CHUNK_DAYS", 7)
    other = Lake(str(tmp_path))
    for table in TABLES:
        refresh_raw(other, ShopSource(shop), table, START, LAST, now=NOW)
    con = ibis.duckdb.connect()
    refresh_features(other, con, FEATURES, TABLES, FIRST_FEATURES, LAST, WINDOWS, data_start=START)
    con.disconnect()
    days = lake.days("customer_features")
    assert other.content_hashes("customer_features", days) == lake.content_hashes(
        "customer_features", days
    )


def test_features_of_ranges_of_customers_are_the_same_files(
    lake: Lake, tmp_path: Path, shop: Shop, monkeypatch: pytest.MonkeyPatch
):
    other = Lake(str(tmp_path))
    for table in TABLES:
        refresh_raw(other, ShopSource(shop), table, START, LAST, now=NOW)
    found = []

    def small_ranges(*args, **options):
        found.extend(customer_ranges(*args, **options, rows_at_once=4_000))
        return found

    monkeypatch.setattr("churn_assets.data.refresh.customer_ranges", small_ranges)
    con = ibis.duckdb.connect()
    done = refresh_features(
        other, con, FEATURES, TABLES, FIRST_FEATURES, LAST, WINDOWS, data_start=START
    )
    con.disconnect()
    assert len(found) > 5
    assert [one.end for one in found[:-1]] == [one.first for one in found[1:]]
    assert found[0].first is None
    assert found[-1].end is None
    assert done.rows == lake.row_counts("customer_features")
    for day in lake.days("customer_features"):
        paths = [Path(one.path("customer_features", day)) for one in (lake, other)]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_few_rows_are_one_range(lake: Lake):
    con = ibis.duckdb.connect()
    scans = scan_look_back(lake, con, TABLES, LAST, LAST, WINDOWS, data_start=START)
    assert customer_ranges(lake, scans, LAST, LAST, WINDOWS) == [CustomerRange()]
    con.disconnect()


def test_the_checks_pass_on_what_was_computed(lake: Lake):
    con = ibis.duckdb.connect()
    for policy in (ValidationPolicy(), ValidationPolicy(rows_in_memory=100)):
        schema = check_feature_schema(lake, con, FEATURES, FIRST_FEATURES, LAST, policy)
        assert schema.passed, schema.reason
        in_engine = sum(lake.row_counts("customer_features").values()) > policy.rows_in_memory
        assert ("rows" in schema.figures) == in_engine
    con.disconnect()
    assert check_label_windows(lake, FIRST_LABELS, LAST, WINDOWS).passed
    result = check_no_event_after_cutoff(lake, TABLES, FIRST_FEATURES, WINDOWS, data_start=START)
    assert result.passed, result.reason
    assert int(result.figures["customers_compared"]) > 100
    assert int(result.figures["events_at_or_after_cutoff"]) > 0


def test_a_feature_that_saw_the_next_day_is_caught(lake: Lake, tmp_path: Path):
    other = Lake(str(tmp_path))
    for table in ("orders", "support_tickets", "logins"):
        other.write(table, START, LAST, lake.read(table), day_of="occurred_at")
    cutoff = lake.read("customer_features", FIRST_FEATURES, FIRST_FEATURES)["cutoff"][0]
    next_day = lake.read(
        "customer_features", FIRST_FEATURES + timedelta(days=1), FIRST_FEATURES + timedelta(days=1)
    )
    place = next_day.schema.get_field_index("cutoff")
    leaking = next_day.set_column(
        place, "cutoff", pa.array([cutoff.as_py()] * next_day.num_rows, next_day["cutoff"].type)
    )
    day = pa.array([FIRST_FEATURES] * leaking.num_rows, pa.date32())
    other.write(
        "customer_features",
        FIRST_FEATURES,
        FIRST_FEATURES,
        leaking.append_column("day", day),
        day_of="day",
    )
    result = check_no_event_after_cutoff(other, TABLES, FIRST_FEATURES, WINDOWS, data_start=START)
    assert not result.passed
    assert "login_frequency_7d differs" in result.reason


def test_a_gap_in_the_label_window_is_caught(lake: Lake, tmp_path: Path):
    other = Lake(str(tmp_path))
    orders = lake.read("orders")
    gap = date(2024, 4, 20)
    other.write("orders", START, gap - timedelta(days=1), _until(orders, gap), day_of="occurred_at")
    after = gap + timedelta(days=1)
    rest = orders.filter(pc.greater_equal(orders["occurred_at"], _at(after)))
    other.write("orders", after, LAST, rest, day_of="occurred_at")
    result = check_label_windows(other, FIRST_LABELS, LAST, WINDOWS)
    assert not result.passed
    assert str(gap) in result.reason


def _at(day: date) -> pa.Scalar:
    return pa.scalar(datetime(day.year, day.month, day.day, tzinfo=UTC), pa.timestamp("us", "UTC"))


def _until(orders: pa.Table, day: date) -> pa.Table:
    return orders.filter(pc.less(orders["occurred_at"], _at(day)))


def test_features_of_a_day_whose_counts_would_be_cut_short_are_refused(lake: Lake):
    con = ibis.duckdb.connect()
    with pytest.raises(UserError, match="2024-03-30"):
        refresh_features(lake, con, FEATURES, TABLES, START, START, WINDOWS, data_start=START)
    con.disconnect()


def test_a_source_without_logins_has_no_login_feature(lake: Lake, tmp_path: Path):
    other = Lake(str(tmp_path))
    other.write("orders", START, LAST, lake.read("orders"), day_of="occurred_at")
    con = ibis.duckdb.connect()
    features = features_for(["customers", "orders"])
    refresh_features(
        other, con, features, ["customers", "orders"], LAST, LAST, WINDOWS, data_start=START
    )
    con.disconnect()
    assert other.read("customer_features", LAST, LAST).column_names == [
        "customer_id",
        "cutoff",
        "total_orders_30d",
        "avg_order_value",
        "days_since_last_order",
    ]


@pytest.mark.parametrize(("days", "lengths"), [(3, [3, 3, 3, 1]), (10, [10]), (100, [10])])
def test_chunks_cover_every_day_once(days: int, lengths: list[int]):
    parts = chunks(START, START + timedelta(days=9), days)
    assert [(end - begin).days + 1 for begin, end in parts] == lengths
    assert parts[0][0] == START
    assert parts[-1][1] == START + timedelta(days=9)
    assert all(b[0] - a[1] == timedelta(days=1) for a, b in pairwise(parts))
