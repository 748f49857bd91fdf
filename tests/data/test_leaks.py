"""Features that saw past their cutoff are found before anything is trained on them."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import ibis
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from brute_force import DAY, FIRST, Event, raw_table

from churn_assets.contract.features import FEATURES
from churn_assets.data.features import customer_features
from churn_assets.data.lake import Lake
from churn_assets.data.leaks import check_no_event_after_cutoff, check_training_rows
from churn_assets.data.tables import TIMESTAMP
from churn_assets.data.windows import Windows, midnight

WINDOWS = Windows(activity_days=10, horizon_days=5)
START, LAST = FIRST - timedelta(days=100), FIRST + timedelta(days=6)
TABLES = ("orders", "support_tickets", "logins")
DAYS = [FIRST, FIRST + timedelta(days=2), FIRST + timedelta(days=4)]
NAMES = [feature.name for feature in FEATURES]

# Ibis asks DuckDB for a table's schema by a name that DuckDB renamed.
pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")


def happened(amount: int) -> list[Event]:
    """Half past midnight of every day, so that an hour into the future shows at every cutoff."""
    return [
        Event(f"c{n}", midnight(START) + day * DAY + DAY / 48, None, amount + 7 * day)
        for n in range(6)
        for day in range(n, (LAST - START).days + 1, n + 1)
    ]


def features_of(lake: Lake, day: date, hours_ahead: int = 0) -> pa.Table:
    """The features of `day`, were every event known and placed some hours before it happened."""
    return computed(lake.root, day, hours_ahead)


@functools.cache
def computed(root: str, day: date, hours_ahead: int) -> pa.Table:
    lake = Lake(root)
    con = ibis.duckdb.connect()
    early = pa.scalar(timedelta(hours=hours_ahead), pa.duration("us"))
    scans = {}
    for table in TABLES:
        events = lake.read(table)
        moved = pc.subtract(events["occurred_at"], early).cast(TIMESTAMP)
        place = events.schema.get_field_index("occurred_at")
        moved_events = events.set_column(place, "occurred_at", moved).append_column(
            "day", pc.cast(moved, pa.date32())
        )
        scans[table] = con.create_table(table, ibis.memtable(moved_events), temp=True)
    found = customer_features(scans, day, day, WINDOWS).to_pyarrow()
    con.disconnect()
    return found.drop(["day"]).sort_by("customer_id")


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    lake = Lake(str(tmp_path_factory.mktemp("lake")))
    for number, table in enumerate(TABLES, start=1):
        lake.write(
            table, START, LAST, raw_table(table, happened(100 * number)), day_of="occurred_at"
        )
    return lake


def leaky(lake: Lake, feature: str, day: date) -> pa.Table:
    """The features of `day`, one of them computed an hour into the future."""
    honest, future = features_of(lake, day), features_of(lake, day, hours_ahead=1)
    future = future.filter(pc.is_in(future["customer_id"], value_set=honest["customer_id"]))
    assert not future[feature].equals(honest[feature]), "the leak changes nothing"
    place = honest.schema.get_field_index(feature)
    return honest.set_column(place, feature, future[feature])


def judge(lake: Lake, rows: pa.Table, days=DAYS, **options):
    return check_training_rows(lake, rows, TABLES, days, WINDOWS, data_start=START, **options)


def test_honest_rows_pass(lake: Lake) -> None:
    rows = pa.concat_tables([features_of(lake, day) for day in DAYS])
    found = judge(lake, rows.append_column("churned", [[True] * rows.num_rows]))
    assert found.passed, found.reason
    assert found.figures == {"cutoffs": 3, "customers_compared": rows.num_rows}


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("feature", NAMES)
def test_an_hour_of_the_future_is_found_in_any_feature_at_any_cutoff(
    lake: Lake, feature: str, place: int
) -> None:
    parts = [features_of(lake, day) for day in DAYS]
    parts[place] = leaky(lake, feature, DAYS[place])
    found = judge(lake, pa.concat_tables(parts))
    assert not found.passed
    assert f"{feature} differs" in found.reason
    assert f"{DAYS[place] + timedelta(days=1)}" in found.reason


def test_of_many_customers_those_who_could_show_a_leak_are_looked_at(lake: Lake) -> None:
    parts = [features_of(lake, DAYS[0]), leaky(lake, "avg_order_value", DAYS[1])]
    found = judge(lake, pa.concat_tables(parts), DAYS[:2], max_customers=2)
    assert not found.passed
    honest = judge(lake, features_of(lake, DAYS[0]), DAYS[:1], max_customers=2)
    assert honest.passed
    assert honest.figures["customers_compared"] == 2


def test_a_sampled_partition_is_judged_by_its_sample(lake: Lake, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("churn_assets.data.leaks.MAX_CUSTOMERS", 3)
    other = Lake(str(tmp_path))
    for table in TABLES:
        other.write(table, START, LAST, lake.read(table), day_of="occurred_at")
    for rows, passed in ((features_of(lake, FIRST), True), (leaky(lake, NAMES[1], FIRST), False)):
        dated = rows.append_column("day", pa.array([FIRST] * rows.num_rows, pa.date32()))
        other.write("customer_features", FIRST, FIRST, dated, day_of="day")
        found = check_no_event_after_cutoff(other, TABLES, FIRST, WINDOWS, data_start=START)
        assert found.passed is passed
        assert found.figures["customers_compared"] == 3


def test_a_lost_customer_is_found(lake: Lake) -> None:
    found = judge(lake, features_of(lake, FIRST).slice(1), [FIRST])
    assert not found.passed
    assert "1 customers are missing" in found.reason


@pytest.mark.parametrize(
    ("days", "rows", "reason"),
    [
        ([], [], "no cutoff"),
        ([FIRST], [], "there are no rows of"),
        ([FIRST], [FIRST, DAYS[1]], "cannot be compared"),
        ([FIRST, DAYS[1]], [FIRST], "there are no rows of"),
    ],
)
def test_nothing_to_compare_does_not_pass(lake: Lake, days, rows, reason: str) -> None:
    empty = features_of(lake, FIRST).slice(0, 0)
    found = judge(lake, pa.concat_tables([empty, *(features_of(lake, d) for d in rows)]), days)
    assert not found.passed
    assert reason in found.reason


# Materializes a few tables, then plants an hour of the future into every feature of the partition
# of one training cutoff, and asks for a model.
PLANTING = """
import json
from churn_assets.home import Home
home = Home.from_environment()
home.prepare()
import ibis, pyarrow as pa, pyarrow.compute as pc
from datetime import timedelta
from dagster import DagsterInstance
from churn_assets.contract.features import FEATURES
from churn_assets.data.features import customer_features
from churn_assets.data.tables import TIMESTAMP
from churn_assets.definitions import defs
from churn_assets.defs import launch
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.modeling.split import temporal_split

