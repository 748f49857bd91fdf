"""One customer at one cutoff has one set of features: in the lake, online, and by definition."""

from __future__ import annotations

import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

import ibis
import numpy as np
import pyarrow as pa
import pytest
from brute_force import Event, features_at, raw_table
from online_cases import RedisServer
from serving_cases import SERVICE, Model

from churn_assets.contract.features import FEATURE_NAMES, FEATURES
from churn_assets.contract.online import open_reader
from churn_assets.contract.release import Release
from churn_assets.data.feast_repo import FeatureRepo
from churn_assets.data.lake import Lake
from churn_assets.data.refresh import refresh_features
from churn_assets.data.windows import Windows, cutoff_of, days_between
from churn_assets.lifecycle.serving import OnlineStore, ask, serve
from churn_assets.simulator.params import ShopParams
from churn_assets.simulator.shop import Shop

START, FIRST, LAST = date(2024, 1, 1), date(2024, 3, 31), date(2024, 4, 24)
TABLES = ("orders", "support_tickets", "logins")
WINDOWS = Windows()
DAY = timedelta(days=1)
TICK = timedelta(microseconds=1)

History = dict[str, dict[str, list[Event]]]


@dataclass(frozen=True)
class World:
    """Raw events by customer and table, and the lake they were computed in."""

    history: History
    lake: Lake


def shop_events() -> Generator[tuple[str, Event]]:
    shop = Shop(ShopParams(customers=150, seed=11), START)
    for table in TABLES:
        for row in shop.events(table, START, LAST).to_pylist():
            ingested, amount = row.get("ingested_at"), row.get("amount_minor", 0)
            yield table, Event(row["customer_id"], row["occurred_at"], ingested, amount)


def events_at_edges(rng: random.Random) -> Generator[tuple[str, Event]]:
    """Customers whose events enter or leave a window at a cutoff, or a tick beside it, or late."""
    cutoffs = [cutoff_of(day) for day in days_between(FIRST, LAST)]
    earliest = cutoff_of(START) - DAY
    for number in range(60):
        for table in TABLES:
            for _ in range(rng.randint(0 if table != "orders" else 1, 6)):
                moment = rng.choice(cutoffs) - rng.choice([0, 1, 7, 30, 90]) * DAY
                moment += rng.choice([-1, 0, 1]) * TICK
                delay = rng.choice([None, None, 0 * DAY, TICK, DAY, 3 * DAY])
                ingested = None if delay is None else moment + delay
                if earliest <= moment < cutoffs[-1]:
                    event = Event(f"edge-{number}", moment, ingested, rng.randint(0, 10**6))
                    yield table, event


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    history: History = defaultdict(lambda: {table: [] for table in TABLES})
    events: dict[str, list[Event]] = {table: [] for table in TABLES}
    for table, event in [*shop_events(), *events_at_edges(random.Random(5))]:
        history[event.customer_id][table].append(event)
        events[table].append(event)
    lake = Lake(str(tmp_path_factory.mktemp("lake")))
    for table in TABLES:
        lake.write(table, START, LAST, raw_table(table, events[table]), day_of="occurred_at")
    con = ibis.duckdb.connect()
    refresh_features(lake, con, FEATURES, TABLES, FIRST, LAST, WINDOWS, data_start=START)
    con.disconnect()
    return World(dict(history), lake)


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def location(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Generator[str]:
    folder = tmp_path_factory.mktemp("online")
    if request.param == "sqlite":
        yield str(folder / "online.db")
        return
    if not shutil.which("redis-server"):
        pytest.skip("install redis-server to run this")
    server = RedisServer(folder)
    server.start()
    yield server.url
    server.kill()


@pytest.fixture(scope="module")
def repo(world: World, location: str, tmp_path_factory: pytest.TempPathFactory) -> FeatureRepo:
    """With the first day online. Feast changes the warning filters; that ends with the fixture."""
    registry = str(tmp_path_factory.mktemp("feast") / "registry.db")
    repo = FeatureRepo(world.lake, FEATURES, registry, location, live=False)
    repo.materialize(FIRST)
    return repo


def in_the_lake(lake: Lake, day: date) -> dict[str, tuple]:
    rows: pa.Table = lake.read("customer_features", day, day)
    return {r["customer_id"]: tuple(r[name] for name in FEATURE_NAMES) for r in rows.to_pylist()}


def by_definition(world: World, customer_id: str, cutoff: datetime) -> tuple | None:
    found = features_at(world.history[customer_id], cutoff, WINDOWS).get(customer_id)
    return tuple(found[name] for name in FEATURE_NAMES) if found else None


def test_offline_online_and_by_definition_are_the_same_and_so_is_the_answer(
    world: World, repo: FeatureRepo, release: Release, model: Model
) -> None:
    location = repo.online
    rng = random.Random(7 if location.startswith("redis") else 8)
    days = sorted(rng.sample(days_between(FIRST, LAST), 5))
    asked: Counter[int] = Counter()
    with serve(SERVICE, release.directory, online=OnlineStore(location)) as url:
        for day in days:
            cutoff = cutoff_of(day)
            repo.materialize(day)
            offline = in_the_lake(world.lake, day)
            customers = rng.sample(sorted(world.history), 60)
            with closing(open_reader(location)) as reader:
                online = dict(zip(customers, reader.read(customers), strict=True))
            batch = ask(
                url, {"rows": [{"customer_id": each} for each in customers]}, path="/predict_batch"
            ).json()["predictions"]
            for customer_id, in_batch in zip(customers, batch, strict=True):
                defined = by_definition(world, customer_id, cutoff)
                assert offline.get(customer_id) == defined
                row = online[customer_id]
                answer = ask(url, {"customer_id": customer_id})
                asked[answer.status] += 1
                if row is None:
                    assert defined is None
                    assert answer.status == in_batch["error"]["status"] == 404
                    continue
                # Who has left the population keeps their last row, until it is too old.
                assert row.cutoff == cutoff if defined else row.cutoff < cutoff
                assert row.values == by_definition(world, customer_id, row.cutoff)
                if cutoff - row.cutoff > timedelta(hours=36):
                    assert answer.status == in_batch["error"]["status"] == 409
                    continue
                assert answer.status == 200
                features = np.array([row.values], dtype=np.float32)
                for got in (answer.json(), in_batch):
                    assert datetime.fromisoformat(got["cutoff"]) == row.cutoff
                    assert got["churn_probability"] == pytest.approx(
                        float(model.predict(features)[0]), abs=6e-5
                    )
    assert asked[200] > 150
    assert asked[404]
    assert asked[409]


def test_the_events_lie_where_windows_open_and_close(world: World) -> None:
    edges = [event for each, tables in world.history.items() if each.startswith("edge")
             for events in tables.values() for event in events]  # fmt: skip
    midnights = [event for event in edges if event.occurred_at == event.occurred_at.astimezone(UTC)
                 .replace(hour=0, minute=0, second=0, microsecond=0)]  # fmt: skip
    assert len(edges) > 200
    assert len(midnights) > 50
