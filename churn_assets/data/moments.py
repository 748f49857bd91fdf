"""Instants as numbers, in expressions that run on every engine."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, overload

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir

from churn_assets.data.results import is_spark

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_INSTANT = dt.Timestamp(timezone="UTC")


# Ibis has no operation for it. Its differences of timestamps go through a calendar in DuckDB, at a
# hundred times the cost of reading the number that a timestamp is.
@ibis.udf.scalar.builtin(name="epoch_us", signature=((_INSTANT,), dt.int64))
def _duckdb(moment): ...


@ibis.udf.scalar.builtin(name="unix_micros", signature=((_INSTANT,), dt.int64))
def _spark(moment): ...


@overload
def epoch_microseconds(moment: datetime) -> int: ...
@overload
def epoch_microseconds(moment: ir.Value) -> Any: ...
def epoch_microseconds(moment: datetime | ir.Value) -> Any:
    """Microseconds since 1970-01-01 UTC of an aware datetime, or of a timestamp expression."""
    if isinstance(moment, datetime):
        return (moment - _EPOCH) // timedelta(microseconds=1)
    return _spark(moment) if is_spark(moment.get_backend()) else _duckdb(moment)
