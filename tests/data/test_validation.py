from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, date, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from churn_assets.contract.features import FEATURE_NAMES, FEATURES, features_for
from churn_assets.data import validation
from churn_assets.data.schema import MAX_ID_LENGTH, features_schema
from churn_assets.data.tables import LOGINS, ORDERS, RAW_TABLES, TIMESTAMP
from churn_assets.data.validation import (
    QUARANTINE_SCHEMA,
    conform,
    pandera_schema,
    validate_events,
    validate_features,
)
from churn_assets.errors import UserError

DAY = date(2024, 3, 5)
NOON = datetime(2024, 3, 5, 12, tzinfo=UTC)
CUTOFF = datetime(2024, 3, 6, tzinfo=UTC)


def orders(**columns) -> pa.Table:
    rows = len(next(iter(columns.values()), [None]))
    values = {
        "order_id": [f"o{n}" for n in range(rows)],
        "customer_id": ["c"] * rows,
        "occurred_at": [NOON] * rows,
        "ingested_at": [None] * rows,
        "amount_minor": [100] * rows,
    }
    schema = pa.schema([field.with_nullable(True) for field in ORDERS.schema])
    return pa.table(values | columns, schema=schema)


def check(rows: pa.Table, now: datetime = CUTOFF) -> dict[str, list[str]]:
    """The reasons, each with the identifiers it was given for."""
    checked = validate_events(ORDERS, rows, DAY, DAY, now)
    assert checked.valid.num_rows + checked.quarantined.num_rows == rows.num_rows
    assert checked.quarantined.schema == QUARANTINE_SCHEMA
    found: dict[str, list[str]] = {}
    for row in checked.quarantined.to_pylist():
        found.setdefault(row["reason"], []).append(json.loads(row["row"])["order_id"])
    return found


@pytest.mark.parametrize("table", RAW_TABLES.values(), ids=RAW_TABLES)
def test_an_empty_table_is_valid(table):
    checked = validate_events(table, table.schema.empty_table(), DAY, DAY, NOON)
    assert checked.valid.schema.names == table.schema.names
    assert checked.valid.num_rows == checked.quarantined.num_rows == 0


def test_sound_events_pass_as_they_are():
    rows = orders(order_id=["b", "a"], ingested_at=[None, NOON])
    checked = validate_events(ORDERS, rows, DAY, DAY, CUTOFF)
    assert checked.valid.equals(rows)


@pytest.mark.parametrize("column", ["order_id", "customer_id"])
@pytest.mark.parametrize("value", [None, ""])
def test_missing_identifiers(column, value):
    assert list(check(orders(**{column: ["a", value]}))) == [f"missing_{column}"]


