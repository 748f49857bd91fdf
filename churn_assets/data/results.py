"""What an expression comes to, computed on all cores."""

from __future__ import annotations

import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import cast

import duckdb
import ibis.expr.types as ir
import pyarrow as pa
from ibis.backends import BaseBackend
from ibis.backends.duckdb import Backend as DuckDBBackend

_BATCH_ROWS = 1_000_000


def is_spark(engine: BaseBackend) -> bool:
    """Whether `engine` is Spark; it is DuckDB otherwise."""
    return engine.name == "pyspark"


def stream(rows: ir.Table) -> Iterator[pa.RecordBatch]:
    """The rows in batches, in their order; of DuckDB never all in memory here."""
    if is_spark(rows.get_backend()):
        yield from to_arrow(rows).to_batches(_BATCH_ROWS)
        return
    schema = rows.schema().to_pyarrow()
    with _computed(rows) as result:
        for batch in result.to_arrow_reader(_BATCH_ROWS):
            yield batch.cast(schema)


def to_arrow(rows: ir.Table) -> pa.Table:
    """All the rows, in their order."""
    if is_spark(rows.get_backend()):
        from churn_assets.data.spark import collect

        return collect(rows)
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
