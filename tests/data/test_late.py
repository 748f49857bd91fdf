from __future__ import annotations

import os
import random
from dataclasses import replace
from datetime import date, datetime, timedelta
from pathlib import Path

import ibis
import pyarrow as pa
import pytest
from brute_force import DAY, FIRST, TICK, features_at, histories, raw_table
from hypothesis import given, settings
from hypothesis import strategies as st

from churn_assets.contract.features import features_for
from churn_assets.data.features import customer_features
from churn_assets.data.lake import Lake
from churn_assets.data.late import (
    Change,
    LatePolicy,
    find_outdated,
    noted_changes,
    plan_refresh,
    touched_days,
)
from churn_assets.data.leaks import check_no_event_after_cutoff
from churn_assets.data.refresh import (
    refresh_features,
    refresh_labels,
    refresh_raw,
)
from churn_assets.data.sources import ShopSource, SourceRead
from churn_assets.data.tables import RAW_TABLES, TIMESTAMP
from churn_assets.data.validation import QUARANTINE_SCHEMA
from churn_assets.data.windows import Windows, cutoff_of, days_between, midnight
from churn_assets.simulator.params import ShopParams
from churn_assets.simulator.shop import Shop

pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")

TABLES = ("customers", "orders", "logins")
START, LAST = date(2024, 1, 1), date(2024, 3, 31)
WINDOWS = Windows(activity_days=20, horizon_days=5)
FEATURES = features_for(TABLES)
FIRST_FEATURES, FIRST_LABELS = date(2024, 1, 30), date(2024, 2, 4)
POLICY = LatePolicy()
NOW = midnight(LAST) + timedelta(days=1, hours=2)


class Growing:
    """A source whose rows a test may add to and change."""

    tables = TABLES

    def __init__(self, ingested: bool, rereads: str) -> None:
        self.rereads = rereads
        self.reads: list[tuple[str, date, date]] = []
        self.rows: dict[str, list[dict]] = {table: [] for table in TABLES}
        draw = random.Random(7)
        for customer in range(12):
            name = f"c{customer:02}"
            first = midnight(START) + timedelta(hours=customer)
            self.add("customers", ingested, customer_id=name, occurred_at=first)
            for day in days_between(START, LAST):
                orders = 1 if day.toordinal() % 12 == customer else 0.1
                for table, chance in (("orders", orders), ("logins", 0.2)):
                    if draw.random() < chance:
                        moment = midnight(day) + timedelta(seconds=draw.randrange(86_000))
                        self.event(table, name, moment, ingested)

    def event(self, table: str, customer: str, moment: datetime, ingested: bool = True) -> dict:
        key = RAW_TABLES[table].key
        named = {key: f"{table}-{len(self.rows[table])}", "customer_id": customer}
        amount = {"amount_minor": 100 + len(self.rows[table])} if table == "orders" else {}
        return self.add(table, ingested, **named, occurred_at=moment, **amount)

    def add(self, table: str, ingested: bool, **row) -> dict:
        row["ingested_at"] = row["occurred_at"] + timedelta(seconds=5) if ingested else None
        self.rows[table].append(row)
        return row

    def read(self, table: str, first: date, last: date, now: datetime | None = None) -> SourceRead:
        self.reads.append((table, first, last))
        start, end = midnight(first), cutoff_of(last)
        rows = [row for row in self.rows[table] if start <= row["occurred_at"] < end]
        events = pa.Table.from_pylist(rows, RAW_TABLES[table].schema).sort_by("occurred_at")
        return SourceRead(events, QUARANTINE_SCHEMA.empty_table(), len(rows), len(rows))

    def order_of(self, day: date) -> dict:
        """Some order of `day`, one of several customers."""
        return next(row for row in self.rows["orders"] if row["occurred_at"].date() == day)


def derive(lake: Lake, features: tuple[date, date] | None, labels: tuple[date, date] | None):
    con = ibis.duckdb.connect()
    if features:
        refresh_features(lake, con, FEATURES, TABLES, *features, WINDOWS, data_start=START)
    if labels:
        refresh_labels(lake, con, *labels, WINDOWS)
    con.disconnect()


def bring_in(lake: Lake, source: Growing) -> Lake:
    for table in TABLES:
        refresh_raw(lake, source, table, START, LAST, now=NOW)
    derive(lake, (FIRST_FEATURES, LAST), (FIRST_LABELS, LAST))
    return lake


def refresh(lake: Lake, source: Growing, now: datetime = NOW) -> tuple[str, ...]:
    """What a daily refresh does about late events; the reasons it had."""
    plan = plan_refresh(lake, source, TABLES, WINDOWS, POLICY, now=now)
    for table in plan.raw_tables:
        assert plan.raw_days is not None
        refresh_raw(lake, source, table, *plan.raw_days, now=now)
    derive(lake, plan.features, plan.labels)
    return tuple(found.reason for found in plan.raw)


