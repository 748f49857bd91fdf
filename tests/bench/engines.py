"""DuckDB and Spark on the same features and machine: what a switch of engine costs or gains."""

from __future__ import annotations

import resource
import time
from pathlib import Path

from churn_assets.data.engines import DuckDBSettings, Engine, SparkSettings, open_engine
from churn_assets.data.lake import DAY, Lake
from churn_assets.data.refresh import compute_features
from churn_assets.data.windows import Windows
from tests.bench import events
from tests.bench.events import DATA_START, FIRST_CUTOFF_DAY, LAST_CUTOFF_DAY, SIZES, STEP_DAYS
from tests.bench.measuring import Figures, measure, rows

_WINDOWS = Windows()
_METRICS = ("seconds", "cpu_seconds", "peak_mb")
DAILY_TOO = True


def run(data: Path, sizes: tuple[str, ...] = ("S", "M"), master: str = "local[*]") -> list[Figures]:
    """The lines of engines.json: all cutoffs of each size, and one day of the last."""
    lines: list[Figures] = []
    for size in sizes:
        lake = data / size
        events.generate(Lake(str(lake)), SIZES[size])
        for daily in (False, True) if DAILY_TOO and size == sizes[-1] else (False,):
            case = f"engines/{'daily-' if daily else ''}{size}"
            print(case, flush=True)
            duckdb = measure("engines:compute", str(lake), "duckdb", master, daily)
            spark = measure("engines:compute", str(lake), "spark", master, daily)
            require_same(Lake(str(lake)), daily)
            lines += rows(case, duckdb, {"spark": spark}, _METRICS)
            waiting = spark["start_seconds"]
            line = {"case": case, "metric": "start_seconds", "ours": duckdb["start_seconds"]}
            lines.append(line | {"peer": "spark", "theirs": waiting, "ratio": None, "runs": 1})
    return lines


def compute(lake: str, engine: Engine, master: str, daily: bool) -> Figures:
    """Compute and write features as a refresh does, with the start and the end of the engine."""
    place, first = Lake(lake), LAST_CUTOFF_DAY if daily else FIRST_CUTOFF_DAY
    start, before = time.perf_counter(), time.process_time()
    with open_engine(engine, DuckDBSettings(), SparkSettings(master), f"{lake}/spill") as con:
        started = time.perf_counter() - start
        with place.replacing(
            _table(engine, daily), first, LAST_CUTOFF_DAY, day_of=DAY, order_by=["customer_id"]
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
    seconds = time.perf_counter() - start
    # Spark's Java is a process of its own, and has ended.
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    peak = sum(one.ru_maxrss for one in used) / 1024
    after = sum(one.ru_utime + one.ru_stime for one in used)
    return {
        "rows": sum(files.counts.values()),
        "seconds": seconds,
        # Unlike seconds, hardly longer on a machine that has other work.
        "cpu_seconds": round(after - before, 2),
        "start_seconds": round(started, 3),
        "peak_mb": round(peak),
    }


def _table(engine: Engine, daily: bool) -> str:
    return f"features_by_{engine}{'_daily' if daily else ''}"


def require_same(lake: Lake, daily: bool) -> None:
    """What is measured side by side must be the same work, to the last bit."""
    one, other = (_table(engine, daily) for engine in ("duckdb", "spark"))
    days = lake.days(one)
    if days != lake.days(other) or lake.content_hashes(one, days) != lake.content_hashes(
        other, days
    ):
        raise RuntimeError(f"{one} and {other} in {lake.root} are not the same")
