"""What features cost: beside the least that can be done, and beside pandas and Feast."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from datetime import date, timedelta
from pathlib import Path

import ibis
import ibis.expr.types as ir
import numpy as np
import pandas as pd
import pyarrow as pa
from ibis.backends.duckdb import Backend as DuckDBBackend

from churn_assets.contract.features import FEATURES
from churn_assets.data.engines import DuckDBSettings, open_duckdb
from churn_assets.data.feast_repo import FeatureRepo
from churn_assets.data.features import look_back_days, scan_look_back
from churn_assets.data.lake import DAY, Lake
from churn_assets.data.refresh import compute_features
from churn_assets.data.windows import Windows, cutoff_of, days_between
from tests.bench import events
from tests.bench.events import DATA_START, FIRST_CUTOFF_DAY, LAST_CUTOFF_DAY, SIZES, STEP_DAYS
from tests.bench.measuring import Figures, measure, rows

COMPUTED = "customer_features"
_WINDOWS = Windows()
_METRICS = ("seconds", "peak_mb")
_CUTOFF_DAYS = days_between(FIRST_CUTOFF_DAY, LAST_CUTOFF_DAY)[::STEP_DAYS]


def run(
    data: Path, sizes: tuple[str, ...] = ("S", "M", "L"), retrieved: int = 1_000_000
) -> list[Figures]:
    """The lines of features.json. `data` keeps the generated events from one run to the next."""
    lines: list[Figures] = []
    before: Figures | None = None
    for size in sizes:
        lake = str(data / size)
        print(f"features/{size}", flush=True)
        events.generate(Lake(lake), SIZES[size])
        runs = 3 if size in ("S", "M") else 1
        ours = measure("features:ours", lake, runs=runs)
        peers = {"scan_write": measure("features:scan_write", lake, runs=runs)}
        if size != "L":
            peers["pandas"] = measure("features:naive", lake)
        if before is not None:
            peers["ours on a tenth"] = before
        lines += rows(f"features/{size}", ours, peers, _METRICS)
        before = ours
    lake = str(data / sizes[-1])
    daily = measure("features:ours", lake, True)
    peers = {"scan_write": measure("features:scan_write", lake, True)}
    lines += rows(f"features/daily-{sizes[-1]}", daily, peers, _METRICS)
    return lines + historical(data / ("M" if "M" in sizes else sizes[-1]), retrieved)


def historical(data: Path, retrieved: int) -> list[Figures]:
    """The lines of retrieving `retrieved` rows out of the features `ours` left in a lake."""
    print("features/historical", flush=True)
    label = f"{retrieved // 1_000_000}M" if retrieved >= 1_000_000 else str(retrieved)
    found = {
        how: measure("features:retrieve", str(data), how, retrieved)
        for how in ("ours", "feast", "asof")
    }
    rows_found = {figures["rows"] for figures in found.values()}
    if rows_found != {retrieved}:
        raise RuntimeError(f"of {retrieved} rows were retrieved: {found}")
    return rows(f"features/historical-{label}", found.pop("ours"), found, _METRICS)


def ours(lake: str, daily: bool = False) -> Figures:
    """Compute and write the features, as a refresh does."""
    place, first = Lake(lake), LAST_CUTOFF_DAY if daily else FIRST_CUTOFF_DAY
    table = f"{COMPUTED}_daily" if daily else COMPUTED
    with _engine(lake) as con, _timed() as seconds:
        with place.replacing(
            table, first, LAST_CUTOFF_DAY, day_of=DAY, order_by=["customer_id"]
        ) as files:
            for part in compute_features(
                place,
                con,
                events.TABLES,
                first,
                LAST_CUTOFF_DAY,
                _WINDOWS,
                data_start=DATA_START,
                step_days=1 if daily else STEP_DAYS,
            ):
                files.append(part)
        figures = {"rows": sum(files.counts.values())}
    return figures | {"seconds": seconds()}


def scan_write(lake: str, daily: bool = False) -> Figures:
    """Look at every value the features need, and write the rows that come out: no less will do."""
    place, first = Lake(lake), LAST_CUTOFF_DAY if daily else FIRST_CUTOFF_DAY
    table = f"{COMPUTED}_daily" if daily else COMPUTED
    with _engine(lake) as con, _timed() as scanning:
        scans = scan_look_back(
            place, con, events.TABLES, first, LAST_CUTOFF_DAY, _WINDOWS, data_start=DATA_START
        )
        for scan in scans.values():
            columns = [c for c in scan.columns if not c.endswith("_id") or c == "customer_id"]
            highest: list[ir.Scalar | ir.Deferred] = [scan[name].max() for name in columns]
            scan.aggregate(highest).to_pyarrow()
    writing, written = 0.0, 0
    for day in [LAST_CUTOFF_DAY] if daily else _CUTOFF_DAYS:
        part = place.read(table, day, day)
        part = part.append_column(DAY, pa.array([day] * part.num_rows, pa.date32()))
        with _timed() as seconds:
            place.write("again", day, day, part, day_of=DAY, order_by=["customer_id"])
        writing, written = writing + seconds(), written + part.num_rows
    return {"rows": written, "seconds": scanning() + writing}


def naive(lake: str) -> Figures:
    """Read everything into pandas, and group it once a cutoff."""
    place = Lake(lake)
    with _timed() as seconds:
        frames = {}
        for table in events.TABLES:
            start = FIRST_CUTOFF_DAY - timedelta(days=look_back_days(table, _WINDOWS) - 1)
            columns = ["customer_id", "occurred_at", "ingested_at"]
            columns += ["amount_minor"] if table == "orders" else []
            scan = place.read(table, max(start, DATA_START), LAST_CUTOFF_DAY, columns=columns)
            frames[table] = scan.to_pandas()
        written = 0
        for day in _CUTOFF_DAYS:
            found = pandas_features(frames, day, _WINDOWS.activity_days)
            path = Path(lake, "pandas", f"{day}.parquet")
            path.parent.mkdir(exist_ok=True)
            found.to_parquet(path)
            written += len(found)
    return {"rows": written, "seconds": seconds()}


def pandas_features(tables: dict[str, pd.DataFrame], day: date, activity_days: int) -> pd.DataFrame:
    """The features of one cutoff, by customer: one window after the other."""
    cutoff = pd.Timestamp(cutoff_of(day))

    def window(table: str, days: int) -> pd.DataFrame:
        rows = tables[table]
        start = cutoff - pd.Timedelta(days=days)
        inside = (rows.occurred_at >= start) & (rows.occurred_at < cutoff)
        return rows[inside & (rows.ingested_at < cutoff)]

    year = window("orders", 365).groupby("customer_id")
    found = pd.DataFrame(
        {
            "last": year.occurred_at.max(),
            "amount": year.amount_minor.sum(),
            "orders": year.size(),
        }
    )
    found = found[found["last"] >= cutoff - pd.Timedelta(days=activity_days)]

    def count(table: str, days: int) -> pd.Series:
        counts = window(table, days).customer_id.value_counts()
        return counts.reindex(found.index, fill_value=0)

    return pd.DataFrame(
        {
            "total_orders_30d": count("orders", 30),
            "avg_order_value": found.amount / (found.orders * 100),
            "days_since_last_order": (cutoff - found["last"]).dt.days,
            "support_tickets_90d": count("support_tickets", 90),
            "login_frequency_7d": count("logins", 7) / 7,
        }
    )


def retrieve(lake: str, how: str, asked: int) -> Figures:
    """Retrieve the features of `asked` rows of customer and cutoff, drawn from all there are."""
    spine = _spine(Lake(lake), asked)
    ways: dict[str, Callable[[str, pa.Table], tuple[int, float]]] = {
        "ours": _with_ours,
        "feast": _with_feast,
        "asof": _with_asof,
    }
    found, seconds = ways[how](lake, spine)
    return {"rows": found, "seconds": seconds}


def _spine(lake: Lake, asked: int) -> pa.Table:
    draw = np.random.default_rng(0)
    parts = []
    for day in _CUTOFF_DAYS:
        customers = lake.read(COMPUTED, day, day, columns=["customer_id", "cutoff"])
        parts.append(customers)
    every = pa.concat_tables(parts)
    return every.take(pa.array(np.sort(draw.choice(every.num_rows, asked, replace=False))))


def _with_ours(lake: str, spine: pa.Table) -> tuple[int, float]:
    repo = FeatureRepo(
        Lake(lake), FEATURES, f"{lake}/registry.db", f"{lake}/online.db", spill=f"{lake}/spill"
    )
    assert repo.store, "Feast is imported and its registry written before the clock starts"
    with _timed() as seconds:
        found = repo.training_rows(spine)
    return _whole(found), seconds()


def _with_feast(lake: str, spine: pa.Table) -> tuple[int, float]:
    from feast import FeatureStore, RepoConfig

    from churn_assets.data.feast_repo import feast_objects

    store = FeatureStore(
        config=RepoConfig(
            project="churn",
            provider="local",
            entity_key_serialization_version=3,
            registry=f"{lake}/feast_registry.db",
            offline_store={"type": "duckdb"},
            online_store={"type": "sqlite", "path": f"{lake}/feast_online.db"},
        )
    )
    objects = feast_objects(FEATURES, Lake(lake))
    store.apply(objects)
    asked = spine.rename_columns(["customer_id", "event_timestamp"]).to_pandas()
    with _timed() as seconds:
        found = store.get_historical_features(asked, objects[-1]).to_arrow()
    return _whole(found), seconds()


def _with_asof(lake: str, spine: pa.Table) -> tuple[int, float]:
    con = ibis.duckdb.connect().con
    con.register("spine", spine)
    names = ", ".join(feature.name for feature in FEATURES)
    with _timed() as seconds:
        found = con.sql(
            f"SELECT spine.*, {names} FROM spine ASOF LEFT JOIN "
            f"read_parquet('{lake}/{COMPUTED}/*/*.parquet') AS f "
            "ON spine.customer_id = f.customer_id AND spine.cutoff >= f.cutoff"
        ).to_arrow_table()
    return _whole(found), seconds()


def _whole(found: pa.Table) -> int:
    """How many rows have all their features."""
    return found.select([feature.name for feature in FEATURES]).drop_null().num_rows


def _engine(lake: str) -> AbstractContextManager[DuckDBBackend]:
    """With the limits it has by default."""
    return open_duckdb(DuckDBSettings(), f"{lake}/spill")


@contextmanager
def _timed() -> Generator[Callable[[], float]]:
    start = time.perf_counter()
    end: list[float] = []
    yield lambda: end[0]
    end.append(time.perf_counter() - start)
