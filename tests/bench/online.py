"""What loading the online store costs, beside Feast's own stores."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa

from churn_assets.contract.features import FEATURES
from churn_assets.data.feast_repo import FeatureRepo, feast_objects
from churn_assets.data.lake import DAY, Lake
from churn_assets.data.tables import TIMESTAMP
from churn_assets.data.windows import cutoff_of
from tests.bench.measuring import Figures, measure, rows

PARTITION = date(2025, 6, 30)
_METRICS = ("seconds", "peak_mb")


def run(data: Path, customers: int = 1_000_000) -> list[Figures]:
    """The lines of online.json. Redis is measured where there is a redis-server to start."""
    lake = data / f"online-{customers}"
    generate(Lake(str(lake)), customers)
    label = f"{customers // 1_000_000}M" if customers >= 1_000_000 else str(customers)
    print(f"online/load-{label}", flush=True)
    theirs = measure("online:load_with_feast", str(lake), "sqlite")
    lines = rows(
        f"online/load-{label}",
        measure("online:load", str(lake), "sqlite"),
        {"feast sqlite": theirs},
        _METRICS,
    )
    if shutil.which("redis-server") is None:
        print("  there is no redis-server to start: nothing measured with Redis")
        return lines
    with redis_server() as url:
        ours = measure("online:load", str(lake), url)
        peers = {"feast sqlite": theirs}
    with redis_server() as url:
        peers["feast redis"] = measure("online:load_with_feast", str(lake), url)
    return lines + rows(f"online/load-{label}-redis", ours, peers, _METRICS)


def generate(lake: Lake, customers: int) -> None:
    """A partition of features of so many customers, where it is not there."""
    if sum(lake.row_counts("customer_features").values()) == customers:
        return
    draw = np.random.default_rng(0)
    ids = [f"c-{number:07d}" for number in range(customers)]
    features = {
        feature.name: pa.array(draw.integers(0, 30, customers))
        if feature.dtype == "int"
        else pa.array(draw.random(customers) * 30)
        for feature in FEATURES
    }
    table = pa.table(
        {
            DAY: pa.array([PARTITION] * customers, pa.date32()),
            "customer_id": pa.array(ids),
            "cutoff": pa.array([cutoff_of(PARTITION)] * customers, TIMESTAMP),
            **features,
        }
    )
    lake.write("customer_features", PARTITION, PARTITION, table, day_of=DAY)


def load(lake: str, store: str) -> Figures:
    """Materialize the partition into an empty store of ours, and see that all of it is there."""
    with tempfile.TemporaryDirectory() as folder:
        online = f"{folder}/online.db" if store == "sqlite" else store
        repo = FeatureRepo(Lake(lake), FEATURES, f"{folder}/registry.db", online)
        assert repo.store, "Feast is imported and its registry written before the clock starts"
        start = time.perf_counter()
        loaded = repo.materialize(PARTITION)
        seconds = time.perf_counter() - start
    if not loaded.same.passed:
        raise RuntimeError(loaded.same.reason)
    return {"rows": loaded.rows, "seconds": seconds}


def load_with_feast(lake: str, store: str) -> Figures:
    """The same with Feast's own engine and stores."""
    from feast import FeatureStore, RepoConfig

    with tempfile.TemporaryDirectory() as folder:
        online = {"type": "sqlite", "path": f"{folder}/online.db"}
        if store != "sqlite":
            address = store.removeprefix("redis://").partition("/")[0]
            online = {"type": "redis", "connection_string": address}
        feast = FeatureStore(
            config=RepoConfig(
                project="churn",
                provider="local",
                entity_key_serialization_version=3,
                registry=f"{folder}/registry.db",
                offline_store={"type": "duckdb"},
                online_store=online,
            )
        )
        feast.apply(feast_objects(FEATURES, Lake(lake)))
        end = cutoff_of(PARTITION)
        start = time.perf_counter()
        feast.materialize(end - timedelta(seconds=1), end)
        seconds = time.perf_counter() - start
        asked = [{"customer_id": "c-0000000"}]
        service = feast.get_feature_service(feast.list_feature_services()[0].name)
        found = feast.get_online_features(service, asked).to_dict()
    if None in found[FEATURES[0].name]:
        raise RuntimeError("Feast does not find what it was given")
    return {"seconds": seconds}


@contextmanager
def redis_server() -> Generator[str]:
    """A Redis of its own on a free port, keeping nothing on disk."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            _wait_for(port, server)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(100):
        if server.poll() is not None:
            raise RuntimeError("redis-server did not start")
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError("redis-server does not answer")
