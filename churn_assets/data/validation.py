"""Row by row: what may enter the lake, and what goes to quarantine with the reason why.

The rules come from one definition, data/schema.py. A vectorised pass over whole columns decides
whether anything is wrong at all (nothing is, in nearly every partition); only then are rows looked
at one by one.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import duckdb
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from churn_assets.contract.features import features_named
from churn_assets.data.schema import Rule, RuleKind, TableSchema, features_schema, table_schema
from churn_assets.data.tables import RawTable
from churn_assets.data.windows import (
    midnight,
    partition_interval,
    partition_of,
    partition_of_cutoff,
)
from churn_assets.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    import pandera.pandas as pandera

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("table", pa.string(), nullable=False),
        pa.field("day", pa.date32()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("row", pa.string(), nullable=False),
    ]
)
"""Rows in quarantine: table, day (null when it cannot be told), the one reason, the row as JSON."""


class ValidationPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """rows_in_memory: tables of more rows are validated in the engine (data/pushdown.py)."""

    rows_in_memory: int = 1_000_000

    def __post_init__(self) -> None:
        if self.rows_in_memory < 0:
            raise ValueError(
                f"validation.rows_in_memory is {self.rows_in_memory}; give rows from 0 on"
            )


@dataclass(frozen=True)
class Validated:
    """Rows that may be used, and the others (QUARANTINE_SCHEMA)."""

    valid: pa.Table
    quarantined: pa.Table


@dataclass(frozen=True)
class _Fault:
    reason: str
    detail: str
    rows: np.ndarray


def validate_events(
    table: RawTable,
    rows: pa.Table,
    first: date | None = None,
    last: date | None = None,
    now: datetime | None = None,
) -> Validated:
    """Part the events of `table` that may be used from those that may not.

    In quarantine go, in this order of precedence: missing, empty or overlong values, negative
    amounts, times after `now`, events outside of the partitions `first` to `last`, and every event
    but the earliest of those that share a key. A bound that is None is not checked. Valid rows keep
    their order. Raises UserError when `rows` lacks a column of the raw schema or has another type.
    """
    schema = table_schema(table)
    rows = conform(table.name, rows, table.schema)
    faults = list(_field_faults(rows, schema))
    for field in schema.fields:
        if field.type == "datetime" and now is not None:
            faults += _beyond(rows, field.name, now)
    faults += _outside(rows, first, last)
    reasons = _first_reasons(rows.num_rows, faults)
    duplicates = _duplicates(rows, (table.key,), reasons == 0, order="occurred_at")
    if duplicates is not None:
        faults.append(_Fault(*told_duplicate_event(table.key), duplicates))
        reasons[duplicates] = len(faults)
    return _part(table.name, rows, faults, reasons, day_of="occurred_at")


def validate_features(
    features: pa.Table | pd.DataFrame, names: Collection[str], table: str = "customer_features"
) -> Validated:
    """Part the feature rows that satisfy the feature contract from those that do not.

    `features` has customer_id, cutoff and the features `names`; further columns pass through. The
    vectorised pass finds the cutoffs with a fault, and pandera judges these lazily, row by row, by
    the schema generated from the same definition. A row in quarantine is under the partition its
    cutoff closes. Raises UserError when a column is missing or has another type.
    """
    schema = features_schema(features_named(names))
    rows = features if isinstance(features, pa.Table) else pa.Table.from_pandas(features)
    rows = conform(table, rows, schema.arrow, others=True)
    suspects = _suspect_cutoffs(rows, schema)
    if suspects is None:
        return Validated(rows, QUARANTINE_SCHEMA.empty_table())
    places = np.flatnonzero(suspects)
    faults = _pandera_faults(rows.take(pa.array(places)), schema, places, rows.num_rows)
    reasons = _first_reasons(rows.num_rows, faults)
    # After the rest, so that a row at fault does not cost a sound one with the same key its place.
    repeated = _duplicates(rows, schema.primary_key, reasons == 0)
    if repeated is not None:
        faults.append(_Fault(*told_duplicate_row(schema.primary_key), repeated))
        reasons[repeated] = len(faults)
    validated = _part(table, rows, faults, reasons, day_of="cutoff")
    if _suspect_cutoffs(validated.valid, schema) is not None:
        raise AssertionError(f"{table}: pandera let rows pass that the schema refuses")
    return validated


def conform(name: str, rows: pa.Table, schema: pa.Schema, others: bool = False) -> pa.Table:
    """`rows` with exactly the columns of `schema`, or with `others` after them, in its types.

    Only types that mean the same are converted (int32 to int64, seconds to microseconds). Raises
    UserError for a column that is missing or cannot be converted without loss.
    """
    columns: dict[str, pa.ChunkedArray] = {}
    fields = []
    for field in schema:
        if field.name not in rows.column_names:
            raise UserError(
                f"{name} has no column {field.name}; it has {', '.join(rows.column_names)}"
            )
        column = rows[field.name]
        if column.type != field.type:
            try:
                column = column.cast(field.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise UserError(
                    f"{name}.{field.name} is {column.type} and cannot be made {field.type}: {error}"
                ) from error
        columns[field.name] = column
        # Nullability is what the rules below judge; a declared one would be believed unchecked.
        fields.append(field.with_nullable(True))
    if others:
        for field in rows.schema:
            if field.name not in columns:
                columns[field.name] = rows[field.name]
                fields.append(field)
    return pa.table(columns, schema=pa.schema(fields))


def _field_faults(rows: pa.Table, schema: TableSchema) -> Iterator[_Fault]:
    """What breaks a field's rules; rows are only looked at when the whole column tells so."""
    for rule in schema.rules:
        broken = _broken(rows[rule.field.name], rule)
        if broken is not None:
            yield _Fault(rule.reason, rule.detail, broken)


