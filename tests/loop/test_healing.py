"""Decisions are carried out once each, whatever is restarted in between."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec
import pytest
from registered import Shop

from churn_assets.contract.clock import now as clock_now
from churn_assets.defs.healing import BY_DECISION, DECISION, came_to_a_model, endings_of
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.registry import Change, change_what_serves
from churn_assets.defs.resources import Project, RecordIOManager
from churn_assets.defs.sensors import retraining_decided, rollback_decided
from churn_assets.defs.simulated_daemon import SimulatedDaemon
from churn_assets.defs.weekly import REASON
from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.lifecycle.history import Evidence
from churn_assets.lifecycle.registry import (
    POLICY,
    WITHOUT_TAG,
    Registry,
    Version,
    rollback_plan,
    transition,
)
from churn_assets.monitoring.retraining import RetrainingDecision
from churn_assets.monitoring.rollback import RollbackDecision

pytestmark = pytest.mark.filterwarnings(
    # MLflow's way of asking its own database, and SQLAlchemy's word on how it is written.
    "ignore:The ``noload`` loader strategy",
    "ignore::sqlalchemy.exc.SAWarning",
)
AT = datetime(2025, 3, 3, 5, 15, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(Home(tmp_path), SETTINGS)


@pytest.fixture
def instance() -> Generator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


# The sensors.


def retraining(verdict: Any, **changes: Any) -> RetrainingDecision:
    made = RetrainingDecision(
        id=f"{verdict}-20250303-abc",
        verdict=verdict,
        trigger="drift",
        reasons=("drift: ks/avg_order_value is 0.3", "and more"),
        action="train",
        alert=True,
        triggers=(),
        at=AT,
    )
    return msgspec.structs.replace(made, **changes)


def rollback(verdict: Any) -> RollbackDecision:
    reasons = ("error_rate: 5 %, at most 1 %",)
    return RollbackDecision(f"{verdict}-2-abc", verdict, "2", "1", reasons, "", True, AT)


def stored(project: Project, instance: dg.DagsterInstance, asset: str, decision: Any) -> None:
    """Materialize an asset of that name that hands the decision on, as the real one would."""

    @dg.asset(name=asset)
    def made() -> dg.MaterializeResult:
        return dg.MaterializeResult(value=decision)

    resources = {"io_manager": RecordIOManager(project.home.records)}
    dg.materialize([made], instance=instance, resources=resources)


@dataclass
class Looks:
    """A sensor that looks again and again, from where it was."""

    project: Project
    instance: dg.DagsterInstance
    sensor: dg.SensorDefinition
    cursor: str | None = None

    def __call__(self) -> Any:
        context = dg.build_sensor_context(
            instance=self.instance, cursor=self.cursor, resources={"project": self.project}
        )
        looked = self.sensor.evaluate_tick(context)
        self.cursor = looked.cursor
        return looked


def in_production(monkeypatch: pytest.MonkeyPatch, version: str, without: str = "") -> None:
    there = Version(version, "Production", {WITHOUT_TAG: without}, AT, None, "")
    seen = Registry("churn", {version: there}, {"production": version}, ())
    monkeypatch.setattr("churn_assets.defs.sensors.read_registry", lambda *_: seen)
    monkeypatch.setattr(Project, "mlflow_client", lambda _: None)


def test_a_decision_to_train_is_carried_to_a_run_once(
    project: Project, instance: dg.DagsterInstance
) -> None:
    decision = retraining(
        "fall_back", plan="history", without=("login_frequency_7d",), until=date(2025, 3, 1)
    )
    stored(project, instance, "retraining_decision", decision)
    look = Looks(project, instance, retraining_decided)
    (request,) = look().run_requests
    assert (request.job_name, request.run_key) == ("training", decision.id)
    assert request.run_config == {
        "ops": {
            "training_set": {
                "config": {
                    "plan": "history",
                    "until": "2025-03-01",
                    "without": ["login_frequency_7d"],
                    "decision": decision.id,
                }
            }
        }
    }
    assert request.tags.items() >= {DECISION: decision.id, **BY_DECISION}.items()
    assert request.tags[REASON] == "drift: drift: ks/avg_order_value is 0.3; and more"
    assert not look().run_requests

    stored(project, instance, "retraining_decision", retraining("retrain", plan="recent"))
    (request,) = look().run_requests
    config = request.run_config["ops"]["training_set"]["config"]
    assert (config["plan"], config["until"], config["without"]) == ("recent", None, [])


def test_the_jobs_take_what_the_sensors_hand_them(
    project: Project, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    from churn_assets.definitions import defs

    in_production(monkeypatch, "2", "login_frequency_7d")
    given = [
        (retraining_decided, "retraining_decision", retraining("retrain", until=date(2025, 3, 1))),
        (retraining_decided, "retraining_decision", retraining("restore")),
        (rollback_decided, "rollback_decision", rollback("rollback")),
    ]
    for sensor, asset, decision in given:
        stored(project, instance, asset, decision)
        (request,) = Looks(project, instance, sensor)().run_requests
        job = defs.resolve_job_def(str(request.job_name or sensor.job_name))
        assert dg.validate_run_config(job, request.run_config)


@pytest.mark.parametrize("verdict", ["wait", "suppress", "investigate"])
def test_other_decisions_ask_for_no_run(
    project: Project, instance: dg.DagsterInstance, verdict: str
) -> None:
    stored(project, instance, "retraining_decision", retraining(verdict))
    looked = Looks(project, instance, retraining_decided)()
    assert not looked.run_requests
    assert looked.skip_message.startswith(f"{verdict}: drift: ks/")


def test_a_version_is_restored_only_while_one_without_a_feature_is_there(
    project: Project, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(project, instance, "retraining_decision", retraining("restore"))
    in_production(monkeypatch, "4")
    looked = Looks(project, instance, retraining_decided)()
    assert not looked.run_requests
    assert "version 4 does without nothing" in looked.skip_message
    in_production(monkeypatch, "2", "login_frequency_7d")
    (request,) = Looks(project, instance, retraining_decided)().run_requests
    assert (request.job_name, request.run_key) == ("rollback", "restore-20250303-abc")


def test_a_decision_to_roll_back_is_carried_to_a_run_while_the_version_is_there(
    project: Project, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    decision = rollback("rollback")
    stored(project, instance, "rollback_decision", decision)
    in_production(monkeypatch, "3")
    looked = Looks(project, instance, rollback_decided)()
    assert not looked.run_requests
    assert "version 2 is not in Production any more" in looked.skip_message
    in_production(monkeypatch, "2")
    look = Looks(project, instance, rollback_decided)
    (request,) = look().run_requests
    assert (request.run_key, request.tags[DECISION]) == (decision.id, decision.id)
    assert request.run_config["ops"]["production_release"]["config"] == {
        "what": "rollback",
        "who": POLICY,
        "why": "error_rate: 5 %, at most 1 %",
        "to": "1",
        "decision": decision.id,
    }
    assert not look().run_requests
    stored(project, instance, "rollback_decision", rollback("keep"))
    assert look().skip_message.startswith("keep: error_rate")


# How the runs ended that carried decisions out.


def test_the_newest_run_of_a_decision_says_how_it_ended(instance: dg.DagsterInstance) -> None:
    status = dg.DagsterRunStatus
    for run_id, decision, ended in [
        ("1", "a", status.FAILURE),
        ("2", "a", status.SUCCESS),
        ("3", "b", status.STARTED),
        ("4", "c", status.CANCELED),
    ]:
        tags = {DECISION: decision, **BY_DECISION}
        instance.add_run(dg.DagsterRun("training", run_id=run_id, status=ended, tags=tags))
    instance.add_run(dg.DagsterRun("training", run_id="5", status=status.SUCCESS))
    assert endings_of(instance) == {"a": "succeeded", "b": "running", "c": "failed"}


def test_a_training_that_broke_off_before_its_model_does_not_count(
    project: Project, instance: dg.DagsterInstance
) -> None:
    """MLflow went away in the middle; one that the gates refused has come to a model."""
    records = project.home.records
    for run_id, ended in [("broken", "FAILURE"), ("refused", "FAILURE"), ("going on", "STARTED")]:
        status = dg.DagsterRunStatus[ended]
        instance.add_run(dg.DagsterRun("training", run_id=run_id, status=status))
    (records / "trained_model").mkdir(parents=True)
    (records / "trained_model" / "refused.json").write_text("{}")
    known = ("broken", "refused", "going on", "purged long ago")
    assert [came_to_a_model(instance, records, run_id) for run_id in known] == [
        False, True, True, True,
    ]  # fmt: skip


# The daemon is killed.


class Killed(BaseException):
    """What no part of a daemon catches."""


@dataclass
class World:
    """A decision a day, and a sensor that carries it to a run; what ran is written down."""

    folder: Path
    instance: dg.DagsterInstance
    ran: list[str] = field(default_factory=list)

    def definitions(self) -> dg.Definitions:
        @dg.asset
        def decision() -> None:
            self.ran.append(f"decision {clock_now({'CHURN_CLOCK': str(self.clock)}):%m-%d}")

        @dg.asset
        def deed() -> None:
            self.ran.append("deed")

        deciding = dg.define_asset_job("deciding", selection=[decision])
        doing = dg.define_asset_job("doing", selection=[deed])

        @dg.asset_sensor(
            asset_key=decision.key, job=doing, default_status=dg.DefaultSensorStatus.RUNNING
        )
        def decided(context: dg.SensorEvaluationContext, asset_event: dg.EventLogEntry):
            return dg.RunRequest(run_key=asset_event.run_id, tags={"why": "decided"})

        daily = dg.ScheduleDefinition(
            name="daily",
            job=deciding,
            cron_schedule="15 5 * * *",
            default_status=dg.DefaultScheduleStatus.RUNNING,
        )
        return dg.Definitions(
            [decision, deed], jobs=[deciding, doing], schedules=[daily], sensors=[decided]
        )

    @property
    def clock(self) -> Path:
        return self.folder / "clock"

    def daemon(self, **given: Any) -> SimulatedDaemon:
        """A daemon started anew, which knows what the one before it kept."""
        return SimulatedDaemon(
            definitions=self.definitions(),
            instance=self.instance,
            resources={},
            clock_path=self.clock,
            state_path=self.folder / "daemon.json",
            began=AT - timedelta(hours=1),
            **given,
        )


@pytest.fixture
def world(tmp_path: Path, instance: dg.DagsterInstance) -> World:
    return World(tmp_path, instance)


def test_a_daemon_does_what_is_due_once(world: World) -> None:
    daemon = world.daemon()
    daemon.run_until(AT + DAY)
    assert world.ran == ["decision 03-03", "deed", "decision 03-04", "deed"]
    assert [(run.job, run.asked_by, run.at, run.success) for run in daemon.runs] == [
        ("deciding", "daily", AT, True),
        ("doing", "decided", AT, True),
        ("deciding", "daily", AT + DAY, True),
        ("doing", "decided", AT + DAY, True),
    ]
    assert daemon.runs[1].tags["why"] == "decided"
    daemon.run_until(AT + DAY)
    # A daemon started anew, and a clock that is set back, do nothing twice.
    world.daemon().run_until(AT - timedelta(minutes=5))
    world.daemon().run_until(AT + DAY)
    assert len(world.ran) == 4
    assert clock_now({"CHURN_CLOCK": str(world.clock)}) == AT + DAY


def test_a_daemon_killed_between_a_decision_and_its_run_asks_for_the_run_again(
    world: World,
) -> None:
    def kill(job: str, request: dg.RunRequest, at: datetime) -> dg.RunRequest:
        if job == "doing":
            raise Killed
        return request

    with pytest.raises(Killed):
        world.daemon(alter=kill).run_until(AT)
    assert world.ran == ["decision 03-03"]
    daemon = world.daemon()
    daemon.run_until(AT)
    # The decision, whose run had ended, is not made again.
    assert world.ran == ["decision 03-03", "deed"]
    assert [run.job for run in daemon.runs] == ["doing"]
    world.daemon().run_until(AT + timedelta(hours=1))
    assert world.ran == ["decision 03-03", "deed"]


def test_a_daemon_killed_during_a_run_does_not_ask_for_it_twice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is known from the moment it began, though the daemon could keep nothing of it."""

    def kill(_: SimulatedDaemon) -> None:
        if "deed" in world.ran:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(SimulatedDaemon, "_keep", kill)
        with pytest.raises(Killed):
            world.daemon().run_until(AT)
    daemon = world.daemon()
    daemon.run_until(AT)
    assert world.ran == ["decision 03-03", "deed"]
    assert daemon.runs == []


