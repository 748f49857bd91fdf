"""The lake in an object store: a real S3 protocol over loopback, served by moto."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import date, timedelta
from pathlib import Path

import ibis
import pyarrow as pa
import pytest
from brute_force import DAY, FIRST, TICK, Event, raw_table
from bucket import s3_endpoint
from s3fs import S3FileSystem

from churn_assets.contract.features import features_named
from churn_assets.contract.online import open_reader
from churn_assets.data.lake import Lake, open_lake
from churn_assets.data.tables import ORDERS
from churn_assets.data.training_set import (
    assemble_training_set,
    changed_partitions,
    restore_training_set,
    store_training_set,
)
from churn_assets.data.windows import Windows, cutoff_of, days_between, midnight
from churn_assets.errors import UserError

LAST = FIRST + timedelta(days=4)
DAYS = days_between(FIRST, LAST)
BUCKET = "a-bucket"
KEY_ID, SECRET = "AKIAWATCHTHISKEYID", "watch+this/secret+access+key"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_endpoint(BUCKET, KEY_ID, SECRET) as url:
        yield url


@pytest.fixture
def lake(endpoint: str, request: pytest.FixtureRequest) -> Lake:
    """An empty lake of the test's own."""
    return open_lake(f"s3://{BUCKET}/{request.node.name}", endpoint)


def orders(*moments, amount: int = 5) -> pa.Table:
    return raw_table("orders", [Event(f"c{n}", m, None, amount) for n, m in enumerate(moments)])


def fill(lake: Lake) -> Lake:
    """Two orders on each of DAYS, at the first and the last instant of the day."""
    moments = [moment for day in DAYS for moment in (midnight(day), midnight(day + DAY) - TICK)]
    lake.write("orders", FIRST, LAST, orders(*moments), day_of="occurred_at")
    return lake


def objects(lake: Lake) -> dict[str, str]:
    """Every key of the lake with the hash of its content."""
    lake.filesystem.invalidate_cache()
    found = lake.filesystem.find(lake.base, detail=True)
    return {name.removeprefix(f"{lake.base}/"): info["ETag"] for name, info in found.items()}


def test_a_lake_in_a_bucket_is_one_on_disk(lake: Lake, tmp_path: Path) -> None:
    local = fill(Lake(str(tmp_path)))
    remote = fill(lake)
    assert set(objects(remote)) == {f"orders/day={day}/part-0.parquet" for day in DAYS}
    assert remote.days("orders") == DAYS
    assert remote.missing("orders", FIRST, LAST + DAY) == [LAST + DAY]
    assert remote.row_counts("orders") == local.row_counts("orders")
    assert remote.schema("orders", FIRST).equals(ORDERS.schema)
    assert remote.read("orders").equals(local.read("orders"))
    assert remote.read("orders", columns=["order_id"]).column_names == ["order_id"]
    assert remote.content_hashes("orders", DAYS) == local.content_hashes("orders", DAYS)


def test_duckdb_reads_the_days_asked_for_with_their_day(lake: Lake, tmp_path: Path) -> None:
    local, remote, con = fill(Lake(str(tmp_path))), fill(lake), ibis.duckdb.connect()
    for days in (DAYS[1:3], [DAYS[0], DAYS[4]], DAYS):
        expected = local.scan(con, "orders", days=days).order_by("occurred_at").to_pyarrow()
        found = remote.scan(con, "orders", days=days).order_by("occurred_at").to_pyarrow()
        assert found.equals(expected)
    rows = remote.scan(con, "orders")
    some = rows.filter(rows["day"] == LAST)
    assert some.count().to_pyarrow().as_py() == 2
    with pytest.raises(UserError, match="materialize orders"):
        remote.scan(con, "orders", FIRST, LAST + DAY)
    with pytest.raises(UserError, match="materialize logins first"):
        remote.scan(con, "logins")
    con.disconnect()


def test_a_write_replaces_exactly_its_partitions(lake: Lake) -> None:
    before = objects(fill(lake))
    lake.write(
        "orders", DAYS[1], DAYS[2], orders(midnight(DAYS[1]), amount=9), day_of="occurred_at"
    )
    after = objects(lake)
    changed = {path for path in before if before[path] != after[path]}
    assert set(after) == set(before)
    assert changed == {f"orders/day={day}/part-0.parquet" for day in DAYS[1:3]}
    assert lake.row_counts("orders", DAYS[1], DAYS[2]) == {DAYS[1]: 1, DAYS[2]: 0}