def _broken(column: pa.ChunkedArray, rule: Rule) -> np.ndarray | None:
    """Which values break `rule` (bool, one a row); None when none does."""
    if rule.kind == "missing":
        return missing_values(column)
    values = pc.binary_length(column) if rule.kind in ("empty", "overlong") else column
    least, greatest = _range(values)
    if least is None:
        return None
    if rule.kind == "empty":
        return _mask(pc.equal(values, 0)) if least == 0 else None
    if rule.kind == "below":
        return _mask(pc.less(values, rule.limit)) if least < rule.limit else None
    return _mask(pc.greater(values, rule.limit)) if greatest > rule.limit else None


def missing_values(column: pa.ChunkedArray) -> np.ndarray | None:
    """Which values are null or NaN (bool, one a row); None when none is."""
    floating = pa.types.is_floating(column.type)
    if not column.null_count and not (floating and pc.any(pc.is_nan(column)).as_py()):
        return None
    return _mask(pc.is_null(column, nan_is_null=True))


# Name and words of the faults that are not of a field's own rules.
def told_future(column: str, now: datetime) -> tuple[str, str]:
    """A time that was not yet."""
    return f"future_{column}", f"{column} is after {now.isoformat()}"


def told_outside(first: date | None, last: date | None) -> tuple[str, str]:
    """An event of another day than those asked for."""
    return "outside_partitions", f"occurred_at is not in {first} to {last}"


def told_duplicate_event(key: str) -> tuple[str, str]:
    """An event that shares its identifier."""
    return f"duplicate_{key}", f"{key} belongs to an earlier event"


def told_duplicate_row(keys: tuple[str, ...]) -> tuple[str, str]:
    """A row of a table with a key, which an earlier row has."""
    return "duplicate_row", f"an earlier row has the same {', '.join(keys)}"


def _beyond(rows: pa.Table, column: str, now: datetime) -> list[_Fault]:
    latest = _range(rows[column])[1]
    if latest is None or latest <= now:
        return []
    after = _mask(pc.greater(rows[column], pa.scalar(now, rows[column].type)))
    return [_Fault(*told_future(column, now), after)]


