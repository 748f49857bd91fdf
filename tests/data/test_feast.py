from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import ibis
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from churn_assets.contract.features import FEATURES, Feature, features_for
from churn_assets.contract.online import (
    OnlineRow,
    OnlineSchemaChanged,
    feature_set_fingerprint,
    open_reader,
)
from churn_assets.data.feast_repo import FeatureRepo, feast_objects
from churn_assets.data.lake import Lake
from churn_assets.data.online_rows import open_writer
from churn_assets.data.training_set import assemble_training_set
from churn_assets.data.windows import Windows, cutoff_of, label_partition
from churn_assets.errors import UserError

FIRST = date(2024, 3, 1)
DAYS = [FIRST + timedelta(days=n) for n in range(4)]
NAMES = [feature.name for feature in FEATURES]
FEWER = features_for(["orders"])
CUSTOMERS = 60
WINDOWS = Windows(activity_days=10, horizon_days=2)


def population(day: date) -> list[str]:
    """Every day three customers leave and three come."""
    start = 3 * (day - FIRST).days
    return [f"c{number:03}" for number in range(start, start + CUSTOMERS)]


def features_of(day: date, seed: int = 0, names: list[str] = NAMES) -> pa.Table:
    draw = np.random.default_rng([day.toordinal(), seed])
    customers = population(day)
    columns = {
        feature.name: draw.integers(0, 50, len(customers))
        if feature.dtype == "int"
        else draw.random(len(customers)) * 100
        for feature in FEATURES
    }
    return pa.table(
        {
            "customer_id": customers,
            "cutoff": pa.array([cutoff_of(day)] * len(customers), pa.timestamp("us", "UTC")),
            **{name: columns[name] for name in names},
            "day": pa.array([day] * len(customers), pa.date32()),
        }
    )


def write_features(lake: Lake, day: date, seed: int = 0, names: list[str] = NAMES) -> None:
    lake.write("customer_features", day, day, features_of(day, seed, names), day_of="day")


def write_labels(lake: Lake, day: date) -> None:
    features = features_of(day)
    mature = label_partition(day, WINDOWS.horizon_days)
    labels = pa.table(
        {
            "customer_id": features["customer_id"],
            "cutoff": features["cutoff"],
            "churned": [number % 3 == 0 for number in range(features.num_rows)],
            "day": pa.array([mature] * features.num_rows, pa.date32()),
        }
    )
    lake.write("churn_labels", mature, mature, labels, day_of="day")


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    lake = Lake(str(tmp_path / "lake"))
    for day in DAYS:
        write_features(lake, day)
        write_labels(lake, day)
    return lake


