"""From a team's own rows to events: the mapping it configures, and its execution in DuckDB.

A row goes one of four ways, and is counted in exactly one of them: filtered (not wanted), put in
quarantine with one reason (unusable), used for an event, or used for an event of another day than
asked for. Conditions are structured (column, operator, value): a configuration holds no SQL.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import duckdb
import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from churn_assets.data.tables import RawTable
from churn_assets.data.validation import QUARANTINE_SCHEMA
from churn_assets.errors import UserError

Scalar = str | int | float | bool

ROW = "#row"
"""Number of a row within its source, from 1, in the table the functions below work on."""

_RESERVED = re.compile(r"#row|=.*")
_TIME_COLUMNS = ("occurred_at", "ingested_at")
_LARGEST_AMOUNT = 10**15


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"as_": "as"}):
    """Where the value of an event column comes from: exactly one of column, product, join.

    column: a source column. product: two source columns, multiplied exactly. join: source columns
    put together with `|`, for a table without an identifier of its own.
    as: `integer_text` reads the identifier 17850.0 as 17850; `unix_seconds` and
    `unix_milliseconds` read numbers as time. format: strptime format of a time (default: ISO 8601).
    timezone: of a time written without an offset (default: that of the source).
    """

    column: str | None = None
    product: tuple[str, str] | None = None
    join: tuple[str, ...] | None = None
    as_: Literal["integer_text", "unix_seconds", "unix_milliseconds"] | None = None
    format: str | None = None
    timezone: str | None = None

    def __post_init__(self) -> None:
        given = [self.column, self.product, self.join]
        if sum(value is not None for value in given) != 1:
            raise ValueError("give exactly one of column, product, join")
        if self.join is not None and not self.join:
            raise ValueError("join needs at least one column")
        if self.as_ in ("unix_seconds", "unix_milliseconds") and (self.format or self.timezone):
            raise ValueError(f"as: {self.as_} goes without format and timezone")
        check_timezone(self.timezone)

    @property
    def columns(self) -> tuple[str, ...]:
        """The source columns it reads."""
        if self.column is not None:
            return (self.column,)
        return self.product or self.join or ()


class Condition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a value is compared with; with several operators all must hold. A null never holds."""

    equals: Scalar | None = None
    one_of: tuple[Scalar, ...] | None = None
    starts_with: str | None = None
    matches: str | None = None
    above: int | float | None = None
    at_least: int | float | None = None
    below: int | float | None = None
    at_most: int | float | None = None

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in self.__struct_fields__):
            raise ValueError(f"give one of {', '.join(self.__struct_fields__)}")
        if self.matches is not None:
            try:
                re.compile(self.matches)
            except re.error as error:
                raise ValueError(f"matches is not a regular expression: {error}") from None

    def __str__(self) -> str:
        parts = []
        for name, words in _OPERATORS.items():
            value = getattr(self, name)
            if value is not None:
                shown = ", ".join(map(str, value)) if isinstance(value, tuple) else value
                parts.append(f"{words} {shown}")
        return " and ".join(parts)


_OPERATORS = {
    "equals": "be",
    "one_of": "be one of",
    "starts_with": "start with",
    "matches": "match",
    "above": "be above",
    "at_least": "be at least",
    "below": "be below",
    "at_most": "be at most",
}

Test = Literal["not_null"] | Condition


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a usable row satisfies; a row that does not is put in quarantine with `reason`."""

    reason: Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]*$")]
    column: str
    must: Test | None = None
    must_not: Test | None = None

    def __post_init__(self) -> None:
        if (self.must is None) == (self.must_not is None):
            raise ValueError("give exactly one of must, must_not")

    @property
    def detail(self) -> str:
        """The rule in words."""
        verb = "must" if self.must is not None else "must not"
        test = self.must if self.must is not None else self.must_not
        words = "be given" if test == "not_null" else str(test)
        return f"{self.column} {verb} {words}"


class Filter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which rows are wanted. What it leaves out is counted and otherwise forgotten."""

    column: str
    keep: Test | None = None
    drop: Test | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.drop is None):
            raise ValueError("give exactly one of keep, drop")


