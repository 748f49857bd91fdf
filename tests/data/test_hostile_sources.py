"""Files and names that are meant to do harm: bombs are not unpacked, names are never SQL."""

from __future__ import annotations

import gzip
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from churn_assets.data import readers
from churn_assets.data.readers import columns_of
from churn_assets.data.sources import SourceConfig, open_source
from churn_assets.errors import UserError

DAY = date(2024, 1, 1)
COLUMNS = {"order_id": "id", "customer_id": "customer", "occurred_at": "at", "amount": "amount"}


def read(place: str, **orders: Any) -> Any:
    orders = {"from": place, "columns": COLUMNS, **orders}
    tables = {"orders": orders, "customers": {"derive_from": "orders"}}
    config = msgspec.convert({"kind": "tables", "tables": tables}, SourceConfig)
    return open_source(config, DAY, base=Path("/")).read("orders", DAY, DAY)


def bomb(path: Path, begins: bytes, megabytes: int) -> str:
    with gzip.open(path, "wb", 9) as file:
        file.write(begins)
        for _ in range(megabytes):
            file.write(b"a" * (1 << 20))
    return str(path)


def test_a_first_line_without_an_end_is_not_held(tmp_path: Path) -> None:
    place = bomb(tmp_path / "orders.csv.gz", b"", 3)
    asked = []

    class Watched:
        def __init__(self, text: Any) -> None:
            self._text = text

        def readline(self, size: int) -> str:
            asked.append(size)
            return self._text.readline(size)

    with (
        gzip.open(place, "rt") as text,
        pytest.raises(UserError, match="line that has no end"),
    ):
        list(readers._lines(Watched(text), Path(place)))  # ty: ignore[invalid-argument-type]
    assert asked == [1024 * 1024 + 1]
    with pytest.raises(UserError, match="line that has no end"):
        columns_of(Path(place))


def test_a_file_that_unpacks_without_end_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_UNPACKED_BYTES", 4 << 20)
    monkeypatch.setattr(readers, "load_query", lambda *_: pytest.fail("it was loaded"))
    place = bomb(tmp_path / "orders.csv.gz", b"id,customer,at,amount\n", 8)
    with pytest.raises(UserError, match="unpacks to more than 200 times its size"):
        read(place)


def test_a_sound_zipped_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_UNPACKED_BYTES", 1)
    with gzip.open(tmp_path / "orders.csv.gz", "wt") as file:
        file.write("id,customer,at,amount\na,c,2024-01-01,1\n")
    assert read(str(tmp_path / "orders.csv.gz")).used == 1


def test_a_parquet_file_of_absurdly_many_rows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "load_query", lambda *_: pytest.fail("it was loaded"))
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(8_000_000, np.int8)), pa.array(["a"]))
    path = tmp_path / "orders.parquet"
    rows = pa.table(dict.fromkeys(COLUMNS.values(), text))
    pq.write_table(rows, path, row_group_size=len(text), data_page_size=1 << 30)
    with pytest.raises(UserError, match="more rows than"):
        read(str(path))


NASTY = ["x'; DROP TABLE t; --", 'x"; DROP TABLE t; --', "x) UNION SELECT 1; --", "read_text('/e')"]


@pytest.fixture(params=["sqlite", "duckdb"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "theirs.db"
    rows = "CREATE TABLE t AS SELECT 'a' AS id, 'c' AS customer, '2024-01-01' AS at, 1 AS amount"
    connect: Any = {"sqlite": sqlite3.connect, "duckdb": duckdb.connect}[request.param]
    with closing(connect(str(path))) as connection:
        connection.execute(rows)
    yield f"{request.param}://{path}"
    assert read(f"{request.param}://{path}", table="t").used == 1


@pytest.mark.parametrize("nasty", NASTY)
def test_the_name_of_a_table_is_never_sql(place: str, nasty: str) -> None:
    with pytest.raises(UserError, match=r"has no table|cannot be read"):
        read(place, table=nasty)


@pytest.mark.parametrize("nasty", NASTY)
def test_the_name_of_a_column_is_never_sql(place: str, nasty: str) -> None:
    with pytest.raises(UserError, match="has no column"):
        read(place, table="t", columns={**COLUMNS, "amount": nasty})


@pytest.mark.parametrize("scheme", ["http", "https", "file", "ftp"])
def test_a_source_asks_no_web_server(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it was asked"))
    with pytest.raises(UserError, match=r"cannot be reached|needs a driver"):
        read(f"{scheme}://127.0.0.1:9/orders.csv", table="t")