def state(lake: Lake) -> dict[str, tuple[int, str]]:
    """Every partition of the tables: when its file was written, and what it says."""
    found = {}
    for table in (*TABLES, "customer_features", "churn_labels"):
        days = lake.days(table)
        for day, hashed in lake.content_hashes(table, days).items():
            written = os.stat(lake.path(table, day)).st_mtime_ns
            found[f"{table} {day}"] = (written, hashed)
    return found


def changed(before: dict, after: dict) -> set[str]:
    assert set(before) == set(after)
    said = {key for key in before if before[key][1] != after[key][1]}
    written = {key for key in before if before[key][0] != after[key][0]}
    assert said == written
    return said


def names(table: str, first: date, last: date) -> set[str]:
    return {f"{table} {day}" for day in days_between(first, last)}


def as_of_scratch(lake: Lake, source: Growing, tmp_path: Path) -> None:
    """The lake says what one says that only ever saw the source as it is now."""
    fresh = bring_in(Lake(str(tmp_path / "fresh")), source)
    says = {key: hashed for key, (_, hashed) in state(fresh).items()}
    assert {key: hashed for key, (_, hashed) in state(lake).items()} == says


def test_a_late_order_changes_what_it_touches_and_nothing_else(tmp_path: Path) -> None:
    source = Growing(ingested=False, rereads="window")
    lake = bring_in(Lake(str(tmp_path / "lake")), source)
    before = state(lake)
    assert refresh(lake, source) == ()
    assert state(lake) == before

    day = LAST - timedelta(days=4)
    source.event("orders", "c03", midnight(day) + timedelta(hours=7), ingested=False)
    assert refresh(lake, source) == (f"orders of {day}: 1 late",)
    touched = changed(before, state(lake))
    assert touched >= names("orders", day, day) | names("customer_features", day, LAST)
    assert touched - names("churn_labels", day, LAST) == names("orders", day, day) | names(
        "customer_features", day, LAST
    )
    as_of_scratch(lake, source, tmp_path)

    before = state(lake)
    assert refresh(lake, source) == ()
    assert state(lake) == before
    assert noted_changes(lake, "customer_features") == noted_changes(lake, "churn_labels") == {}


def test_a_late_login_touches_a_week_of_features(tmp_path: Path) -> None:
    source = Growing(ingested=False, rereads="whole")
    lake = bring_in(Lake(str(tmp_path / "lake")), source)
    before, day = state(lake), LAST - timedelta(days=6)
    customer = source.order_of(day - timedelta(days=1))["customer_id"]
    source.event("logins", customer, midnight(day), ingested=False)
    assert refresh(lake, source) == (f"logins of {day}: 1 late",)
    assert changed(before, state(lake)) == (
        names("logins", day, day) | names("customer_features", day, LAST)
    )
    as_of_scratch(lake, source, tmp_path)


def test_a_late_order_of_long_ago_is_found_by_its_ingestion(tmp_path: Path) -> None:
    source = Growing(ingested=True, rereads="whole")
    lake = bring_in(Lake(str(tmp_path / "lake")), source)
    before, day = state(lake), date(2024, 2, 10)
    known = date(2024, 2, 20)
    order = source.event("orders", "c05", midnight(day) + TICK)
    order["ingested_at"] = midnight(known) + timedelta(hours=1)
    assert refresh(lake, source) == (f"orders of {day}: 1 late",)
    touched = changed(before, state(lake))
    # Labels look at what happened; features at what was known, which is more from `known` on.
    assert touched - names("churn_labels", day, day + timedelta(days=4)) <= (
        names("orders", day, day)
        | names("customer_features", known, LAST)
        | names("churn_labels", known + timedelta(days=5), LAST)
    )
    assert touched & names("churn_labels", day, day + timedelta(days=4))
    assert touched >= names("customer_features", known, known + timedelta(days=9))
    as_of_scratch(lake, source, tmp_path)
    before = state(lake)
    assert refresh(lake, source) == ()
    assert state(lake) == before