class TableConfig(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"from_": "from"}
):
    """Where one raw table comes from and how its rows become events.

    from: path of CSV, CSV.gz or parquet files (globs allowed), or the URL of a database, whose
    table is named by `table`. derive_from: `orders`, for customers that are only known by their
    orders; then nothing else is given. columns: event column -> source column or Value; amounts
    are in currency units. filters, rules: see Filter and Rule; applied in order, filters first.
    exact_duplicates: what happens to a row equal to an earlier one in every column. one_event_per:
    the identifier, when an event has several rows: its time is the earliest of them, its amount
    their sum.
    """

    from_: str | None = None
    derive_from: Literal["orders"] | None = None
    format: Literal["auto", "csv", "parquet"] = "auto"
    delimiter: Annotated[str, msgspec.Meta(min_length=1, max_length=1)] = ","
    encoding: Literal["utf-8", "utf-16", "latin-1"] = "utf-8"
    null_values: tuple[str, ...] = ("",)
    table: str | None = None
    columns: dict[str, str | Value] = {}
    filters: tuple[Filter, ...] = ()
    rules: tuple[Rule, ...] = ()
    exact_duplicates: Literal["quarantine", "keep"] = "quarantine"
    one_event_per: str | None = None

    def __post_init__(self) -> None:
        if (self.from_ is None) == (self.derive_from is None):
            raise ValueError("give exactly one of from, derive_from")
        if self.derive_from is not None and (self.columns or self.filters or self.rules):
            raise ValueError("derive_from goes alone; remove the other keys")

    def value(self, column: str) -> Value:
        """The mapping of event column `column`. Raises KeyError when it has none."""
        mapped = self.columns[column]
        return Value(column=mapped) if isinstance(mapped, str) else mapped

    @property
    def source_columns(self) -> tuple[str, ...]:
        """Every source column the configuration names, once, in the order it names them."""
        named = [name for column in self.columns for name in self.value(column).columns]
        named += [condition.column for condition in (*self.filters, *self.rules)]
        return tuple(dict.fromkeys(named))


def check_timezone(name: str | None) -> None:
    """Raise ValueError unless `name` is None or a time zone of the IANA database."""
    if name is None:
        return
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"there is no time zone {name}; write one such as Europe/London") from None


def event_columns(table: RawTable) -> tuple[str, ...]:
    """The event columns of `table` as a configuration names them (an amount is not yet minor)."""
    return tuple("amount" if c.name == "amount_minor" else c.name for c in table.columns)


def check_columns(table: RawTable, config: TableConfig) -> None:
    """Raise ValueError unless `config` maps every needed column of `table` and no other."""
    if config.derive_from is not None:
        if table.name != "customers":
            raise ValueError(f"only customers can be derived from orders, not {table.name}")
        return
    known = event_columns(table)
    for column in config.columns:
        if column not in known:
            raise ValueError(
                f"{table.name}.columns: {table.name} has no column {column}"
                f"{_meant(column, known)}; it has {', '.join(known)}"
            )
        kind = config.value(column)
        if kind.product is not None and column != "amount":
            raise ValueError(f"{table.name}.columns.{column}: only an amount can be a product")
        if kind.join is not None and column != table.key:
            raise ValueError(f"{table.name}.columns.{column}: only {table.key} can be a join")
        time_only = kind.format or kind.timezone or kind.as_ not in (None, "integer_text")
        if time_only and column not in _TIME_COLUMNS:
            raise ValueError(f"{table.name}.columns.{column} is not a time; remove its format")
        if kind.as_ == "integer_text" and column not in (table.key, "customer_id"):
            raise ValueError(f"{table.name}.columns.{column} is not an identifier; remove its as")
    for column in known:
        if column not in config.columns and column != "ingested_at":
            raise ValueError(f"{table.name}.columns lacks {column}; name its source column")
    if config.one_event_per not in (None, table.key):
        raise ValueError(f"{table.name}.one_event_per can only be {table.key}")


