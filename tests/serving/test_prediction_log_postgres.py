"""The prediction log in Postgres, for services without a volume."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, urlsplit

import msgspec
import psutil
import pytest
from log_cases import Client, Load, answered
from online_cases import until
from serving_cases import SERVICE, VALID, family

from churn_assets.contract.logged import TABLE, decode_logged, encode_logged
from churn_assets.contract.release import Release
from churn_assets.contract.request import Refusal
from churn_assets.data.lake import Lake
from churn_assets.data.log_sources import open_log_source
from churn_assets.data.prediction_log import PREDICTION_LOG, all_trimmed, ingest
from churn_assets.errors import UserError
from churn_assets.lifecycle.serving import PredictionLog, serve
from churn_service import log_postgres
from churn_service.log_files import LogBroken
from churn_service.log_postgres import PostgresLog
from churn_service.prediction_log import DurableLog, prediction_log


class Database:
    """A schema of its own in the database of the tests."""

    def __init__(self, url: str):
        import psycopg

        self.schema = f"log_{uuid.uuid4().hex[:12]}"
        self._connection = psycopg.connect(url, autocommit=True)
        self.run(f"CREATE SCHEMA {self.schema}")
        joined = "&" if "?" in url else "?"
        self.url = f"{url}{joined}options={quote(f'-csearch_path={self.schema}')}"

    def run(self, statement: str) -> list[tuple]:
        cursor = self._connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []

    def insert(self, writer: str, content: bytes) -> None:
        self._connection.execute(
            f"INSERT INTO {self.schema}.{TABLE} VALUES (%s, 1, %s)".encode(), (writer, content)
        )

    def names(self) -> list[str]:
        found = self.run(f"SELECT record FROM {self.schema}.{TABLE} ORDER BY writer, number")
        return [decode_logged(record).request_id for (record,) in found]

    def close(self) -> None:
        self.run(f"DROP SCHEMA {self.schema} CASCADE")
        self._connection.close()


@pytest.fixture
def database() -> Iterator[Database]:
    url = os.environ.get("CHURN_TEST_POSTGRES")
    if not url:
        pytest.skip("set CHURN_TEST_POSTGRES to the URL of an empty Postgres database to run this")
    database = Database(url)
    yield database
    database.close()


@pytest.fixture
def log(database: Database) -> Iterator[PostgresLog]:
    log = PostgresLog(database.url)
    yield log
    log.close()


def record(name: str) -> bytes:
    return encode_logged(answered(name))


def test_a_service_keeps_what_it_answers_on_the_server(
    release: Release, database: Database, tmp_path: Path
):
    before = {process.pid for process in family(os.getpid())}
    with serve(SERVICE, release.directory, log=PredictionLog(database.url)) as url:
        started = [p for p in family(os.getpid()) if p.pid not in before]
        client = Client(url)
        assert client.ask(headers={"x-request-id": "one"})[0] == 200
        assert client.ask({"rows": [VALID, VALID]}, "/predict_batch", {"x-request-id": "two"})[0]
        assert database.names() == ["one", "two-0", "two-1"]
        health = client.health()["prediction_log"]
        client.close()
        assert (health["usable"], health["durability"], health["rows_waiting"]) == (
            True,
            "power",
            3,
        )
        assert health["store"].startswith("postgresql://")
        assert datetime.fromisoformat(health["oldest_waiting"]) <= datetime.now(UTC)
        with Load({"pod": url}) as load:
            load.wait_for(150, "pod")
            for process in started:
                if process.is_running():
                    process.send_signal(signal.SIGKILL)
            psutil.wait_procs(started, timeout=10)
    lake = Lake(str(tmp_path))
    done = ingest(open_log_source(database.url), lake)
    assert all_trimmed(done).passed
    assert database.names() == []
    kept = lake.read(PREDICTION_LOG)["request_id"].to_pylist()
    assert len(kept) == len(set(kept))
    assert set(load.acknowledged) - set(kept) == set()


def test_rows_are_read_and_trimmed_by_writer_and_number(
    database: Database, log: PostgresLog, tmp_path: Path
):
    other, lake = PostgresLog(database.url), Lake(str(tmp_path))
    for number in range(5):
        log.write([record(f"a{number}"), record("same")])
        other.write([record(f"b{number}")])
    source = open_log_source(database.url)
    with source.open(), pytest.raises(UserError, match="is being ingested by another run"):
        ingest(source, lake)
    assert ingest(source, lake, rows_at_once=3).trimmed == 15
    log.write([record("later")])
    assert ingest(source, lake).trimmed == 1
    other.close()
    kept = sorted(lake.read(PREDICTION_LOG)["request_id"].to_pylist())
    wanted = [f"{writer}{number}" for writer in "ab" for number in range(5)]
    assert kept == sorted([*wanted, *["same"] * 5, "later"])


def test_what_cannot_be_read_is_left_alone(database: Database, log: PostgresLog, tmp_path: Path):
    lake = Lake(str(tmp_path))
    source = open_log_source(database.url)
    assert ingest(source, lake).added == {}
    strange = PostgresLog(database.url)
    strange.write([record("1"), b"no record"])
    log.write([record("good")])
    newer = TABLE.replace("v1", "v2")
    database.run(f"CREATE TABLE {database.schema}.{newer} (a int)")
    for _ in range(2):
        done = ingest(source, lake, rows_at_once=1)
        assert set(done.left_alone) == {strange._writer, newer}
    strange.close()
    assert sorted(lake.read(PREDICTION_LOG)["request_id"].to_pylist()) == ["1", "good"]
    assert database.run(f"SELECT record FROM {database.schema}.{TABLE}") == [(b"no record",)]


def backends(database: Database) -> list[int]:
    found = database.run(
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'churn prediction log' "
        "AND datname = current_database()"
    )
    return [pid for (pid,) in found]


def test_a_connection_that_was_lost_is_made_anew(database: Database, log: PostgresLog):
    before = set(backends(database))
    log.write([record("one")])
    (mine,) = set(backends(database)) - before
    database.run(f"SELECT pg_terminate_backend({mine})")
    until(lambda: mine not in backends(database))
    log.write([record("two")])
    assert database.names() == ["one", "two"]


def test_what_was_committed_before_the_connection_went_is_one_row(
    database: Database, log: PostgresLog, monkeypatch: pytest.MonkeyPatch
):
    import psycopg

    log.write([record("one")])
    connection = log._connection
    assert connection is not None
    execute = connection.execute

    def commit_and_go(*arguments, **named):
        execute(*arguments, **named)
        connection.close()
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(connection, "execute", commit_and_go)
    log.write([record("two")])
    assert database.names() == ["one", "two"]


def test_a_server_that_breaks_refuses_and_comes_back(
    database: Database, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(log_postgres, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(log_postgres, "_ANSWER_MS", 200)
    log = prediction_log({"CHURN_PREDICTION_LOG": database.url})
    assert isinstance(log, DurableLog)
    acknowledged = []
    with asyncio.Runner() as loop:

        def keep(name: str) -> bool:
            try:
                loop.run(log.keep([answered(name)]))
            except Refusal:
                return False
            acknowledged.append(name)
            return True

        assert keep("before")
        database.run(f"ALTER SCHEMA {database.schema} RENAME TO {database.schema}_gone")
        assert not keep("gone")
        assert loop.run(log.health()).reason
        database.run(f"ALTER SCHEMA {database.schema}_gone RENAME TO {database.schema}")
        until(lambda: keep("back"))
        database.run("BEGIN")
        database.run(f"LOCK TABLE {database.schema}.{TABLE} IN ACCESS EXCLUSIVE MODE")
        assert not keep("hangs")
        assert "statement timeout" in (loop.run(log.health()).reason or "")
        database.run("COMMIT")
        until(lambda: keep("after"))
        assert loop.run(log.health()).usable
    log.close()
    assert sorted(database.names()) == sorted(acknowledged)


def test_a_server_that_is_not_there_is_told_without_the_password(tmp_path: Path):
    url = "postgresql://churn:secret@127.0.0.1:1/none"
    log = PostgresLog(url)
    with pytest.raises(LogBroken) as broken:
        log.write([b"record"])
    assert "secret" not in str(broken.value) + log.place
    assert urlsplit(log.place).hostname == "127.0.0.1"
    with pytest.raises(UserError, match="cannot be used") as refused:
        ingest(open_log_source(url), Lake(str(tmp_path)))
    assert "secret" not in str(refused.value)


HOSTILE = [
    "'; DROP TABLE {table}; --",
    "', 1, ''); DELETE FROM {table}; --",
    '"; DROP TABLE {table}; --',
    "$1; DROP TABLE {table}",
    "%s %(name)s {{}}",
    "x\\'; DROP TABLE {table}; --",
    "c-1\0; --",
    "' OR ''='",
]


def test_an_id_is_never_sql_on_its_way_through_the_log(
    database: Database, log: PostgresLog, tmp_path: Path
) -> None:
    """Of a customer, of a request, and of a writer, which whoever may write the table chooses."""
    ids = [each.format(table=f"{database.schema}.{TABLE}") for each in HOSTILE]
    log.write(
        [encode_logged(msgspec.structs.replace(answered(each), customer_id=each)) for each in ids]
    )
    log.write([record("a last one")])
    database.run(f"CREATE TABLE {database.schema}.theirs AS SELECT 1 AS kept")
    writers = [each for each in ids if "\0" not in each]
    for writer in writers:
        database.insert(writer, record(f"of {writer}"))
    nasty = f'{TABLE[:-1]}9"; DROP TABLE theirs; --'
    quoted = nasty.replace('"', '""')
    database.run(f'CREATE TABLE {database.schema}."{quoted}" (n int)')
    assert log.waiting().rows == len(ids) + 1 + len(writers)
    lake = Lake(str(tmp_path))
    done = ingest(open_log_source(database.url), lake)
    kept = lake.read(PREDICTION_LOG)
    assert sorted(kept["request_id"].to_pylist()) == sorted(
        [*ids, "a last one", *(f"of {writer}" for writer in writers)]
    )
    assert set(ids) < set(kept["customer_id"].to_pylist())
    # Trimmed by writer and number: no row of another goes, and none stays.
    assert database.names() == []
    assert nasty in done.left_alone
    assert database.run(f"SELECT kept FROM {database.schema}.theirs") == [(1,)]
