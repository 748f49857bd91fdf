"""One expression on two engines: DuckDB, and a real Spark cluster of a master and two workers."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Generator
from datetime import date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import cast

import dagster as dg
import ibis
import msgspec
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from brute_force import Event, raw_table
from bucket import s3_endpoint
from cluster import QUICK_JAVA, standalone
from dirt import (
    FEATURE_VALUES,
    ORDER_VALUES,
    drawn,
    features,
    features_in_engine,
    features_in_memory,
    orders,
    orders_in_engine,
    orders_in_memory,
    same_verdicts,
)
from ibis.backends import BaseBackend
from ibis.backends.pyspark import Backend
from pyspark.errors import PySparkException

from churn_assets.contract.features import FEATURES
from churn_assets.data import ranges, refresh
from churn_assets.data.engines import DuckDBSettings, SparkSettings, open_engine
from churn_assets.data.features import customer_features, scan_look_back
from churn_assets.data.gate import judge_schema, judge_schema_in_engine
from churn_assets.data.lake import Lake, open_lake
from churn_assets.data.ranges import CustomerRange
from churn_assets.data.refresh import refresh_features, refresh_labels
from churn_assets.data.results import to_arrow
from churn_assets.data.schema import features_schema
from churn_assets.data.spark import from_arrow
from churn_assets.data.validation import ValidationPolicy
from churn_assets.data.versions import SUPERSEDED_AT, superseded_table
from churn_assets.data.windows import Windows, days_between, midnight
from churn_assets.defs.features import customer_features as customer_features_asset
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.errors import UserError
from churn_assets.home import Home

START, LAST = SETTINGS.calendar.start, SETTINGS.calendar.start + timedelta(days=125)
FIRST_FEATURES = START + timedelta(days=89)
FIRST_LABELS = FIRST_FEATURES + timedelta(days=30)
TABLES = ("orders", "support_tickets", "logins")
WINDOWS = Windows()
BUCKET = "raw"
TICK = timedelta(microseconds=1)
# Identifiers that a quotation, an order of text or a pattern could trip over.
CUSTOMERS = [
    "a'b", 'a"b', "a\\b", "a\nb", "a%b_", "Z", "z", "é", "e\u0301", "\U0001f6d2", "日本", " a",
    "a ", "$x", "`t`", "{0}", "NULL", "null", "0", "00", "1e3", "-", "--", "a;b",
    *(f"c-{number:03d}" for number in range(60)),
]  # fmt: skip
SESSION = {
    "spark.sql.shuffle.partitions": 2,
    "spark.sql.files.openCostInBytes": 4096,
    "spark.executor.memory": "600m",
    "spark.executor.extraJavaOptions": QUICK_JAVA,
    "spark.driver.extraJavaOptions": QUICK_JAVA,
}


def history(seed: int) -> dict[str, list[Event]]:
    """Events on the edges of windows and of days, and some between; many known late."""
    draw = random.Random(seed)
    edges = [midnight(day) for day in days_between(START, LAST)]
    delays = (None, timedelta(0), TICK, timedelta(days=1), timedelta(days=40))

    def moment() -> datetime:
        if draw.random() < 0.6:
            return max(draw.choice(edges) + draw.choice((-1, 0, 1)) * TICK, edges[0])
        return edges[0] + draw.randrange((LAST - START).days * 86_400_000_000) * TICK

    def event() -> Event:
        happened, delay = moment(), draw.choice(delays)
        known = None if delay is None else happened + delay
        # Cents whose quotients have no short form, and a sum beyond what 32 bits hold.
        return Event(draw.choice(CUSTOMERS), happened, known, draw.choice((0, 1, 7, 333, 10**9)))

    counts = {"orders": 1500, "support_tickets": 300, "logins": 2500}
    return {table: [event() for _ in range(count)] for table, count in counts.items()}


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """A lake with raw tables, one event of which was corrected; in a folder with an odd name."""
    lake = Lake(str(tmp_path_factory.mktemp("lake") / "a [b] {c}* 100%"))
    for table, happened in history(7).items():
        lake.write(table, START, LAST, raw_table(table, happened), day_of="occurred_at")
    order = Event("c-001", midnight(FIRST_FEATURES), midnight(FIRST_FEATURES), 999)
    corrected = midnight(FIRST_FEATURES + timedelta(days=20))
    former = raw_table("orders", [order]).append_column(
        SUPERSEDED_AT, pa.array([corrected], pa.timestamp("us", "UTC"))
    )
    day = order.occurred_at.date()
    lake.write(superseded_table("orders"), day, day, former, day_of="occurred_at")
    return lake


@pytest.fixture(scope="module")
def endpoint() -> Generator[str]:
    with s3_endpoint(BUCKET, "AKIAOFTHECLUSTER", "of/the+cluster") as url:
        yield url


@pytest.fixture(scope="module")
def cluster(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """A cluster whose workers have the credentials of `endpoint`; where it is, a lake says."""
    if shutil.which("java") is None:
        pytest.skip("there is no Java; install Java 17 to test what runs on Spark")
    with standalone(tmp_path_factory.mktemp("cluster")) as master:
        yield master


@pytest.fixture(scope="module")
def spark(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Generator[Backend]:
    settings = SparkSettings(cluster, "512m", dict(SESSION))
    with open_engine(
        "spark", DuckDBSettings(), settings, tmp_path_factory.mktemp("spill")
    ) as session:
        yield cast(Backend, session)


@pytest.fixture
def duckdb(tmp_path: Path) -> Generator[BaseBackend]:
    with open_engine("duckdb", DuckDBSettings(), SparkSettings(), tmp_path) as connection:
        yield connection


def javas() -> set[int]:
    """The Java processes this one has started."""
    return {
        child.pid for child in psutil.Process().children(recursive=True) if "java" in child.name()
    }


def same_files(one: Lake, other: Lake, table: str) -> int:
    """The rows of `table`, which both lakes hold byte for byte."""
    assert one.days(table) == other.days(table)
    for day in one.days(table):
        assert Path(one.path(table, day)).read_bytes() == Path(other.path(table, day)).read_bytes()
    return sum(one.row_counts(table).values())


def a_copy(lake: Lake, folder: Path) -> Lake:
    shutil.copytree(lake.root, folder)
    return Lake(str(folder))


def materialize(project: Project, day: date) -> dg.ExecuteInProcessResult:
    with dg.instance_for_test() as instance:
        return dg.materialize(
            [customer_features_asset],
            partition_key=day.isoformat(),
            resources={"project": project},
            instance=instance,
        )


# Before the tests that hold a session: a process has one at a time.
def test_an_asset_is_materialized_on_the_cluster(cluster: str, lake: Lake, tmp_path: Path) -> None:
    settings = SparkSettings(cluster, "512m", dict(SESSION))
    written = {}
    for engine in ("spark", "duckdb"):
        place = a_copy(lake, tmp_path / engine)
        mine = msgspec.structs.replace(
            SETTINGS,
            lake=place.root,
            engine=engine,
            spark=settings,
            validation=ValidationPolicy(rows_in_memory=0),
        )
        before = javas()
        result = materialize(Project(Home(tmp_path / f"home-{engine}"), mine), FIRST_FEATURES)
        assert result.success
        assert javas() == before, "the driver of Spark ends with the asset"
        checks = {check.check_name: check.passed for check in result.get_asset_check_evaluations()}
        assert checks == {"schema": True, "nulls": True, "no_event_after_cutoff": True}
        written[engine] = place
    assert same_files(written["spark"], written["duckdb"], "customer_features") > 50


def test_features_agree_to_the_last_bit(
    spark: BaseBackend, duckdb: BaseBackend, lake: Lake
) -> None:
    found = []
    for con in (spark, duckdb):
        scans = scan_look_back(lake, con, TABLES, FIRST_FEATURES, LAST, WINDOWS, data_start=START)
        assert SUPERSEDED_AT in scans["orders"].columns
        rows = customer_features(scans, FIRST_FEATURES, LAST, WINDOWS, step_days=7)
        found.append(ordered(to_arrow(rows)))
    assert found[0].num_rows > 200
    assert_same_bits(*found)


def test_labels_and_files_agree_to_the_last_bit(
    spark: BaseBackend, duckdb: BaseBackend, lake: Lake, tmp_path: Path, monkeypatch
) -> None:
    lakes = []
    for con in (spark, duckdb):
        place = a_copy(lake, tmp_path / con.name)
        monkeypatch.setattr(refresh, "SPARK_LABEL_DAYS", 3)
        # Small enough for several ranges of customers, whose bounds are among the identifiers.
        monkeypatch.setattr(ranges.customer_ranges, "__kwdefaults__", RANGES)
        refresh_features(
            place, con, FEATURES, TABLES, FIRST_FEATURES, LAST, WINDOWS, data_start=START
        )
        refresh_labels(place, con, FIRST_LABELS, LAST, WINDOWS)
        lakes.append(place)
    assert same_files(*lakes, "customer_features") > 2000
    assert same_files(*lakes, "churn_labels") > 500
    churned = lakes[0].read("churn_labels")["churned"]
    assert 0 < pc.sum(churned).as_py() < len(churned)


def put(lake: Lake, there: Lake, table: str, day: date) -> None:
    """Copy a partition of `lake` to `there`."""
    there.filesystem.pipe_file(there.path(table, day), Path(lake.path(table, day)).read_bytes())


def test_a_lake_in_a_bucket_gives_the_same_files(
    spark: BaseBackend, duckdb: BaseBackend, lake: Lake, endpoint: str, tmp_path: Path
) -> None:
    there, here = open_lake(f"s3://{BUCKET}/lake", endpoint), a_copy(lake, tmp_path / "here")
    # As if the shop had opened then: every day is read by a process of Python.
    since, last = FIRST_FEATURES - timedelta(days=29), FIRST_FEATURES + timedelta(days=1)
    features = [feature for feature in FEATURES if feature.name != "support_tickets_90d"]
    windows = Windows(activity_days=30, horizon_days=10)
    for table in ("orders", "logins", superseded_table("orders")):
        for day in lake.days(table):
            if since <= day <= last:
                put(lake, there, table, day)
    for place, con in ((there, spark), (here, duckdb)):
        refresh_features(
            place,
            con,
            features,
            ("orders", "logins"),
            FIRST_FEATURES,
            last,
            windows,
            data_start=since,
        )
    assert there.days("customer_features") == [FIRST_FEATURES, last]
    for day in (FIRST_FEATURES, last):
        theirs = there.filesystem.cat_file(there.path("customer_features", day))
        assert theirs == Path(here.path("customer_features", day)).read_bytes()
    assert sum(here.row_counts("customer_features").values()) > 50


def test_a_partition_that_is_gone_is_named_by_the_worker(
    spark: BaseBackend, lake: Lake, endpoint: str
) -> None:
    there = open_lake(f"s3://{BUCKET}/gone", endpoint)
    for day in (START, START + timedelta(days=1)):
        put(lake, there, "orders", day)
    rows = there.scan(spark, "orders")
    there.filesystem.rm(there.path("orders", START))
    with pytest.raises(PySparkException, match=f"orders.*{START}"):
        to_arrow(rows)


RANGES = {"step_days": 1, "rows_at_once": 3000}


def test_validation_gives_the_verdicts_of_pandera(spark: Backend) -> None:
    dirty = orders(drawn(ORDER_VALUES, 400, seed=1))
    same_verdicts(orders_in_memory(dirty), orders_in_engine(from_arrow(spark, dirty)), 400)
    dirty = features(drawn(FEATURE_VALUES, 400, seed=2))
    same_verdicts(features_in_memory(dirty), features_in_engine(from_arrow(spark, dirty)), 400)
    schema = features_schema(FEATURES)
    for rows in (dirty, dirty.slice(0, 0)):
        mine = judge_schema(rows, schema)
        pushed = judge_schema_in_engine(from_arrow(spark, rows), schema)
        assert (pushed.passed, pushed.reason) == (mine.passed, mine.reason)
        assert pushed.figures == {"rows": rows.num_rows} | mine.figures


def test_every_identifier_bounds_a_range_alike(
    spark: BaseBackend, duckdb: BaseBackend, lake: Lake
) -> None:
    bounds = sorted(CUSTOMERS, key=str.encode)[::6]
    for first, end in pairwise(bounds):
        found = []
        for con in (spark, duckdb):
            orders = lake.scan(con, "orders", START, START + timedelta(days=9))
            rows = CustomerRange(first, end).of(orders).select("order_id", "customer_id")
            found.append(to_arrow(rows).sort_by("order_id"))
        assert found[0].equals(found[1]), (first, end)


def test_a_table_without_partitions_is_empty(spark: BaseBackend, tmp_path: Path) -> None:
    empty = Lake(str(tmp_path)).scan(spark, "orders", START, START, strict=False)
    assert to_arrow(empty).num_rows == 0
    with pytest.raises(UserError, match="no partition of churn_labels yet"):
        Lake(str(tmp_path)).scan(spark, "churn_labels", START, START, strict=False)


def test_an_instant_does_not_pass_through_the_time_zone_of_the_machine(
    spark: BaseBackend, lake: Lake, monkeypatch
) -> None:
    # There the midnight of UTC came twice that day.
    monkeypatch.setenv("TZ", "Atlantic/Azores")
    time.tzset()
    try:
        moments = [midnight(date(2024, 10, 27)) + timedelta(hours=hour) for hour in range(3)]
        known = ibis.memtable(pa.table({"moment": pa.array(moments, pa.timestamp("us", "UTC"))}))
        one = lake.scan(spark, "orders", START, START).limit(1).select("order_id")
        found = to_arrow(one.cross_join(known))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert sorted(found["moment"].to_pylist()) == moments


def ordered(rows: pa.Table) -> pa.Table:
    return rows.sort_by([("day", "ascending"), ("customer_id", "ascending")]).combine_chunks()


def assert_same_bits(one: pa.Table, other: pa.Table) -> None:
    """Every value of every column, doubles by their bits."""
    assert one.schema.equals(other.schema)
    for name in one.column_names:
        mine, theirs = one[name], other[name]
        if pa.types.is_floating(mine.type):
            mine, theirs = (column.combine_chunks().view(pa.int64()) for column in (mine, theirs))
        assert mine.equals(theirs), name
