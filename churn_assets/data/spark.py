"""Spark as an engine: a session of its own, the lake's files as tables, results as Arrow.

Everything is SQL that Spark's own processes run: over a lake in a folder its workers need Java and
that folder, and neither Python nor this package. A lake in an object store is read by the workers'
Python, with this package. Imported only where Spark is asked for.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from typing import Any, cast

import ibis
import ibis.expr.operations as ops
import ibis.expr.types as ir
import pyarrow as pa
from ibis.backends.pyspark import Backend
from ibis.backends.pyspark.datatypes import PySparkSchema
from ibis.util import gen_name
from pyspark import SparkContext
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from churn_assets.errors import UserError

_SECONDS_TO_ANSWER = 10.0
_SECONDS_TO_END = 30.0
_LOOPBACK = "127.0.0.1"


@contextmanager
def open_spark(master: str, memory: str, conf: Mapping[str, str], spill: str) -> Generator[Backend]:
    """A Spark session at `master`, and its driver's JVM, for the length of a block.

    memory: of the driver. conf: Spark settings that go before those of this project, except for
    what makes results the same everywhere. spill: a local folder. Raises UserError when there is no
    Java or the master does not answer, RuntimeError when this process has a session already.
    """
    if SparkContext._active_spark_context is not None:
        raise RuntimeError("this process already has a Spark session; close it first")
    _require_java()
    _require_master(master)
    local = master.startswith("local") or _host(master) in (_LOOPBACK, "localhost")
    settings = {
        "spark.app.name": "churn_assets",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        # Results are fetched in ranges that are kept small (data/ranges.py).
        "spark.driver.maxResultSize": "0",
        # Days are listed here, not by a job of their own.
        "spark.sql.sources.parallelPartitionDiscovery.threshold": "100000",
        # A day is a small file of its own; at the usual price of opening one, each is a task.
        "spark.sql.files.openCostInBytes": "65536",
        "spark.sql.warehouse.dir": f"{spill}/spark-warehouse",
        **({"spark.local.dir": spill} if master.startswith("local") else {}),
        **(
            {"spark.driver.host": _LOOPBACK, "spark.driver.bindAddress": _LOOPBACK} if local else {}
        ),
        **conf,
        "spark.master": master,
        "spark.driver.memory": memory,
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.ansi.enabled": "true",
        # Otherwise small tables in memory pass through this machine's own time zone, in which a
        # midnight of UTC may come twice.
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        "spark.sql.execution.arrow.pyspark.fallback.enabled": "false",
        "spark.sql.parquet.datetimeRebaseModeInRead": "CORRECTED",
        "spark.sql.caseSensitive": "true",
    }
    os.makedirs(spill, exist_ok=True)
    builder = SparkSession.builder
    for name, value in settings.items():
        builder = builder.config(name, value)
    try:
        with (
            _environment("SPARK_LOCAL_IP", _LOOPBACK if local else None),
            # Of the workers: of the same version, at the same path unless the environment says.
            _environment("PYSPARK_PYTHON", sys.executable),
        ):
            session = builder.getOrCreate()
        try:
            yield ibis.pyspark.connect(session)
        finally:
            session.stop()
    except PySparkException as error:
        if error.getCondition() == "JAVA_GATEWAY_EXITED":
            raise UserError(
                "Spark's Java did not start; its own words are above. Spark 4 needs Java 17 or "
                "later: check `java -version` and JAVA_HOME"
            ) from error
        raise
    finally:
        _end_jvm()


def scan(con: Backend, folder: str, paths: Sequence[str], schema: pa.Schema) -> ir.Table:
    """The rows of the parquet files `paths`, in partition directories of `folder`, unread.

    `schema` is that of the rows, with the partition's column. Every process of Spark opens the
    files at the same paths.
    """
    if not paths:
        return from_arrow(con, schema.empty_table())
    schema = _nullable(schema)
    reader = con._session.read.schema(_spark_schema(schema)).option("basePath", _uri(folder))
    return _table(con, reader.parquet(*(_literally(_uri(path)) for path in paths)), schema)


def scan_by_python(
    con: Backend, read: Callable[[date], pa.Table], days: Sequence[date], schema: pa.Schema
) -> ir.Table:
    """The rows of `read(day)` for each of `days`, unread.

    `schema` is that of the rows. It is Python processes of the workers that call `read`, a day
    each, so they need this package; `read` travels to them.
    """
    schema = _nullable(schema)
    if not days:
        return from_arrow(con, schema.empty_table())

    def rows(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for day in batch.column(0).to_pylist():
                yield from read(day).cast(schema).to_batches()

    asked = con._session.createDataFrame(pa.table({"day": pa.array(days, pa.date32())}))
    # Without it all days may come to one process.
    frame = asked.repartition(len(days), "day").mapInArrow(rows, _spark_schema(schema))
    # A query reads a table several times, and the store is far.
    return _table(con, frame.persist(), schema)


def from_arrow(con: Backend, rows: pa.Table) -> ir.Table:
    """Rows in memory as a table of Spark; for small ones."""
    schema = _nullable(rows.schema)
    return _table(con, con._session.createDataFrame(rows, schema=_spark_schema(schema)), schema)


def _table(con: Backend, frame: DataFrame, schema: pa.Schema) -> ir.Table:
    name = gen_name("lake_scan")
    frame.createOrReplaceTempView(name)
    # Spark would describe an instant as a time without a zone.
    table = cast("Any", ops.DatabaseTable)(
        name,
        schema=ibis.Schema.from_pyarrow(schema),
        source=con,
        namespace=ops.Namespace(catalog=None, database=None),
    )
    return table.to_expr()


def _nullable(schema: pa.Schema) -> pa.Schema:
    # A null where the files declare none is for validation to find, not to be optimised away.
    return pa.schema([field.with_nullable(True) for field in schema])


def collect(rows: ir.Table) -> pa.Table:
    """All the rows, in their order."""
    con = cast(Backend, rows.get_backend())
    con._run_pre_execute_hooks(rows)
    frame: DataFrame = con.raw_sql(con.compile(rows))
    return frame.toArrow().cast(rows.schema().to_pyarrow())


def _spark_schema(schema: pa.Schema) -> Any:
    return PySparkSchema.from_ibis(ibis.Schema.from_pyarrow(schema))


def _uri(path: str) -> str:
    """A path of this machine's file system, also where the cluster has another by default."""
    return f"file://{os.path.abspath(path)}"


