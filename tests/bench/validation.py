"""Ten million feature rows: judged in the engine, in memory column by column, and by pandera."""

from __future__ import annotations

import time
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa

from churn_assets.contract.features import FEATURE_NAMES, FEATURES
from churn_assets.data.engines import DuckDBSettings, open_duckdb
from churn_assets.data.lake import DAY, Lake
from churn_assets.data.pushdown import validate_features_in_engine
from churn_assets.data.schema import features_schema
from churn_assets.data.tables import TIMESTAMP
from churn_assets.data.validation import pandera_schema, validate_features
from churn_assets.data.windows import cutoff_of, days_between
from tests.bench.measuring import Figures, measure, rows

_FIRST = date(2025, 1, 1)
_DAYS = 10
_METRICS = ("seconds", "peak_mb")
_FAULTY = 0.001
"""Share of the rows that are at fault, in the table that has some."""


def run(data: Path, judged: int = 10_000_000) -> list[Figures]:
    """The lines of validation.json. `data` keeps the generated rows from one run to the next."""
    lines: list[Figures] = []
    size = f"{judged // 1_000_000}M" if judged >= 1_000_000 else str(judged)
    for name, faulty in (("clean", 0.0), ("faulty", _FAULTY)):
        lake = data / f"validation-{name}-{judged}"
        generate(Lake(str(lake)), judged, faulty)
        print(f"validation/{size}-{name}", flush=True)
        ours = measure("validation:pushed_down", str(lake), runs=3)
        peers = {"in memory": measure("validation:in_memory", str(lake))}
        if not faulty:
            # Its verdicts on single rows take a table of failure cases that grows with them.
            peers["pandera"] = measure("validation:by_pandera", str(lake))
        refused = {figures["refused"] for figures in (ours, *peers.values())}
        if len(refused) != 1 or bool(faulty) != bool(refused.pop()):
            raise RuntimeError(f"the verdicts on {lake} differ: {ours}, {peers}")
        lines += rows(f"validation/{size}-{name}", ours, peers, _METRICS)
    return lines


def generate(lake: Lake, judged: int, faulty: float) -> None:
    """Write `judged` feature rows of some days, where they are not there already."""
    days = days_between(_FIRST, _FIRST + timedelta(days=_DAYS - 1))
    if lake.days("customer_features") == days:
        return
    a_day = judged // _DAYS
    ids = pa.array([f"c-{number:08d}" for number in range(a_day)], pa.string())
    for number, day in enumerate(days):
        draw = np.random.default_rng([7, number])
        orders = draw.poisson(2.0, a_day)
        orders[draw.random(a_day) < faulty] = -1
        values = {
            "customer_id": ids,
            "cutoff": pa.array([cutoff_of(day)] * a_day, TIMESTAMP),
            "total_orders_30d": pa.array(orders, pa.int64()),
            "avg_order_value": pa.array(np.round(draw.lognormal(4, 0.5, a_day), 2)),
            "days_since_last_order": pa.array(draw.integers(0, 90, a_day), pa.int64()),
            "support_tickets_90d": pa.array(draw.poisson(0.2, a_day), pa.int64()),
            "login_frequency_7d": pa.array(draw.poisson(3.0, a_day) / 7),
            DAY: pa.array([day] * a_day, pa.date32()),
        }
        lake.write("customer_features", day, day, pa.table(values), day_of=DAY)


def pushed_down(lake: str) -> Figures:
    """As churn_assets does with more rows than the settings want in memory."""
    with open_duckdb(DuckDBSettings(), f"{lake}/spill") as con:
        start = time.perf_counter()
        stored = Lake(lake).scan(con, "customer_features").drop(DAY)
        found = validate_features_in_engine(stored, FEATURE_NAMES)
        seconds = time.perf_counter() - start
    return {"rows": found.rows, "refused": found.quarantined.num_rows, "seconds": seconds}


def in_memory(lake: str) -> Figures:
    """As churn_assets does with fewer: whole columns first, pandera on cutoffs with a fault."""
    start = time.perf_counter()
    stored = Lake(lake).read("customer_features")
    found = validate_features(stored, FEATURE_NAMES)
    seconds = time.perf_counter() - start
    return {"rows": stored.num_rows, "refused": found.quarantined.num_rows, "seconds": seconds}


def by_pandera(lake: str) -> Figures:
    """Every row by pandera, lazily; that no key repeats is not among what it looks at."""
    import pandas as pd

    schema = pandera_schema(features_schema(FEATURES))
    start = time.perf_counter()
    frame = (
        Lake(lake)
        .read("customer_features")
        .to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    )
    schema.validate(frame, lazy=True)
    return {"rows": len(frame), "refused": 0, "seconds": time.perf_counter() - start}
