"""What an expression comes to, computed on all cores."""

from __future__ import annotations

import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import cast

import duckdb
import ibis.expr.types as ir
import pyarrow as pa
from ibis.backends.duckdb import Backend as DuckDBBackend

_BATCH_ROWS = 1_000_000


def stream(rows: ir.Table) -> Iterator[pa.RecordBatch]:
    """The rows in batches, in their order, never all in memory here."""
    schema = rows.schema().to_pyarrow()
    with _computed(rows) as result:
        for batch in result.to_arrow_reader(_BATCH_ROWS):
            yield batch.cast(schema)


def to_arrow(rows: ir.Table) -> pa.Table:
    """All the rows."""
    schema = rows.schema().to_pyarrow()
    with _computed(rows) as result:
        return result.to_arrow_table().cast(schema)


@contextmanager
def _computed(rows: ir.Table) -> Generator[duckdb.DuckDBPyRelation]:
    # DuckDB fills a table in parallel, and spills to disk when it must; a query that is read as it
    # runs is computed on the one core that asks for the next batch.
    con = cast(DuckDBBackend, rows.get_backend())
    name = f"computed_{uuid.uuid4().hex}"
    con.create_table(name, rows, temp=True)
    try:
        yield con.con.sql(f'FROM "{name}"')
    finally:
        con.raw_sql(f'DROP TABLE "{name}"')
