"""From a version on trial to Production by what live requests showed, as a person does it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import dagster as dg
import msgspec
import numpy as np
import pyarrow as pa
import pytest
from command import RAW, write_config
from conftest import SHOP
from mlflow import MlflowClient
from registered import CUSTOMER, NOW, Shop

from churn_assets.contract.clock import CLOCK_VARIABLE, set_clock
from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.contract.release import read_release
from churn_assets.contract.trial import assignment
from churn_assets.data.lake import Lake, open_lake
from churn_assets.data.log_sources import open_log_source
from churn_assets.data.prediction_log import ingest
from churn_assets.data.windows import cutoff_of, label_partition, midnight
from churn_assets.defs import jobs
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.performance import performance_report
from churn_assets.defs.registry import (
    Change,
    change_what_serves,
    production_release,
    promotion_decision,
)
from churn_assets.defs.resources import Project, RecordIOManager, read_record
from churn_assets.defs.sensors import trial_judged
from churn_assets.defs.serving import churn_bento
from churn_assets.defs.trial import trial_report, tried_beside_incumbent
from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.lifecycle.history import Evidence, Move, Step, TrialRun, trial_figures
from churn_assets.lifecycle.pointer import Current, read_current
from churn_assets.lifecycle.records import ProductionRelease
from churn_assets.lifecycle.registry import POLICY, Registry, rollback_plan, transition
from churn_assets.lifecycle.serving import PredictionLog, ask, free_port, serve
from churn_assets.modeling.bootstrap import Interval
from churn_assets.monitoring.metric import read_metrics
from churn_assets.monitoring.performance import PerformanceRecord
from churn_assets.monitoring.trial import TrialReport, last_report

pytestmark = pytest.mark.filterwarnings(
    # MLflow's way of asking its own database.
    "ignore:The ``noload`` loader strategy",
)
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Generator[Shop]:
    folder = tmp_path_factory.mktemp("trial")
    made = Shop(Home(folder / "home"), write_config(folder / "shop.yaml", SHOP), free_port())
    with mock.patch.dict(os.environ):
        made.home.prepare()
        yield made


def current(shop: Shop) -> Current:
    found = read_current(shop.home.current)
    assert found is not None
    return found


def customers(count: int) -> list[dict[str, Any]]:
    rows = np.random.default_rng(9).integers(0, 30, (count, len(FEATURE_NAMES)))
    return [
        {"customer_id": f"c-{n}"}
        | {
            name: float(value) if type(CUSTOMER[name]) is float else int(value)
            for name, value in zip(FEATURE_NAMES, row, strict=True)
        }
        for n, row in enumerate(rows)
    ]


def data_up_to_now(lake: Lake, today: date) -> None:
    """A source whose data time is the clock's, so that requests are of its newest days."""
    for table in RAW:
        row = pa.table({"day": pa.array([today - DAY], pa.date32()), "customer_id": ["c-1"]})
        lake.write(table, today - DAY, today - DAY, row, day_of="day")


def labels_of(lake: Lake, rows: list[dict[str, Any]], today: date) -> None:
    """Who churned, by the rule the good model has learned; today's midnight may come meanwhile."""
    for feature_day in (today, today + DAY):
        day = label_partition(feature_day, 30)
        table = pa.table(
            {
                "day": pa.array([day] * len(rows), pa.date32()),
                "customer_id": [row["customer_id"] for row in rows],
                "cutoff": pa.array([cutoff_of(feature_day)] * len(rows), pa.timestamp("us", "UTC")),
                "churned": [row[FEATURE_NAMES[2]] > row[FEATURE_NAMES[0]] for row in rows],
            }
        )
        lake.write("churn_labels", day, day, table, day_of="day")


def promote_first(shop: Shop) -> None:
    transition(
        shop.client(),
        "churn",
        "1",
        "Production",
        who="ada",
        why="the first one",
        evidence=Evidence("bootstrap", {"auc": 0.9}),
        now=NOW,
        plan=rollback_plan(shop.read()),
    )


