"""Validation in the engine, for tables that are not to be in memory here.

The rules are those of data/schema.py, as for rows in memory (data/validation.py), and the verdicts
are the same. A table without a fault costs one scan: every rule counts the rows that break it, and
fingerprints of the keys tell whether one may repeat. Only then are the rows at fault selected, and
only they leave the engine.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa

from churn_assets.contract.features import features_named
from churn_assets.data.moments import epoch_microseconds
from churn_assets.data.results import is_spark, to_arrow
from churn_assets.data.schema import Rule, TableSchema, features_schema, table_schema
from churn_assets.data.tables import RawTable
from churn_assets.data.validation import (
    QUARANTINE_SCHEMA,
    as_quarantined,
    told_duplicate_event,
    told_duplicate_row,
    told_future,
    told_outside,
)
from churn_assets.data.windows import midnight, partition_interval
from churn_assets.errors import UserError

# Ibis' stubs know no arithmetic and no comparison on the result of a function of the engine.
Value = Any

_FAULT = "fault_number"
_NTH = "nth_of_its_key"


@dataclass(frozen=True)
class PushedDown:
    """What of `rows` rows may be used, unread, and the others (QUARANTINE_SCHEMA)."""

    rows: int
    valid: ir.Table
    quarantined: pa.Table


@dataclass(frozen=True)
class ColumnFigures:
    """nulls: how many. lowest, highest: of a number, without nulls and NaN. longest: bytes."""

    nulls: int
    lowest: float | int | None = None
    highest: float | int | None = None
    longest: int | None = None


@dataclass(frozen=True)
class TableFigures:
    """What one scan tells of a table. nulls: of every column, NaN among them."""

    rows: int
    nulls: dict[str, int]
    columns: dict[str, ColumnFigures]
    repeated_keys: int


@dataclass(frozen=True)
class _Fault:
    told: tuple[str, str]
    condition: Value


def validate_events_in_engine(
    table: RawTable,
    rows: ir.Table,
    first: date | None = None,
    last: date | None = None,
    now: datetime | None = None,
    *,
    order: Sequence[str] = (),
) -> PushedDown:
    """`validation.validate_events` for rows that stay in the engine, with the same verdicts.

    Of events that share a key and a moment, the first by `order` and then by its other columns
    stays: rows in an engine have no place. Raises UserError as validate_events does.
    """
    schema = table_schema(table)
    rows = _conform(table.name, rows, table.schema)
    faults = _field_faults(rows, schema)
    if now is not None:
        for name in (field.name for field in schema.fields if field.type == "datetime"):
            after = epoch_microseconds(rows[name]) > epoch_microseconds(now)
            faults.append(_Fault(told_future(name, now), after))
    moment = epoch_microseconds(rows.occurred_at)
    outside: list[Value] = []
    if first is not None:
        outside.append(moment < epoch_microseconds(midnight(first)))
    if last is not None:
        outside.append(moment >= epoch_microseconds(partition_interval(last).end))
    if outside:
        faults.append(_Fault(told_outside(first, last), ibis.or_(*outside)))
    return _validated(
        table.name,
        rows,
        faults,
        keys=(table.key,),
        told=told_duplicate_event(table.key),
        order=("occurred_at", *order),
        day_of="occurred_at",
    )


def validate_features_in_engine(
    rows: ir.Table,
    names: Collection[str],
    table: str = "customer_features",
    *,
    order: Sequence[str] = (),
) -> PushedDown:
    """`validation.validate_features` for rows that stay in the engine, with the same verdicts.

    Of rows that share a key, the first by `order` and then by its other columns stays. Raises
    UserError as validate_features does.
    """
    schema = features_schema(features_named(names))
    rows = _conform(table, rows, schema.arrow)
    return _validated(
        table,
        rows,
        _field_faults(rows, schema),
        keys=schema.primary_key,
        told=told_duplicate_row(schema.primary_key),
        order=tuple(order),
        day_of="cutoff",
    )


def table_figures(rows: ir.Table, schema: TableSchema) -> TableFigures:
    """What data/gate.py judges a table by, in one scan; columns `rows` lacks are left out."""
    asked: dict[str, Value] = {"rows": rows.count()}
    for place, name in enumerate(rows.columns):
        asked[f"nulls_{place}"] = _count(_is_missing(rows[name]))
    fields = [field for field in schema.fields if field.name in rows.columns]
    for place, field in enumerate(fields):
        column = rows[field.name]
        asked[f"null_{place}"] = _count(column.isnull())
        if column.type().is_numeric():
            there = ~_is_missing(column)
            asked[f"lowest_{place}"] = column.min(where=there)
            asked[f"highest_{place}"] = column.max(where=there)
        elif column.type().is_string():
            asked[f"longest_{place}"] = _byte_length(column).max()
    keys = schema.primary_key if set(schema.primary_key) <= set(rows.columns) else ()
    if keys:
        asked["keys"] = _fingerprint(rows, keys).nunique()
    found = _one_row(rows.aggregate(**asked))
    count = found["rows"]
    repeated = 0
    if keys and found["keys"] < count:
        repeated = count - _one_row(rows.select(*keys).distinct().aggregate(n=ibis._.count()))["n"]
    columns = {
        field.name: ColumnFigures(
            found[f"null_{place}"] or 0,
            *(found.get(f"{figure}_{place}") for figure in ("lowest", "highest", "longest")),
        )
        for place, field in enumerate(fields)
    }
    nulls = {name: found[f"nulls_{place}"] or 0 for place, name in enumerate(rows.columns)}
    return TableFigures(count, nulls, columns, repeated)


def _validated(
    name: str,
    rows: ir.Table,
    faults: Sequence[_Fault],
    *,
    keys: tuple[str, ...],
    told: tuple[str, str],
    order: tuple[str, ...],
    day_of: str,
) -> PushedDown:
    broken = {f"broken_{n}": _count(fault.condition) for n, fault in enumerate(faults)}
    found = _one_row(
        rows.aggregate(rows=rows.count(), keys=_fingerprint(rows, keys).nunique(), **broken)
    )
    count = found["rows"]
    present = [n for n in range(len(faults)) if found[f"broken_{n}"]]
    may_repeat = found["keys"] < count
    if not present and not may_repeat:
        return PushedDown(count, rows, QUARANTINE_SCHEMA.empty_table())

    # The first fault a row has is the one it is told; a row at fault costs no other its place.
    numbered = rows.mutate(**{_FAULT: _first_fault(faults, present)})
    refused = [numbered.filter(numbered[_FAULT] >= 0)]
    valid = sound = numbered.filter(numbered[_FAULT] < 0).drop(_FAULT)
    if may_repeat:
        shared = sound.group_by(list(keys)).having(ibis._.count() > 1).aggregate()
        rest = [column for column in rows.columns if column not in (*keys, *order)]
        ranked = sound.semi_join(shared, list(keys))
        place = ibis.row_number().over(group_by=list(keys), order_by=[*order, *rest])
        ranked = ranked.mutate(**{_NTH: place})
        repeated = ranked.filter(ranked[_NTH] > 0).drop(_NTH)
        refused.append(repeated.mutate(**{_FAULT: ibis.literal(len(faults), "int64")}))
        kept = ranked.filter(ranked[_NTH] == 0).drop(_NTH)
        valid = ibis.union(sound.anti_join(shared, list(keys)), kept.select(sound.columns))
    bad = to_arrow(ibis.union(*refused) if len(refused) > 1 else refused[0])
    words = [*(fault.told for fault in faults), told]
    numbers = np.asarray(bad[_FAULT])
    quarantined = as_quarantined(name, bad.drop([_FAULT]), numbers, words, day_of)
    return PushedDown(count, valid, quarantined)


def _field_faults(rows: ir.Table, schema: TableSchema) -> list[_Fault]:
    return [
        _Fault((rule.reason, rule.detail), _breaks(rows[rule.field.name], rule))
        for rule in schema.rules
    ]


def _breaks(column: Value, rule: Rule) -> Value:
    if rule.kind == "missing":
        return _is_missing(column)
    if rule.kind == "empty":
        return _byte_length(column) == 0
    if rule.kind == "overlong":
        return _byte_length(column) > rule.limit
    if rule.kind == "below":
        return column < rule.limit
    above = column > rule.limit
    # An engine orders NaN after every number.
    return above & ~column.isnan() if column.type().is_floating() else above


def _is_missing(column: Value) -> Value:
    missing = column.isnull()
    return missing | column.isnan().fill_null(False) if column.type().is_floating() else missing


def _first_fault(faults: Sequence[_Fault], present: Sequence[int]) -> Value:
    number: Value = ibis.literal(-1, "int64")
    for n in reversed(present):
        number = ibis.ifelse(faults[n].condition.fill_null(False), n, number)
    return number.cast("int64")


def _count(condition: Value) -> Value:
    return condition.fill_null(False).sum()


def _one_row(figures: ir.Table) -> dict[str, Any]:
    return to_arrow(figures).to_pylist()[0]


def _conform(name: str, rows: ir.Table, schema: pa.Schema) -> ir.Table:
    """`rows` with the columns of `schema` in its types; others pass through.

    As validation.conform, except that what a conversion would lose is told by the types alone.
    """
    casts = {}
    for field in schema:
        if field.name not in rows.columns:
            raise UserError(f"{name} has no column {field.name}; it has {', '.join(rows.columns)}")
        wanted: Any = dt.DataType.from_pyarrow(field.type, nullable=True)
        stored = rows[field.name].type()
        if stored.copy(nullable=True) == wanted:
            continue
        alike = (
            (stored.is_integer() and wanted.is_numeric())
            or (stored.is_floating() and wanted.is_floating())
            or (stored.is_timestamp() and wanted.is_timestamp())
        )
        if not alike:
            raise UserError(f"{name}.{field.name} is {stored} and cannot be made {field.type}")
        casts[field.name] = wanted
    return rows.cast(casts) if casts else rows


def _fingerprint(rows: ir.Table, keys: Sequence[str]) -> Value:
    """A number that follows from the keys: where it differs, they differ."""
    hashes = []
    for name in keys:
        column = rows[name]
        value: Value = epoch_microseconds(column) if column.type().is_timestamp() else column
        hashes.append(_hash(is_spark(rows.get_backend()), value.type().copy(nullable=True))(value))
    return functools.reduce(lambda one, other: one ^ other, hashes)


@functools.cache
def _hash(spark: bool, dtype: dt.DataType) -> Value:
    name, number = ("xxhash64", dt.int64) if spark else ("hash", dt.uint64)

    @ibis.udf.scalar.builtin(name=name, signature=((dtype,), number))
    def engine_hash(value): ...

    return engine_hash


@ibis.udf.scalar.builtin(name="strlen", signature=((dt.string,), dt.int64))
def _duckdb_byte_length(text): ...


@ibis.udf.scalar.builtin(name="octet_length", signature=((dt.string,), dt.int64))
def _spark_byte_length(text): ...


def _byte_length(text: ir.Value) -> Value:
    if is_spark(text.get_backend()):
        return _spark_byte_length(text)
    return _duckdb_byte_length(text)
