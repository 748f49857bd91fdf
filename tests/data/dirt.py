"""Rows with every fault there is, and both ways to find them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import ibis.expr.types as ir
import pyarrow as pa

from churn_assets.contract.features import FEATURE_NAMES, FEATURES
from churn_assets.data.pushdown import (
    PushedDown,
    validate_events_in_engine,
    validate_features_in_engine,
)
from churn_assets.data.results import to_arrow
from churn_assets.data.schema import features_schema
from churn_assets.data.tables import ORDERS
from churn_assets.data.validation import Validated, validate_events, validate_features

DAY = date(2024, 3, 5)
MIDNIGHT = datetime(2024, 3, 5, tzinfo=UTC)
NOW = MIDNIGHT + timedelta(days=1)
TICK = timedelta(microseconds=1)
PLACE = "place"
NAN, INFINITY = float("nan"), float("inf")

# Values of a column, the first of which is sound.
ORDER_VALUES: Mapping[str, Sequence[Any]] = {
    "order_id": ["a", "b", "c", "d", "", None, "x" * 128, "é" * 65],
    "customer_id": ["c", "c", "d", None, "", "\0", "y" * 129],
    "occurred_at": [MIDNIGHT, MIDNIGHT + TICK, MIDNIGHT - TICK, NOW - TICK, NOW, NOW + TICK, None],
    "ingested_at": [None, None, MIDNIGHT, NOW, NOW + TICK],
    "amount_minor": [0, 1, 2**62, -1, None],
}
FEATURE_VALUES: Mapping[str, Sequence[Any]] = {
    "customer_id": ["a", "b", "c", "d", "e", "", None, "é" * 65],
    "cutoff": [NOW, NOW, MIDNIGHT, None],
    "total_orders_30d": [1, 1, 2, 10_000, 10_001, -1, None],
    "avg_order_value": [
        0.0, -0.0, 1.5, 1e7, -1e-9, 1e7 + 1e-3, NAN, INFINITY, -INFINITY, None,
    ],
    "days_since_last_order": [0, 365, 366, None],
    "support_tickets_90d": [0],
    "login_frequency_7d": [0.5, 0.5, NAN, None],
}  # fmt: skip


def drawn(values: Mapping[str, Sequence[Any]], rows: int, seed: int) -> list[dict[str, Any]]:
    """Rows of any of the values, half of them sound but for one."""
    draw = random.Random(seed)
    found = []
    for _ in range(rows):
        row = {name: draw.choice(of) for name, of in values.items()}
        if draw.random() < 0.5:
            spoilt = draw.choice(list(values))
            row = {name: row[name] if name == spoilt else of[0] for name, of in values.items()}
        found.append(row)
    return found


def orders(rows: list[dict[str, Any]]) -> pa.Table:
    return _placed(rows, ORDERS.schema)


def features(rows: list[dict[str, Any]]) -> pa.Table:
    return _placed(rows, features_schema(FEATURES).arrow)


def _placed(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """The rows and their places, which a table in memory has and one in an engine has not."""
    nullable = pa.schema([field.with_nullable(True) for field in schema])
    table = pa.Table.from_pylist(rows, nullable)
    return table.append_column(PLACE, pa.array(range(len(rows)), pa.int64()))


def orders_in_memory(rows: pa.Table) -> Validated:
    return validate_events(ORDERS, rows.drop([PLACE]), DAY, DAY, NOW)


def orders_in_engine(rows: ir.Table) -> PushedDown:
    return validate_events_in_engine(ORDERS, rows, DAY, DAY, NOW, order=[PLACE])


def features_in_memory(rows: pa.Table) -> Validated:
    return validate_features(rows, FEATURE_NAMES)


def features_in_engine(rows: ir.Table) -> PushedDown:
    return validate_features_in_engine(rows, FEATURE_NAMES, order=[PLACE])


def same_verdicts(mine: Validated, pushed: PushedDown, rows: int) -> None:
    """The same rows in quarantine for the same reasons, and the same that may be used."""

    def told(quarantined: pa.Table) -> Counter[tuple]:
        found = quarantined.to_pylist()
        for row in found:
            row["row"] = row["row"].partition(f', "{PLACE}"')[0].rstrip("}")
        return Counter(tuple(row.values()) for row in found)

    assert pushed.rows == rows
    assert told(pushed.quarantined) == told(mine.quarantined)
    columns = [name for name in mine.valid.column_names if name != PLACE]
    valid = to_arrow(pushed.valid).sort_by(PLACE).select(columns)
    assert repr(valid.to_pylist()) == repr(mine.valid.select(columns).to_pylist())