@pytest.fixture(params=["sqlite", "redis"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield str(tmp_path / "online.db")
        return
    url = os.environ.get("CHURN_TEST_REDIS")
    if not url:
        pytest.skip("set CHURN_TEST_REDIS to the URL of a Redis database to run this")
    with closing(open_writer(url)) as writer:
        writer.remove()
        yield url
        writer.remove()


Make = Callable[..., FeatureRepo]


@pytest.fixture
def make(lake: Lake, tmp_path: Path) -> Make:
    def make(features: tuple[Feature, ...] = FEATURES, online: str = "", **given: Any):
        registry = given.get("registry") or str(tmp_path / "feast" / "registry.db")
        return FeatureRepo(
            lake,
            features,
            registry=registry,
            online=online or str(tmp_path / "online.db"),
            live=given.get("live", False),
            retention=given.get("retention", timedelta(days=30)),
        )

    return make


def online(location: str, *customer_ids: str) -> dict[str, OnlineRow | None]:
    with closing(open_reader(location)) as reader:
        return dict(zip(customer_ids, reader.read(customer_ids), strict=True))


def offline(lake: Lake, day: date) -> dict[str, OnlineRow]:
    return {
        row["customer_id"]: OnlineRow(row["cutoff"], tuple(row[name] for name in NAMES))
        for row in lake.read("customer_features", day, day).to_pylist()
    }


def spoil(lake: Lake, *days: date) -> None:
    """Whoever reads these partitions now fails."""
    for day in days:
        Path(lake.path("customer_features", day)).write_bytes(b"not parquet")


def spine(lake: Lake, *days: date) -> pa.Table:
    return lake.read("customer_features", days=days, columns=["customer_id", "cutoff"])


def test_the_definitions_are_the_contracts(make: Make) -> None:
    repo = make()
    view = repo.store.get_feature_view("customer_features")
    assert [(field.name, str(field.dtype)) for field in view.features] == [
        (feature.name, {"int": "Int64", "float": "Float64"}[feature.dtype]) for feature in FEATURES
    ]
    for field, feature in zip(view.features, FEATURES, strict=True):
        assert feature.meaning in field.description
        assert feature.unit in field.description
    assert [column.name for column in view.entity_columns] == ["customer_id"]
    assert (view.ttl, view.online) == (timedelta(days=1), True)
    assert view.batch_source is not None
    assert view.batch_source.timestamp_field == "cutoff"
    assert repo.store.config.entity_key_serialization_version == 3
    service = repo.store.get_feature_service(repo.service)
    (projection,) = service.feature_view_projections
    assert {field.name for field in projection.features} == set(NAMES)
    assert service.tags["feature_set"] == feature_set_fingerprint(FEATURES)


def test_another_feature_set_is_another_service_and_the_old_one_stays(make: Make) -> None:
    whole, fewer = make(), make(FEWER)
    assert whole.service != fewer.service
    whole.store.list_feature_services()
    names = {service.name for service in fewer.store.list_feature_services()}
    assert names == {whole.service, fewer.service}
    view = fewer.store.get_feature_view("customer_features")
    assert [field.name for field in view.features] == [feature.name for feature in FEWER]


def test_training_sets_are_the_direct_join(lake: Lake, make: Make) -> None:
    repo, con = make(), ibis.duckdb.connect()
    for days in ([DAYS[0]], [DAYS[3], DAYS[1]], DAYS):
        joined = assemble_training_set(lake, con, days, WINDOWS, FEATURES)
        retrieved = assemble_training_set(
            lake,
            con,
            days,
            WINDOWS,
            FEATURES,
            retrieve=repo.training_rows,
            feature_service=repo.service,
        )
        assert retrieved.table.equals(joined.table)
        assert retrieved.data_hash == joined.data_hash
        assert retrieved.complete == joined.complete
        assert retrieved.complete.passed
        assert retrieved.manifest.feature_service == repo.service
        assert retrieved.table.num_rows == CUSTOMERS * len(days)


@pytest.mark.parametrize("known_the_day_before", [True, False])
def test_a_row_that_is_lost_is_told(lake: Lake, make: Make, known_the_day_before: bool) -> None:
    """Also where Feast takes the row of the day before for it, which is not older than the TTL."""
    day, lost = DAYS[2], population(DAYS[2])[0]
    for each in DAYS[2:3] if known_the_day_before else DAYS[:3]:
        rows = features_of(each).filter(pc.field("customer_id") != lost)
        lake.write("customer_features", each, each, rows, day_of="day")
    training_set = assemble_training_set(
        lake, ibis.duckdb.connect(), [day], WINDOWS, FEATURES, retrieve=make().training_rows
    )
    assert training_set.table.num_rows == CUSTOMERS - (not known_the_day_before)
    assert not training_set.complete.passed
    assert "rows were lost" in training_set.complete.reason


def test_rows_come_in_the_order_of_the_spine_with_its_columns(lake: Lake, make: Make) -> None:
    asked = spine(lake, DAYS[1], DAYS[0])
    order = np.random.default_rng(0).permutation(asked.num_rows)
    asked = asked.take(order).append_column("churned", pa.array(order % 2 == 0))
    rows = make().training_rows(asked)
    assert rows.select(asked.column_names).equals(asked)
    direct = {day: offline(lake, day) for day in DAYS[:2]}
    for row in rows.to_pylist():
        expected = direct[row["cutoff"].date() - timedelta(days=1)][row["customer_id"]]
        assert tuple(row[name] for name in NAMES) == expected.values


def test_a_large_spine_keeps_its_order(lake: Lake, make: Make) -> None:
    rows = features_of(DAYS[0]).take(pa.array([0] * 100_000))
    ids = pa.array([f"c{number:06}" for number in range(rows.num_rows)])
    rows = rows.set_column(0, "customer_id", ids)
    lake.write("customer_features", DAYS[0], DAYS[0], rows, day_of="day")
    order = np.random.default_rng(0).permutation(rows.num_rows)
    asked = spine(lake, DAYS[0]).take(order)
    assert make().training_rows(asked)["customer_id"].equals(asked["customer_id"])


def test_the_past_is_joined_as_feasts_own_duckdb_store_joins_it(
    lake: Lake, make: Make, tmp_path: Path
) -> None:
    """Exact cutoffs, hours after one, as old as the TTL and older, and customers nobody knows."""
    from feast import FeatureStore, RepoConfig

    repo = make()
    moments = [
        cutoff_of(DAYS[3]) + timedelta(hours=hours) for hours in (-80, -25, 0, 1, 23, 24, 25)
    ]
    asked = pa.table(
        {
            "customer_id": [c for c in ("c000", "c005", "c011", "c066", "no") for _ in moments],
            "cutoff": pa.array(moments * 5, pa.timestamp("us", "UTC")),
        }
    )
    rows = repo.training_rows(asked)
    config = repo.config() | {
        "registry": str(tmp_path / "plain.db"),
        "offline_store": {"type": "duckdb"},
    }
    plain = FeatureStore(config=RepoConfig(**config))
    plain.apply(feast_objects(FEATURES, lake))
    found = plain.get_historical_features(
        asked.rename_columns(["customer_id", "event_timestamp"]).to_pandas(),
        plain.get_feature_service(repo.service),
    ).to_arrow()
    key = [("customer_id", "ascending"), ("cutoff", "ascending")]
    found = found.rename_columns({"event_timestamp": "cutoff"}).sort_by(key)
    rows = rows.sort_by(key)
    for name in NAMES:
        assert found[name].to_pylist() == rows[name].to_pylist()
    assert 0 < rows[NAMES[0]].null_count < rows.num_rows


def test_only_the_partitions_in_reach_are_read(lake: Lake, make: Make) -> None:
    spoil(lake, DAYS[0], DAYS[3])
    rows = make().training_rows(spine(lake, DAYS[2]))
    assert rows.num_rows == CUSTOMERS
    assert sum(column.null_count for column in rows.columns) == 0


def test_a_spine_that_names_a_row_twice_is_refused(lake: Lake, make: Make) -> None:
    asked = spine(lake, DAYS[0])
    with pytest.raises(UserError, match="twice in the spine"):
        make().training_rows(pa.concat_tables([asked, asked.slice(0, 1)]))


def test_a_spine_of_days_without_features_is_told(lake: Lake, make: Make) -> None:
    asked = pa.table(
        {
            "customer_id": ["c001"],
            "cutoff": pa.array([cutoff_of(DAYS[3] + timedelta(days=9))], pa.timestamp("us", "UTC")),
        }
    )
    with pytest.raises(UserError, match=f"there are {DAYS[0]} to {DAYS[3]}"):
        make().training_rows(asked)


def test_online_is_offline(lake: Lake, make: Make, location: str) -> None:
    repo = make(online=location)
    load = repo.materialize(DAYS[1])
    expected = offline(lake, DAYS[1])
    assert online(location, *expected) == expected
    assert (load.rows, load.same.passed) == (CUSTOMERS, True)
    assert load.same.figures == {"compared": CUSTOMERS, "differing": 0}
    assert load.state.newest_cutoff == load.state.data_time == cutoff_of(DAYS[1])
    answer = repo.store.get_online_features(
        repo.store.get_feature_service(repo.service),
        [{"customer_id": each} for each in (*expected, "nobody")],
    ).to_dict()
    for place, name in enumerate(NAMES):
        assert answer[name] == [*(row.values[place] for row in expected.values()), None]
    two = repo.store.get_online_features(
        [f"customer_features:{NAMES[3]}", f"customer_features:{NAMES[1]}"],
        [{"customer_id": "c005"}],
    ).to_dict()
    assert two == {
        "customer_id": ["c005"],
        NAMES[3]: [expected["c005"].values[3]],
        NAMES[1]: [expected["c005"].values[1]],
    }


def test_feasts_own_way_of_writing_gives_the_same_rows(
    lake: Lake, make: Make, location: str
) -> None:
    repo = make(online=location)
    expected = offline(lake, DAYS[1])
    frame = lake.read("customer_features", DAYS[1], DAYS[1]).to_pandas()
    repo.store.write_to_online_store("customer_features", df=frame)
    assert online(location, *expected) == expected
    frame.loc[0, NAMES[1]] = None
    with pytest.raises(UserError, match=f"{NAMES[1]} has a value that is not a finite"):
        repo.store.write_to_online_store("customer_features", df=frame)


def test_each_day_brings_what_is_new(lake: Lake, make: Make, location: str) -> None:
    make(online=location).materialize(DAYS[0])
    spoil(lake, DAYS[0])
    load = make(online=location).materialize(DAYS[2])
    assert load.state.newest_cutoff == cutoff_of(DAYS[2])
    gone, between = population(DAYS[0])[0], population(DAYS[1])[0]
    assert between not in population(DAYS[2])
    rows = online(location, gone, between, population(DAYS[2])[0])
    assert [row and row.cutoff for row in rows.values()] == [
        cutoff_of(DAYS[0]), cutoff_of(DAYS[1]), cutoff_of(DAYS[2]),
    ]  # fmt: skip


def test_customers_long_gone_leave_the_store(lake: Lake, make: Make, location: str) -> None:
    repo = make(online=location, retention=timedelta(days=1))
    assert [repo.materialize(day).purged for day in DAYS[:2]] == [0, 0]
    gone, left = population(DAYS[0])[0], population(DAYS[1])[0]
    load = repo.materialize(DAYS[2])
    assert load.purged == len({*population(DAYS[0])} - {*population(DAYS[1])})
    rows = online(location, gone, left, *population(DAYS[2]))
    assert rows.pop(gone) is None
    assert rows.pop(left) == offline(lake, DAYS[1])[left]
    assert rows == offline(lake, DAYS[2])
    again = repo.materialize(DAYS[0])
    assert online(location, gone)[gone] is None
    assert (again.same.passed, again.same.figures["compared"]) == (True, 0)


def test_an_earlier_partition_does_not_bring_the_past_back(
    lake: Lake, make: Make, location: str
) -> None:
    repo = make(online=location)
    repo.materialize(DAYS[2])
    load = repo.materialize(DAYS[1])
    assert load.state.newest_cutoff == cutoff_of(DAYS[2])
    newest = offline(lake, DAYS[2])
    assert online(location, *newest) == newest
    left = population(DAYS[1])[0]
    assert online(location, left)[left] == offline(lake, DAYS[1])[left]
    assert load.same.passed
    assert load.same.figures["compared"] == 3


def test_a_partition_computed_again_is_online_again(lake: Lake, make: Make, location: str) -> None:
    repo = make(online=location)
    repo.materialize(DAYS[1])
    before = offline(lake, DAYS[1])
    write_features(lake, DAYS[1], seed=1)
    same = repo.compare(DAYS[1])
    assert not same.passed
    assert f"{CUSTOMERS} differ" in same.reason
    repo.materialize(DAYS[1])
    after = offline(lake, DAYS[1])
    assert online(location, *after) == after != before


def test_a_store_that_was_lost_starts_again(lake: Lake, make: Make, location: str) -> None:
    make(online=location).materialize(DAYS[1])
    with closing(open_writer(location)) as writer:
        writer.remove()
    assert make(online=location).newest_online() is None
    make(online=location).materialize(DAYS[2])
    newest = offline(lake, DAYS[2])
    assert online(location, *newest) == newest


def test_a_registry_that_was_lost_costs_nothing(lake: Lake, make: Make, tmp_path: Path) -> None:
    make().materialize(DAYS[0])
    repo = make(registry=str(tmp_path / "new.db"))
    assert repo.materialize(DAYS[2]).same.passed
    left = population(DAYS[1])[0]
    assert online(repo.online, left)[left] == offline(lake, DAYS[1])[left]


def test_a_store_brought_back_from_a_backup_catches_up(lake: Lake, make: Make) -> None:
    path, backup = Path(make().online), Path(make().online + ".backup")
    make().materialize(DAYS[0])
    shutil.copy(path, backup)
    make().materialize(DAYS[2])
    backup.replace(path)
    assert make().materialize(DAYS[3]).state.newest_cutoff == cutoff_of(DAYS[3])
    for day in DAYS[:3]:
        left = population(day)[0]
        assert online(str(path), left)[left] == offline(lake, day)[left]


def test_a_feature_set_that_changes_takes_over_with_its_first_load(
    lake: Lake, make: Make, location: str
) -> None:
    make(online=location).materialize(DAYS[1])
    fewer = make(FEWER, online=location)
    fewer.store.list_feature_views()
    assert fewer.newest_online() is None
    assert online(location, "c010")["c010"] == offline(lake, DAYS[1])["c010"], (
        "until then as before"
    )
    with pytest.raises(OnlineSchemaChanged):
        fewer.store.get_online_features(
            fewer.store.get_feature_service(fewer.service), [{"customer_id": "c010"}]
        )
    fewer.materialize(DAYS[2])
    values = offline(lake, DAYS[2])["c010"].values[:3]
    left = population(DAYS[1])[0]
    assert online(location, "c010", left) == {
        "c010": OnlineRow(cutoff_of(DAYS[2]), values),
        left: None,
    }


def test_data_time_is_the_wall_clocks_where_the_source_is_live(make: Make) -> None:
    later = cutoff_of(DAYS[3])
    assert make().materialize(DAYS[1], later).state.data_time == later
    assert make(live=True).materialize(DAYS[2], later).state.data_time is None


def test_a_partition_that_is_not_there_is_told(lake: Lake, make: Make) -> None:
    absent = DAYS[3] + timedelta(days=1)
    with pytest.raises(UserError, match=f"no partition {absent}"):
        make().materialize(absent)
    with pytest.raises(UserError, match="materialize customer_features"):
        FeatureRepo(
            Lake(f"{lake.root}/none"), FEATURES, make().registry, make().online
        ).materialize(DAYS[0])


def test_an_empty_day_leaves_who_is_online_as_they_were(lake: Lake, make: Make) -> None:
    repo = make()
    repo.materialize(DAYS[0])
    empty = features_of(DAYS[1]).slice(0, 0)
    lake.write("customer_features", DAYS[1], DAYS[1], empty, day_of="day")
    load = repo.materialize(DAYS[1])
    assert (load.rows, load.same.passed) == (0, True)
    assert load.state.newest_cutoff == cutoff_of(DAYS[1])
    before = offline(lake, DAYS[0])
    assert online(repo.online, *before) == before


def test_a_row_that_is_other_online_is_found(lake: Lake, make: Make) -> None:
    repo = make()
    repo.materialize(DAYS[0])
    changed = features_of(DAYS[0]).to_pylist()
    changed[7] = changed[7] | {NAMES[1]: changed[7][NAMES[1]] + 1e-9}
    rows = pa.Table.from_pylist(changed, schema=features_of(DAYS[0]).schema)
    lake.write("customer_features", DAYS[0], DAYS[0], rows, day_of="day")
    same = repo.compare(DAYS[0])
    assert not same.passed
    assert same.figures == {"compared": CUSTOMERS, "differing": 1}
    assert "c007" in same.reason
    Path(repo.online).unlink()
    assert "cannot be read" in repo.compare(DAYS[0]).reason


def test_a_null_is_not_kept_online(lake: Lake, make: Make) -> None:
    rows = features_of(DAYS[0])
    place = rows.schema.get_field_index(NAMES[1])
    holed = pa.array([None, *rows[NAMES[1]].to_pylist()[1:]], pa.float64())
    rows = rows.set_column(place, NAMES[1], holed)
    lake.write("customer_features", DAYS[0], DAYS[0], rows, day_of="day")
    with pytest.raises(UserError, match=f"{NAMES[1]} has 1 nulls"):
        make().materialize(DAYS[0])


def test_a_feature_that_is_not_the_contracts_is_refused(make: Make) -> None:
    shoe = msgspec.structs.replace(FEATURES[0], name="shoe_size")
    with pytest.raises(UserError, match="unknown feature 'shoe_size'"):
        make((*FEATURES, shoe)).store.list_feature_views()


def test_a_partition_that_lacks_a_feature_is_told(lake: Lake, make: Make) -> None:
    write_features(lake, DAYS[0], names=NAMES[:3])
    with pytest.raises(UserError, match=f"has no column {NAMES[3]}"):
        assemble_training_set(
            lake,
            ibis.duckdb.connect(),
            [DAYS[0]],
            WINDOWS,
            FEATURES,
            retrieve=make().training_rows,
        )
    with pytest.raises(UserError, match=f"has no column {NAMES[3]}"):
        make().materialize(DAYS[0])


def test_a_registry_that_cannot_be_used_is_told_without_its_password(
    make: Make, tmp_path: Path
) -> None:
    (tmp_path / "damaged.db").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match=r"check feast\.registry"):
        make(registry=str(tmp_path / "damaged.db")).store.list_entities()
    url = "postgresql://me:secret@127.0.0.1:1/none"
    with pytest.raises(UserError, match=r"check feast\.registry") as error:
        make(registry=url).store.list_entities()
    assert "secret" not in str(error.value)
    assert "secret" not in repr(make(registry=url))


@pytest.fixture
def postgres() -> Iterator[str]:
    """A Postgres schema of our own, as a URL."""
    url = os.environ.get("CHURN_TEST_POSTGRES")
    if not url:
        pytest.skip("set CHURN_TEST_POSTGRES to the URL of an empty Postgres database to run this")
    import psycopg

    name = f"feast_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}".encode())
        yield f"{url}?options=-csearch_path%3D{name}"
        connection.execute(f"DROP SCHEMA {name} CASCADE".encode())


