"""Parquet files of one day each, written from rows that come in any number of parts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import date

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from churn_assets.data.results import stream

DAY = "day"
_MICROSECONDS_A_DAY = 86_400_000_000
# Small enough that a reader of some customers can pass over most of a large day's file.
GROUP_ROWS = 16_384


class DayFiles:
    """The files of some days of a table, being written.

    `day_of` names the column that says which day a row belongs to: a timestamp (UTC), which is
    kept, or the date column `day`, which is not. `order_by` sorts the rows of a part (default: as
    they come); parts are expected in that order. Where a part ends leaves no trace in the files.
    """

    def __init__(
        self, folder: str, days: Sequence[date], day_of: str, order_by: Sequence[str], threads: int
    ) -> None:
        self.counts = dict.fromkeys(days, 0)
        self._folder, self._day_of, self._threads = folder, day_of, threads
        self._keys = [(name, "ascending") for name in order_by]
        self._schema: pa.Schema | None = None
        self._open: dict[date, _DayFile] = {}

    def path(self, day: date) -> str:
        """Where the file of `day` is."""
        return os.path.join(self._folder, f"{day.isoformat()}.tmp")

    def append(self, rows: pa.Table | ir.Table, *, complete: bool = False) -> None:
        """Add rows to the files of their days; `complete`: these are all rows of their days.

        Raises ValueError for a row without a day, or of one that is not among the days.
        """
        self._schema, parts = _by_day(rows, self._day_of)
        self._write(((day, part) for day, part in parts), complete)

    def finish(self) -> None:
        """Complete the files; a day without rows gets one with the columns alone."""
        if self._schema is None:
            raise ValueError("nothing was appended, so the columns are unknown")
        empty = self._schema.empty_table()
        open_or_absent = [day for day in self.counts if day in self._open or not self.counts[day]]
        self._write([(day, empty) for day in open_or_absent], complete=True)

    def _write(self, parts: Iterable[tuple[date, pa.Table]], complete: bool) -> None:
        pending: set[Future[None]] = set()
        with ThreadPoolExecutor(self._threads) as pool:
            for day, part in parts:
                if day not in self.counts:
                    first, last = min(self.counts), max(self.counts)
                    raise ValueError(f"a row of {day} is outside of {first} to {last}")
                self.counts[day] += part.num_rows
                pending.add(pool.submit(self._write_part, day, part, complete))
                if len(pending) > 4 * self._threads:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            for future in pending:
                future.result()

    def _write_part(self, day: date, part: pa.Table, complete: bool) -> None:
        file = self._open.pop(day, None) or _DayFile(self.path(day))
        file.append(part.sort_by(self._keys) if self._keys else part)
        if complete:
            file.close()
        else:
            self._open[day] = file


class _DayFile:
    """One file, whose row groups are full but for the last however its rows arrive."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None
        self._rest: pa.Table | None = None

    def append(self, rows: pa.Table) -> None:
        """Add rows at the end."""
        rest = pa.concat_tables([self._rest, rows]) if self._rest is not None else rows
        full = rest.num_rows - rest.num_rows % GROUP_ROWS
        if full:
            self._into_file(rest.slice(0, full))
            # A copy, so that a few rows left over do not keep all of them in memory.
            rest = rest.slice(full).take(pa.array(range(rest.num_rows - full), pa.int64()))
        self._rest = rest

    def close(self) -> None:
        """Write what is left, and the footer."""
        assert self._rest is not None, "a file is closed after something was appended"
        if self._rest.num_rows or self._writer is None:
            self._into_file(self._rest)
        assert self._writer is not None
        self._writer.close()

    def _into_file(self, rows: pa.Table) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._path, rows.schema, compression="snappy", coerce_timestamps="us"
            )
        self._writer.write_table(rows, row_group_size=GROUP_ROWS)


def _by_day(
    rows: pa.Table | ir.Table, day_of: str
) -> tuple[pa.Schema, Iterator[tuple[date, pa.Table]]]:
    """The schema of a file, and the rows of one day after the other."""
    batches: Iterable[pa.RecordBatch]
    if isinstance(rows, ir.Table):
        schema = rows.schema().to_pyarrow()
        batches = stream(rows.order_by(day_of))
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