def _outside(rows: pa.Table, first: date | None, last: date | None) -> list[_Fault]:
    moments = rows["occurred_at"]
    earliest, latest = _range(moments)
    outside = np.zeros(rows.num_rows, bool)
    if first is not None and earliest is not None and earliest < midnight(first):
        outside |= _mask(pc.less(moments, pa.scalar(midnight(first), moments.type)))
    if last is not None and latest is not None:
        end = partition_interval(last).end
        if latest >= end:
            outside |= _mask(pc.greater_equal(moments, pa.scalar(end, moments.type)))
    if not outside.any():
        return []
    return [_Fault(*told_outside(first, last), outside)]


def _duplicates(
    rows: pa.Table, keys: tuple[str, ...], among: np.ndarray, order: str | None = None
) -> np.ndarray | None:
    """Which rows repeat the keys of an earlier one (by `order`, then by place); None for none."""
    connection = duckdb.connect()
    try:
        everything = bool(among.all())
        looked_at = rows.select([*keys, *([order] if order else [])])
        looked_at = looked_at if everything else looked_at.filter(pa.array(among))
        connection.register("looked_at", looked_at)
        listed = ", ".join(keys)
        # Distinct hashes prove distinct keys, at a third of the price of comparing the keys.
        distinct = f"SELECT count(DISTINCT hash({listed})) FROM looked_at"
        if connection.execute(distinct).fetchall()[0][0] == looked_at.num_rows:
            return None
        places = np.flatnonzero(among)
        connection.register("numbered", looked_at.append_column("place", pa.array(places)))
        by = f"{order}, place" if order else "place"
        found = connection.execute(
            f"""SELECT place FROM (SELECT place, row_number() OVER (
                  PARTITION BY {listed} ORDER BY {by}) AS nth FROM numbered)
                WHERE nth > 1"""
        ).fetchnumpy()["place"]
    finally:
        connection.close()
    if not len(found):
        return None
    repeated = np.zeros(rows.num_rows, bool)
    repeated[np.asarray(found)] = True
    return repeated


def _suspect_cutoffs(rows: pa.Table, schema: TableSchema) -> np.ndarray | None:
    """Which rows share a cutoff with a row at fault; None when no row is."""
    masks = [fault.rows for fault in _field_faults(rows, schema)]
    repeated = _duplicates(rows, schema.primary_key, np.ones(rows.num_rows, bool))
    if repeated is not None:
        masks.append(repeated)
    if not masks:
        return None
    at_fault = pa.array(np.logical_or.reduce(masks))
    cutoffs = pc.unique(rows["cutoff"].filter(at_fault))
    return _mask(pc.is_in(rows["cutoff"], value_set=cutoffs))


@cache
def pandera_schema(schema: TableSchema) -> pandera.DataFrameSchema:
    """The fields of `schema` as pandera's columns, for pandas with nullable integers."""
    import pandas as pd
    import pandera.pandas as pandera

    dtypes = {
        "integer": pd.Int64Dtype(),
        "number": "float64",
        "datetime": pd.DatetimeTZDtype("us", "UTC"),
        "boolean": pd.BooleanDtype(),
    }
    columns = {}
    for field in schema.fields:
        limits, checks = field.constraints, []
        # `error` is what pandera's failure cases call the check.
        if field.type == "string" and field.name in schema.required:
            checks.append(pandera.Check.str_length(min_value=1, error="empty"))
        if (length := limits.max_length) is not None:
            in_bytes = partial(_fits, length=length)
            checks.append(pandera.Check(in_bytes, element_wise=True, error="overlong"))
        if limits.minimum is not None:
            checks.append(pandera.Check.ge(limits.minimum, error="below"))
        if limits.maximum is not None:
            checks.append(pandera.Check.le(limits.maximum, error="above"))
        columns[field.name] = pandera.Column(
            dtypes.get(field.type, object),
            checks,
            nullable=field.name not in schema.required,
            description=field.description,
        )
    return pandera.DataFrameSchema(columns)


# What pandera's failure cases call the check of a rule.
_PANDERA_CHECKS: dict[RuleKind, str] = {
    "missing": "not_nullable",
    "empty": "empty",
    "overlong": "overlong",
    "below": "below",
    "above": "above",
}