def test_the_registry_may_be_a_database(lake: Lake, make: Make, postgres: str) -> None:
    first, then = make(registry=postgres), make(registry=postgres)
    first.materialize(DAYS[0])
    spoil(lake, DAYS[0])
    view = then.store.get_feature_view("customer_features")
    assert view.most_recent_end_time == cutoff_of(DAYS[0])
    assert then.materialize(DAYS[2]).same.passed
    left = population(DAYS[1])[0]
    assert online(then.online, left)[left] is not None, "the day between came along"
    registries: list[Any] = [first.store.registry, then.store.registry]
    for registry in registries:
        registry.write_engine.dispose()


def test_feast_is_imported_late_and_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    script = """
import os, sys, warnings
from churn_assets.contract.features import FEATURES
from churn_assets.data.feast_repo import FeatureRepo
from churn_assets.data.lake import Lake
assert "feast" not in sys.modules
before = dict(os.environ), list(warnings.filters)
FeatureRepo(Lake("lake"), FEATURES, "registry.db", "online.db").store
assert "feast" in sys.modules
assert (dict(os.environ), list(warnings.filters)) == before
assert not os.listdir(os.environ["TMPDIR"])
"""
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": os.getcwd()}
    (tmp_path / "temporary").mkdir()
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, check=True)