@dataclass(frozen=True)
class Mapped:
    """What became of every row of a source.

    events: raw schema and `lines` (int64, the rows an event was made of), by time, then key.
    quarantined: QUARANTINE_SCHEMA, one row a source row. rows: all of them; filtered: not wanted.
    """

    events: pa.Table
    quarantined: pa.Table
    rows: int
    filtered: int


def map_rows(
    connection: duckdb.DuckDBPyConnection,
    source: str,
    table: RawTable,
    config: TableConfig,
    *,
    minor_units: int,
    timezone: str,
) -> Mapped:
    """Bring the rows of DuckDB table `source` to the events of `table`.

    `source` has the source's columns and ROW. The connection's TimeZone must be UTC. Money is
    decimal from text to the sum of an event's rows, and is rounded once, half to even, to
    `minor_units` to the currency unit. Raises UserError when the configuration names a column
    that the source does not have.
    """
    types = _column_types(connection, source)
    check_source_columns(table, config, types)
    compiler = _Compiler(types, timezone)
    connection.execute(compiler.mapped(source, table, config))
    if config.exact_duplicates == "quarantine":
        partition = ", ".join(sql_name(column) for column in types)
        _quarantine_rows(
            connection,
            "exact_duplicate",
            f"""SELECT {sql_name(ROW)} FROM (
                  SELECT s.{sql_name(ROW)}, row_number() OVER (
                    PARTITION BY {partition} ORDER BY s.{sql_name(ROW)}) AS nth
                  FROM {source} s JOIN mapped USING ({sql_name(ROW)}) WHERE {_USABLE})
                WHERE nth > 1""",
        )
    details = {rule.reason: rule.detail for rule in reversed(config.rules)}
    details["exact_duplicate"] = "equal to an earlier row in every column"
    if config.one_event_per is not None:
        if table.key != "customer_id":
            _quarantine_rows(
                connection,
                "conflicting_customer_id",
                f"""SELECT {sql_name(ROW)} FROM mapped WHERE {_USABLE} AND "=key" IN (
                      SELECT "=key" FROM mapped WHERE {_USABLE}
                      GROUP BY 1 HAVING count(DISTINCT "=customer_id") > 1)""",
            )
            details["conflicting_customer_id"] = f"{table.key} has rows of several customers"
    else:
        _quarantine_rows(
            connection,
            f"duplicate_{table.key}",
            f"""SELECT {sql_name(ROW)} FROM (
                  SELECT {sql_name(ROW)}, row_number() OVER (
                    PARTITION BY "=key" ORDER BY "=occurred_at", {sql_name(ROW)}) AS nth
                  FROM mapped WHERE {_USABLE})
                WHERE nth > 1""",
        )
        details[f"duplicate_{table.key}"] = f"{table.key} belongs to an earlier event"
    mapped = Mapped(
        events=_events(connection, table, minor_units),
        quarantined=_quarantined(connection, source, table, types, details),
        rows=_count(connection, "mapped"),
        filtered=_count(connection, 'mapped WHERE "=filtered"'),
    )
    connection.execute("DROP TABLE mapped")
    return mapped


_USABLE = '"=reason" IS NULL AND NOT "=filtered"'