def test_a_correction_counts_from_when_it_was_known(tmp_path: Path) -> None:
    source = Growing(ingested=True, rereads="whole")
    lake = bring_in(Lake(str(tmp_path / "lake")), source)
    before, day, known = state(lake), date(2024, 2, 10), date(2024, 3, 5)
    order = source.order_of(day)
    order["amount_minor"] += 5_000
    order["ingested_at"] = midnight(known) + timedelta(hours=3)
    assert refresh(lake, source) == (f"orders of {day}: 1 corrected",)
    touched = changed(before, state(lake))
    assert touched >= names("orders", day, day) | names("customer_features", known, known)
    assert touched <= names("orders", day, day) | names("customer_features", known, LAST)

    # Again, and further back than needed: the first amount is not forgotten.
    once = state(lake)
    order["amount_minor"] += 5_000
    order["ingested_at"] += timedelta(days=10)
    refresh(lake, source)
    touched = changed(once, state(lake))
    assert touched <= names("orders", day, day) | names(
        "customer_features", known + timedelta(days=10), LAST
    )
    once = state(lake)
    derive(lake, (FIRST_FEATURES, LAST), (FIRST_LABELS, LAST))
    assert state(lake) == once
    for cutoff_day in (day, known - DAY, known, known + timedelta(days=10), LAST):
        result = check_no_event_after_cutoff(lake, TABLES, cutoff_day, WINDOWS, data_start=START)
        assert result.passed, result.reason
        assert int(result.figures["customers_compared"]) > 5


def test_a_row_that_was_only_touched_is_as_it_was(tmp_path: Path) -> None:
    source = Growing(ingested=True, rereads="whole")
    lake = bring_in(Lake(str(tmp_path / "lake")), source)
    before = state(lake)
    for day in (date(2024, 2, 10), LAST):
        source.order_of(day)["ingested_at"] += timedelta(hours=1)
    assert refresh(lake, source) == ()
    refresh_raw(lake, source, "orders", START, LAST, now=NOW)
    assert state(lake) == before


def test_rows_that_are_gone_go_in_the_window_and_are_kept_before_it(tmp_path: Path) -> None:
    source = Growing(ingested=True, rereads="whole")
    lake = bring_in(Lake(str(tmp_path / "lake")), source)
    before, recent = state(lake), LAST - timedelta(days=6)
    gone = (source.order_of(recent), source.order_of(recent - DAY), source.order_of(START))
    source.rows["orders"] = [row for row in source.rows["orders"] if row not in gone]
    assert refresh(lake, source) == (f"orders of {recent}: 1 gone",)
    raw = {key for key in changed(before, state(lake)) if key.startswith("orders")}
    assert raw == names("orders", recent, recent)


def test_a_correction_without_ingestion_time_is_found_in_the_window(tmp_path: Path) -> None:
    source = Growing(ingested=False, rereads="whole")
    lake = bring_in(Lake(str(tmp_path / "lake")), source)
    inside, outside = LAST - timedelta(days=6), LAST - timedelta(days=7)
    for day in (inside, outside):
        source.order_of(day)["amount_minor"] += 1
    found = find_outdated(lake, source, "orders", POLICY, now=NOW)
    assert [item.reason for item in found] == [f"orders of {inside}: 1 corrected"]
    wider = find_outdated(lake, source, "orders", LatePolicy(reread_days=8), now=NOW)
    assert [item.day for item in wider] == [outside, inside]
    assert find_outdated(lake, source, "orders", LatePolicy(reread_days=0), now=NOW) == ()


@pytest.mark.parametrize("done", [(), ("raw",), ("raw", "features")])
def test_a_refresh_that_was_cut_short_is_finished_by_the_next(tmp_path: Path, done) -> None:
    source = Growing(ingested=False, rereads="window")
    lake = bring_in(Lake(str(tmp_path / "lake")), source)
    day = LAST - timedelta(days=5)
    customer = source.order_of(day)["customer_id"]
    source.rows["orders"] = [
        row
        for row in source.rows["orders"]
        if not (row["customer_id"] == customer and row["occurred_at"].date() >= day)
    ]
    plan = plan_refresh(lake, source, TABLES, WINDOWS, POLICY, now=NOW)
    assert plan.features == (day, LAST)
    assert plan.labels == (day, LAST)
    if "raw" in done:
        assert plan.raw_days is not None
        refresh_raw(lake, source, "orders", *plan.raw_days, now=NOW)
    if "features" in done:
        derive(lake, plan.features, None)
    refresh(lake, source)
    as_of_scratch(lake, source, tmp_path)
    assert plan_refresh(lake, source, TABLES, WINDOWS, POLICY, now=NOW).features is None
    assert noted_changes(lake, "churn_labels") == {}


def test_a_refresh_of_a_part_does_not_settle_the_rest(tmp_path: Path) -> None:
    source = Growing(ingested=False, rereads="window")
    lake = bring_in(Lake(str(tmp_path / "lake")), source)
    day = LAST - timedelta(days=3)
    source.event("orders", "c01", midnight(day), ingested=False)
    refresh_raw(lake, source, "orders", day, day, now=NOW)
    derive(lake, (LAST, LAST), None)
    assert list(noted_changes(lake, "customer_features").values()) == [Change("orders", (day,))]
    assert refresh(lake, source) == ()
    assert noted_changes(lake, "customer_features") == {}
    as_of_scratch(lake, source, tmp_path)


