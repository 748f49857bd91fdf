"""Late and corrected events through the schedule and `make run`, on Dagster's real instance."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

CONFIG = """
source:
  kind: tables
  tables:
    orders:
      from: orders.csv
      columns:
        order_id: number
        customer_id: customer
        occurred_at: placed
        ingested_at: updated
        amount: value
    customers: {derive_from: orders}
calendar: {start: 2024-01-01, end: 2024-02-20}
windows: {activity_days: 20, horizon_days: 5}
"""

RUN = """
import json, sys
from pathlib import Path
from datetime import UTC, datetime
from churn_assets.home import Home
home = Home.from_environment()
home.prepare()
import dagster as dg
from churn_assets.definitions import defs
from churn_assets.defs import launch
from churn_assets.defs.resources import Project
from churn_assets.defs.schedules import daily_refresh_schedule

project = Project.of(home)
seen = {}

def state():
    found = {}
    for table in ("orders", "customers", "customer_features", "churn_labels"):
        days = project.lake.days(table)
        for day, content in project.lake.content_hashes(table, days).items():
            found[f"{table} {day}"] = content
    return found

def note(name, **more):
    now = state()
    changed = sorted(key for key in now if seen.get("state", now).get(key) != now[key])
    print("\\nSAID", json.dumps({"name": name, "changed": changed, **more}), flush=True)
    seen["state"] = now

def change(old, new):
    path = Path(sys.argv[1])
    path.write_text(path.read_text().replace(old, new) if old else path.read_text() + new)

def bring_in(name):
    launcher = launch.Launcher(defs, instance, project, lambda: False)
    launch._bring_in_data(launcher)
    note(name, stages=sorted(launcher.seconds))

def tick():
    context = dg.build_schedule_context(
        instance=instance,
        scheduled_execution_time=datetime(2026, 1, 1, 2, tzinfo=UTC),
        resources={"project": Project.of(home)},
    )
    answer = daily_refresh_schedule(context)
    return answer if isinstance(answer, list) else [answer]

with dg.DagsterInstance.get() as instance:
    bring_in("first")
    bring_in("again")
    change("", "late,c1,2024-01-20T10:00:00Z,2024-02-10T09:00:00Z,5.00\\n")
    requests = tick()
    same = [request.run_key for request in tick()] == [request.run_key for request in requests]
    for request in requests:
        result = defs.resolve_job_def("daily_refresh").execute_in_process(
            instance=instance,
            tags=request.tags,
            asset_selection=list(request.asset_selection),
        )
        assert result.success
    note(
        "late",
        same=same,
        asked=[[key.path[-1] for key in request.asset_selection] for request in requests],
        why=sorted({request.tags["churn/late"] for request in requests}),
        then=[type(answer).__name__ for answer in tick()],
    )
    change("2024-02-10T09:00:00Z,5.00", "2024-02-15T09:00:00Z,7.00")
    bring_in("corrected")
    bring_in("corrected again")
"""


def orders() -> str:
    draw, lines = random.Random(3), ["number,customer,placed,updated,value"]
    for day in range(51):
        for customer in range(20):
            if customer == day % 20 or draw.random() < 0.1:
                moment = datetime(2024, 1, 1, 8, tzinfo=UTC) + timedelta(days=day, minutes=customer)
                known = moment + timedelta(minutes=1)
                lines.append(
                    f"o{len(lines)},c{customer},{moment.isoformat()},{known.isoformat()},"
                    f"{draw.randrange(1, 90)}.50"
                )
    return "\n".join(lines) + "\n"


def test_late_and_corrected_events_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "orders.csv").write_text(orders())
    config = tmp_path / "churn.yaml"
    config.write_text(CONFIG)
    environment = os.environ | {
        "CHURN_CONFIG": str(config),
        "CHURN_HOME": str(tmp_path / "home"),
    }
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "orders.csv")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    said = [line.removeprefix("SAID ") for line in run.stdout.splitlines() if "SAID" in line]
    first, again, late, corrected, corrected_again = map(json.loads, said)
    assert first["stages"] == ["features", "labels", "online", "raw"]
    assert (again["changed"], again["stages"]) == ([], [])

    assert late["same"]
    assert late["asked"] == [["orders"], ["customer_features", "online_features"], ["churn_labels"]]
    assert late["why"] == ["orders of 2024-01-20: 1 late"]
    assert late["then"] == ["SkipReason"]
    raw, features, labels = by_table(late["changed"])
    assert raw == [date(2024, 1, 20)]
    assert features[0] == date(2024, 2, 10)
    assert features[-1] == date(2024, 2, 20)
    assert labels == [] or date(2024, 2, 4) <= labels[0]

    assert "orders of 2024-01-20: 1 corrected" in run.stdout
    assert corrected["stages"] == ["features", "labels", "online", "raw"]
    raw, features, labels = by_table(corrected["changed"])
    assert (raw, labels) == ([date(2024, 1, 20)], [])
    assert features[0] == date(2024, 2, 15)
    assert features[-1] == date(2024, 2, 20)
    assert (corrected_again["changed"], corrected_again["stages"]) == ([], [])


def by_table(changed: list[str]) -> list[list[date]]:
    found: dict[str, list[date]] = {"orders": [], "customer_features": [], "churn_labels": []}
    for key in changed:
        table, day = key.split()
        found[table].append(date.fromisoformat(day))
    return list(found.values())
