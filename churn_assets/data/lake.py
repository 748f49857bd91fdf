"""The lake: tables in daily partitions of parquet, each replaced as a whole or not at all.

Layout: `<root>/<table>/day=YYYY-MM-DD/part-0.parquet`. A partition without rows is a file with the
schema and no rows, so "empty" and "missing" differ. Writers work in `<root>/<table>/.tmp-*/` and
rename at the end, so a reader never sees half a partition.
"""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any, cast

import fsspec
import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from ibis.backends import BaseBackend
from ibis.backends.duckdb import Backend as DuckDBBackend

from churn_assets.data.contents import content_hash
from churn_assets.data.tables import RAW_TABLES
from churn_assets.data.windows import days_between
from churn_assets.errors import UserError

DAY = "day"
_FILE = "part-0.parquet"
_PARTITION = re.compile(rf"/{DAY}=(\d{{4}}-\d{{2}}-\d{{2}})/{re.escape(_FILE)}$")
_WORKSPACE = re.compile(r"\.tmp-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{32}$")
_ABANDONED_AFTER_SECONDS = 24 * 3600
_MICROSECONDS_A_DAY = 86_400_000_000
_BATCH_ROWS = 1_000_000


@dataclass(frozen=True)
class Lake:
    """Tables in daily partitions under `root`: a local path, or a URI fsspec understands.

    `storage_options` go to fsspec. `clock` (seconds) only decides when the temporaries a killed
    run left behind on another machine are old enough to be removed.
    """

    root: str
    storage_options: dict[str, Any] = field(default_factory=dict)
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", str(self.root))

    @cached_property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        """The filesystem `root` lies on."""
        return fsspec.core.url_to_fs(self.root, **self.storage_options)[0]

    @cached_property
    def base(self) -> str:
        """`root` as `filesystem` names it."""
        return fsspec.core.url_to_fs(self.root, **self.storage_options)[1].rstrip("/")

    def path(self, table: str, day: date) -> str:
        """Where the partition `day` of `table` is, whether or not it exists."""
        return f"{self.base}/{table}/{DAY}={day.isoformat()}/{_FILE}"

    def days(self, table: str) -> list[date]:
        """The partitions of `table` that exist, oldest first."""
        self.filesystem.invalidate_cache()
        found = (_PARTITION.search(path) for path in self.filesystem.find(f"{self.base}/{table}"))
        return sorted(date.fromisoformat(match[1]) for match in found if match)

    def missing(self, table: str, first: date, last: date) -> list[date]:
        """The days of [first, last] that have no partition of `table`."""
        present = set(self.days(table))
        return [day for day in days_between(first, last) if day not in present]

    def row_counts(
        self, table: str, first: date | None = None, last: date | None = None
    ) -> dict[date, int]:
        """Rows per existing partition of [first, last], from the parquet footers."""
        days = self._existing(table, first, last)
        with ThreadPoolExecutor(_threads()) as pool:
            footers = pool.map(lambda day: self._footer(table, day).num_rows, days)
            return dict(zip(days, footers, strict=True))

    def schema(self, table: str, day: date) -> pa.Schema:
        """The schema of one partition's file.

        Raises UserError when the partition does not exist.
        """
        self._require(table, [day])
        return pq.read_schema(self.path(table, day), filesystem=self.filesystem)

    def scan(
        self,
        con: BaseBackend,
        table: str,
        first: date | None = None,
        last: date | None = None,
        *,
        days: Sequence[date] | None = None,
        strict: bool = True,
    ) -> ir.Table:
        """The rows of [first, last] (all there are, without bounds) with their `day`, unread.

        Only the files of those days are opened, or of `days` when given instead. `con` is an Ibis
        DuckDB connection.
        Raises UserError when `strict` and a day of [first, last] is missing, or when nothing is
        there and the schema is unknown.
        """
        days = self._wanted(table, first, last, days, strict=strict)
        if days:
            paths = [self.path(table, day) for day in days]
            duckdb = cast(DuckDBBackend, con)
            return duckdb.read_parquet(paths, hive_partitioning=True)
        if table not in RAW_TABLES:
            raise _nothing_there(table)
        schema = RAW_TABLES[table].schema.append(pa.field(DAY, pa.date32()))
        return ibis.memtable(schema.empty_table())

    def read(
        self,
        table: str,
        first: date | None = None,
        last: date | None = None,
        *,
        days: Sequence[date] | None = None,
        columns: Sequence[str] | None = None,
        strict: bool = True,
    ) -> pa.Table:
        """The rows of [first, last] as they are stored (without `day`), oldest partition first.

        Raises UserError as `scan` does.
        """
        days = self._wanted(table, first, last, days, strict=strict)
        if days:
            return self._dataset(table, days).to_table(columns=list(columns) if columns else None)
        if table not in RAW_TABLES:
            raise _nothing_there(table)
        empty = RAW_TABLES[table].schema.empty_table()
        return empty.select(list(columns)) if columns else empty

    def content_hash(self, table: str, day: date) -> str:
        """The hash of what one partition says; row order and parquet writer do not matter.

        Raises UserError when the partition does not exist.
        """
        return self.content_hashes(table, [day])[day]

    def content_hashes(self, table: str, days: Sequence[date]) -> dict[date, str]:
        """`content_hash` of several partitions at once."""
        self._require(table, days)
        with ThreadPoolExecutor(_threads()) as pool:
            hashes = pool.map(
                lambda day: content_hash(self._dataset(table, [day]).to_table()), days
            )
            return dict(zip(days, hashes, strict=True))

    def write(
        self,
        table: str,
        first: date,
        last: date,
        rows: pa.Table | ir.Table,
        *,
        day_of: str,
        order_by: Sequence[str] = (),
    ) -> dict[date, int]:
        """Replace exactly the partitions [first, last] of `table` by `rows`; rows per day.

        `day_of` names the column that says which day a row belongs to: a timestamp (UTC), which is
        kept, or the date column `day`, which becomes the directory's name. `order_by` sorts the
        rows of a partition (default: as they come). All files are complete before the first is
        put in place; each is then put there by a rename, so whatever happens a reader finds the
        old partition or the new one.

        Raises ValueError when a row lies outside of [first, last] or has no day; nothing is
        replaced then.
        """
        wanted = days_between(first, last)
        if not wanted:
            raise ValueError(f"no days between {first} and {last}")
        with self._workspace(table) as workspace:
            schema, parts = _by_day(rows, day_of)
            counts = dict.fromkeys(wanted, 0)
            for day, count in self._write_files(workspace, parts, order_by):
                if day not in counts:
                    raise ValueError(f"{table}: a row of {day} is outside of {first} to {last}")
                counts[day] += count
            empty = schema.empty_table()
            absent = ((day, empty) for day, count in counts.items() if count == 0)
            for _ in self._write_files(workspace, absent):
                pass
            for day in wanted:
                target = self.path(table, day)
                self.filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._rename(f"{workspace}/{day.isoformat()}.tmp", target)
        return counts

    def put(self, folder: str, name: str, content: pa.Table | bytes) -> str:
        """Store `<root>/<folder>/<name>` beside the tables, whole or not at all; its path.

        A table becomes parquet. A file of that name is replaced.
        """
        target = f"{self.base}/{folder}/{name}"
        with self._workspace(folder) as workspace:
            temporary = f"{workspace}/{name}.tmp"
            if isinstance(content, bytes):
                self.filesystem.pipe_file(temporary, content)
            else:
                pq.write_table(content, temporary, filesystem=self.filesystem, compression="zstd")
            self._rename(temporary, target)
        return target

    def get_bytes(self, folder: str, name: str) -> bytes:
        """One file that `put` stored. Raises FileNotFoundError."""
        return self.filesystem.cat_file(f"{self.base}/{folder}/{name}")

    def get_table(self, folder: str, name: str) -> pa.Table:
        """One table that `put` stored. Raises FileNotFoundError, or ArrowInvalid when damaged."""
        return pq.read_table(f"{self.base}/{folder}/{name}", filesystem=self.filesystem)

    @contextmanager
    def _workspace(self, folder: str) -> Generator[str]:
        """A folder for temporaries inside `folder`; first sweeps away those of killed runs."""
        self._sweep(folder)
        name = f".tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
        workspace = f"{self.base}/{folder}/{name}"
        self.filesystem.makedirs(workspace, exist_ok=True)
        try:
            yield workspace
        finally:
            self.filesystem.rm(workspace, recursive=True)

    def _rename(self, source: str, target: str) -> None:
        if isinstance(self.filesystem, LocalFileSystem):
            os.replace(source, target)
        else:
            self.filesystem.mv(source, target)

    def _write_files(
        self,
        workspace: str,
        parts: Iterable[tuple[date, pa.Table]],
        order_by: Sequence[str] = (),
    ) -> Iterator[tuple[date, int]]:
        keys = [(name, "ascending") for name in order_by]

        def write(day: date, part: pa.Table) -> tuple[date, int]:
            pq.write_table(
                part.sort_by(keys) if keys else part,
                f"{workspace}/{day.isoformat()}.tmp",
                filesystem=self.filesystem,
                compression="snappy",
                coerce_timestamps="us",
            )
            return day, part.num_rows

        pending: set[Future[tuple[date, int]]] = set()
        with ThreadPoolExecutor(_threads()) as pool:
            for day, part in parts:
                pending.add(pool.submit(write, day, part))
                if len(pending) > 4 * _threads():
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in wait(pending).done)

    def _sweep(self, table: str) -> None:
        """Remove what killed runs left behind; leave the workspaces of runs still at work."""
        folder = f"{self.base}/{table}"
        if not self.filesystem.isdir(folder):
            return
        self.filesystem.invalidate_cache()
        for entry in self.filesystem.ls(folder, detail=True):
            match = _WORKSPACE.search(entry["name"])
            if match and self._abandoned(entry, match["host"], int(match["pid"])):
                self.filesystem.rm(entry["name"], recursive=True)

    def _abandoned(self, entry: dict[str, Any], host: str, pid: int) -> bool:
        if host == socket.gethostname():
            return not _alive(pid)
        return self.clock() - float(entry.get("mtime") or 0) > _ABANDONED_AFTER_SECONDS

    def _footer(self, table: str, day: date) -> pq.FileMetaData:
        return pq.read_metadata(self.path(table, day), filesystem=self.filesystem)

    def _dataset(self, table: str, days: Sequence[date]) -> ds.Dataset:
        paths = [self.path(table, day) for day in days]
        return ds.dataset(paths, filesystem=self.filesystem, format="parquet")

    def _existing(self, table: str, first: date | None, last: date | None) -> list[date]:
        return [
            day
            for day in self.days(table)
            if (first is None or day >= first) and (last is None or day <= last)
        ]

    def _wanted(
        self,
        table: str,
        first: date | None,
        last: date | None,
        days: Sequence[date] | None,
        *,
        strict: bool,
    ) -> list[date]:
        if days:
            first, last = min(days), max(days)
        present = self._existing(table, first, last)
        if not present and (first is None or last is None):
            if strict:
                raise _nothing_there(table)
            return []
        wanted = sorted(set(days or days_between(first or present[0], last or present[-1])))
        if strict:
            _refuse_missing(table, sorted(set(wanted) - set(present)))
        return sorted(set(wanted) & set(present))

    def _require(self, table: str, days: Sequence[date]) -> None:
        if days:
            present = set(self._existing(table, min(days), max(days)))
            _refuse_missing(table, [day for day in days if day not in present])


