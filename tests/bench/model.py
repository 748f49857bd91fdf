"""How good the model is: beside one that sees far more, and beside recency alone in a real shop."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from unittest import mock

import duckdb
import ibis
import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa

from churn_assets.contract.features import features_for
from churn_assets.data.lake import Lake
from churn_assets.data.refresh import refresh_features, refresh_labels, refresh_raw
from churn_assets.data.sources import ShopSourceConfig, open_source
from churn_assets.data.training_set import assemble_training_set
from churn_assets.data.windows import cutoff_of, days_between, label_partition
from churn_assets.modeling.candidates import limited_threads
from churn_assets.modeling.metrics import auc
from churn_assets.modeling.onnx_export import export_onnx, predict_onnx
from churn_assets.modeling.rows import RECENCY, feature_matrix, outcomes, rows_of
from churn_assets.modeling.split import Split, temporal_split
from churn_assets.modeling.training import TrainedModel, fit
from churn_assets.settings import DEFAULT_CONFIG, Settings, load_settings
from churn_assets.simulator.params import ShopParams
from churn_assets.simulator.shop import Shop
from tests.bench.measuring import Figures, measure, row

RETAIL = DEFAULT_CONFIG.with_name("online_retail.yaml")
HORIZONS = (30, 60, 90)
HELD_OUT = "held_out.parquet"
TIMES_THE_CUSTOMERS = 10


def run(data: Path, customers: int = 12_000, days: int = 730) -> list[Figures]:
    """The lines of model.json. `data` keeps the events and the held-out customers."""
    folder = str(data / f"model-{customers}-{days}")
    print("model/shop", flush=True)
    ours = measure("model:ours", folder, customers, days)
    theirs = measure("model:reference", folder, customers * TIMES_THE_CUSTOMERS, days)
    lines = [
        row("model/shop", "auc", ours, "reference", theirs),
        row("model/shop", "auc", ours, "oracle", {"auc": ours["oracle"]}),
        row("model/shop", "auc", ours, "recency", {"auc": ours["recency"]}),
    ]
    path = os.environ.get("CHURN_ONLINE_RETAIL")
    if path is None:
        print("set CHURN_ONLINE_RETAIL to the path of online_retail.csv.gz for the real shop")
        return lines
    print("model/online-retail", flush=True)
    for horizon in HORIZONS:
        found = measure("model:real_shop", str(data / f"retail-{horizon}"), path, horizon)
        theirs = {"auc": found["recency"]}
        lines.append(row(f"model/online-retail-{horizon}", "auc", found, "recency", theirs))
    return lines


def ours(folder: str, customers: int, days: int) -> Figures:
    """The product's way from events to the served graph, judged on the newest labelled cutoff."""
    settings, shop = _shop(customers)
    begun = time.perf_counter()
    last = settings.calendar.start + timedelta(days=days - 1)
    lake = _with_events(Lake(folder), settings, last)
    split = temporal_split(_labelled_days(settings, last), settings.windows.horizon_days)
    frame = _frame(lake, settings, split.days)
    model, p = _judged(frame, split, settings)
    test = rows_of(frame, [split.test])
    test[["customer_id", "churned"]].to_parquet(Path(folder, HELD_OUT))
    true_p = Shop(shop, settings.calendar.start).churn_probability(
        test["customer_id"].tolist(), cutoff_of(split.test), split.horizon_days
    )
    return {
        "auc": auc(outcomes(test), p),
        "oracle": auc(outcomes(test), true_p),
        "recency": auc(outcomes(test), test[RECENCY]),
        "family": model.family,
        "seconds": time.perf_counter() - begun,
    }