def test_a_run_that_the_instance_will_retry_is_tried_again_and_not_for_ever(
    tmp_path: Path,
) -> None:
    told = {"run_retries": {"enabled": True}}
    with dg.instance_for_test(overrides=told) as instance:
        tried = []

        @dg.asset
        def deed() -> None:
            tried.append("deed")
            raise OSError("it is away")

        job = dg.define_asset_job("doing", selection=[deed], tags={"dagster/max_retries": "2"})
        daemon = SimulatedDaemon(
            definitions=dg.Definitions([deed], jobs=[job]),
            instance=instance,
            resources={},
            clock_path=tmp_path / "clock",
            state_path=tmp_path / "daemon.json",
            began=AT,
        )
        assert daemon.execute("doing", "somebody", dg.RunRequest(run_key="once"), AT)
        assert len(tried) == 3
        assert [run.success for run in daemon.runs] == [False] * 3
        assert [run.tags["dagster/will_retry"] for run in daemon.runs] == ["true", "true", "false"]
        assert not daemon.execute("doing", "somebody", dg.RunRequest(run_key="once"), AT)
        assert len(tried) == 3


def fail(_: dg.SensorEvaluationContext) -> dg.SkipReason:
    raise ZeroDivisionError


def test_a_sensor_that_fails_keeps_no_other_from_its_tick(world: World) -> None:
    definitions = world.definitions()
    broken = dg.SensorDefinition(
        name="broken",
        evaluation_fn=fail,
        job_name="doing",
        default_status=dg.DefaultSensorStatus.RUNNING,
    )
    daemon = world.daemon()
    with_it = dg.Definitions.merge(dg.Definitions(sensors=[broken]), definitions)
    daemon = replace(daemon, definitions=with_it)
    daemon.run_until(AT)
    assert world.ran == ["decision 03-03", "deed"]
    assert {(tick.sensor, "ZeroDivisionError" in tick.why) for tick in daemon.failed_ticks} == {
        ("broken", True)
    }


