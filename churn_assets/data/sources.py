"""Where raw events come from: the built-in shop, or a team's own files and databases."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, Protocol

import duckdb
import ibis
import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from ibis.common.exceptions import TableNotFound

from churn_assets.data.lake import Lake
from churn_assets.data.mapping import (
    Mapped,
    TableConfig,
    check_columns,
    check_source_columns,
    check_timezone,
    map_rows,
    sql_name,
    sql_text,
)
from churn_assets.data.offers import OFFERS, offers_of
from churn_assets.data.readers import (
    CORRUPT_SCHEMA,
    columns_of,
    connect,
    find_files,
    load_files,
    load_query,
)
from churn_assets.data.tables import CUSTOMERS, ORDERS, RAW_TABLES
from churn_assets.data.validation import QUARANTINE_SCHEMA, validate_events
from churn_assets.data.windows import midnight, partition_interval
from churn_assets.errors import UserError
from churn_assets.simulator.params import Offer, ShopParams
from churn_assets.simulator.scenarios import Scenario

if TYPE_CHECKING:
    import numpy as np
    from ibis.backends import BaseBackend
    from numpy.typing import NDArray

    from churn_assets.simulator.shop import Shop


@dataclass(frozen=True)
class SourceRead:
    """What reading some days of one table gave.

    events: raw schema. quarantined: QUARANTINE_SCHEMA, rows of these days and rows whose day is not
    known. Every row of the source is in one of the counts: rows_read = used + rows in
    quarantine + filtered (not wanted) + outside (of other days). A table derived from
    another reads no rows of its own.
    """

    events: pa.Table
    quarantined: pa.Table
    rows_read: int
    used: int
    filtered: int = 0
    outside: int = 0


class Source(Protocol):
    """Anything that can hand over the raw events of some days.

    An attribute `rereads` may say where to look for late and corrected events: `never`, when what
    it said of a complete day stays so; `window` (the default), in the newest days; `whole`, on
    every day, because it reads its whole table whatever it is asked for.
    """

    @property
    def tables(self) -> tuple[str, ...]:
        """The raw tables there are; the others are absent, which is not the same as empty."""
        ...

    def read(self, table: str, first: date, last: date, now: datetime | None = None) -> SourceRead:
        """The events of partitions `first` to `last`, both included.

        With `now` also those after it, wherever they lie: they are for quarantine.
        """
        ...


class Tables(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The raw tables of a source. Orders and customers are needed, the others add features."""

    orders: TableConfig | None = None
    customers: TableConfig | None = None
    support_tickets: TableConfig | None = None
    logins: TableConfig | None = None

    def __post_init__(self) -> None:
        if self.orders is None:
            raise ValueError("tables has no orders; a customer churns by not ordering, so map them")
        if self.customers is None:
            raise ValueError("tables has no customers; add customers: {derive_from: orders}")
        for name, config in self.present.items():
            check_columns(RAW_TABLES[name], config)

    @property
    def present(self) -> dict[str, TableConfig]:
        """The tables that are there, in the order of RAW_TABLES."""
        named = {name: getattr(self, name) for name in RAW_TABLES}
        return {name: config for name, config in named.items() if config is not None}


class ShopSourceConfig(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="shop"
):
    """The built-in shop, with its parameters and what happens to it."""

    shop: ShopParams = ShopParams()
    scenario: Scenario = Scenario()


class TablesSourceConfig(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="tables"
):
    """A team's own tables.

    currency_minor_units: minor units to the currency unit. timezone: of times written without an
    offset.
    """

    tables: Tables
    currency_minor_units: Literal[1, 10, 100, 1000] = 100
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        check_timezone(self.timezone)


SourceConfig = ShopSourceConfig | TablesSourceConfig


def source_tables(config: SourceConfig) -> tuple[str, ...]:
    """The raw tables a source has, in the order of RAW_TABLES."""
    if isinstance(config, ShopSourceConfig):
        return tuple(RAW_TABLES)
    return tuple(config.tables.present)