def _fits(text: str, length: int) -> bool:
    return len(text.encode()) <= length


def _pandera_faults(
    rows: pa.Table, schema: TableSchema, places: np.ndarray, total: int
) -> list[_Fault]:
    """What pandera finds wrong in `rows`, which are at `places` of `total` rows."""
    import pandas as pd
    from pandera.errors import SchemaErrors

    nullable = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
    frame = rows.select([field.name for field in schema.fields]).to_pandas(
        types_mapper=nullable.get
    )
    try:
        with warnings.catch_warnings():
            # Pandera concatenates its failure cases in a way pandas is about to change.
            warnings.filterwarnings("ignore", "The behavior of DataFrame concatenation")
            pandera_schema(schema).validate(frame, lazy=True)
    except SchemaErrors as errors:
        cases = errors.failure_cases
    else:
        return []
    unplaced = cases[cases["index"].isna()]
    if len(unplaced):
        raise UserError(f"the table does not have its schema: {unplaced.iloc[0].to_dict()}")
    faults = []
    by_name = {(case.column, case.check): [] for case in cases.itertuples()}
    for case in cases.itertuples():
        by_name[(case.column, case.check)].append(int(case.index))
    for rule in schema.rules:
        found = by_name.get((rule.field.name, _PANDERA_CHECKS[rule.kind]))
        if found:
            mask = np.zeros(total, bool)
            mask[places[found]] = True
            faults.append(_Fault(rule.reason, rule.detail, mask))
    return faults


def _first_reasons(rows: int, faults: list[_Fault]) -> np.ndarray:
    """For each row the number, from 1, of the first fault it has; 0 for none."""
    reasons = np.zeros(rows, np.int16)
    for number, fault in enumerate(faults, 1):
        reasons[(reasons == 0) & fault.rows] = number
    return reasons


def _part(
    table: str, rows: pa.Table, faults: list[_Fault], reasons: np.ndarray, day_of: str
) -> Validated:
    bad = np.flatnonzero(reasons)
    if not len(bad):
        return Validated(rows, QUARANTINE_SCHEMA.empty_table())
    told = [(fault.reason, fault.detail) for fault in faults]
    quarantined = as_quarantined(table, rows.take(pa.array(bad)), reasons[bad] - 1, told, day_of)
    return Validated(rows.filter(pa.array(reasons == 0)), quarantined)


def as_quarantined(
    table: str,
    refused: pa.Table,
    faults: np.ndarray,
    told: Sequence[tuple[str, str]],
    day_of: str,
) -> pa.Table:
    """Rows as quarantine keeps them: `faults` has the number of each row's fault in `told`.

    told: reason and detail. day_of: `cutoff` or the column with the moment of an event.
    """
    partition = partition_of_cutoff if day_of == "cutoff" else partition_of
    days = [None if moment is None else partition(moment) for moment in refused[day_of].to_pylist()]
    numbers = pa.array(faults)
    return pa.table(
        {
            "table": pa.repeat(table, refused.num_rows),
            "day": pa.array(days, pa.date32()),
            "reason": pa.array([reason for reason, _ in told], pa.string()).take(numbers),
            "detail": pa.array([detail for _, detail in told], pa.string()).take(numbers),
            "row": pa.array([_as_json(row) for row in refused.to_pylist()], pa.string()),
        },
        schema=QUARANTINE_SCHEMA,
    )


def _as_json(row: dict[str, Any]) -> str:
    return json.dumps({name: _finite(value) for name, value in row.items()}, default=_plain)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _plain(value: Any) -> str:
    return value.isoformat() if isinstance(value, date | datetime) else str(value)


def _range(values: pa.ChunkedArray) -> tuple[Any, Any]:
    """Least and greatest, nulls and NaN left out; None and None when nothing is left."""
    found = pc.min_max(values)
    return found["min"].as_py(), found["max"].as_py()


def _mask(condition: pa.ChunkedArray) -> np.ndarray:
    """A condition as numpy bools; null is false."""
    return np.asarray(
        pc.fill_null(condition, False).combine_chunks().to_numpy(zero_copy_only=False)
    )