def test_a_write_that_fails_half_way_leaves_everything_as_it_was(lake: Lake, monkeypatch) -> None:
    before = objects(fill(lake))
    put_file, calls = S3FileSystem._put_file, []

    async def failing(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise OSError("the line is dead")
        return await put_file(*args, **options)

    monkeypatch.setattr(S3FileSystem, "_put_file", failing)
    rows = orders(*(midnight(day) for day in DAYS))
    with pytest.raises(OSError, match="the line is dead"):
        lake.write("orders", FIRST, LAST, rows, day_of="occurred_at")
    with pytest.raises(ValueError, match="is outside"):
        lake.write("orders", FIRST, FIRST, rows, day_of="occurred_at")
    assert objects(lake) == before


def test_a_reader_finds_the_old_partition_or_the_new_one(lake: Lake) -> None:
    small = orders(midnight(FIRST), amount=1)
    large = orders(*(midnight(FIRST) + n * TICK for n in range(50_000)), amount=2)
    lake.write("orders", FIRST, FIRST, small, day_of="occurred_at")
    done = threading.Event()

    def replace() -> None:
        try:
            for n in range(12):
                rows = small if n % 2 else large
                lake.write("orders", FIRST, FIRST, rows, day_of="occurred_at")
        finally:
            done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    reader, con, seen = open_lake(lake.root, lake._endpoint), ibis.duckdb.connect(), 0
    while not done.is_set() or not seen:
        rows = reader.read("orders", FIRST, FIRST)
        assert rows.equals(small) or rows.equals(large)
        scanned = reader.scan(con, "orders", FIRST, FIRST)
        total = con.to_pyarrow(scanned.amount_minor.sum()).as_py()
        assert total in (1, 100_000)
        seen += 1
    writer.join()
    con.disconnect()


def test_what_a_killed_run_left_is_not_read_and_goes_after_a_day(lake: Lake) -> None:
    fill(lake)
    left = f"{lake.base}/orders/.tmp-{os.uname().nodename}-1-{'0' * 32}/{FIRST}.tmp"
    lake.filesystem.pipe_file(left, b"half a file")
    assert lake.days("orders") == DAYS
    assert lake.read("orders").num_rows == 10
    fill(lake)
    assert left.removeprefix(f"{lake.base}/") in objects(lake)
    written = lake.filesystem.info(left)["LastModified"].timestamp()
    tomorrow = Lake(lake.root, lake.storage_options, clock=lambda: written + 86_401)
    fill(tomorrow)
    assert set(objects(lake)) == {f"orders/day={day}/part-0.parquet" for day in DAYS}


def test_a_file_beside_the_tables(lake: Lake) -> None:
    lake.put("notes", "a.json", b"{}")
    lake.put("notes", "a.json", b"[]")
    lake.put("notes", "t.parquet", pa.table({"x": [1]}))
    assert lake.get_bytes("notes", "a.json") == b"[]"
    assert lake.get_table("notes", "t.parquet").to_pydict() == {"x": [1]}
    assert set(objects(lake)) == {"notes/a.json", "notes/t.parquet"}
    with pytest.raises(FileNotFoundError):
        lake.get_bytes("notes", "b.json")


def test_a_training_set_is_kept_and_brought_back(lake: Lake) -> None:
    windows = Windows(horizon_days=2)
    population = pa.table(
        {
            "customer_id": ["a", "b"],
            "cutoff": pa.array([cutoff_of(FIRST)] * 2, pa.timestamp("us", "UTC")),
            "total_orders_30d": [1, 2],
        }
    )
    labels = population.select(["customer_id", "cutoff"]).append_column("churned", [[True, False]])
    for table, day, rows in (
        ("customer_features", FIRST, population),
        ("churn_labels", DAYS[2], labels),
    ):
        dated = rows.append_column("day", pa.array([day] * 2, pa.date32()))
        lake.write(table, day, day, dated, day_of="day")
    con = ibis.duckdb.connect()
    assembled = assemble_training_set(
        lake, con, [FIRST], windows, features_named(["total_orders_30d"])
    )
    assert assembled.complete.passed
    path = store_training_set(lake, assembled)
    assert lake.filesystem.exists(path)
    assert restore_training_set(lake, assembled.data_hash).equals(assembled.table)
    assert changed_partitions(lake, assembled.manifest) == ()
    with pytest.raises(UserError, match="there is no training set"):
        restore_training_set(lake, "0" * 64)
    con.disconnect()


def test_a_bucket_that_is_not_there(endpoint: str) -> None:
    lake = open_lake("s3://nowhere/prefix", endpoint)
    told = f"there is no bucket nowhere at {endpoint}; make it or correct lake"
    for attempt in (
        lambda: lake.days("orders"),
        lambda: lake.read("orders"),
        lambda: lake.scan(ibis.duckdb.connect(), "orders", FIRST, LAST),
        lambda: lake.put("notes", "a.json", b"{}"),
        lambda: lake.get_bytes("notes", "a.json"),
        lambda: fill(lake),
    ):
        with pytest.raises(UserError, match=told):
            attempt()
    assert not lake.filesystem.exists("nowhere")


def test_an_endpoint_that_does_not_answer() -> None:
    lake = open_lake("s3://bucket/prefix", "http://127.0.0.1:9")
    told = "the lake s3://bucket/prefix cannot be reached at http://127.0.0.1:9"
    with pytest.raises(UserError, match=told):
        lake.days("orders")
    with pytest.raises(UserError, match=told):
        fill(lake)


def test_no_credentials(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    lake = Lake(f"s3://{BUCKET}/x", {"endpoint_url": endpoint, "skip_instance_cache": True})
    with pytest.raises(UserError, match="set AWS_ACCESS_KEY_ID"):
        lake.days("orders")


@pytest.mark.parametrize(
    ("root", "endpoint_url", "told"),
    [
        ("s3://key:word@bucket/x", None, "lake holds credentials"),
        ("s3://bucket/x", "http://key:word@host:1", "lake_endpoint_url holds credentials"),
        ("s3://bucket/x", "host:1", "write it like https://host:port"),
        ("s3:///x", None, "names no bucket"),
        ("folder", "http://host:1", "remove it or set"),
        ("martian://x", None, None),
    ],
)
def test_addresses_that_cannot_be(root: str, endpoint_url: str | None, told: str | None) -> None:
    with pytest.raises(UserError, match=told or "cannot be opened") as error:
        open_lake(root, endpoint_url).days("orders")
    assert "word" not in str(error.value)


DATA_RUN = """
from churn_assets.home import Home
home = Home.from_environment()
home.prepare()
from dagster import DagsterInstance
from churn_assets.definitions import defs
from churn_assets.defs import launch
from churn_assets.defs.resources import Project
project = Project.of(home)
with DagsterInstance.get() as instance:
    launch.claim_lake(project)
    launcher = launch.Launcher(defs, instance, project, lambda: False)
    launch._bring_in_data(launcher)
    outcome = launcher.run("training_set", "training", ["training_set"])
print("refused by", outcome.refused_by)
assert outcome.success
"""

CONFIG = """
source: {kind: shop, shop: {customers: 150}}
calendar: {start: 2024-01-01, days: 125}
lake: ${CHURN_TEST_LAKE}
lake_endpoint_url: ${CHURN_TEST_ENDPOINT}
windows: {activity_days: 60, horizon_days: 10}
data_gate: {min_rows: 50}
"""


def test_data_from_the_source_to_the_training_set_without_a_trace_of_credentials(
    endpoint: str, tmp_path: Path
) -> None:
    config = tmp_path / "churn.yaml"
    config.write_text(CONFIG)
    home = tmp_path / "home"
    root = f"s3://{BUCKET}/whole"
    environment = os.environ | {
        "CHURN_CONFIG": str(config),
        "CHURN_HOME": str(home),
        "CHURN_TEST_LAKE": root,
        "CHURN_TEST_ENDPOINT": endpoint,
    }
    environment.pop("PYTHONWARNINGS", None)
    run = subprocess.run(
        [sys.executable, "-c", DATA_RUN], env=environment, capture_output=True, text=True
    )
    said = run.stdout + run.stderr
    assert run.returncode == 0, said[-3000:]

    lake = open_lake(root, endpoint)
    start, last = date(2024, 1, 1), date(2024, 5, 4)
    assert lake.days("orders") == days_between(start, last)
    assert lake.days("customer_features") == days_between(date(2024, 3, 30), last)
    assert lake.days("churn_labels") == days_between(date(2024, 4, 9), last)
    kept = [name for name in objects(lake) if name.startswith("training_sets/")]
    assert len(kept) == 2
    newest = lake.read("customer_features", last, last).to_pylist()
    with closing(open_reader(str(home / "feast" / "online.db"))) as reader:
        assert reader.state().newest_cutoff == reader.state().data_time == cutoff_of(last)
        rows = reader.read([row["customer_id"] for row in newest])
    assert [row and list(row.values) for row in rows] == [list(row.values())[2:] for row in newest]
    assert "about/source.json" in objects(lake)
    assert not list((home / "lake").rglob("*.parquet"))
    assert not [name for name in objects(lake) if ".tmp" in name]

    written = [path for path in home.rglob("*") if path.is_file()]
    assert any(path.suffix == ".db" for path in written)
    for secret in (KEY_ID, SECRET):
        assert secret not in said
        assert [path for path in written if secret.encode() in path.read_bytes()] == []
        for name in objects(lake):
            assert secret.encode() not in lake.filesystem.cat_file(f"{lake.base}/{name}")
