"""The engines that compute features and labels: DuckDB in this process, or a Spark cluster.

Expressions are written once, in Ibis, and give the same rows to the last bit on both: money is
summed in whole cents, a quotient is one division of two integers, and instants are microseconds of
UTC. docs/engines.md says when which is worth it.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import duckdb
import ibis
import msgspec
from ibis.backends import BaseBackend
from ibis.backends.duckdb import Backend as DuckDBBackend

from churn_assets.errors import UserError

Engine = Literal["duckdb", "spark"]

_MASTER = re.compile(r"local(\[[^\]]+\])?|yarn|(spark|k8s)://.+|\$\{\w+\}")
_DUCKDB_MEMORY = re.compile(r"\d+(\.\d+)? ?([KMGT]i?B)", re.IGNORECASE)
_JAVA_MEMORY = re.compile(r"\d+[kmgt]", re.IGNORECASE)


class DuckDBSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """memory: what DuckDB may hold before it spills to disk, such as 1500MB or 8GB."""

    memory: str = "1500MB"

    def __post_init__(self) -> None:
        if not _DUCKDB_MEMORY.fullmatch(self.memory):
            raise ValueError(f"duckdb.memory is {self.memory}; write it like 1500MB or 8GB")


class SparkSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to reach Spark.

    master: local[2] (threads of this machine), spark://host:7077, k8s://... or yarn. memory: of the
    driver, the process on this machine, such as 2g. conf: any of Spark's own settings, by name.
    """

    master: str = "local[*]"
    memory: str = "2g"
    conf: dict[str, str | int | float | bool] = {}

    def __post_init__(self) -> None:
        if not _MASTER.fullmatch(self.master):
            raise ValueError(
                f"spark.master is {self.master}; write it like spark://host:7077 or local[2]"
            )
        if not _JAVA_MEMORY.fullmatch(self.memory):
            raise ValueError(f"spark.memory is {self.memory}; write it like 2g or 512m")


@contextmanager
def open_duckdb(settings: DuckDBSettings, spill: str | Path) -> Generator[DuckDBBackend]:
    """A DuckDB of its own, which spills to the folder `spill` when its memory runs out.

    Raises UserError when what is asked of it does not fit all the same.
    """
    connection = ibis.duckdb.connect(temp_directory=str(spill), memory_limit=settings.memory)
    try:
        yield connection
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"DuckDB needs more than the {settings.memory} it may use; raise duckdb.memory, or set "
            "engine: spark"
        ) from error
    finally:
        connection.disconnect()


@contextmanager
def open_engine(
    engine: Engine, duckdb: DuckDBSettings, spark: SparkSettings, spill: str | Path
) -> Generator[BaseBackend]:
    """The engine the settings ask for, for the length of a block; `spill` is a local folder.

    Raises UserError when Spark is not installed, finds no Java, or cannot reach its master.
    """
    if engine == "duckdb":
        with open_duckdb(duckdb, spill) as connection:
            yield connection
        return
    try:
        from churn_assets.data.spark import open_spark
    except ImportError as error:
        raise UserError(
            f"engine: spark needs pyspark ({error}); install churn-assets[spark], or set "
            "engine: duckdb"
        ) from error
    conf = {name: _as_text(value) for name, value in spark.conf.items()}
    with open_spark(spark.master, spark.memory, conf, str(spill)) as connection:
        yield connection


def _as_text(value: str | int | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