def reference(folder: str, customers: int, days: int) -> Figures:
    """A model of fifty more event features, trained on another shop with many more customers.

    It is trained on the same cutoffs and judged on the same held-out customers.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    settings, params = _shop(customers)
    begun = time.perf_counter()
    start = settings.calendar.start
    last = start + timedelta(days=days - 1)
    split = temporal_split(_labelled_days(settings, last), settings.windows.horizon_days)
    shop = Shop(replace(params, seed=params.seed + 1), start)
    own = Lake(folder)
    own_tables, their_tables = {}, {}
    for table, look_back in (("orders", days), ("support_tickets", 365), ("logins", 90)):
        first = split.train[0] - timedelta(days=look_back)
        own_tables[table] = own.read(table, max(first, start), last)
        their_tables[table] = shop.events(table, max(first, start), last)
    train = pd.concat(
        [_rich(their_tables, day, settings) for day in (*split.train, split.calibration)]
    )
    test = _rich(own_tables, split.test, settings).set_index("customer_id")
    held_out = pd.read_parquet(Path(folder, HELD_OUT)).set_index("customer_id")
    test = test.loc[held_out.index]
    if not (test["churned"] == held_out["churned"]).all():
        raise RuntimeError("the reference sees other outcomes than we do")
    names = [name for name in test.columns if name != "churned"]
    model = HistGradientBoostingClassifier(
        max_iter=300, learning_rate=0.06, max_leaf_nodes=31, min_samples_leaf=100,
        l2_regularization=1.0, early_stopping=False, random_state=1,
    )  # fmt: skip
    with limited_threads(len(train)):
        model.fit(train[names].to_numpy(dtype=np.float32), train["churned"].to_numpy())
        p = model.predict_proba(test[names].to_numpy(dtype=np.float32))[:, 1]
    return {
        "auc": auc(held_out["churned"].to_numpy(), p),
        "features": names,
        "rows": len(train),
        "seconds": time.perf_counter() - begun,
    }


def real_shop(folder: str, path: str, horizon: int, cutoffs: int = 5) -> Figures:
    """The product on Online Retail at several cutoffs, each with only what was known by then."""
    with mock.patch.dict(os.environ, {"CHURN_DATA": path}):
        settings = load_settings(RETAIL)
    windows = replace(settings.windows, horizon_days=horizon)
    settings = msgspec.structs.replace(settings, windows=windows)
    begun = time.perf_counter()
    assert settings.calendar.end is not None
    lake = _with_events(Lake(folder), settings, settings.calendar.end)
    days = _labelled_days(settings, settings.calendar.end)
    # The oldest judged day leaves a training and a calibration cutoff before it.
    room = (days[-1] - days[0]).days - 2 * horizon
    step = max(1, min(15, room // (cutoffs - 1)))
    judged = [days[-1] - timedelta(days=step * back) for back in range(cutoffs)]
    splits = [
        temporal_split(
            [day for day in days if day <= newest], horizon, spacing_days=10, max_train_cutoffs=12
        )
        for newest in judged
        if (newest - days[0]).days >= 2 * horizon
    ]
    wanted = sorted({day for split in splits for day in split.days})
    frame = _frame(lake, settings, wanted)
    found, alone = [], []
    for split in splits:
        _, p = _judged(frame, split, settings)
        test = rows_of(frame, [split.test])
        found.append(auc(outcomes(test), p))
        alone.append(auc(outcomes(test), test[RECENCY]))
        print(f"{split.test}: {found[-1]:.4f}, recency {alone[-1]:.4f}", flush=True)
    return {
        "auc": float(np.mean(found)),
        "recency": float(np.mean(alone)),
        "cutoffs": len(splits),
        "won": sum(f > a for f, a in zip(found, alone, strict=True)),
        "seconds": time.perf_counter() - begun,
    }


def _shop(customers: int) -> tuple[Settings, ShopParams]:
    """The settings of the built-in shop with so many customers."""
    settings = load_settings(DEFAULT_CONFIG)
    assert isinstance(settings.source, ShopSourceConfig)
    shop = replace(settings.source.shop, customers=customers)
    source = msgspec.structs.replace(settings.source, shop=shop)
    return msgspec.structs.replace(settings, source=source), shop


def _judged(
    frame: pd.DataFrame, split: Split, settings: Settings
) -> tuple[TrainedModel, np.ndarray]:
    names = [f.name for f in features_for(settings.raw_tables)]
    model = fit(frame, split, names, seed=settings.seed, policy=settings.training)
    held_out = feature_matrix(rows_of(frame, [split.test]), names)
    return model, predict_onnx(export_onnx(model.estimator, len(names)), held_out)


def _labelled_days(settings: Settings, last: date) -> list[date]:
    horizon = timedelta(days=settings.windows.horizon_days)
    return days_between(settings.earliest_feature_day, last - horizon)


def _with_events(lake: Lake, settings: Settings, last: date) -> Lake:
    source = open_source(settings.source, settings.calendar.start)
    for table in settings.raw_tables:
        if last not in lake.days(table):
            refresh_raw(lake, source, table, settings.calendar.start, last, now=datetime.now(UTC))
    return lake


def _frame(lake: Lake, settings: Settings, days: tuple[date, ...] | list[date]) -> pd.DataFrame:
    tables, windows = settings.raw_tables, settings.windows
    features = features_for(tables)
    con = ibis.duckdb.connect()
    for day in days:
        if day not in lake.days("customer_features"):
            refresh_features(
                lake, con, features, tables, day, day, windows, data_start=settings.calendar.start
            )
        matured = label_partition(day, windows.horizon_days)
        if matured not in lake.days("churn_labels"):
            refresh_labels(lake, con, matured, matured, windows)
    return assemble_training_set(lake, con, days, windows, features).table.to_pandas()


_COUNTED = {
    "orders": (7, 14, 30, 60, 90, 180, 365),
    "logins": (1, 3, 7, 14, 30, 45, 60, 90),
    "support_tickets": (7, 14, 30, 60, 90, 180, 365),
}


def _rich(tables: dict[str, pa.Table], day: date, settings: Settings) -> pd.DataFrame:
    """The customers of a cutoff with the five features, fifty more, and their outcome."""
    con, windows = duckdb.connect(), settings.windows
    cutoff = f"TIMESTAMPTZ '{cutoff_of(day).isoformat()}'"
    for name, table in tables.items():
        con.register(name, table)
        con.execute(
            f"CREATE VIEW {name}_seen AS SELECT *, "
            f"(epoch_us({cutoff}) - epoch_us(occurred_at)) / 86400e6 AS age "
            f"FROM {name} WHERE occurred_at < {cutoff}"
        )
    counts = {
        table: ", ".join(f"count(*) FILTER (age <= {d}) AS {table}_{d}" for d in days)
        for table, days in _COUNTED.items()
    }
    sums = ", ".join(
        f"coalesce(sum(amount_minor) FILTER (age <= {d}), 0) AS spent_{d}"
        for d in _COUNTED["orders"]
    )
    con.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
    con.execute(
        f"""
        CREATE TABLE o AS
        WITH gaps AS (
            SELECT *, lead(age) OVER w - age AS gap, row_number() OVER w AS place
            FROM orders_seen WINDOW w AS (PARTITION BY customer_id ORDER BY age)
        )
        SELECT customer_id, {counts["orders"]}, {sums},
            min(age) AS last, max(age) AS tenure,
            max(age) FILTER (place = 2) AS second, max(age) FILTER (place = 3) AS third,
            max(gap) FILTER (place = 1) AS last_gap, avg(gap) AS mean_gap,
            stddev_pop(gap) AS spread_gap, max(gap) AS longest_gap, median(gap) AS median_gap,
            min(age) / avg(gap) AS overdue, min(age) / max(gap) AS overdue_most,
            max(amount_minor) FILTER (age <= 365) AS largest,
            min(amount_minor) FILTER (age <= 365) AS smallest,
            stddev_pop(amount_minor) FILTER (age <= 365) AS spread_amount,
            avg(amount_minor) FILTER (age <= 365) AS mean_amount,
            max(amount_minor) FILTER (place = 1) AS newest_amount,
            avg((dayofweek(occurred_at) IN (0, 6))::INT) AS weekends,
            avg(hour(occurred_at)) AS hours
        FROM gaps GROUP BY customer_id HAVING min(age) <= {windows.activity_days}
        """
    )
    con.execute(
        f"""
        CREATE TABLE l AS
        SELECT customer_id, {counts["logins"]}, min(age) AS last_login,
            count(*) FILTER (age <= o.last) AS logins_since_order,
            count(DISTINCT floor(age)) FILTER (age <= 30) AS login_days
        FROM logins_seen JOIN (SELECT customer_id, last FROM o) AS o USING (customer_id)
        GROUP BY customer_id
        """
    )
    con.execute(
        f"""
        CREATE TABLE t AS SELECT customer_id, {counts["support_tickets"]}, min(age) AS last_ticket
        FROM support_tickets_seen GROUP BY customer_id
        """
    )
    found: pd.DataFrame = con.execute(
        f"""
        SELECT *, floor(last) AS whole_days, logins_7 / 7.0 AS login_frequency,
            orders_30 / orders_90 AS trend_orders, logins_14 / logins_60 AS trend_logins,
            customer_id NOT IN (
                SELECT customer_id FROM orders WHERE occurred_at >= {cutoff}
                AND occurred_at < {cutoff} + INTERVAL {windows.horizon_days} DAY
            ) AS churned
        FROM o LEFT JOIN l USING (customer_id) LEFT JOIN t USING (customer_id)
        """
    ).df()
    return found