def resolve_paths(config: SourceConfig, base: Path, environment: Mapping[str, str]) -> SourceConfig:
    """`config` with its ${VARIABLES} filled in and relative paths made absolute.

    A relative path starts at `base`, the folder of the configuration, and one that a variable
    holds at the working directory, where the variable was written. Raises UserError naming a
    variable that is not set.
    """
    if isinstance(config, ShopSourceConfig):
        return config
    return _with_places(
        config,
        lambda table, place: resolve_place(place, base, environment, f"source.tables.{table}.from"),
    )


def without_passwords(config: SourceConfig) -> SourceConfig:
    """`config` as it may be written down: the passwords in its URLs masked."""
    if isinstance(config, ShopSourceConfig):
        return config
    return _with_places(config, lambda _, place: shown(place))


def _with_places(
    config: TablesSourceConfig, place: Callable[[str, str], str]
) -> TablesSourceConfig:
    placed = {
        name: msgspec.structs.replace(table, from_=place(name, table.from_))
        for name, table in config.tables.present.items()
        if table.from_ is not None
    }
    tables = msgspec.structs.replace(config.tables, **placed)
    return msgspec.structs.replace(config, tables=tables)


def resolve_place(place: str, base: Path, environment: Mapping[str, str], key: str) -> str:
    """A path or URL of the configuration's `key`, as `resolve_paths` does. Raises UserError."""
    filled = fill_variables(place, environment, key)
    base = Path.cwd() if place.startswith("${") else base
    scheme, separator, rest = filled.partition("://")
    if not separator:
        return str(base / Path(filled).expanduser())
    if scheme in _FILE_DATABASES:
        return f"{scheme}://{base / Path(rest).expanduser()}"
    return filled


def fill_variables(text: str, environment: Mapping[str, str], key: str) -> str:
    """`text`, of the configuration's `key`, with the variables it names as ${NAME} filled in.

    Raises UserError naming one that is not set.
    """

    def value(found: re.Match[str]) -> str:
        if not environment.get(found[1]):
            raise UserError(f"{key} needs ${{{found[1]}}}; set that environment variable")
        return environment[found[1]]

    return re.sub(r"\$\{(\w+)\}", value, text)


def check_files(config: SourceConfig) -> None:
    """Look at the files of a source without reading them: are they there, with their columns?

    Databases are left alone. Raises UserError for the first file or column that is missing.
    """
    if isinstance(config, ShopSourceConfig):
        return
    for name, table in config.tables.present.items():
        if table.from_ is None or "://" in table.from_:
            continue
        try:
            first = find_files(table.from_)[0]
            columns = columns_of(
                first, format=table.format, delimiter=table.delimiter, encoding=table.encoding
            )
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        # An empty file is refused when it is read, with what to do.
        if columns:
            check_source_columns(RAW_TABLES[name], table, columns)


def open_source(
    config: SourceConfig,
    start: date,
    *,
    base: Path | None = None,
    environment: Mapping[str, str] | None = None,
    lake: Lake | None = None,
) -> Source:
    """The source `config` describes; nothing is read yet.

    start: first day of the built-in shop's record. base: where relative paths start (default: the
    working directory). lake: where the offers are that the shop's customers were served.
    """
    if isinstance(config, ShopSourceConfig):
        return ShopSource(OfferedShop(config, start, lake))
    settled = resolve_paths(
        config, base or Path.cwd(), os.environ if environment is None else environment
    )
    assert isinstance(settled, TablesSourceConfig)
    return MappedSource(settled)


class EventMaker(Protocol):
    """The part of the built-in shop a source needs."""

    @property
    def tables(self) -> tuple[str, ...]:
        """The raw tables it makes."""
        ...

    def events(self, table: str, first: date, last: date) -> pa.Table:
        """Events of partitions `first` to `last`, raw schema."""
        ...