class _Compiler:
    """Writes configured values and conditions as DuckDB SQL; all text in it is quoted here."""

    def __init__(self, types: dict[str, str], timezone: str) -> None:
        self._types = types
        self._timezone = timezone

    def mapped(self, source: str, table: RawTable, config: TableConfig) -> str:
        """The table that decides the fate of each row."""
        key = config.value(table.key)
        ids = {"=key": key, "=customer_id": config.value("customer_id")}
        expressions = {name: self._identifier(value) for name, value in ids.items()}
        given = {"=key": table.key, "=customer_id": "customer_id"}
        for column in _TIME_COLUMNS:
            value = config.value(column) if column in config.columns else None
            name = f"={column}"
            expressions[name] = "NULL::TIMESTAMPTZ" if value is None else self._time(value)
            if value is not None:
                given[name] = column
        if "amount" in config.columns:
            expressions["=amount"] = self._amount(config.value("amount"))
            given["=amount"] = "amount"
        else:
            expressions["=amount"] = "NULL::DECIMAL(36, 12)"
        broken = [(f"NOT {self.passes(rule)}", sql_text(rule.reason)) for rule in config.rules]
        for name, column in given.items():
            value = config.value(column)
            missing = " OR ".join(f"trim({self._as_text(c)}) = ''" for c in value.columns)
            missing = " OR ".join(
                [missing, *(f"{sql_name(column)} IS NULL" for column in value.columns)]
            )
            if column != "ingested_at":
                broken.append((missing, sql_text(f"missing_{column}")))
                broken.append((f"{sql_name(name)} IS NULL", sql_text(f"invalid_{column}")))
            else:
                broken.append(
                    (f"{sql_name(name)} IS NULL AND NOT ({missing})", sql_text(f"invalid_{column}"))
                )
        broken.append((f'abs("=amount") >= {_LARGEST_AMOUNT}', sql_text("invalid_amount")))
        wanted = " AND ".join(self._kept(filter_) for filter_ in config.filters) or "true"
        values = ", ".join(f"{sql} AS {sql_name(name)}" for name, sql in expressions.items())
        reasons = " ".join(f"WHEN {condition} THEN {reason}" for condition, reason in broken)
        # A filtered row is not judged, so it has no reason.
        return f"""CREATE OR REPLACE TEMP TABLE mapped AS
            SELECT {sql_name(ROW)}, "=key", "=customer_id", "=occurred_at", "=ingested_at",
                   "=amount",
                   NOT "=wanted" AS "=filtered",
                   CASE WHEN NOT "=wanted" THEN NULL {reasons} END AS "=reason"
            FROM (SELECT *, {values}, {wanted} AS "=wanted" FROM {source})"""

    def passes(self, rule: Rule) -> str:
        """SQL that is true or false, never null: does a row satisfy `rule`."""
        if rule.must is not None:
            return self._holds(rule.column, rule.must)
        assert rule.must_not is not None
        return f"(NOT {self._holds(rule.column, rule.must_not)})"

    def _kept(self, filter_: Filter) -> str:
        if filter_.keep is not None:
            return self._holds(filter_.column, filter_.keep)
        assert filter_.drop is not None
        return f"(NOT {self._holds(filter_.column, filter_.drop)})"

    def _holds(self, column: str, test: Test) -> str:
        if test == "not_null":
            return f"({sql_name(column)} IS NOT NULL AND {self._as_text(column)} <> '')"
        assert isinstance(test, Condition)
        text = self._as_text(column)
        parts = []
        if test.equals is not None:
            parts.append(self._equals(column, test.equals))
        if test.one_of is not None:
            options = " OR ".join(self._equals(column, value) for value in test.one_of)
            parts.append(f"({options or 'false'})")
        if test.starts_with is not None:
            parts.append(f"starts_with({text}, {sql_text(test.starts_with)})")
        if test.matches is not None:
            parts.append(f"regexp_full_match({text}, {sql_text(test.matches)})")
        for value, operator in (
            (test.above, ">"),
            (test.at_least, ">="),
            (test.below, "<"),
            (test.at_most, "<="),
        ):
            if value is not None:
                parts.append(f"{self._as_number(column)} {operator} {_number(value)}")
        return f"coalesce({' AND '.join(parts)}, false)"

    def _equals(self, column: str, value: Scalar) -> str:
        if isinstance(value, bool):
            return f"TRY_CAST({sql_name(column)} AS BOOLEAN) = {str(value).lower()}"
        if isinstance(value, str):
            return f"{self._as_text(column)} = {sql_text(value)}"
        return f"{self._as_number(column)} = {_number(value)}"

    def _as_text(self, column: str) -> str:
        if self._types[column] == "VARCHAR":
            return sql_name(column)
        return f"CAST({sql_name(column)} AS VARCHAR)"

    def _as_number(self, column: str) -> str:
        return f"TRY_CAST({sql_name(column)} AS DECIMAL(38, 12))"

    def _identifier(self, value: Value) -> str:
        parts = [f"trim({self._as_text(column)})" for column in value.columns]
        if value.as_ == "integer_text":
            pattern = sql_text(r"^([0-9]+)(?:\.0*)?$")
            parts = [f"nullif(regexp_extract({part}, {pattern}, 1), '')" for part in parts]
        else:
            parts = [f"nullif({part}, '')" for part in parts]
        return " || '|' || ".join(parts)

    def _amount(self, value: Value) -> str:
        # Two factors of six decimals multiply exactly within DuckDB's 38 digits.
        factors = [f"TRY_CAST({sql_name(column)} AS DECIMAL(18, 6))" for column in value.columns]
        return f"CAST({' * '.join(factors)} AS DECIMAL(36, 12))"

    def _time(self, value: Value) -> str:
        # DuckDB also reads 'infinity' and years no calendar of Python's has.
        moment = self._moment(value)
        return (
            f"CASE WHEN {moment} >= TIMESTAMPTZ '1900-01-01 00:00:00+00' "
            f"AND {moment} < TIMESTAMPTZ '9999-01-01 00:00:00+00' THEN {moment} END"
        )

    def _moment(self, value: Value) -> str:
        assert value.column is not None
        column, kind = sql_name(value.column), self._types[value.column]
        zone = sql_text(value.timezone or self._timezone)
        if value.as_ is not None:
            per_second = 1 if value.as_ == "unix_seconds" else 1000
            number = f"TRY_CAST({column} AS DECIMAL(20, 6))"
            micros = f"TRY_CAST({number} * {1_000_000 // per_second} AS BIGINT)"
            return f"timezone('UTC', make_timestamp({micros}))"
        if kind == "TIMESTAMP WITH TIME ZONE":
            return column
        if kind.startswith("TIMESTAMP") or kind == "DATE":
            return f"timezone({zone}, CAST({column} AS TIMESTAMP))"
        text = f"trim({self._as_text(value.column)})"
        if value.format is not None:
            parsed = f"try_strptime({text}, {sql_text(value.format)})"
            if "%z" in value.format or "%Z" in value.format:
                return f"CAST({parsed} AS TIMESTAMPTZ)"
            return f"timezone({zone}, {parsed})"
        offset = sql_text(
            r".*[0-9]{2}(?::[0-9]{2})?(?:\.[0-9]+)?\s*(?:Z|[+-][0-9]{2}(?::?[0-9]{2})?)"
        )
        has_offset = f"(contains({text}, ':') AND regexp_full_match({text}, {offset}))"
        return (
            f"CASE WHEN {has_offset} THEN TRY_CAST({text} AS TIMESTAMPTZ) "
            f"ELSE timezone({zone}, TRY_CAST({text} AS TIMESTAMP)) END"
        )