def test_an_event_from_a_clock_that_is_ahead_comes_in_when_its_time_has_come(
    tmp_path: Path,
) -> None:
    source = Growing(ingested=True, rereads="whole")
    ahead = source.event("orders", "c02", midnight(LAST) + timedelta(hours=5))
    ahead["ingested_at"] = NOW + timedelta(hours=1)
    lake = Lake(str(tmp_path / "lake"))
    done = refresh_raw(lake, source, "orders", START, LAST, now=NOW)
    assert done.quarantined == {"future_ingested_at": 1}
    assert find_outdated(lake, source, "orders", POLICY, now=NOW) == ()
    later = find_outdated(lake, source, "orders", POLICY, now=NOW + timedelta(hours=1))
    assert [found.reason for found in later] == [f"orders of {LAST}: 1 late"]


def test_the_built_in_shop_is_not_read_again(tmp_path: Path) -> None:
    shop = ShopSource(Shop(ShopParams(customers=50), START))
    lake = Lake(str(tmp_path))
    refresh_raw(lake, shop, "orders", START, START, now=NOW)
    shop.read = None  # ty: ignore[invalid-assignment]
    assert find_outdated(lake, shop, "orders", POLICY, now=NOW) == ()


def test_only_the_window_is_read_of_a_source_that_reads_by_day(tmp_path: Path) -> None:
    source = Growing(ingested=True, rereads="window")
    lake = Lake(str(tmp_path))
    assert find_outdated(lake, source, "orders", POLICY, now=NOW) == ()
    refresh_raw(lake, source, "orders", START, LAST, now=NOW)
    source.reads.clear()
    assert find_outdated(lake, source, "orders", POLICY, now=NOW) == ()
    assert source.reads == [("orders", LAST - timedelta(days=6), LAST)]


@pytest.mark.parametrize(
    ("made", "table", "first", "last"),
    [
        ("customer_features", "orders", 0, 364),
        ("customer_features", "support_tickets", 0, 89),
        ("customer_features", "logins", 0, 6),
        ("churn_labels", "orders", 0, 4),
        ("churn_labels", "customer_features", 5, 5),
    ],
)
def test_how_far_a_change_reaches(made: str, table: str, first: int, last: int) -> None:
    reached = touched_days(made, [Change(table, (FIRST,))], WINDOWS)
    expected = days_between(FIRST + timedelta(days=first), FIRST + timedelta(days=last))
    assert sorted(reached) == expected


def test_a_negative_window_is_refused() -> None:
    with pytest.raises(ValueError, match="reread_days is negative"):
        LatePolicy(reread_days=-1)


@settings(max_examples=40, deadline=None)
@given(
    histories(5), st.lists(st.tuples(st.integers(0, 11), st.integers(0, 60), st.integers(0, 10**9)))
)
def test_features_of_corrected_orders_follow_what_was_known(events, corrections) -> None:
    """A correction: an order, the days until it is known, the new amount."""
    current, former = list(events["orders"]), []
    for number, days, amount in corrections:
        if number < len(current) and current[number].ingested_at is not None:
            old = current[number]
            known = old.ingested_at + days * DAY + 7 * TICK
            former.append((number, old, known))
            current[number] = replace(old, ingested_at=known, amount_minor=amount)

    rows = raw_table("orders", current).append_column(
        "superseded_at", pa.nulls(len(current), TIMESTAMP)
    )
    before = raw_table("orders", [old for _, old, _ in former]).append_column(
        "superseded_at", pa.array([known for *_, known in former], TIMESTAMP)
    )
    orders = pa.concat_tables([rows, before])
    days = pa.array([e.occurred_at.date() for e in (*current, *(o for _, o, _ in former))])
    tables = {"orders": ibis.memtable(orders.append_column("day", days.cast(pa.date32())))}
    last = FIRST + timedelta(days=4)
    computed = ibis.duckdb.connect().to_pyarrow(customer_features(tables, FIRST, last, WINDOWS))
    for day in days_between(FIRST, last):
        cutoff = cutoff_of(day)
        seen = [*current, *(old for _, old, known in former if cutoff <= known)]
        expected = features_at({"orders": seen}, cutoff, WINDOWS)
        found = {
            row["customer_id"]: {name: row[name] for name in expected[row["customer_id"]]}
            for row in computed.to_pylist()
            if row["cutoff"] == cutoff and row["customer_id"] in expected
        }
        assert found == expected
        assert sum(row["cutoff"] == cutoff for row in computed.to_pylist()) == len(expected)