class OfferedShop:
    """The built-in shop, whose customers react to the offers that a lake has of them.

    It is made anew when the table has changed. Day d follows from the offers served before d.
    """

    def __init__(self, config: ShopSourceConfig, start: date, lake: Lake | None) -> None:
        """A shop from `start` on. Raises UserError when its scenario happens before."""
        self._config, self._start, self._lake = config, start, lake
        self._lock = Lock()
        self._stamps: dict[date, str] = {}
        self._shop = self._with(())

    @property
    def tables(self) -> tuple[str, ...]:
        """The raw tables it makes."""
        return self._shop.tables

    def events(self, table: str, first: date, last: date) -> pa.Table:
        """Events of partitions `first` to `last`, raw schema. Raises UserError as Shop does."""
        return self._now().events(table, first, last)

    def churn_probability(
        self, customer_ids: Sequence[str], cutoff: datetime, horizon_days: int
    ) -> NDArray[np.float64]:
        """P(no order in [cutoff, cutoff + horizon)) [customers], by the offers before the cutoff.

        Raises UserError as Shop does.
        """
        return self._now().churn_probability(customer_ids, cutoff, horizon_days)

    def check(self, offers: Sequence[Offer]) -> None:
        """Raises UserError for an offer to somebody who was not a customer when it was served."""
        self._with(offers)

    def _now(self) -> Shop:
        if self._lake is None:
            return self._shop
        with self._lock:
            # Looked at before they are read, so that what comes in between is read the next time.
            stamps = self._lake.stamps(OFFERS)
            if stamps != self._stamps:
                self._shop = self._with(offers_of(self._lake))
                self._stamps = stamps
            return self._shop

    def _with(self, offers: Sequence[Offer]) -> Shop:
        from churn_assets.simulator.shop import Shop

        return Shop(self._config.shop, self._start, offers, self._config.scenario)


class ShopSource:
    """The built-in shop as a source; its rows are events already."""

    rereads = "never"

    def __init__(self, shop: EventMaker) -> None:
        self._shop = shop

    @property
    def tables(self) -> tuple[str, ...]:
        """The raw tables there are."""
        return tuple(self._shop.tables)

    def read(self, table: str, first: date, last: date, now: datetime | None = None) -> SourceRead:
        """The events of partitions `first` to `last`, both included."""
        events = self._shop.events(table, first, last)
        return SourceRead(
            events, QUARANTINE_SCHEMA.empty_table(), events.num_rows, used=events.num_rows
        )


