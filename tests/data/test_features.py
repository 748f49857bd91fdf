from __future__ import annotations

from dataclasses import replace
from datetime import date, datetime, timedelta

import ibis
import pyarrow as pa
import pytest
from brute_force import (
    DAY,
    FIRST,
    TICK,
    Event,
    Events,
    events,
    features_at,
    histories,
    raw_table,
    scanned,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ibis.backends.sql.compilers.pyspark import PySparkCompiler

from churn_assets.contract.features import FEATURE_NAMES, FEATURES, features_for
from churn_assets.data.checks import CheckResult, no_event_after_cutoff
from churn_assets.data.features import (
    customer_features,
    earliest_feature_day,
    look_back_days,
    require_look_back,
    scan_look_back,
)
from churn_assets.data.lake import Lake
from churn_assets.data.windows import Windows, cutoff_of, days_between, midnight
from churn_assets.errors import UserError

WINDOWS = st.builds(Windows, activity_days=st.sampled_from((5, 60, 90, 365)))
CUTOFF = cutoff_of(FIRST)
CON = ibis.duckdb.connect()

# Ibis asks DuckDB for a table's schema by a name that DuckDB renamed.
pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")


def compute(
    happened: Events,
    windows: Windows | None = None,
    days: int = 1,
    step: int = 1,
    first: date = FIRST,
) -> pa.Table:
    tables = {name: scanned(name, rows) for name, rows in happened.items()}
    last = first + timedelta(days=days - 1)
    return CON.to_pyarrow(
        customer_features(tables, first, last, windows or Windows(), step_days=step)
    )


def by_cutoff(rows: pa.Table) -> dict[datetime, dict[str, dict]]:
    found: dict[datetime, dict[str, dict]] = {}
    for row in rows.to_pylist():
        assert cutoff_of(row.pop("day")) == row["cutoff"]
        customers = found.setdefault(row.pop("cutoff"), {})
        customer = row.pop("customer_id")
        assert customer not in customers
        customers[customer] = row
    return found


@settings(max_examples=40, deadline=None)
@given(histories(days=12), WINDOWS, st.integers(1, 12), st.sampled_from((1, 1, 2, 7)))
def test_the_expression_equals_the_definition(
    happened: Events, windows: Windows, days: int, step: int
) -> None:
    cutoffs = [cutoff_of(FIRST + timedelta(days=n)) for n in range(0, days, step)]
    expected = {cutoff: features_at(happened, cutoff, windows) for cutoff in cutoffs}
    found = by_cutoff(compute(happened, windows, days, step))
    assert found == {cutoff: rows for cutoff, rows in expected.items() if rows}


@pytest.mark.parametrize("step", [6, 7, 30, 31, 90, 91])
def test_what_one_cutoff_saw_the_next_does_not(step: int) -> None:
    windows = Windows(activity_days=365)
    moments = [CUTOFF - TICK, CUTOFF + (step - 1) * DAY, CUTOFF + 2 * step * DAY]
    events = [Event("a", moment) for moment in moments]
    happened = {"orders": events, "support_tickets": events, "logins": events}
    cutoffs = [CUTOFF + n * step * DAY for n in range(4)]
    found = by_cutoff(compute(happened, windows, 3 * step + 1, step))
    assert found == {cutoff: features_at(happened, cutoff, windows) for cutoff in cutoffs}


@settings(max_examples=15, deadline=None)
@given(histories(days=3), st.sampled_from(("orders", "support_tickets", "logins")), st.data())
def test_no_event_at_or_after_the_cutoff_changes_a_feature(
    happened: Events, table: str, data: st.DataObject
) -> None:
    days_later = data.draw(st.integers(0, 40))
    tick = data.draw(st.sampled_from((0, 1, 86_399_999_999)))
    later = Event(data.draw(st.sampled_from("abz")), CUTOFF + days_later * DAY + tick * TICK)
    more = {**happened, table: [*happened[table], replace(later, amount_minor=7)]}
    before = by_cutoff(compute(happened)).get(CUTOFF)
    assert by_cutoff(compute(more)).get(CUTOFF) == before


@settings(max_examples=6, deadline=None)
@given(histories(days=3))
def test_a_backfill_says_what_the_single_days_say(happened: Events) -> None:
    whole = by_cutoff(compute(happened, days=3))
    single = {}
    for day in days_between(FIRST, FIRST + timedelta(days=2)):
        single |= by_cutoff(compute(happened, first=day))
    assert whole == single


@pytest.mark.parametrize(
    ("table", "feature", "days", "inside"),
    [
        ("orders", "total_orders_30d", 30, 2),
        ("support_tickets", "support_tickets_90d", 90, 1),
        ("logins", "login_frequency_7d", 7, 1 / 7),
    ],
)
def test_a_window_holds_its_first_instant_and_not_its_cutoff(
    table: str, feature: str, days: int, inside: float
) -> None:
    anchor = Event("a", CUTOFF - DAY)
    base = int(table == "orders")

    def feature_with(moment: datetime) -> float:
        happened: dict[str, list[Event]] = {"orders": [anchor], "support_tickets": [], "logins": []}
        happened[table] = [*happened[table], Event("a", moment)]
        return by_cutoff(compute(happened))[CUTOFF]["a"][feature]

    assert feature_with(CUTOFF - days * DAY - TICK) == base
    assert feature_with(CUTOFF - days * DAY) == inside
    assert feature_with(CUTOFF - TICK) == inside
    assert feature_with(CUTOFF) == base


@pytest.mark.parametrize(
    ("age", "days"), [(TICK, 0), (DAY - TICK, 0), (DAY, 1), (DAY + TICK, 1), (2 * DAY, 2)]
)
def test_days_since_the_last_order_are_whole_days(age: timedelta, days: int) -> None:
    found = by_cutoff(compute({"orders": [Event("a", CUTOFF - age)]}))
    assert found[CUTOFF]["a"]["days_since_last_order"] == days


def test_the_population_has_an_order_inside_the_activity_window() -> None:
    edge = CUTOFF - 90 * DAY
    happened = {
        "orders": [Event("in", edge), Event("out", edge - TICK), Event("future", CUTOFF)],
        "logins": [Event("never", CUTOFF - DAY)],
    }
    assert set(by_cutoff(compute(happened))[CUTOFF]) == {"in"}


def test_an_event_is_unknown_until_it_was_ingested() -> None:
    order = Event("a", CUTOFF - 10 * DAY, ingested_at=CUTOFF)
    assert compute({"orders": [order]}).num_rows == 0
    known = replace(order, ingested_at=CUTOFF - TICK)
    assert compute({"orders": [known]}).num_rows == 1
    # Known a day late it still leaves the 30 days when it would have.
    counts = [
        rows["a"]["total_orders_30d"]
        for _, rows in sorted(by_cutoff(compute({"orders": [order]}, days=25)).items())
    ]
    assert counts == [1] * 20 + [0] * 4


@pytest.mark.parametrize("absent", ["support_tickets", "logins"])
def test_a_source_without_a_table_has_no_such_column(absent: str) -> None:
    happened = {"orders": [Event("a", CUTOFF - DAY)], "support_tickets": [], "logins": []}
    del happened[absent]
    names = [feature.name for feature in features_for(happened)]
    assert compute(happened).column_names == ["day", "customer_id", "cutoff", *names]
    assert len(names) == 4


def test_a_customer_without_tickets_and_logins_has_none() -> None:
    happened = {"orders": [Event("a", CUTOFF - DAY)], "support_tickets": [], "logins": []}
    row = by_cutoff(compute(happened))[CUTOFF]["a"]
    assert (row["support_tickets_90d"], row["login_frequency_7d"]) == (0, 0.0)


def test_the_columns_and_their_types() -> None:
    happened = {"orders": [], "support_tickets": [], "logins": []}
    schema = compute(happened).schema
    types = {"int": pa.int64(), "float": pa.float64()}
    assert schema.names == ["day", "customer_id", "cutoff", *FEATURE_NAMES]
    assert schema.types == [
        pa.date32(),
        pa.string(),
        pa.timestamp("us", "UTC"),
        *(types[feature.dtype] for feature in FEATURES),
    ]


def test_the_same_expression_compiles_for_spark() -> None:
    tables = {name: scanned(name, []) for name in ("orders", "support_tickets", "logins")}
    expression = customer_features(tables, FIRST, FIRST + 30 * DAY, Windows(), step_days=7)
    assert "EXPLODE" in PySparkCompiler().to_sqlglot(expression).sql("spark")


def test_features_need_orders() -> None:
    with pytest.raises(UserError, match="table orders"):
        compute({"logins": []})


def test_an_activity_window_beyond_the_look_back_is_refused() -> None:
    with pytest.raises(UserError, match="at most 365"):
        compute({"orders": []}, Windows(activity_days=366))


def test_counts_are_never_cut_short_averages_may_be() -> None:
    start = date(2024, 1, 1)
    assert earliest_feature_day(start, Windows()) == start + timedelta(days=89)
    orders_only = features_for(["orders"])
    assert earliest_feature_day(start, Windows(activity_days=10), orders_only) == date(2024, 1, 30)
    earliest = earliest_feature_day(start, Windows())
    assert midnight(start) == cutoff_of(earliest) - timedelta(days=90)
    require_look_back(earliest, start, Windows())
    with pytest.raises(UserError, match=r"from 2024-03-30 on"):
        require_look_back(earliest - DAY, start, Windows())


def test_a_look_back_is_the_longest_window_on_a_table() -> None:
    reaches = {name: look_back_days(name, Windows()) for name in ("orders", "logins", "customers")}
    assert reaches == {"orders": 365, "logins": 7, "customers": 0}


def test_only_the_look_back_is_read(tmp_path) -> None:
    lake = Lake(str(tmp_path))
    start = FIRST - timedelta(days=20)
    for name in ("orders", "logins"):
        happened = [Event("a", midnight(day)) for day in days_between(start, FIRST)]
        lake.write(name, start, FIRST, raw_table(name, happened), day_of="occurred_at")
    tables = scan_look_back(
        lake, CON, ("customers", "orders", "logins"), FIRST, FIRST, Windows(), data_start=start
    )
    assert {name: CON.to_pyarrow(rows.count()).as_py() for name, rows in tables.items()} == {
        "orders": 21,
        "logins": 7,
    }


LEAK_FREE = {
    "orders": [
        Event("a", CUTOFF - 3 * DAY, amount_minor=501),
        Event("a", CUTOFF - 40 * DAY, amount_minor=100),
        Event("a", CUTOFF + timedelta(minutes=30), amount_minor=900),
        Event("b", CUTOFF - 80 * DAY, amount_minor=700),
        Event("b", CUTOFF - 2 * DAY, CUTOFF, amount_minor=700),
        Event("c", CUTOFF + timedelta(minutes=50), amount_minor=100),
    ],
    "support_tickets": [Event("b", CUTOFF + timedelta(minutes=59))],
    "logins": [Event("b", CUTOFF - DAY), Event("b", CUTOFF + TICK)],
}


def leak_check(features: pa.Table) -> CheckResult:
    tables = {name: raw_table(name, rows) for name, rows in LEAK_FREE.items()}
    return no_event_after_cutoff(features.drop_columns("day"), tables, Windows())


def test_honest_features_pass_the_check_for_leaks() -> None:
    result = leak_check(compute(LEAK_FREE))
    assert result.passed
    assert result.figures["customers_compared"] == 2
    assert result.figures["events_at_or_after_cutoff"] == 4


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("orders", "customers had no order before"),
        ("support_tickets", "support_tickets_90d differs for 1 of 2"),
        ("logins", "login_frequency_7d differs for 1 of 2"),
    ],
)
def test_features_shifted_an_hour_into_the_future_fail(table: str, told: str) -> None:
    hour = timedelta(hours=1)
    shifted = [replace(e, occurred_at=e.occurred_at - hour) for e in LEAK_FREE[table]]
    result = leak_check(compute({**LEAK_FREE, table: shifted}))
    assert not result.passed
    assert told in result.reason


