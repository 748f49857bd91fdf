"""The drift report as an asset: of the version in Production, whatever was trained since."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import dagster as dg
import msgspec
import numpy as np
import pyarrow as pa
import pytest
from command import write_config
from conftest import SHOP
from registered import NOW, Shop

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.data.prediction_log import PREDICTION_LOG, SCHEMA
from churn_assets.data.windows import cutoff_of
from churn_assets.defs import monitoring
from churn_assets.defs.health import health_page, page_of
from churn_assets.defs.monitoring import drift_report
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project, RecordIOManager, read_record
from churn_assets.home import Home
from churn_assets.lifecycle.history import Evidence
from churn_assets.lifecycle.registry import rollback_plan, transition
from churn_assets.monitoring.alert_outbox import Outbox
from churn_assets.monitoring.alerts import Alert
from churn_assets.monitoring.drift_watch import DriftRecord
from churn_assets.monitoring.metric import read_metrics
from churn_assets.monitoring.rollback import RollbackDecision

pytestmark = pytest.mark.filterwarnings(
    # MLflow's way of asking its own database.
    "ignore:The ``noload`` loader strategy",
)
TODAY = datetime(2024, 7, 9, 4, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Generator[Shop]:
    folder = tmp_path_factory.mktemp("drift")
    made = Shop(Home(folder / "home"), write_config(folder / "shop.yaml", SHOP), 0)
    clock = folder / "clock"
    clock.write_text(TODAY.isoformat())
    with mock.patch.dict(os.environ, {"CHURN_CLOCK": str(clock)}):
        made.home.prepare()
        yield made


def materialized(
    shop: Shop, draw: Literal["always", "on_drift", "never"] = "always"
) -> tuple[DriftRecord, dict[str, Any], dict[str, bool]]:
    """The record of a report, what the asset shows, and which checks passed."""
    project = Project(shop.home, SETTINGS)
    settings = msgspec.structs.replace(SETTINGS, drift=replace(SETTINGS.drift, draw=draw))
    with (
        warnings.catch_warnings(),
        mock.patch.object(monitoring, "SETTINGS", settings),
        dg.DagsterInstance.ephemeral() as instance,
    ):
        # SQLAlchemy's and Evidently's, about how they are written.
        warnings.simplefilter("ignore")
        done = dg.materialize(
            [drift_report],
            instance=instance,
            resources={"project": project, "io_manager": RecordIOManager(shop.home.records)},
        )
    (shown,) = done.asset_materializations_for_node("drift_report")
    stored = read_record(shop.home.records, "drift_report", done.run_id)
    return (
        msgspec.json.decode(stored, type=DriftRecord),
        {name: value.value for name, value in shown.metadata.items()},
        {check.check_name: check.passed for check in done.get_asset_check_evaluations()},
    )


def values(count: int, *, low: int = 0) -> dict[str, Any]:
    rows = np.random.default_rng(3).integers(low, 30 + low, (count, len(FEATURE_NAMES)))
    return {
        "customer_id": [f"c-{n}" for n in range(count)],
        **{name: rows[:, n].astype(float) for n, name in enumerate(FEATURE_NAMES)},
    }


def promote(shop: Shop, version: str) -> None:
    transition(
        shop.client(), "churn", version, "Production", who="ada", why="the first one",
        evidence=Evidence("bootstrap", {"auc": 0.9}), now=NOW, plan=rollback_plan(shop.read()),
    )  # fmt: skip


def assert_undrawn(found: tuple[DriftRecord, dict[str, Any], Any], drawn: DriftRecord) -> None:
    """The same is found without a page of Evidently's, and none is pointed to."""
    record, shown, _ = found
    assert (record.page, "evidently" in shown) == ("", False)
    assert (record.verdict, record.drifted) == (drawn.verdict, drawn.drifted)