class MappedSource:
    """A team's tables, mapped to events. What it has mapped it keeps until the files change."""

    rereads = "whole"

    def __init__(self, config: TablesSourceConfig) -> None:
        self._config = config
        self._mapped: dict[str, tuple[Any, Mapped]] = {}
        self._lock = Lock()

    @property
    def tables(self) -> tuple[str, ...]:
        """The raw tables there are."""
        return source_tables(self._config)

    def read(self, table: str, first: date, last: date, now: datetime | None = None) -> SourceRead:
        """The events of partitions `first` to `last`, both included, and those after `now`.

        The whole table is read and mapped, because rows of one event may be anywhere in it. Raises
        UserError when the table cannot be read, is empty, lacks a mapped column or has no usable
        row.
        """
        config = self._config.tables.present.get(table)
        if config is None:
            raise UserError(f"the source has no table {table}; it has {', '.join(self.tables)}")
        if config.derive_from is not None:
            events = _within(_first_appearances(self._map("orders").events), first, last)
            return SourceRead(events, QUARANTINE_SCHEMA.empty_table(), rows_read=0, used=0)
        mapped = self._map(table)
        days = mapped.quarantined["day"]
        bounds = pa.scalar(first, pa.date32()), pa.scalar(last, pa.date32())
        inside = pc.and_(pc.greater_equal(days, bounds[0]), pc.less_equal(days, bounds[1]))
        quarantined = mapped.quarantined.filter(pc.fill_null(inside, True))
        events = _within(mapped.events, first, last, now)
        used = pc.sum(events["lines"]).as_py() or 0
        outside = mapped.rows - mapped.filtered - quarantined.num_rows - used
        return SourceRead(
            events.drop_columns(["lines"]),
            quarantined,
            rows_read=mapped.rows,
            used=used,
            filtered=mapped.filtered,
            outside=outside,
        )

    def _map(self, table: str) -> Mapped:
        config = self._config.tables.present[table]
        try:
            with self._lock:
                version = _version(config)
                known = self._mapped.get(table)
                if version is not None and known is not None and known[0] == version:
                    return known[1]
                mapped = self._read_and_map(table, config)
                self._mapped[table] = (version, mapped)
                return mapped
        except UserError as error:
            raise UserError(f"{table}: {error}") from error

    def _read_and_map(self, name: str, config: TableConfig) -> Mapped:
        assert config.from_ is not None
        connection = connect()
        try:
            corrupt = _load(connection, config)
            if not connection.execute("SELECT 1 FROM source LIMIT 1").fetchall():
                lines = f" (all {corrupt.num_rows} lines are corrupt)" if corrupt.num_rows else ""
                raise UserError(f"{shown(config.from_)} has no rows{lines}; give one with data")
            mapped = map_rows(
                connection,
                "source",
                RAW_TABLES[name],
                config,
                minor_units=self._config.currency_minor_units,
                timezone=self._config.timezone,
            )
        except duckdb.Error as error:
            first = str(error).splitlines()[0]
            raise UserError(f"{shown(config.from_)} cannot be mapped: {first}") from error
        finally:
            connection.close()
        if not mapped.events.num_rows:
            raise UserError(_nothing_usable(config.from_, mapped))
        return Mapped(
            mapped.events,
            pa.concat_tables([_corrupt_rows(name, corrupt), mapped.quarantined]),
            mapped.rows + corrupt.num_rows,
            mapped.filtered,
        )


def _nothing_usable(place: str, mapped: Mapped) -> str:
    reasons = Counter(mapped.quarantined["reason"].to_pylist()).most_common(3)
    why = ", ".join(f"{reason} {count:,}" for reason, count in reasons)
    filtered = f", filtered {mapped.filtered:,}" if mapped.filtered else ""
    return (
        f"none of the {mapped.rows:,} rows of {shown(place)} is usable ({why}{filtered}); "
        "check columns, filters and rules"
    )


def _within(events: pa.Table, first: date, last: date, now: datetime | None = None) -> pa.Table:
    moments = events["occurred_at"]
    start = pa.scalar(midnight(first), moments.type)
    end = pa.scalar(partition_interval(last).end, moments.type)
    wanted = pc.and_(pc.greater_equal(moments, start), pc.less(moments, end))
    if now is not None:
        wanted = pc.or_(wanted, pc.greater(moments, pa.scalar(now, moments.type)))
    return events.filter(wanted)


def _first_appearances(orders: pa.Table) -> pa.Table:
    """Customers as their orders show them: the first order that can be used, and when."""
    usable = validate_events(ORDERS, orders.drop_columns(["lines"])).valid
    ordered = usable.sort_by([("occurred_at", "ascending"), ("order_id", "ascending")])
    firsts = ordered.group_by("customer_id", use_threads=False).aggregate(
        [("occurred_at", "first"), ("ingested_at", "first")]
    )
    columns = {
        "customer_id": firsts["customer_id"],
        "occurred_at": firsts["occurred_at_first"],
        "ingested_at": firsts["ingested_at_first"],
    }
    customers = pa.table(columns).select(CUSTOMERS.schema.names)
    return customers.sort_by([("occurred_at", "ascending"), ("customer_id", "ascending")])