def materialized(project: Project, *assets: Any, **config: Any) -> dg.ExecuteInProcessResult:
    """A run of `assets`, with the configuration of the first."""
    name = assets[0].key.path[-1]
    with warnings.catch_warnings(), dg.DagsterInstance.ephemeral() as instance:
        # SQLAlchemy's, about how MLflow's first import of its store is written.
        warnings.simplefilter("ignore")
        return dg.materialize(
            list(assets),
            instance=instance,
            resources={
                "project": project,
                "io_manager": RecordIOManager(project.home.records),
            },
            run_config={"ops": {name: {"config": config}}} if config else None,
        )


def test_from_a_trial_to_production(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = msgspec.structs.replace(
        SETTINGS,
        promotion=replace(SETTINGS.promotion, evidence="trial"),
        trial=replace(SETTINGS.trial, min_rows=500),
    )
    for module in ("registry", "trial"):
        monkeypatch.setattr(f"churn_assets.defs.{module}.SETTINGS", settings)
    project = Project(shop.home, settings)
    assert (shop.register(good=False), shop.register(good=True)) == ("1", "2")
    promote_first(shop)
    untried = tried_beside_incumbent(project, shop.read(), "2")
    assert "version 2 has not been on trial beside it" in str(untried)

    given = {"what": "start_trial", "who": "ada", "why": "better", "version": "2", "share": 0.4}
    materialized(project, production_release, churn_bento, **given)
    trial = shop.read().trial
    assert trial is not None
    assert (trial.challenger, trial.champion, trial.share, trial.shadow) == ("2", "1", 0.4, True)
    both = current(shop)
    assert (both.model_version, both.release_id) == ("1", trial.release_id)

    rows, today, arm_of = customers(900), datetime.now(UTC).date(), assignment(trial.id, 0.4)
    log = str(shop.home.prediction_log)
    with serve(both.bento, bentoml_home=shop.home.bentoml, log=PredictionLog(log)) as url:
        for row in rows[:60]:
            answer = ask(url, row).json()
            assert answer["model_version"] == {"champion": "1"}.get(arm_of(row["customer_id"]), "2")
        ask(url, {"rows": rows}, path="/predict_batch")
    lake = open_lake(str(shop.home.lake))
    assert sum(ingest(open_log_source(log), lake).added.values()) == 960
    data_up_to_now(lake, today)
    not_yet = tried_beside_incumbent(project, shop.read(), "2")
    assert "0 outcomes are known, 500 are needed" in str(not_yet)
    labels_of(lake, rows, today)

    judged = materialized(project, trial_report)
    assert judged.get_asset_check_evaluations()[0].passed
    report = last_report(project.home.records, trial.id)
    assert report is not None
    assert (report.verdict, report.rows) == ("challenger better", 900)
    assert report.counts["repeated"] == 60
    materialized(project, promotion_decision, who="ada", why="the trial")
    materialized(project, production_release)
    registry = shop.read()
    step = registry.history[-1]
    assert (registry.production, registry.trial) == ("2", None)
    assert (step.evidence.kind, step.evidence.passed, step.evidence.rows) == ("trial", True, 900)
    assert (step.evidence.incumbent, step.plan.to) == ("1", "1")
    assert step.evidence.figures["verdict"] == "challenger better"
    assert step.evidence.figures["log_loss_difference_at_most"] < 0
    record = read_record(project.home.records, "production_release")
    after = msgspec.json.decode(record, type=ProductionRelease)
    assert (after.version, after.trial, after.step.number) == ("2", None, step.number)
    assert read_release(Path(after.release_dir)).manifest.challenger is None
    status = shop.churn("trial", "status")
    assert f"{trial.id}: version 2 beside version 1" in status.out
    assert "  challenger better: its log loss is " in status.out

    # A month later, the version that was on trial is judged by what it scored then, too.
    later = today + 32 * DAY
    monkeypatch.setenv(CLOCK_VARIABLE, str(shop.home.root / "clock"))
    set_clock(shop.home.root / "clock", midnight(later))
    data_up_to_now(lake, later)
    performed = materialized(project, performance_report)
    assert all(check.passed for check in performed.get_asset_check_evaluations())
    kept = read_record(project.home.records, "performance_report")
    record = msgspec.json.decode(kept, type=PerformanceRecord)
    assert (record.version, record.rows, record.verdict) == ("2", 900, "ok")
    assert record.promised_auc == Interval(0.95, None, None)
    assert record.metric("accuracy").verdict == "ok"
    assert {line.release_id: line.outcomes for line in record.releases} == {both.release_id: 900}
    assert {metric.name for metric in read_metrics(shop.home.metrics)} >= {
        "accuracy",
        "matured_auc",
        "days_without_labels",
    }
    (shown,) = performed.asset_materializations_for_node("performance_report")
    assert "data:image/png" in str(shown.metadata["over_time"].value)


TRIAL = TrialRun(
    "trial-3-beside-2", "3", "2", 0.1, True, "v2-both", NOW, None,
    Step(
        2,
        (Move("3", "Staging", "Staging"),),
        {"challenger": "3"},
        "ada",
        "so",
        NOW,
        Evidence(
            "trial_begins", trial_figures("trial-3-beside-2", 0.1, True, "v2-both"), incumbent="2"
        ),
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("verdict", "ended", "says"),
    [
        ("stopped by a guard rail", False, None),
        ("worse", False, None),
        ("challenger better", False, "trial-3-beside-2: challenger better"),
        ("not yet", False, "trial-3-beside-2: not yet"),
        ("worse", True, "is not going on"),
    ],
)
def test_a_harmful_trial_is_stopped_by_a_run_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verdict: Any, ended: bool, says: str | None
) -> None:
    report = TrialReport(
        trial=TRIAL.id, champion="2", challenger="3", verdict=verdict, reason="it fails", rows=0,
        figures={}, counts={}, guards=(), looks=(), policy={}, at=NOW,
    )  # fmt: skip

    @dg.asset(name="trial_report")
    def told() -> dg.MaterializeResult:
        return dg.MaterializeResult(value=report)

    project = Project(Home(tmp_path), SETTINGS)
    seen = Registry("churn", {}, {}, () if ended else (TRIAL.step,))
    monkeypatch.setattr("churn_assets.defs.sensors.read_registry", lambda *_: seen)
    monkeypatch.setattr(Project, "mlflow_client", lambda _: None)
    with dg.DagsterInstance.ephemeral() as instance:
        io_manager = RecordIOManager(project.home.records)
        dg.materialize([told], instance=instance, resources={"io_manager": io_manager})
        context = dg.build_sensor_context(instance=instance, resources={"project": project})
        looked = trial_judged.evaluate_tick(context)
    if says is not None:
        assert not looked.run_requests
        assert says in str(looked.skip_message)
        return
    assert looked.run_requests
    request = looked.run_requests[0]
    assert request.run_key == f"stop-{TRIAL.id}"
    assert jobs.stop_trial.name == "stop_trial"
    change = request.run_config["ops"]["production_release"]["config"]
    assert (change["what"], change["who"]) == ("stop_trial", POLICY)
    assert "it fails" in change["why"]


@pytest.mark.parametrize(
    ("change", "who"),
    [
        (Change(what="stop_trial", who=POLICY, why="worse"), POLICY),
        (Change(what="stop_trial", who="ada", why="enough"), "ada"),
    ],
)
def test_a_policy_may_stop_a_trial(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: Change, who: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        "churn_assets.defs.registry.stop_trial", lambda *_, who, **__: asked.append(who)
    )
    change_what_serves(MlflowClient("sqlite://"), change, tmp_path, NOW)
    assert asked == [who]


@pytest.mark.parametrize("what", ["start_trial", "rollback"])
def test_a_policy_may_do_nothing_else_alone(tmp_path: Path, what: Any) -> None:
    change = Change(what=what, who=POLICY, why="so", version="2")
    with pytest.raises(UserError, match="is not a person"):
        change_what_serves(MlflowClient("sqlite://"), change, tmp_path, NOW)
