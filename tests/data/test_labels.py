from __future__ import annotations

from datetime import datetime, timedelta

import ibis
import pyarrow as pa
import pytest
from brute_force import DAY, FIRST, TICK, Event, churned, events, raw_table, scanned
from hypothesis import given, settings
from hypothesis import strategies as st
from ibis.backends.sql.compilers.pyspark import PySparkCompiler

from churn_assets.data.labels import churn_labels, label_window_complete, scan_label_inputs
from churn_assets.data.lake import Lake
from churn_assets.data.windows import Windows, cutoff_of, days_between, label_partition
from churn_assets.errors import UserError

CON = ibis.duckdb.connect()
WINDOWS = Windows()
HORIZON = WINDOWS.horizon_days

# Ibis asks DuckDB for a table's schema by a name that DuckDB renamed.
pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")


def population(customers: str, days: int) -> pa.Table:
    rows = [
        {"customer_id": customer, "day": day, "cutoff": cutoff_of(day)}
        for day in days_between(FIRST, FIRST + timedelta(days=days - 1))
        for customer in customers
    ]
    schema = pa.schema(
        {"customer_id": pa.string(), "cutoff": pa.timestamp("us", "UTC"), "day": pa.date32()}
    )
    return pa.Table.from_pylist(rows, schema)


def labels(orders: list[Event], customers: str, days: int, windows: Windows) -> pa.Table:
    first = label_partition(FIRST, windows.horizon_days)
    return CON.to_pyarrow(
        churn_labels(
            scanned("orders", orders),
            ibis.memtable(population(customers, days)),
            first,
            first + timedelta(days=days - 1),
            windows,
        )
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(events(days=15, customers="abz"), max_size=12),
    st.integers(1, 15),
    st.sampled_from((1, 7, 30)),
)
def test_the_expression_equals_the_definition(orders: list[Event], days: int, horizon: int) -> None:
    windows = Windows(horizon_days=horizon)
    found = labels(orders, "abc", days, windows)
    assert found.num_rows == 3 * days
    for row in found.to_pylist():
        expected = churned({"orders": orders}, row["customer_id"], row["cutoff"], windows)
        assert row["churned"] == expected, row


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        (cutoff_of(FIRST) - TICK, True),
        (cutoff_of(FIRST), False),
        (cutoff_of(FIRST) + HORIZON * DAY - TICK, False),
        (cutoff_of(FIRST) + HORIZON * DAY, True),
    ],
)
def test_a_label_window_holds_its_cutoff_and_not_its_end(moment: datetime, expected: bool) -> None:
    assert labels([Event("a", moment)], "a", 1, WINDOWS)["churned"].to_pylist() == [expected]


@pytest.mark.parametrize("gap", [1, HORIZON - 1, HORIZON, HORIZON + 1])
def test_orders_whose_windows_overlap_give_each_label_once(gap: int) -> None:
    start = cutoff_of(FIRST) + 40 * DAY
    orders = [Event("a", start + n * gap * DAY) for n in range(3)]
    found = labels(orders, "a", 120, WINDOWS)
    assert found.num_rows == 120
    kept = [row["cutoff"] for row in found.to_pylist() if not row["churned"]]
    assert len(kept) == HORIZON + 2 * min(gap, HORIZON)


def test_an_order_counts_when_it_occurred_not_when_it_was_ingested() -> None:
    late = Event("a", cutoff_of(FIRST) + DAY, ingested_at=cutoff_of(FIRST) + 100 * DAY)
    assert labels([late], "a", 1, WINDOWS)["churned"].to_pylist() == [False]


def test_labels_are_keyed_by_the_day_they_mature() -> None:
    found = labels([], "a", 2, WINDOWS)
    assert found.schema.names == ["day", "customer_id", "cutoff", "churned"]
    assert found.schema.types == [
        pa.date32(),
        pa.string(),
        pa.timestamp("us", "UTC"),
        pa.bool_(),
    ]
    for row in found.to_pylist():
        assert cutoff_of(row["day"]) == row["cutoff"] + HORIZON * DAY


def test_the_same_expression_compiles_for_spark() -> None:
    expression = churn_labels(
        scanned("orders", []), ibis.memtable(population("a", 1)), FIRST, FIRST + DAY, WINDOWS
    )
    assert "LEFT OUTER JOIN" in PySparkCompiler().to_sqlglot(expression).sql("spark")


def test_only_the_window_is_read(tmp_path) -> None:
    lake = Lake(str(tmp_path))
    last = label_partition(FIRST, HORIZON)
    happened = [Event("a", cutoff_of(day)) for day in days_between(FIRST, last - DAY)]
    start = FIRST + DAY
    lake.write("orders", start, last, raw_table("orders", happened), day_of="occurred_at")
    with pytest.raises(UserError, match=f"materialize customer_features for {FIRST} to {FIRST}"):
        scan_label_inputs(lake, CON, last, last, WINDOWS)
    lake.write("customer_features", FIRST, FIRST, population("a", 1), day_of="day")
    orders, features = scan_label_inputs(lake, CON, last, last, WINDOWS)
    assert CON.to_pyarrow(orders.count()).as_py() == HORIZON
    assert CON.to_pyarrow(features.count()).as_py() == 1
    with pytest.raises(UserError, match=f"materialize orders for {last + DAY}"):
        scan_label_inputs(lake, CON, last, last + DAY, WINDOWS)


def test_the_whole_window_must_have_been_there() -> None:
    label_day = label_partition(FIRST, HORIZON)
    window = days_between(FIRST + DAY, label_day)
    complete = label_window_complete(window, label_day, HORIZON)
    assert complete.passed
    assert complete.figures["days_needed"] == len(window) == HORIZON
    for absent in (window[0], window[14], window[-1]):
        result = label_window_complete([d for d in window if d != absent], label_day, HORIZON)
        assert not result.passed
        assert result.figures["first_missing"] == absent.isoformat()
        assert "1 of the 30 days" in result.reason
    neighbours = {FIRST, label_day + DAY}
    assert not label_window_complete({*window[1:], *neighbours}, label_day, HORIZON).passed