def _corrupt_rows(table: str, corrupt: pa.Table) -> pa.Table:
    several = len(pc.unique(corrupt["file"])) > 1
    lines = corrupt.to_pylist()
    return pa.table(
        {
            "table": pa.repeat(table, len(lines)),
            "day": pa.nulls(len(lines), pa.date32()),
            "reason": pa.repeat("corrupt_line", len(lines)),
            "detail": pa.array(
                [
                    (f"{Path(line['file']).name} " if several else "")
                    + f"line {line['line']}: {line['problem']}"
                    for line in lines
                ],
                pa.string(),
            ),
            "row": pa.array(
                [
                    msgspec.json.encode({"line": line["line"], "text": line["text"]}).decode()
                    for line in lines
                ],
                pa.string(),
            ),
        },
        schema=QUARANTINE_SCHEMA,
    )


_FILE_DATABASES = ("sqlite", "duckdb")


def _version(config: TableConfig) -> Any:
    """What changes when a file does; None for a database server, which is always asked again."""
    assert config.from_ is not None
    scheme, separator, rest = config.from_.partition("://")
    if separator and scheme not in _FILE_DATABASES:
        return None
    files = [Path(rest)] if separator else find_files(config.from_)
    try:
        stats = [(file, file.stat()) for file in files]
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); check the path"
        ) from error
    return tuple((str(file), stat.st_mtime_ns, stat.st_size) for file, stat in stats)


def _load(connection: duckdb.DuckDBPyConnection, config: TableConfig) -> pa.Table:
    """Make the table `source`; give its corrupt lines."""
    assert config.from_ is not None
    if "://" not in config.from_:
        if config.table is not None:
            raise UserError(f"{config.from_} is a file and has no table {config.table}; remove it")
        return load_files(
            connection,
            "source",
            find_files(config.from_),
            format=config.format,
            delimiter=config.delimiter,
            encoding=config.encoding,
            null_values=config.null_values,
        )
    if config.table is None:
        raise UserError(f"{shown(config.from_)} is a database; name its table with table")
    if config.from_.startswith("duckdb://"):
        path = config.from_.removeprefix("duckdb://")
        try:
            connection.execute(f"ATTACH {sql_text(path)} AS theirs (READ_ONLY)")
            named = ".".join(sql_name(part) for part in config.table.split("."))
            load_query(connection, "source", f"FROM theirs.{named}")
        except duckdb.CatalogException:
            raise UserError(f"{path} has no table {config.table}; check table") from None
        except duckdb.Error as error:
            raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
        return CORRUPT_SCHEMA.empty_table()
    connection.register("fetched", _fetch(config.from_, config.table))
    load_query(connection, "source", "FROM fetched")
    connection.unregister("fetched")
    return CORRUPT_SCHEMA.empty_table()


def _fetch(url: str, table: str) -> pa.Table:
    """The whole of a database table, read through Ibis."""
    try:
        backend = _database(url)
    except ImportError as error:
        scheme = url.partition("://")[0]
        raise UserError(
            f'{shown(url)} needs a driver that is not installed; install "ibis-framework[{scheme}]"'
        ) from error
    except Exception as error:
        raise UserError(f"{shown(url)} cannot be reached: {_one_line(error, url)}") from error
    try:
        return backend.table(table).to_pyarrow()
    except TableNotFound:
        raise UserError(f"{shown(url)} has no table {table}; check table") from None
    except Exception as error:
        raise UserError(f"{shown(url)} cannot be read: {_one_line(error, url)}") from error
    finally:
        backend.disconnect()


def _database(url: str) -> BaseBackend:
    scheme, _, rest = url.partition("://")
    return ibis.sqlite.connect(rest) if scheme == "sqlite" else ibis.connect(url)


def shown(place: str) -> str:
    """A path or URL without the password in it."""
    return re.sub(r"(?<=://)([^/@:]*):[^@/]*@", r"\1:***@", place)


def _one_line(error: Exception, url: str) -> str:
    text = str(error).strip()
    password = re.search(r"://[^/@:]*:([^@/]+)@", url)
    if password is not None:
        text = text.replace(password[1], "***")
    return text.splitlines()[0] if text else type(error).__name__