def assert_on_the_health_page(shop: Shop, promoted: str) -> None:
    """The asset shows this home's metrics, its promotion, a decision and what is open."""
    project = Project(shop.home, SETTINGS)
    alert = Alert("1", "k", "critical", "requests drift", "drift", "A person looks.", TODAY)
    Outbox(shop.home.alerts, SETTINGS.alerts).raise_alert(alert)
    folder = shop.home.records / "rollback_decision"
    folder.mkdir(parents=True)
    for verdict in ("keep", "rollback"):
        decision = RollbackDecision(
            verdict, verdict, promoted, None, (f"because {verdict}",), "none", False, TODAY
        )
        (folder / f"{verdict}.json").write_bytes(msgspec.json.encode(decision))
    with warnings.catch_warnings(), dg.DagsterInstance.ephemeral() as instance:
        warnings.simplefilter("ignore")
        done = dg.materialize([health_page], instance=instance, resources={"project": project})
    (shown,) = done.asset_materializations_for_node("health_page")
    assert (shown.metadata["marks"].value, shown.metadata["open_alerts"].value) == (2, 1)
    assert shown.metadata["page"].value == project.report_url(page_of(shop.home))
    html = page_of(shop.home).read_text()
    for part in (
        "critical since 2024-07-09 04:00 UTC: requests drift. A person looks.",
        f"version {promoted} to Production",
        "because rollback",
        "ks/avg_order_value",
        f"drift/{TODAY.date() - DAY}.html",
    ):
        assert part in html
    assert "because keep" not in html


def test_from_an_empty_home_to_drifted_requests(shop: Shop) -> None:
    record, shown, passed = materialized(shop)
    assert (record.verdict, record.source, shown["version"]) == ("insufficient", "none", "none")
    assert passed == {"no_drift": False, "prediction_mean_stable": False}
    assert "Drift: insufficient" in Path(record.page).read_text()
    assert read_metrics(shop.home.metrics) == []

    # Version 2 is newer, backwards, and not in Production.
    good, _bad = shop.register(good=True), shop.register(good=False)
    promote(shop, good)
    lake = Project(shop.home, SETTINGS).lake
    newest = TODAY.date() - DAY
    cutoffs = pa.array([cutoff_of(newest)] * 600, pa.timestamp("us", "UTC"))
    days = pa.array([newest] * 600, pa.date32())
    table = pa.table({**values(600), "cutoff": cutoffs, "day": days})
    lake.write("customer_features", newest, newest, table, day_of="day")
    record, shown, passed = materialized(shop)
    assert (record.source, record.version, record.verdict) == ("customers", good, "ok")
    assert record.reference == shop.releases[good].manifest.data_hash
    assert record.prediction.verdict == "ok"
    assert passed == {"no_drift": True, "prediction_mean_stable": True}
    assert shown["evidently"].startswith("http://")
    assert_undrawn(materialized(shop, "on_drift"), record)

    for back in range(1, 8):
        at = TODAY - back * DAY
        given = values(400, low=12)
        told = {
            "key": [f"{back}-{n}" for n in range(400)],
            "request_id": [str(n) for n in range(400)],
            "at": [at] * 400,
            "probability": [0.97] * 400,
            "arm": ["champion"] * 400,
            "model_version": [good] * 400,
            "release_id": [record.release_id] * 400,
            "latency_us": [500] * 400,
            **given,
        }
        rows = pa.table(
            {f.name: pa.array(told.get(f.name, [None] * 400), f.type, safe=False) for f in SCHEMA}
        )
        lake.write(PREDICTION_LOG, at.date(), at.date(), rows, day_of="at")
    record, _, passed = materialized(shop)
    assert (record.source, record.verdict, record.customers) == ("requests", "drift", 400)
    assert record.drifted == FEATURE_NAMES
    assert passed == {"no_drift": False, "prediction_mean_stable": False}
    last = {metric.name: metric for metric in read_metrics(shop.home.metrics, since=record.until)}
    assert last["prediction_shift"].verdict == "alert"
    assert last["ks/avg_order_value"].release_id == shop.releases[good].manifest.release_id
    assert "evidently" in materialized(shop, "on_drift")[1]
    assert_undrawn(materialized(shop, "never"), record)
    assert list(shop.home.evidently.glob("*/snapshots/*.json"))
    assert_on_the_health_page(shop, good)