def _by_day(
    rows: pa.Table | ir.Table, day_of: str
) -> tuple[pa.Schema, Iterator[tuple[date, pa.Table]]]:
    """The schema of a file, and the rows of one day after the other."""
    batches: Iterable[pa.RecordBatch]
    if isinstance(rows, ir.Table):
        schema = rows.schema().to_pyarrow()
        batches = _stream(rows.order_by(day_of), schema)
    else:
        schema = rows.schema
        numbers = _day_numbers(rows[day_of])
        if np.any(numbers[1:] < numbers[:-1]):
            # Days since the first fit 16 bits, which numpy sorts by radix: linear, and stable.
            since = numbers - numbers.min()
            since = since.astype(np.uint16) if since.max() < 2**16 else since
            rows = rows.take(pa.array(np.argsort(since, kind="stable")))
        batches = rows.to_batches()
    drop = day_of == DAY
    stored = schema.remove(schema.get_field_index(DAY)) if drop else schema
    return stored, _split(batches, day_of, stored)


def _stream(rows: ir.Table, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows in batches, in their order, computed on all cores and never all in memory here.

    Through a temporary table, which DuckDB fills in parallel and spills to disk when it must; a
    streamed query would run on the one core that asks for the next batch.
    """
    con = cast(DuckDBBackend, rows.get_backend())
    name = f"lake_write_{uuid.uuid4().hex}"
    con.create_table(name, rows, temp=True)
    try:
        for batch in con.con.sql(f'FROM "{name}"').to_arrow_reader(_BATCH_ROWS):
            yield batch.cast(schema)
    finally:
        con.raw_sql(f'DROP TABLE "{name}"')


def _split(
    batches: Iterable[pa.RecordBatch], day_of: str, schema: pa.Schema
) -> Iterator[tuple[date, pa.Table]]:
    """Cut batches that are ordered by day at the changes of day."""
    current: int | None = None
    pieces: list[pa.RecordBatch] = []
    for batch in batches:
        numbers = _day_numbers(batch.column(day_of))
        stored = batch.select(schema.names)
        edges = np.flatnonzero(np.diff(numbers)) + 1
        for start, stop in zip([0, *edges], [*edges, len(numbers)], strict=True):
            if start == stop:
                continue
            if current is not None and numbers[start] != current:
                yield _date(current), pa.Table.from_batches(pieces, schema)
                pieces = []
            current = int(numbers[start])
            pieces.append(stored.slice(start, stop - start))
    if current is not None:
        yield _date(current), pa.Table.from_batches(pieces, schema)


def _day_numbers(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Days since 1970-01-01 (UTC) of dates or timestamps."""
    if column.null_count:
        raise ValueError(f"{column.null_count} rows without a day")
    if pa.types.is_date32(column.type):
        return column.cast(pa.int32()).to_numpy()
    return column.cast(pa.timestamp("us", column.type.tz)).cast(pa.int64()).to_numpy() // (
        _MICROSECONDS_A_DAY
    )


def _date(number: int) -> date:
    return date.fromordinal(date(1970, 1, 1).toordinal() + number)


def _refuse_missing(table: str, missing: Sequence[date]) -> None:
    if not missing:
        return
    days = ", ".join(day.isoformat() for day in missing[:3]) + (", ..." if missing[3:] else "")
    raise UserError(
        f"{table} has no partition for {len(missing)} day(s) ({days}); materialize {table} "
        f"for {missing[0]} to {missing[-1]}"
    )


def _nothing_there(table: str) -> UserError:
    return UserError(f"there is no partition of {table} yet; materialize {table} first")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _threads() -> int:
    return min(4, os.cpu_count() or 1)
