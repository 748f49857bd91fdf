"""Validation in the engine says what validation of rows in memory says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import ibis
import pyarrow as pa
import pytest
from dirt import (
    FEATURE_VALUES,
    ORDER_VALUES,
    PLACE,
    drawn,
    features,
    features_in_engine,
    features_in_memory,
    orders,
    orders_in_engine,
    orders_in_memory,
    same_verdicts,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from churn_assets.contract.features import FEATURES
from churn_assets.data import pushdown
from churn_assets.data.gate import judge_schema, judge_schema_in_engine
from churn_assets.data.pushdown import validate_events_in_engine
from churn_assets.data.results import to_arrow
from churn_assets.data.schema import features_schema, table_schema
from churn_assets.data.tables import ORDERS
from churn_assets.errors import UserError

# Ibis asks DuckDB for a table's schema by a name that DuckDB renamed.
pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")


def dirty(values: Mapping[str, Sequence]) -> st.SearchStrategy[list[dict]]:
    return st.builds(drawn, st.just(values), st.integers(0, 12), st.integers(0, 10**6))


@settings(max_examples=40, deadline=None)
@given(dirty(ORDER_VALUES))
@example([])
def test_events_are_judged_alike(rows: list[dict]) -> None:
    table = orders(rows)
    same_verdicts(orders_in_memory(table), orders_in_engine(ibis.memtable(table)), len(rows))


@settings(max_examples=40, deadline=None)
@given(dirty(FEATURE_VALUES))
@example([])
def test_features_are_judged_alike(rows: list[dict]) -> None:
    table = features(rows)
    same_verdicts(features_in_memory(table), features_in_engine(ibis.memtable(table)), len(rows))
    schema = features_schema(FEATURES)
    pushed = judge_schema_in_engine(ibis.memtable(table), schema)
    mine = judge_schema(table, schema)
    assert (pushed.passed, pushed.reason) == (mine.passed, mine.reason)
    assert pushed.figures == {"rows": len(rows)} | mine.figures


SOUND = {name: values[0] for name, values in ORDER_VALUES.items()}


def test_a_table_that_is_another_is_refused_alike() -> None:
    other = features([{}]).drop(["cutoff", "avg_order_value"])
    other = other.append_column("avg_order_value", pa.array(["much"]))
    verdicts = [
        judge_schema(other, features_schema(FEATURES)),
        judge_schema_in_engine(ibis.memtable(other), features_schema(FEATURES)),
    ]
    assert verdicts[0].reason == verdicts[1].reason
    assert "cutoff is missing; " in verdicts[0].reason
    assert "avg_order_value is string, not number" in verdicts[0].reason


@pytest.mark.parametrize("repeated", [False, True])
def test_a_clean_table_is_scanned_once(repeated: bool, monkeypatch) -> None:
    scans = 0

    def counted(real: Callable) -> Callable:
        def to_arrow(rows):
            nonlocal scans
            scans += 1
            return real(rows)

        return to_arrow

    monkeypatch.setattr(pushdown, "to_arrow", counted(pushdown.to_arrow))
    rows = [SOUND | {"order_id": "a" if repeated else str(n)} for n in range(5)]
    checked = orders_in_engine(ibis.memtable(orders(rows)))
    assert checked.quarantined.num_rows == (4 if repeated else 0)
    assert scans == (2 if repeated else 1)


def test_fingerprints_that_happen_to_be_equal_are_no_duplicates(monkeypatch) -> None:
    monkeypatch.setattr(pushdown, "_fingerprint", lambda rows, keys: rows[keys[0]].length() * 0)
    rows = ibis.memtable(orders([SOUND | {"order_id": str(n)} for n in range(5)]))
    checked = orders_in_engine(rows)
    assert checked.quarantined.num_rows == 0
    assert to_arrow(checked.valid).num_rows == 5
    assert pushdown.table_figures(rows, table_schema(ORDERS)).repeated_keys == 0


def test_other_types_are_converted_or_refused() -> None:
    table = orders([SOUND]).drop([PLACE])
    at = table.schema.get_field_index("amount_minor")
    smaller = table.set_column(at, "amount_minor", pa.array([5], pa.int16()))
    checked = validate_events_in_engine(ORDERS, ibis.memtable(smaller))
    assert to_arrow(checked.valid).schema.field("amount_minor").type == pa.int64()
    with pytest.raises(UserError, match=r"orders\.amount_minor is string and cannot be made int64"):
        validate_events_in_engine(
            ORDERS, ibis.memtable(table.set_column(at, "amount_minor", pa.array(["5"])))
        )
    with pytest.raises(UserError, match="orders has no column amount_minor; it has order_id"):
        validate_events_in_engine(ORDERS, ibis.memtable(table.drop(["amount_minor"])))
