"""The treatment report as an asset: what it says while there is nothing to say, and the series."""

from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import dagster as dg
import msgspec
import numpy as np
import pytest

from churn_assets.data.offers import offers_table, record_offers
from churn_assets.data.sources import ShopSourceConfig
from churn_assets.data.tables import RAW_TABLES
from churn_assets.definitions import defs
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project, RecordIOManager
from churn_assets.defs.treatment import treatment_report
from churn_assets.home import Home
from churn_assets.monitoring.metric import read_metrics
from churn_assets.monitoring.treatment import TreatmentReport
from churn_assets.simulator import Offer, ShopParams

NEWEST = date(2024, 3, 1)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(Home(tmp_path), SETTINGS)
    for table in SETTINGS.raw_tables:
        empty = RAW_TABLES[table].schema.empty_table()
        project.lake.write(table, NEWEST, NEWEST, empty, day_of="occurred_at")
    return project


def test_without_a_prediction_it_is_insufficient_and_does_not_pass(project: Project) -> None:
    resources = {"project": project, "io_manager": RecordIOManager(project.home.records)}
    done = dg.materialize([treatment_report], resources=resources)
    assert done.success
    (check,) = done.get_asset_check_evaluations()
    assert (check.check_name, check.passed) == ("holdout_intact", False)
    assert check.severity == dg.AssetCheckSeverity.WARN
    assert check.metadata["verdict"].value == "insufficient"
    kept = (project.home.records / "treatment_report" / "latest.json").read_bytes()
    report = msgspec.json.decode(kept, type=TreatmentReport)
    assert (report.verdict, report.effect, report.threshold) == (
        "insufficient",
        None,
        SETTINGS.costs.threshold,
    )
    metrics = read_metrics(project.home.metrics)
    assert [(metric.name, metric.verdict) for metric in metrics] == [
        ("offer_effect", "insufficient"),
        ("holdout_balance", "insufficient"),
    ]
    assert all(metric.until == report.until for metric in metrics)


def test_the_shop_and_its_oracle_hear_of_the_offers_in_the_lake(tmp_path: Path) -> None:
    start = SETTINGS.calendar.start
    settings = msgspec.structs.replace(SETTINGS, source=ShopSourceConfig(ShopParams(customers=500)))
    project = Project(Home(tmp_path), settings)
    ids = project.source.read("customers", start, start).events["customer_id"].to_pylist()
    oracle = project.oracle()
    assert oracle is not None
    served = datetime(start.year, start.month, start.day, 12, tzinfo=UTC) + timedelta(days=40)
    cutoff = served + timedelta(hours=12)
    days = served.date() + timedelta(days=1), served.date() + timedelta(days=30)

    def seen() -> tuple[np.ndarray, int]:
        return oracle(ids, cutoff, 30), project.source.read("orders", *days).events.num_rows

    before = seen()
    record_offers(project.lake, offers_table([Offer(customer, served) for customer in ids]))
    after = seen()
    assert (after[0] <= before[0] + 1e-9).all()
    assert (after[0] < before[0] - 1e-9).any()
    assert after[1] > before[1]


def test_it_is_made_of_the_log_and_the_labels() -> None:
    layer = defs.resolve_job_def("treatment").asset_layer
    assert layer.get(dg.AssetKey("treatment_report")).parent_keys == {
        dg.AssetKey("prediction_log"),
        dg.AssetKey("churn_labels"),
    }