def test_identifiers_may_be_this_long_and_no_longer():
    longest = "é" * (MAX_ID_LENGTH // 2)
    assert check(orders(customer_id=[longest])) == {}
    assert check(orders(customer_id=["a", longest + "x"])) == {"overlong_customer_id": ["o1"]}


def test_missing_times_and_amounts_and_negative_amounts():
    rows = orders(occurred_at=[None, NOON, NOON, NOON], amount_minor=[1, None, -1, 0])
    assert check(rows) == {
        "missing_occurred_at": ["o0"],
        "missing_amount_minor": ["o1"],
        "negative_amount_minor": ["o2"],
    }
    days = validate_events(ORDERS, rows).quarantined["day"].to_pylist()
    assert days == [None, DAY, DAY]


def test_the_future_begins_after_now():
    late = NOON + timedelta(microseconds=1)
    assert check(orders(occurred_at=[NOON, late]), now=NOON) == {"future_occurred_at": ["o1"]}
    assert check(orders(ingested_at=[NOON, late]), now=NOON) == {"future_ingested_at": ["o1"]}


def test_partitions_are_half_open():
    start = datetime(2024, 3, 5, tzinfo=UTC)
    tick = timedelta(microseconds=1)
    moments = [start - tick, start, CUTOFF - tick, CUTOFF]
    assert check(orders(occurred_at=moments), CUTOFF) == {"outside_partitions": ["o0", "o3"]}


def test_the_earliest_event_keeps_a_shared_identifier():
    rows = orders(
        order_id=["a", "a", "b", "a"],
        occurred_at=[NOON, NOON - timedelta(hours=1), NOON, NOON],
        amount_minor=[1, 2, 3, -4],
    )
    checked = validate_events(ORDERS, rows, DAY, DAY, CUTOFF)
    assert checked.valid["amount_minor"].to_pylist() == [2, 3]
    assert Counter(checked.quarantined["reason"].to_pylist()) == {
        "duplicate_order_id": 1,
        "negative_amount_minor": 1,
    }


def test_a_row_has_one_reason_the_first():
    rows = orders(order_id=["", "x"], customer_id=[None, None], amount_minor=[-1, -1])
    assert check(rows) == {"missing_order_id": [""], "missing_customer_id": ["x"]}


def test_types_are_converted_only_without_loss():
    rows = orders(order_id=["a"])
    smaller = rows.set_column(4, "amount_minor", pa.array([5], pa.int16()))
    assert validate_events(ORDERS, smaller).valid["amount_minor"].type == pa.int64()
    wrong = rows.set_column(4, "amount_minor", pa.array([1.5]))
    with pytest.raises(UserError, match=r"orders.amount_minor is double and cannot be made int64"):
        validate_events(ORDERS, wrong)
    with pytest.raises(UserError, match="orders has no column amount_minor; it has order_id"):
        validate_events(ORDERS, rows.drop_columns(["amount_minor"]))


def test_many_sound_logins_pass():
    n = 50_000
    moments = np.datetime64("2024-03-05", "us") + np.arange(n).astype("timedelta64[s]")
    rows = pa.table(
        {
            "login_id": [f"l{i}" for i in range(n)],
            "customer_id": [f"c{i % 100}" for i in range(n)],
            "occurred_at": pa.array(moments).cast(TIMESTAMP),
            "ingested_at": pa.nulls(n, TIMESTAMP),
        }
    )
    assert validate_events(LOGINS, rows, DAY, DAY, CUTOFF).quarantined.num_rows == 0


def features(rows: int = 3, **columns) -> pa.Table:
    values = {
        "customer_id": [f"c{n}" for n in range(rows)],
        "cutoff": [CUTOFF] * rows,
        "total_orders_30d": [1] * rows,
        "avg_order_value": [20.0] * rows,
        "days_since_last_order": [3] * rows,
        "support_tickets_90d": [0] * rows,
        "login_frequency_7d": [0.5] * rows,
    }
    schema = pa.schema([f.with_nullable(True) for f in features_schema(FEATURES).arrow])
    return pa.table(values | columns, schema=schema)


def test_sound_features_pass_as_they_are():
    rows = features()
    checked = validate_features(rows, FEATURE_NAMES)
    assert checked.valid.equals(rows)
    assert validate_features(features(0), FEATURE_NAMES).valid.num_rows == 0
    assert validate_features(rows.to_pandas(), FEATURE_NAMES).valid.equals(rows)


def test_other_columns_pass_through():
    rows = features().append_column("day", pa.array([DAY] * 3))
    assert validate_features(rows, FEATURE_NAMES).valid["day"].to_pylist() == [DAY] * 3


def test_a_source_without_logins_has_no_such_feature():
    names = [feature.name for feature in features_for(["orders", "support_tickets"])]
    rows = features().drop_columns(["login_frequency_7d"])
    assert validate_features(rows, names).valid.num_rows == 3
    with pytest.raises(UserError, match="no column login_frequency_7d"):
        validate_features(rows, FEATURE_NAMES)


def test_feature_rows_at_fault_go_to_quarantine_with_a_reason():
    before = CUTOFF - timedelta(days=1)
    rows = features(
        9,
        customer_id=["a", "b", "c", "d", "e", "", "g", "h", "a"],
        cutoff=[CUTOFF] * 7 + [before, CUTOFF],
        total_orders_30d=[1, -1, 10_001, None, 1, 1, 1, 1, 1],
        avg_order_value=[1.0, 1.0, 1.0, 1.0, float("nan"), 1.0, float("inf"), 1.0, 1.0],
    )
    checked = validate_features(rows, FEATURE_NAMES)
    assert checked.valid["customer_id"].to_pylist() == ["a", "h"]
    found = [
        (json.loads(row["row"])["customer_id"], row["reason"], row["day"])
        for row in checked.quarantined.to_pylist()
    ]
    assert found == [
        ("b", "negative_total_orders_30d", DAY),
        ("c", "too_large_total_orders_30d", DAY),
        ("d", "missing_total_orders_30d", DAY),
        ("e", "missing_avg_order_value", DAY),
        ("", "missing_customer_id", DAY),
        ("g", "too_large_avg_order_value", DAY),
        ("a", "duplicate_row", DAY),
    ]
    assert checked.quarantined["table"].to_pylist() == ["customer_features"] * 7


def test_a_row_at_fault_does_not_cost_a_sound_one_its_place():
    rows = features(2, customer_id=["a", "a"], total_orders_30d=[-1, 1])
    checked = validate_features(rows, FEATURE_NAMES)
    assert checked.valid["total_orders_30d"].to_pylist() == [1]
    assert checked.quarantined["reason"].to_pylist() == ["negative_total_orders_30d"]


def test_only_cutoffs_with_a_fault_are_looked_at_row_by_row(monkeypatch):
    looked_at = []
    real = validation._pandera_faults

    def counting(rows, *rest):
        looked_at.append(rows.num_rows)
        return real(rows, *rest)

    monkeypatch.setattr(validation, "_pandera_faults", counting)
    validate_features(features(), FEATURE_NAMES)
    assert looked_at == []
    cutoffs = [CUTOFF, CUTOFF + timedelta(days=1), CUTOFF + timedelta(days=1)]
    validate_features(features(cutoff=cutoffs, total_orders_30d=[1, 1, -1]), FEATURE_NAMES)
    assert looked_at == [2]


# Values of a column on this side of its limits and on the other.
SOUND = {
    "customer_id": ["x" * 128, "é" * 64],
    "total_orders_30d": [0, 10_000],
    "avg_order_value": [0.0, 1e7],
    "days_since_last_order": [0, 365],
}
FAULTY = {
    "customer_id": ["", None, "x" * 129, "é" * 64 + "x"],
    "total_orders_30d": [None, -1, 10_001],
    "avg_order_value": [None, -1e-9, 1e7 + 1e-3, float("nan"), float("inf"), float("-inf")],
    "days_since_last_order": [None, -1, 366],
}
CELLS = [(name, value) for name in SOUND for value in (*SOUND[name], *FAULTY[name])]


@settings(max_examples=30, deadline=None)
@given(cells=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(CELLS)), max_size=3))
@example(cells=[(1, ("avg_order_value", float("nan")))])
@example(cells=[(1, ("avg_order_value", -1e-9))])
@example(cells=[(1, ("customer_id", "é" * 64 + "x"))])
def test_exactly_the_rows_with_a_value_beyond_its_limits_are_refused(cells):
    columns = features(4).to_pydict()
    for row, (name, value) in cells:
        columns[name][row] = value
    table = features(4, **columns)
    seen, kept = set(), []
    for row in range(4):
        values = {name: columns[name][row] for name in FAULTY}
        sound = not any(repr(v) in map(repr, FAULTY[n]) for n, v in values.items())
        if sound and values["customer_id"] not in seen:
            seen.add(values["customer_id"])
            kept.append(row)
    checked = validate_features(table, FEATURE_NAMES)
    assert checked.valid.equals(table.take(kept))
    assert checked.quarantined.num_rows == 4 - len(kept)
    frame = checked.valid.to_pandas(types_mapper=_nullable)
    pandera_schema(features_schema(FEATURES)).validate(frame, lazy=True)


def _nullable(kind: pa.DataType):
    import pandas as pd

    return pd.Int64Dtype() if kind == pa.int64() else None


def test_conforming_does_not_believe_a_declared_nullability():
    schema = pa.schema([pa.field("a", pa.int64(), nullable=False)])
    rows = pa.table({"a": pa.array([1, None])})
    assert conform("t", rows, schema)["a"].null_count == 1