def test_features_that_use_what_was_not_yet_known_fail() -> None:
    early = [replace(event, ingested_at=None) for event in LEAK_FREE["orders"]]
    result = leak_check(compute({**LEAK_FREE, "orders": early}))
    assert not result.passed
    assert "days_since_last_order differs for 1 of 2" in result.reason


def test_a_missing_or_doubled_customer_fails() -> None:
    features = compute(LEAK_FREE).sort_by("customer_id")
    assert "1 customers are missing (such as a)" in leak_check(features.slice(1)).reason
    doubled = pa.concat_tables([features, features.slice(0, 1)])
    assert "1 rows are there twice" in leak_check(doubled).reason


def test_a_sample_looks_first_at_who_was_active_after_the_cutoff() -> None:
    crowd = [Event(f"m{n:03}", CUTOFF - DAY) for n in range(200)]
    active = Event("m117", CUTOFF)
    happened = {"orders": [*crowd, active]}
    leaked = compute({"orders": [*crowd, replace(active, occurred_at=CUTOFF - TICK)]})
    result = no_event_after_cutoff(
        leaked, {"orders": raw_table("orders", happened["orders"])}, Windows(), max_customers=10
    )
    assert not result.passed
    assert result.figures["customers_compared"] in range(1, 11)


def test_the_check_refuses_more_than_one_cutoff() -> None:
    assert not leak_check(compute(LEAK_FREE, days=2)).passed


@settings(max_examples=10, deadline=None)
@given(st.lists(events(1, "ab"), min_size=1, max_size=6))
def test_the_check_agrees_with_the_expression(orders: list[Event]) -> None:
    features = compute({"orders": orders})
    result = no_event_after_cutoff(
        features, {"orders": raw_table("orders", orders)}, Windows(), cutoff=CUTOFF
    )
    assert result.passed, result.reason
