from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime

import msgspec
import pytest

from churn_assets.data.sources import SourceConfig, open_source
from churn_assets.errors import UserError

FIRST, LAST = date(2024, 1, 1), date(2024, 1, 31)


@pytest.fixture(scope="module")
def database() -> str:
    url = os.environ.get("CHURN_TEST_POSTGRES")
    if not url:
        pytest.skip("set CHURN_TEST_POSTGRES to the URL of an empty Postgres database to run this")
    return url


@pytest.fixture
def orders(database: str) -> Iterator[str]:
    import psycopg
    from psycopg import sql

    name = f"orders_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(database, autocommit=True) as connection:
        table = sql.Identifier(name)
        columns = "id text, customer int, at timestamptz, total numeric(12, 2)"
        connection.execute(sql.SQL("CREATE TABLE {} (" + columns + ")").format(table))
        connection.execute(
            sql.SQL(
                """INSERT INTO {} VALUES
                ('a1', 7, '2024-01-02 23:59:59.999999+00', 12.35),
                ('a2', NULL, '2024-01-03 00:00:00+01', 5.00),
                ('a3', 8, '2024-01-03 00:30:00+01', 6.95)"""
            ).format(table)
        )
        yield name
        connection.execute(sql.SQL("DROP TABLE {}").format(table))


def source(url: str, table: str, **columns: str):
    config = msgspec.convert(
        {
            "kind": "tables",
            "tables": {
                "orders": {
                    "from": url,
                    "table": table,
                    "columns": {
                        "order_id": "id",
                        "customer_id": "customer",
                        "occurred_at": "at",
                        "amount": "total",
                        **columns,
                    },
                },
                "customers": {"derive_from": "orders"},
            },
        },
        SourceConfig,
    )
    return open_source(config, FIRST)


def test_a_postgres_table_becomes_events(database: str, orders: str):
    read = source(database, orders).read("orders", FIRST, LAST)
    assert read.rows_read == 3
    assert [
        (row["order_id"], row["customer_id"], row["occurred_at"], row["amount_minor"])
        for row in read.events.to_pylist()
    ] == [
        ("a3", "8", datetime(2024, 1, 2, 23, 30, tzinfo=UTC), 695),
        ("a1", "7", datetime(2024, 1, 2, 23, 59, 59, 999999, UTC), 1235),
    ]
    (refused,) = read.quarantined.to_pylist()
    assert refused["reason"] == "missing_customer_id"


def test_a_table_that_is_not_there_is_named(database: str):
    with pytest.raises(UserError, match="has no table nothing"):
        source(database, "nothing").read("orders", FIRST, LAST)


# {t} is a table that is there.
NASTY = [
    "x'; DROP TABLE {t}; --",
    'x"; DROP TABLE {t}; --',
    '{t}"; DROP TABLE {t}; --',
    "{t}; DROP TABLE {t}",
    "(SELECT * FROM {t}) AS x",
    "pg_read_file('/etc/passwd')",
    "x\\'; DROP TABLE {t}; --",
    "$$; DROP TABLE {t}; --",
    "%s",
]


@pytest.mark.parametrize("nasty", NASTY)
def test_the_name_of_a_table_is_never_sql(database: str, orders: str, nasty: str):
    with pytest.raises(UserError, match=r"has no table|cannot be read") as error:
        source(database, nasty.format(t=orders)).read("orders", FIRST, LAST)
    assert "\n" not in str(error.value)
    assert source(database, orders).read("orders", FIRST, LAST).rows_read == 3


@pytest.mark.parametrize("nasty", NASTY)
def test_the_name_of_a_column_is_never_sql(database: str, orders: str, nasty: str):
    with pytest.raises(UserError, match="has no column"):
        source(database, orders, amount=nasty.format(t=orders)).read("orders", FIRST, LAST)
    assert source(database, orders).read("orders", FIRST, LAST).rows_read == 3


@pytest.mark.parametrize("nasty", [name for name in NASTY if name != "%s"])
def test_what_really_has_such_names_and_ids_is_read(database: str, orders: str, nasty: str):
    """Names are quoted on the way to Postgres and on the way out of it; ids are text."""
    import psycopg
    from psycopg import sql

    name = nasty.format(t=orders)[:60]
    table, column = sql.Identifier(name), sql.Identifier(f"{name}!")
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            sql.SQL("CREATE TABLE {} ({} text, customer text, at date, total int)").format(
                table, column
            )
        )
        connection.execute(
            sql.SQL("INSERT INTO {} VALUES (%s, %s, '2024-01-02', 1)").format(table), (name, name)
        )
        try:
            read = source(database, name, order_id=f"{name}!").read("orders", FIRST, LAST)
        finally:
            connection.execute(sql.SQL("DROP TABLE {}").format(table))
    (event,) = read.events.to_pylist()
    assert (event["order_id"], event["customer_id"]) == (name, name)


def test_a_server_that_does_not_answer_is_one_line_without_the_password():
    url = "postgresql://reader:secret@127.0.0.1:1/none"
    with pytest.raises(UserError, match="cannot be reached") as error:
        source(url, "orders").read("orders", FIRST, LAST)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)