# A rollback the policy decided on.


def put_into_production(shop: Shop, version: str) -> None:
    registry = shop.read()
    incumbent = registry.production
    kind = "paired_replay" if incumbent else "bootstrap"
    transition(
        shop.client(),
        "churn",
        version,
        "Production",
        who=POLICY,
        why="better",
        evidence=Evidence(kind, {"auc": 0.95}, incumbent=incumbent, rows=900),
        plan=rollback_plan(registry),
        now=AT,
    )


def test_a_rollback_by_the_policy_is_carried_out_once_and_only_by_a_decision(
    tmp_path: Path,
) -> None:
    shop = Shop(Home(tmp_path / "home"), tmp_path / "shop.yaml", 0)
    shop.home.prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            put_into_production(shop, shop.register(good=True))
    change = Change(
        what="rollback", who=POLICY, why="it is slow", to="1", decision="rollback-2-abc"
    )

    def carry_out(given: Change) -> None:
        change_what_serves(shop.client(), given, shop.home.releases, AT + DAY)

    with pytest.raises(UserError, match="is not a person"):
        carry_out(Change(what="rollback", who=POLICY, why="it is slow", to="1"))
    assert shop.read().production == "2"

    carry_out(change)
    done = shop.read()
    assert done.production == "1"
    last = done.history[-1]
    assert (last.who, last.why, last.decision) == (POLICY, "it is slow", "rollback-2-abc")
    assert (last.evidence.kind, last.evidence.figures) == ("rollback", {"from_version": "2"})

    # A second run of the same decision changes nothing.
    carry_out(change)
    assert shop.read().history == done.history
