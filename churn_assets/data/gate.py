"""The data gate: may this table be trained on? By rows, nulls and schema; no evidence refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb
import ibis.expr.types as ir
import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from churn_assets.contract.features import FEATURES, Feature
from churn_assets.data.checks import CheckResult
from churn_assets.data.mapping import ROW, sql_name, sql_text
from churn_assets.data.pushdown import ColumnFigures, table_figures
from churn_assets.data.readers import connect, find_files, format_of, load_files
from churn_assets.data.schema import (
    Field,
    FieldType,
    TableSchema,
    features_schema,
    field_type,
    read_schema,
    schema_as_json,
    table_schema,
    training_schema,
)
from churn_assets.data.tables import RAW_TABLES
from churn_assets.errors import UserError


@dataclass(frozen=True)
class GatePolicy:
    """Limits of the gate.

    min_rows: at least this many rows. max_null_ratio: at most this share of nulls in a column.
    max_feature_auc: at most this ROC AUC of one feature by itself, either way round.
    Raises UserError for a limit that would let anything pass.
    """

    min_rows: int = 10_000
    max_null_ratio: float = 0.05
    max_feature_auc: float = 0.97

    def __post_init__(self) -> None:
        if self.min_rows < 1:
            raise UserError(f"data_gate.min_rows is {self.min_rows}; set at least 1")
        if not (math.isfinite(self.max_null_ratio) and 0 <= self.max_null_ratio < 1):
            raise UserError(
                f"data_gate.max_null_ratio is {self.max_null_ratio}; set 0 or more, below 1"
            )
        if not 0.5 < self.max_feature_auc < 1:
            raise UserError(
                f"data_gate.max_feature_auc is {self.max_feature_auc}; "
                "set a number above 0.5 and below 1"
            )


def judge_rows(rows: int, policy: GatePolicy) -> CheckResult:
    """Are there at least `policy.min_rows` rows?"""
    figures: dict[str, float | int | str] = {"rows": rows, "min_rows": policy.min_rows}
    if rows < policy.min_rows:
        reason = f"{rows:,} rows are fewer than the {policy.min_rows:,} asked for"
        return CheckResult(False, reason, figures)
    return CheckResult(True, f"{rows:,} rows, at least {policy.min_rows:,} asked for", figures)


def judge_nulls(
    table: pa.Table, policy: GatePolicy, schema: TableSchema | None = None
) -> CheckResult:
    """Is no column null (or NaN) in more than `policy.max_null_ratio` of the rows?

    With `schema`, columns in which it allows a null are shown and not judged.
    """
    if not table.num_rows:
        return CheckResult(False, "there are no rows to judge", {"rows": 0})
    ratios = {
        name: pc.sum(pc.is_null(table[name], nan_is_null=True)).as_py() / table.num_rows
        for name in table.column_names
    }
    return judge_null_ratios(ratios, policy, None if schema is None else schema.required)


def judge_null_ratios(
    ratios: dict[str, float], policy: GatePolicy, judged: frozenset[str] | None = None
) -> CheckResult:
    """Like judge_nulls, from the share of nulls by column. `judged`: default every column."""
    figures: dict[str, float | int | str] = {
        f"null_ratio {name}": round(ratio, 6) for name, ratio in ratios.items()
    }
    figures["max_null_ratio"] = policy.max_null_ratio
    looked_at = {name: r for name, r in ratios.items() if judged is None or name in judged}
    if not looked_at:
        return CheckResult(False, "there is no column to judge for nulls", figures)
    worst = max(looked_at, key=lambda name: looked_at[name])
    above = [name for name, ratio in looked_at.items() if not ratio <= policy.max_null_ratio]
    if above:
        listed = ", ".join(f"{name} {looked_at[name]:.1%}" for name in above)
        return CheckResult(False, f"nulls above {policy.max_null_ratio:.1%}: {listed}", figures)
    reason = (
        f"at most {looked_at[worst]:.1%} nulls in a column, {policy.max_null_ratio:.1%} allowed"
    )
    return CheckResult(True, reason, figures)


def judge_schema(table: pa.Table, schema: TableSchema) -> CheckResult:
    """Has `table` the columns of `schema`, of its types and within its ranges?

    Key columns must not be null; how many nulls the others may have is judge_nulls' question.
    Columns the schema does not name are listed and allowed.
    """
    types = {field.name: field.type for field in table.schema}
    figures = {
        field.name: _column_figures(table[field.name], field)
        for field in schema.fields
        if field.name in types
    }
    return _schema_verdict(types, schema, figures, lambda: _repeated_keys(table, schema))


def judge_schema_in_engine(rows: ir.Table, schema: TableSchema) -> CheckResult:
    """`judge_schema` of a table that stays in its engine: the same verdict, from one scan."""
    types = {field.name: field.type for field in rows.schema().to_pyarrow()}
    found = table_figures(rows, schema)
    verdict = _schema_verdict(types, schema, found.columns, lambda: found.repeated_keys)
    return replace(verdict, figures={"rows": found.rows} | verdict.figures)


def _schema_verdict(
    types: Mapping[str, pa.DataType],
    schema: TableSchema,
    columns: Mapping[str, ColumnFigures],
    repeated_keys: Callable[[], int],
) -> CheckResult:
    problems = []
    for field in schema.fields:
        if field.name not in types:
            problems.append(f"{field.name} is missing")
            continue
        is_key = field.name in schema.primary_key
        problems += _column_problems(types[field.name], columns[field.name], field, is_key)
    others = [name for name in types if name not in {f.name for f in schema.fields}]
    figures: dict[str, float | int | str] = {
        "columns": len(schema.fields),
        "problems": len(problems),
    }
    if others:
        figures["other_columns"] = ", ".join(others)
    if not problems:
        repeated = repeated_keys()
        if repeated:
            problems.append(f"{repeated:,} rows repeat the key {', '.join(schema.primary_key)}")
            figures["problems"] = 1
    if problems:
        return CheckResult(False, "; ".join(problems), figures)
    return CheckResult(True, f"{len(schema.fields)} columns have their types and ranges", figures)


def judge_data(
    table: pa.Table | None,
    features: Sequence[Feature] = FEATURES,
    policy: GatePolicy | None = None,
    schema: TableSchema | None = None,
) -> CheckResult:
    """The whole gate on a feature table: rows, nulls and schema.

    schema: another one than that of the feature table with `features`, for another table. No table,
    or an empty one, does not pass.
    """
    policy = GatePolicy() if policy is None else policy
    if table is None:
        return CheckResult(False, "there is no table to judge", {"rows": 0})
    return _judge(table, policy, features_schema(features) if schema is None else schema)


def validate_file(
    path: str | Path,
    min_rows: int = 10_000,
    max_null_ratio: float = 0.05,
    schema_path: str | Path | None = None,
) -> CheckResult:
    """The gate on a parquet or CSV file (gzip and globs allowed), by the schema in `schema_path`.

    Without a schema, rows and nulls are judged. CSV text is read as the types the schema names; a
    corrupt line, or text that is not of its type, does not pass. Raises UserError when the file or
    the schema cannot be read.
    """
    policy = GatePolicy(min_rows, max_null_ratio)
    schema = None if schema_path is None else read_schema(schema_path)
    files = find_files(str(path))
    connection = connect()
    try:
        corrupt = load_files(connection, "given", files)
        problems = []
        if corrupt.num_rows:
            line = corrupt.slice(0, 1).to_pylist()[0]
            problems.append(
                f"{corrupt.num_rows:,} corrupt lines, the first is line {line['line']}: "
                f"{line['problem']}"
            )
        columns = {
            name: sql_name(name)
            for name, *_ in connection.execute("DESCRIBE given").fetchall()
            if name != ROW
        }
        if schema is not None and format_of(files[0]) == "csv":
            for field in schema.fields:
                if field.name in columns:
                    columns[field.name], problem = _typed(connection, field)
                    problems += problem
        selected = ", ".join(f"{sql} AS {sql_name(name)}" for name, sql in columns.items())
        table = (
            connection.sql(f"SELECT {selected} FROM given").to_arrow_table()
            if columns
            else pa.table({})
        )
    except duckdb.Error as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be judged: {first}") from error
    finally:
        connection.close()
    return _judge(table, policy, schema, problems)


def schema_json(table: str) -> str:
    """The schema of a raw table, of customer_features or of training_set, as JSON.

    Raises UserError when there is no such table.
    """
    schemas = {name: table_schema(raw) for name, raw in RAW_TABLES.items()}
    schemas["customer_features"] = features_schema(FEATURES)
    schemas["training_set"] = training_schema(FEATURES)
    if table not in schemas:
        raise UserError(f"there is no table {table}; choose one of {', '.join(schemas)}")
    return schema_as_json(schemas[table])


def _judge(
    table: pa.Table,
    policy: GatePolicy,
    schema: TableSchema | None,
    problems: Sequence[str] = (),
) -> CheckResult:
    results = [judge_rows(table.num_rows, policy), judge_nulls(table, policy, schema)]
    if schema is not None:
        results.append(judge_schema(table, schema))
    failed = [*problems, *(result.reason for result in results if not result.passed)]
    figures = {name: value for result in results for name, value in result.figures.items()}
    if failed:
        return CheckResult(False, "; ".join(failed), figures)
    return CheckResult(True, "; ".join(result.reason for result in results), figures)


_COMPATIBLE: dict[FieldType, frozenset[FieldType]] = {
    "number": frozenset({"number", "integer"}),
}


def _column_figures(column: pa.ChunkedArray, field: Field) -> ColumnFigures:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    stored = field_type(column.type)
    if stored in ("integer", "number"):
        found = pc.min_max(column)
        return ColumnFigures(column.null_count, found["min"].as_py(), found["max"].as_py())
    if stored == "string":
        return ColumnFigures(column.null_count, longest=pc.max(pc.binary_length(column)).as_py())
    return ColumnFigures(column.null_count)


def _column_problems(
    stored: pa.DataType, figures: ColumnFigures, field: Field, is_key: bool
) -> list[str]:
    if field_type(stored) not in _COMPATIBLE.get(field.type, frozenset({field.type})):
        return [f"{field.name} is {stored}, not {field.type}"]
    problems = []
    if is_key and figures.nulls:
        problems.append(f"{field.name} is a key and null in {figures.nulls:,} rows")
    limits = field.constraints
    if field.type in ("integer", "number"):
        lowest, highest = figures.lowest, figures.highest
        if limits.minimum is not None and lowest is not None and lowest < limits.minimum:
            problems.append(f"{field.name} goes down to {lowest}, below {limits.minimum}")
        if limits.maximum is not None and highest is not None and highest > limits.maximum:
            problems.append(f"{field.name} goes up to {highest}, above {limits.maximum}")
    longest, most = figures.longest, limits.max_length
    if field.type == "string" and most is not None and longest is not None and longest > most:
        problems.append(f"{field.name} has {longest} bytes, more than {most}")
    return problems


def _repeated_keys(table: pa.Table, schema: TableSchema) -> int:
    if not schema.primary_key or not table.num_rows:
        return 0
    connection = connect()
    try:
        connection.register("judged", table.select(list(schema.primary_key)))
        listed = ", ".join(sql_name(name) for name in schema.primary_key)
        distinct = f"SELECT count(*) FROM (SELECT DISTINCT {listed} FROM judged)"
        return table.num_rows - connection.execute(distinct).fetchall()[0][0]
    finally:
        connection.close()


_SQL_TYPES: dict[FieldType, str] = {
    "string": "VARCHAR",
    "integer": "BIGINT",
    "number": "DOUBLE",
    "boolean": "BOOLEAN",
    "date": "DATE",
    "datetime": "TIMESTAMPTZ",
}


def _typed(connection: duckdb.DuckDBPyConnection, field: Field) -> tuple[str, list[str]]:
    """SQL for a CSV column in its type, and what of its text is not of that type."""
    column = sql_name(field.name)
    typed = f"TRY_CAST({column} AS {_SQL_TYPES[field.type]})"
    if field.type == "integer":
        # DuckDB would round 1.5.
        whole = sql_text(r"\s*[+-]?[0-9]+\s*")
        typed = f"CASE WHEN regexp_full_match({column}, {whole}) THEN {typed} END"
    count, example = connection.execute(
        f"SELECT count(*), min({column}) FROM given WHERE {column} IS NOT NULL AND {typed} IS NULL"
    ).fetchall()[0]
    if not count:
        return typed, []
    shown = msgspec.json.encode(example).decode()
    return typed, [f"{field.name} has {count:,} values that are not {field.type}, such as {shown}"]