def _column_types(connection: duckdb.DuckDBPyConnection, source: str) -> dict[str, str]:
    described = connection.execute(f"DESCRIBE {source}").fetchall()
    return {row[0]: str(row[1]) for row in described if row[0] != ROW}


def check_source_columns(table: RawTable, config: TableConfig, present: Iterable[str]) -> None:
    """Raise UserError when a source with the columns `present` lacks one that `config` names."""
    columns = list(present)
    for column in columns:
        if _RESERVED.fullmatch(column):
            raise UserError(f"{table.name}: rename the source column {column!r}; it is reserved")
    for column in config.source_columns:
        if column not in columns:
            wrong_delimiter = len(columns) == 1 and config.table is None
            hint = "; is the delimiter right?" if wrong_delimiter else ""
            raise UserError(
                f"{table.name}: {config.from_} has no column {column}{_meant(column, columns)}; "
                f"it has {', '.join(columns)}{hint}"
            )


def _meant(name: str, known: Sequence[str]) -> str:
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1)
    return f" (did you mean {by_lower[close[0]]}?)" if close else ""


def _quarantine_rows(connection: duckdb.DuckDBPyConnection, reason: str, rows: str) -> None:
    connection.execute(
        f'UPDATE mapped SET "=reason" = {sql_text(reason)} WHERE {sql_name(ROW)} IN ({rows})'
    )