project = Project.of(home)
lake, windows, told = project.lake, SETTINGS.windows, {}

def ahead(day):
    con = ibis.duckdb.connect()
    scans = {}
    for table in ("orders", "support_tickets", "logins"):
        events = lake.read(table, last=day + timedelta(days=1))
        hour = pa.scalar(timedelta(hours=1), pa.duration("us"))
        moved = pc.subtract(events["occurred_at"], hour).cast(TIMESTAMP)
        events = events.drop(["occurred_at", "ingested_at"])
        events = events.append_column("occurred_at", moved).append_column("ingested_at", moved)
        events = events.append_column("day", pc.cast(moved, pa.date32()))
        scans[table] = con.create_table(table, ibis.memtable(events), temp=True)
    return customer_features(scans, day, day, windows).to_pyarrow()

with DagsterInstance.get() as instance:
    launch.claim_lake(project)
    launcher = launch.Launcher(defs, instance, project, lambda: False)
    launch._bring_in_data(launcher)
    split = temporal_split(project.labelled_days(), windows.horizon_days, max_train_cutoffs=3)
    day = split.train[1]
    honest = lake.read("customer_features", day, day)
    future = ahead(day).drop(["day"])
    future = honest.select(["customer_id"]).join(future, "customer_id").sort_by("customer_id")
    rows = honest
    for place, feature in enumerate(honest.column_names):
        if feature in {known.name for known in FEATURES}:
            values = pc.coalesce(future[feature], honest[feature])
            told[feature] = not values.equals(honest[feature])
            rows = rows.set_column(place, feature, values)
    rows = rows.append_column("day", pa.array([day] * rows.num_rows, pa.date32()))
    lake.write("customer_features", day, day, rows, day_of="day", order_by=["customer_id"])
    outcome = launcher.run("training", "training", ["training_set", "trained_model"])
    trained = instance.get_latest_materialization_event(launch.dg.AssetKey("trained_model"))
told = {"changed": told, "refused": outcome.refused_by, "trained": trained is not None}
(home.root / "told.json").write_text(json.dumps(told))
"""

CONFIG = """
source:
  kind: tables
  tables:
    orders:
      from: orders.csv
      columns: {order_id: id, customer_id: customer, occurred_at: at, amount: amount}
    support_tickets:
      from: support_tickets.csv
      columns: {ticket_id: id, customer_id: customer, occurred_at: at}
    logins:
      from: logins.csv
      columns: {login_id: id, customer_id: customer, occurred_at: at}
    customers: {derive_from: orders}
calendar: {start: 2024-01-01, end: 2024-06-08}
windows: {activity_days: 60, horizon_days: 10}
training: {max_train_cutoffs: 3}
data_gate: {min_rows: 50, max_feature_auc: 0.9999}
"""


def write_tables(folder: Path) -> None:
    """Forty customers, each with events every few days, half past midnight; some stop coming."""
    for table in TABLES:
        lines = ["id,customer,at,amount"]
        for n in range(40):
            last = 100 + n if n % 3 == 0 else 200
            for day in range(n % 7, last, n % 7 + 1):
                moment = f"{date(2024, 1, 1) + timedelta(days=day)}T00:30:00Z"
                lines.append(f"{n}-{day},c{n:02},{moment},{n + day}")
        (folder / f"{table}.csv").write_text("\n".join(lines) + "\n")


def test_a_planted_leak_stops_the_run_before_training(tmp_path: Path) -> None:
    config = tmp_path / "churn.yaml"
    config.write_text(CONFIG)
    write_tables(tmp_path)
    environment = os.environ | {"CHURN_CONFIG": str(config), "CHURN_HOME": str(tmp_path / "home")}
    environment.pop("PYTHONWARNINGS", None)
    run = subprocess.run(
        [sys.executable, "-c", PLANTING], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    told = json.loads((tmp_path / "home" / "told.json").read_text())
    assert told["changed"] == dict.fromkeys(NAMES, True), "the leak changes nothing"
    for feature in NAMES:
        assert f"{feature} differs" in told["refused"]["training_set.known_at_cutoff"]
    assert not told["trained"]