def _literally(path: str) -> str:
    """A path without patterns: Spark would match what it holds of * and brackets."""
    return re.sub(r"([\\*?\[\]{}])", r"\\\1", path)


def _require_java() -> None:
    home = os.environ.get("JAVA_HOME")
    if not (shutil.which("java") or (home and os.path.exists(f"{home}/bin/java"))):
        raise UserError(
            "engine: spark needs Java, and there is none; install Java 17 or later or set JAVA_HOME"
        )


def _host(master: str) -> str:
    return master.removeprefix("spark://").partition(",")[0].rpartition(":")[0]


def _require_master(master: str) -> None:
    """Raise UserError when none of the hosts of a spark:// URL answers; Spark tries for minutes."""
    if not master.startswith("spark://"):
        return
    problems = []
    for place in master.removeprefix("spark://").split(","):
        host, _, port = place.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"spark.master is {master}; write it like spark://host:7077")
        try:
            socket.create_connection((host, int(port)), _SECONDS_TO_ANSWER).close()
        except OSError as error:
            problems.append(str(error))
        else:
            return
    raise UserError(
        f"the Spark master {master} cannot be reached ({problems[0]}); check spark.master, and "
        "that the cluster is up"
    )


@contextmanager
def _environment(name: str, value: str | None) -> Generator[None]:
    """An environment variable for the length of a block, unless it is set or `value` is None."""
    if value is None or name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def _end_jvm() -> None:
    """End the driver's JVM, which pyspark would keep as long as this process."""
    gateway = SparkContext._gateway
    process = getattr(gateway, "proc", None)
    if gateway is None or process is None:
        return
    SparkContext._gateway = SparkContext._jvm = None
    gateway.shutdown()
    process.stdin.close()
    try:
        process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
