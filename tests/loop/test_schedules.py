"""Schedules and sensors: which days a refresh asks for, and when a bento is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec
import pyarrow as pa
import pytest

from churn_assets.definitions import defs
from churn_assets.defs.launch import LAUNCHER, close_dead_server_runs
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project, RecordIOManager
from churn_assets.defs.schedules import (
    SCHEDULES,
    daily_refresh_schedule,
    days_to_refresh,
    refresh_request,
)
from churn_assets.defs.sensors import SENSORS, mlflow_failed_runs, promotion_decided
from churn_assets.home import Home
from churn_assets.lifecycle.experiments import ensure_experiment
from churn_assets.lifecycle.history import Evidence, Move, RollbackPlan, Step
from churn_assets.lifecycle.promotion import PromotionDecision
from churn_assets.lifecycle.registry import POLICY, Registry

NEWEST = date(2024, 3, 10)
NIGHT = datetime(2024, 3, 15, 2, 0, tzinfo=UTC)
REFRESHED = (*SETTINGS.raw_tables, "customer_features", "churn_labels")


@pytest.mark.parametrize(
    ("now", "end", "one", "expected"),
    [
        (NIGHT, None, False, (date(2024, 3, 11), date(2024, 3, 14))),
        (NIGHT, None, True, (date(2024, 3, 11), date(2024, 3, 11))),
        (NIGHT, date(2024, 3, 12), False, (date(2024, 3, 11), date(2024, 3, 12))),
        (NIGHT, NEWEST, False, None),
        # The day after the newest is complete at its last midnight, not a moment before.
        (datetime(2024, 3, 12, tzinfo=UTC), None, False, (date(2024, 3, 11), date(2024, 3, 11))),
        (datetime(2024, 3, 11, 23, 59, 59, tzinfo=UTC), None, False, None),
        (datetime.fromisoformat("2024-03-12T01:30:00+02:00"), None, False, None),
    ],
)
def test_a_refresh_asks_for_the_days_that_are_complete_and_missing(
    now: datetime, end: date | None, one: bool, expected: tuple[date, date] | None
) -> None:
    assert days_to_refresh(NEWEST, now, end, one_at_a_time=one) == expected


def test_many_days_are_one_run() -> None:
    request = refresh_request(date(2024, 3, 11), date(2024, 3, 14))
    assert request.partition_key is None
    assert request.tags == {
        "dagster/asset_partition_range_start": "2024-03-11",
        "dagster/asset_partition_range_end": "2024-03-14",
    }


def test_a_code_server_takes_every_definition() -> None:
    """It refuses a job that is called like an asset, which no other process minds."""
    defs.get_repository_def().load_all_definitions()


def test_everything_is_on() -> None:
    assert {s.name for s in SCHEDULES} == {
        "daily_refresh_schedule",
        "training_schedule",
        "drift_schedule",
        "prediction_log_schedule",
        "performance_schedule",
        "serving_health_schedule",
        "trial_schedule",
        "decisions_schedule",
        "health_schedule",
        "treatment_schedule",
        "clean_archive_schedule",
    }
    assert all(s.default_status is dg.DefaultScheduleStatus.RUNNING for s in SCHEDULES)
    assert all(s.default_status is dg.DefaultSensorStatus.RUNNING for s in SENSORS)
    crons = {s.name: s.cron_schedule for s in SCHEDULES}
    assert crons["training_schedule"] == "0 6 * * 1"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(Home(tmp_path), SETTINGS)


@pytest.fixture
def instance() -> Generator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


def fill(project: Project, newest: dict[str, date]) -> None:
    """Empty partitions of the last days, up to a day of its own for each table."""
    for table, last in newest.items():
        project.lake.write(
            table,
            last - timedelta(days=1),
            last,
            pa.table({"cutoff": pa.array([], pa.timestamp("us", "UTC"))}),
            day_of="cutoff",
        )


def tick(project: Project, instance: dg.DagsterInstance, now: datetime = NIGHT) -> Any:
    context = dg.build_schedule_context(
        instance=instance, scheduled_execution_time=now, resources={"project": project}
    )
    with pytest.MonkeyPatch.context() as patch:
        # The partitions of these tests are empty: every event of the shop would be a late one.
        patch.setattr("churn_assets.defs.schedules.late_requests", lambda *_: [])
        asked = daily_refresh_schedule(context)
    if isinstance(asked, list):
        (asked,) = asked
    return asked


def test_without_a_history_there_is_nothing_to_refresh(
    project: Project, instance: dg.DagsterInstance
) -> None:
    skipped = tick(project, instance)
    assert isinstance(skipped, dg.SkipReason)
    assert "make run" in str(skipped.skip_message)


def test_the_shop_produces_its_next_day(project: Project, instance: dg.DagsterInstance) -> None:
    fill(project, dict.fromkeys(REFRESHED, NEWEST))
    assert tick(project, instance).partition_key == "2024-03-11"
    assert isinstance(tick(project, instance, datetime(2024, 3, 11, 2, tzinfo=UTC)), dg.SkipReason)


@pytest.mark.parametrize("behind", REFRESHED)
def test_a_day_that_was_left_half_done_comes_again(
    behind: str, project: Project, instance: dg.DagsterInstance
) -> None:
    fill(project, dict.fromkeys(REFRESHED, NEWEST) | {behind: NEWEST - timedelta(days=1)})
    assert tick(project, instance).partition_key == NEWEST.isoformat()


@pytest.mark.parametrize(
    ("status", "skips"),
    [(dg.DagsterRunStatus.STARTED, True), (dg.DagsterRunStatus.FAILURE, False)],
)
def test_one_refresh_at_a_time(
    status: dg.DagsterRunStatus, skips: bool, project: Project, instance: dg.DagsterInstance
) -> None:
    fill(project, dict.fromkeys(REFRESHED, NEWEST))
    instance.add_run(dg.DagsterRun(job_name="daily_refresh", run_id="1", status=status))
    assert isinstance(tick(project, instance), dg.SkipReason) is skips


def decided(
    project: Project, instance: dg.DagsterInstance, verdict: str, who: str = POLICY
) -> PromotionDecision:
    """Materialize a promotion_decision that hands this record on, as the real one would."""
    decision = PromotionDecision(
        id=f"promotion-{verdict}-{len(list(instance.get_runs()))}",
        name="churn",
        version="3",
        verdict=verdict,  # ty: ignore[invalid-argument-type]
        reasons=("because",),
        who=who,
        why="because",
        incumbent=None,
        evidence=Evidence("bootstrap", {"auc": 0.9}),
        plan=RollbackPlan(None, None, "stop the service"),
        policy={},
        at=NIGHT,
    )

    @dg.asset
    def promotion_decision() -> dg.MaterializeResult:
        return dg.MaterializeResult(value=decision)

    dg.materialize(
        [promotion_decision],
        instance=instance,
        resources={"io_manager": RecordIOManager(project.home.records)},
    )
    return decision


def look(project: Project, instance: dg.DagsterInstance, cursor: str | None = None) -> Any:
    context = dg.build_sensor_context(
        instance=instance, cursor=cursor, resources={"project": project}
    )
    with warnings.catch_warnings():
        # SQLAlchemy's, about how MLflow's first import of its store is written.
        warnings.simplefilter("ignore")
        return promotion_decided.evaluate_tick(context)


def test_a_decision_to_promote_is_carried_to_a_run_once(
    project: Project, instance: dg.DagsterInstance
) -> None:
    decision = decided(project, instance, "promote")
    first = look(project, instance)
    assert [request.run_key for request in first.run_requests] == [decision.id]
    assert not look(project, instance, first.cursor).run_requests

    another = decided(project, instance, "promote")
    second = look(project, instance, first.cursor)
    assert [request.run_key for request in second.run_requests] == [another.id]
    assert another.id != decision.id


def test_a_decision_that_was_carried_out_asks_for_no_run(
    project: Project, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    decision = decided(project, instance, "promote")
    move = Move("3", "Staging", "Production")
    step = Step(1, (move,), {}, POLICY, "because", NIGHT, Evidence("bootstrap"), None, decision.id)
    seen = Registry("churn", {}, {}, (step,))
    monkeypatch.setattr("churn_assets.defs.sensors.read_registry", lambda *_: seen)
    looked = look(project, instance)
    assert not looked.run_requests
    assert "has been carried out" in looked.skip_message


@pytest.mark.parametrize(
    ("verdict", "who", "says"),
    [
        ("wait", POLICY, "version 3: because"),
        ("refuse", POLICY, "version 3: because"),
        ("promote", "ada", "is carried out by the run it was approved in"),
    ],
)
def test_no_other_decision_is_carried_out_by_itself(
    project: Project, instance: dg.DagsterInstance, verdict: str, who: str, says: str
) -> None:
    decided(project, instance, verdict, who)
    looked = look(project, instance)
    assert not looked.run_requests
    assert says in looked.skip_message


def test_a_run_that_failed_in_dagster_says_so_in_mlflow(
    project: Project, instance: dg.DagsterInstance
) -> None:
    with warnings.catch_warnings():
        # SQLAlchemy's, about how MLflow's first import of its store is written.
        warnings.simplefilter("ignore")
        client = project.mlflow_client()
        client.search_experiments()
    experiment = ensure_experiment(client, project.home.mlflow_artifacts)

    @dg.op
    def broken() -> None:
        raise ValueError("on purpose")

    @dg.job
    def training() -> None:
        broken()

    failed = training.execute_in_process(instance=instance, raise_on_error=False)
    run = client.create_run(experiment, tags={"dagster_run_id": failed.run_id})
    # What MLflow does by itself when the process of a run ends.
    client.set_terminated(run.info.run_id, "FINISHED")
    context = dg.build_run_status_sensor_context(
        sensor_name="mlflow_failed_runs",
        dagster_instance=instance,
        dagster_run=failed.dagster_run,
        dagster_event=next(event for event in failed.all_events if event.is_job_failure),
        resources={"project": project},
    )
    mlflow_failed_runs(context)
    assert client.get_run(run.info.run_id).info.status == "FAILED"


def test_runs_whose_servers_were_killed_are_closed(instance: dg.DagsterInstance) -> None:
    started = dg.DagsterRunStatus.STARTED
    ours = dict(LAUNCHER)
    for run_id, status, tags in [
        ("dead", started, {}),
        ("of make run", started, ours),
        ("over", dg.DagsterRunStatus.SUCCESS, {}),
    ]:
        instance.add_run(dg.DagsterRun("training", run_id=run_id, status=status, tags=tags))
    assert close_dead_server_runs() == ["dead"]
    statuses = {run.run_id: run.status for run in instance.get_runs()}
    assert statuses == {
        "dead": dg.DagsterRunStatus.FAILURE,
        "of make run": started,
        "over": dg.DagsterRunStatus.SUCCESS,
    }


def test_the_schedules_refuse_what_is_no_cron_expression(monkeypatch: pytest.MonkeyPatch) -> None:
    from churn_assets.defs import schedules
    from churn_assets.errors import UserError

    wrong = msgspec.structs.replace(SETTINGS.schedules, training="every monday")
    settings = msgspec.structs.replace(SETTINGS, schedules=wrong)
    monkeypatch.setattr(schedules, "SETTINGS", settings)
    with pytest.raises(UserError, match=r"schedules\.training is 'every monday'"):
        schedules.cron("training")