def _count(connection: duckdb.DuckDBPyConnection, what: str) -> int:
    return connection.execute(f"SELECT count(*) FROM {what}").fetchall()[0][0]


def _events(connection: duckdb.DuckDBPyConnection, table: RawTable, minor_units: int) -> pa.Table:
    # ingested_at: an event is known in full once its last row is.
    grouped = connection.sql(
        f"""SELECT "=key" AS key, min("=customer_id") AS customer_id,
                   min("=occurred_at") AS occurred_at, max("=ingested_at") AS ingested_at,
                   sum("=amount") AS amount, count(*) AS lines
            FROM mapped WHERE {_USABLE} GROUP BY 1 ORDER BY 3, 1"""
    ).to_arrow_table()
    columns = {column: grouped[column] for column in grouped.column_names}
    columns[table.key] = columns.pop("key")
    columns["amount_minor"] = minor_amounts(columns.pop("amount"), minor_units)
    fields = {field.name: columns[field.name].cast(field.type) for field in table.schema}
    return pa.table(
        {**fields, "lines": columns["lines"]},
        schema=table.schema.append(pa.field("lines", pa.int64())),
    )


def minor_amounts(amounts: pa.ChunkedArray, minor_units: int) -> pa.ChunkedArray:
    """Decimal amounts in currency units as int64 minor units, rounded half to even."""
    digits = len(str(minor_units)) - 1
    rounded = pc.round(
        amounts.cast(pa.decimal128(38, 12)), ndigits=digits, round_mode="half_to_even"
    )
    factor = pa.scalar(Decimal(minor_units), pa.decimal256(6, 0))
    return pc.multiply(rounded.cast(pa.decimal256(40, digits)), factor).cast(pa.int64())


def _quarantined(
    connection: duckdb.DuckDBPyConnection,
    source: str,
    table: RawTable,
    columns: Iterable[str],
    details: dict[str, str],
) -> pa.Table:
    row = ", ".join(f"{sql_text(column)}: s.{sql_name(column)}" for column in columns)
    found = connection.sql(
        f"""SELECT CAST("=occurred_at" AS DATE) AS day, "=reason" AS reason,
                   CAST(to_json({{{row}}}) AS VARCHAR) AS row
            FROM {source} s JOIN mapped m USING ({sql_name(ROW)})
            WHERE "=reason" IS NOT NULL ORDER BY {sql_name(ROW)}"""
    ).to_arrow_table()
    reasons = found["reason"].combine_chunks().dictionary_encode()
    words = [
        details.get(reason) or _standard_detail(reason) for reason in reasons.dictionary.to_pylist()
    ]
    detail = pa.DictionaryArray.from_arrays(reasons.indices, pa.array(words, pa.string()))
    return pa.table(
        {
            "table": pa.repeat(table.name, found.num_rows),
            "day": found["day"],
            "reason": found["reason"],
            "detail": detail.cast(pa.string()),
            "row": found["row"],
        },
        schema=QUARANTINE_SCHEMA,
    )


def _standard_detail(reason: str) -> str:
    kind, _, column = reason.partition("_")
    return f"{column} is not given" if kind == "missing" else f"{column} cannot be read"


def sql_name(identifier: str) -> str:
    """An identifier, quoted for DuckDB."""
    return '"' + identifier.replace('"', '""') + '"'


def sql_text(value: str) -> str:
    """A text value, quoted for DuckDB."""
    return "'" + value.replace("'", "''") + "'"


def _number(value: int | float) -> str:
    return f"CAST({sql_text(str(Decimal(str(value))))} AS DECIMAL(38, 12))"
