from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from ibis.backends.duckdb import Backend as DuckDBBackend

from churn_assets.data import engines
from churn_assets.data.engines import DuckDBSettings, SparkSettings, open_duckdb, open_engine
from churn_assets.errors import UserError
from churn_assets.settings import Settings, load_settings

SHOP = "source: {kind: shop}\ncalendar: {start: 2024-01-01}\n"


def settings(folder: Path, text: str) -> Settings:
    path = folder / "churn.yaml"
    path.write_text(SHOP + text)
    return load_settings(path)


def opened(spark: SparkSettings, folder: Path) -> None:
    with open_engine("spark", DuckDBSettings(), spark, folder):
        pytest.fail("there is no such Spark")


def test_the_engine_is_duckdb_unless_the_settings_say_spark(tmp_path: Path, monkeypatch) -> None:
    assert settings(tmp_path, "").engine == "duckdb"
    monkeypatch.setenv("CHURN_TEST_MASTER", "spark://host:7077")
    mine = settings(
        tmp_path,
        "engine: spark\nspark: {master: '${CHURN_TEST_MASTER}', conf: {spark.cores.max: 4}}",
    )
    assert (mine.engine, mine.spark.master) == ("spark", "spark://host:7077")
    assert mine.spark.conf == {"spark.cores.max": 4}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("engine: sparc", "Invalid enum value 'sparc'"),
        ("spark: {master: host:7077}", "write it like spark://host:7077 or local"),
        ("spark: {memory: much}", "spark.memory is much; write it like 2g"),
        ("duckdb: {memory: 80}", "Expected `str`"),
        ("duckdb: {memory: all}", "duckdb.memory is all; write it like 1500MB"),
        ("spark: {cores: 3}", "unknown field `cores`"),
        ("spark: {master: '${CHURN_NO_MASTER}'}", "spark.master needs ${CHURN_NO_MASTER}"),
    ],
)
def test_wrong_settings_are_refused_with_what_to_write(
    tmp_path: Path, text: str, told: str
) -> None:
    with pytest.raises(UserError) as error:
        settings(tmp_path, text)
    assert told in str(error.value)


def test_duckdb_holds_no_more_than_it_may(tmp_path: Path) -> None:
    with open_duckdb(DuckDBSettings("100MB"), tmp_path) as con:
        assert isinstance(con, DuckDBBackend)
        told = con.con.sql("SELECT current_setting('memory_limit')").fetchall()[0][0]
        assert told == "95.3 MiB"
    with (
        pytest.raises(UserError, match=r"more than the 1MB it may use; raise duckdb\.memory"),
        open_duckdb(DuckDBSettings("1MB"), tmp_path) as con,
    ):
        con.con.sql("SELECT list(range) FROM range(10_000_000)").fetchall()


def test_without_pyspark_the_extra_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "churn_assets.data.spark", raising=False)
    monkeypatch.setitem(sys.modules, "pyspark", None)
    monkeypatch.setitem(sys.modules, "ibis.backends.pyspark", None)
    with pytest.raises(UserError, match=r"install churn-assets\[spark\], or set engine: duckdb"):
        opened(SparkSettings(), tmp_path)


def test_without_java_spark_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(UserError, match="install Java 17 or later or set JAVA_HOME"):
        opened(SparkSettings(), tmp_path)


# What pyspark leaves open of a process that did not start.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_java_that_does_not_start_is_told(tmp_path: Path, monkeypatch) -> None:
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text("#!/bin/sh\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(UserError, match="Spark's Java did not start"):
        opened(SparkSettings("local[1]"), tmp_path)


def test_a_master_that_does_not_answer_is_told_at_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("churn_assets.data.spark._require_java", lambda: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = f"spark://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=f"master {master} cannot be reached"):
        opened(SparkSettings(master), tmp_path)


def test_spark_takes_true_and_false_in_its_own_spelling() -> None:
    assert [engines._as_text(value) for value in (True, False, 4, "4g")] == [
        "true",
        "false",
        "4",
        "4g",
    ]
