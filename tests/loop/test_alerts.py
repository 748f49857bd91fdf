"""Alerts from what Dagster has recorded, sent to a webhook on this machine."""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, cast

import dagster as dg
import msgspec
import pyarrow as pa
import pytest
from dagster._core.remote_origin import (
    GrpcServerCodeLocationOrigin,
    RemoteInstigatorOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    InstigatorType,
    ScheduleInstigatorData,
    SensorInstigatorData,
    TickData,
    TickStatus,
)
from dagster._utils.error import serializable_error_info_from_exc_info
from webhook import Webhook, webhook

from churn_assets import cli
from churn_assets.contract.clock import CLOCK_VARIABLE, set_clock
from churn_assets.contract.pointer import Current
from churn_assets.data.sources import SourceConfig
from churn_assets.definitions import defs
from churn_assets.defs import alert_events, alerting
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project, RecordIOManager
from churn_assets.home import Home
from churn_assets.lifecycle.pointer import point_at
from churn_assets.lifecycle.serving import free_port
from churn_assets.monitoring.alerts import AlertPolicy
from churn_assets.settings import Settings

NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
WARN, ERROR = dg.AssetCheckSeverity.WARN, dg.AssetCheckSeverity.ERROR
REFRESHED = (*SETTINGS.raw_tables, "customer_features", "churn_labels")


@pytest.fixture
def hook() -> Generator[Webhook]:
    with webhook() as hook:
        yield hook


@pytest.fixture
def instance() -> Generator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


def with_alerts(**policy: Any) -> Settings:
    return msgspec.structs.replace(SETTINGS, alerts=AlertPolicy(**policy))


class Watch:
    """The sensor over a home, with the cursor it left and a clock a test turns."""

    def __init__(self, home: Path, instance: dg.DagsterInstance, settings: Settings) -> None:
        self.project = Project(Home(home), settings)
        self.instance = instance
        self.cursor: str | None = None
        self.clock = home / "clock"
        self.at(NOON)

    def at(self, moment: datetime) -> None:
        set_clock(self.clock, moment)

    def tick(self, **more: Any) -> Any:
        context = dg.build_sensor_context(
            instance=self.instance,
            cursor=self.cursor,
            resources={"project": self.project},
            **more,
        )
        found = alerting.alert_sensor.evaluate_tick(context)
        self.cursor = found.cursor
        return found

    def read_ticks(self, cursor: alerting.Cursor) -> None:
        outbox, now = alerting.outbox_of(self.project), self.project.now()
        alerting.read_ticks(alerting.Pass(self.instance, self.project, outbox, cursor, now))

    @property
    def open(self) -> dict[str, str]:
        return {c.key: c.alert.what for c in alerting.outbox_of(self.project).open()}


@pytest.fixture
def watch(
    tmp_path: Path, instance: dg.DagsterInstance, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> Watch:
    monkeypatch.setenv(CLOCK_VARIABLE, str(tmp_path / "clock"))
    monkeypatch.setenv("HOOK_URL", hook.url("a-secret-word"))
    return Watch(tmp_path, instance, with_alerts(urls=("${HOOK_URL}",)))


def materialize(
    watch: Watch,
    *,
    passed: bool = True,
    severity: dg.AssetCheckSeverity = WARN,
    blocking: bool = False,
    fails: bool = False,
    name: str = "drift_report",
    value: object = None,
) -> dg.ExecuteInProcessResult:
    """A run of one asset with a check, as the real ones have it."""

    @dg.asset(name=name, check_specs=[dg.AssetCheckSpec("no_drift", asset=name, blocking=blocking)])
    def asset():
        if fails:
            try:
                raise OSError("disk full\nand more")
            except OSError as error:
                raise RuntimeError("while writing") from error
        return dg.MaterializeResult(
            value=value,
            check_results=[
                dg.AssetCheckResult(
                    passed=passed,
                    check_name="no_drift",
                    severity=severity,
                    description="KS 0.31 of total_orders_30d is above 0.15",
                    metadata={
                        "ks": 0.31,
                        "distributions": dg.MetadataValue.md("| a | b |"),
                    },
                )
            ],
        )

    job = dg.define_asset_job("drift", selection=[name])
    built = dg.Definitions(
        assets=[asset],
        jobs=[job],
        resources={"io_manager": RecordIOManager(watch.project.home.records)},
    )
    return built.resolve_job_def("drift").execute_in_process(
        instance=watch.instance, raise_on_error=False
    )


def evaluate(watch: Watch, *, passed: bool, asset: str = "drift_report") -> None:
    """What a check said, without the run."""
    watch.instance.report_runless_asset_event(
        dg.AssetCheckEvaluation(
            asset_key=dg.AssetKey(asset),
            check_name="no_drift",
            passed=passed,
            severity=WARN,
            description="KS 0.31 of total_orders_30d is above 0.15",
        )
    )


def test_a_failed_non_blocking_check_is_exactly_one_message(watch: Watch, hook: Webhook) -> None:
    assert materialize(watch, passed=False).success
    first = watch.tick()
    (message,) = hook.accepted
    assert message["title"] == "[WARNING] drift_report.no_drift did not pass"
    for part in (
        "KS 0.31 of total_orders_30d",
        "- ks: 0.31",
        "The retraining decision weighs it",
        "http://127.0.0.1:3000/assets/drift_report",
    ):
        assert part in message["message"]
    assert "| a | b |" not in message["message"]
    assert "1 messages sent, 0 waiting" in first.skip_message
    # Restarted with its cursor, with the one before, and without one.
    for cursor in (watch.cursor, None, first.cursor):
        watch.cursor = cursor
        watch.tick()
    # It fails again, and is still the same thing.
    evaluate(watch, passed=False)
    watch.tick()
    assert len(hook.accepted) == 1

    evaluate(watch, passed=True)
    watch.at(NOON + timedelta(hours=1))
    watch.tick()
    watch.tick()
    assert hook.titles[1:] == ["[RESOLVED] drift_report.no_drift did not pass"]
    assert watch.open == {}


def test_what_failed_and_passed_between_two_ticks_is_told(watch: Watch, hook: Webhook) -> None:
    watch.tick()
    evaluate(watch, passed=False)
    evaluate(watch, passed=True)
    watch.tick()
    assert hook.titles == ["[PASSED] drift_report.no_drift did not pass"]


def test_a_failed_run_is_told_with_its_step_and_its_first_error_line(
    watch: Watch, hook: Webhook
) -> None:
    result = materialize(watch, fails=True)
    watch.tick()
    materialize(watch, fails=True)
    watch.tick()
    (message,) = hook.accepted
    assert message["title"] == "[CRITICAL] drift failed"
    for part in (
        "OSError: disk full",
        "- job: drift",
        "- step: drift_report",
        f"3000/runs/{result.run_id}",
    ):
        assert part in message["message"]
    assert "and more" not in message["message"]
    materialize(watch)
    watch.at(NOON + timedelta(hours=1))
    watch.tick()
    assert hook.titles[1:] == ["[RESOLVED] drift failed"]


def test_a_run_that_a_blocking_check_stopped_is_one_message(watch: Watch, hook: Webhook) -> None:
    assert not materialize(watch, passed=False, blocking=True, severity=ERROR).success
    watch.tick()
    assert hook.titles == ["[CRITICAL] drift_report.no_drift did not pass"]


class Decision(msgspec.Struct):
    id: str
    verdict: str
    reasons: tuple[str, ...] = ("KS 0.3 for 3 days",)
    alert: bool | None = None
    action: str | None = None


def decide(watch: Watch, asset: str, decision: object) -> None:
    materialize(watch, name=asset, value=decision)


def test_a_decision_is_told_once_and_ended_by_the_next(watch: Watch, hook: Webhook) -> None:
    told = Decision("retrain-1", "retrain", alert=True, action="run training was asked for")
    decide(watch, "retraining_decision", told)
    watch.tick()
    watch.cursor = None
    watch.tick()
    (message,) = hook.accepted
    assert message["title"] == "[INFO] retraining decision: retrain"
    for part in ("KS 0.3 for 3 days", "being done: run training was asked for", "retrain-1"):
        assert part in message["message"]
    decide(watch, "retraining_decision", Decision("retrain-2", "wait", alert=False))
    decide(watch, "rollback_decision", Decision("rollback-1", "rollback"))
    # One that left no record.
    decide(watch, "promotion_decision", None)
    watch.at(NOON + timedelta(hours=1))
    watch.tick()
    assert sorted(hook.titles[1:]) == [
        "[CRITICAL] rollback decision: rollback",
        "[RESOLVED] retraining decision: retrain",
    ]


def test_a_source_that_cannot_be_read_is_an_alert_and_stops_no_other(
    watch: Watch, hook: Webhook
) -> None:
    decide(watch, "retraining_decision", {"id": "without a verdict"})
    evaluate(watch, passed=False)
    watch.tick()
    assert sorted(watch.open) == ["check/drift_report.no_drift", "source/decisions"]
    assert "has no verdict" in watch.open["source/decisions"]
    decide(watch, "retraining_decision", Decision("d", "wait"))
    watch.cursor = None
    watch.tick()
    assert sorted(watch.open) == ["check/drift_report.no_drift"]


def test_a_log_that_begins_anew_is_read_anew(watch: Watch, hook: Webhook) -> None:
    for _ in range(3):
        evaluate(watch, passed=False)
    watch.tick()
    assert len(watch.open) == 1
    with dg.instance_for_test() as another:
        watch.instance = another
        evaluate(watch, passed=True)
        watch.tick()
    assert watch.open == {}


def add(
    watch: Watch, name: str, kind: InstigatorType, data: Any, *, running: bool = True
) -> InstigatorState:
    # Abstract only to a type checker.
    location = cast("Any", GrpcServerCodeLocationOrigin)("127.0.0.1", 4000, None, "churn_assets")
    origin = RemoteInstigatorOrigin(RemoteRepositoryOrigin(location, "__repository__"), name)
    status = InstigatorStatus.RUNNING if running else InstigatorStatus.STOPPED
    return watch.instance.add_instigator_state(InstigatorState(origin, kind, status, data))


def evaluated(
    watch: Watch,
    state: InstigatorState,
    at: datetime,
    status: Literal[TickStatus.SKIPPED, TickStatus.FAILURE] = TickStatus.SKIPPED,
) -> None:
    error = None
    if status is TickStatus.FAILURE:
        try:
            raise ValueError("no registry")
        except ValueError:
            error = serializable_error_info_from_exc_info(sys.exc_info())
    watch.instance.create_tick(
        TickData(
            state.instigator_origin_id,
            state.name,
            state.instigator_type,
            status,
            at.timestamp(),
            selector_id=state.selector_id,
            error=error,
        )
    )


def test_a_silent_sensor_a_failing_one_and_a_schedule_that_missed_its_time(
    watch: Watch, hook: Webhook
) -> None:
    sensor, schedule = InstigatorType.SENSOR, InstigatorType.SCHEDULE
    ours = add(watch, "alert_sensor", sensor, SensorInstigatorData(min_interval=45))
    silent = add(watch, "promotion_decided", sensor, SensorInstigatorData(min_interval=30))
    failing = add(watch, "trial_judged", sensor, SensorInstigatorData(min_interval=30))
    missed = add(watch, "drift_schedule", schedule, ScheduleInstigatorData("0 4 * * *"))
    add(watch, "clean_archive_schedule", schedule, ScheduleInstigatorData("0 5 * * *"))
    off = add(watch, "mlflow_failed_runs", sensor, SensorInstigatorData(), running=False)
    watch.tick()
    assert watch.open == {}, "without any tick nothing is dead"
    # The daemon's clock, not the operational one.
    start = datetime(2030, 1, 1, 3, 30, tzinfo=UTC)
    for state in (silent, failing, off):
        evaluated(watch, state, start)
    evaluated(watch, missed, start - timedelta(hours=23, minutes=30))
    before = (start + timedelta(minutes=84)).timestamp()
    cursor = alerting.Cursor(last_tick=before, alive_since=start.timestamp())
    for minute in range(87, 100, 3):
        at = start + timedelta(minutes=minute)
        evaluated(watch, ours, at)
        if minute < 93:
            evaluated(watch, failing, at)
            evaluated(watch, silent, at)
        watch.read_ticks(cursor)
        assert (f"tick/{missed.name}" in watch.open) is (minute > 90)
    evaluated(watch, failing, at, TickStatus.FAILURE)
    watch.read_ticks(cursor)
    assert {"tick/drift_schedule", "tick/promotion_decided", "tick/trial_judged"} == set(watch.open)
    assert "has not been evaluated since" in watch.open["tick/promotion_decided"]
    assert "ValueError: no registry" in watch.open["tick/trial_judged"]
    for state in (silent, failing):
        evaluated(watch, state, at + timedelta(seconds=1))
    watch.read_ticks(cursor)
    assert set(watch.open) == {"tick/drift_schedule"}


def test_a_daemon_that_was_away_leaves_no_silence_to_tell_of(watch: Watch) -> None:
    sensor = InstigatorType.SENSOR
    ours = add(watch, "alert_sensor", sensor, SensorInstigatorData(min_interval=45))
    other = add(watch, "promotion_decided", sensor, SensorInstigatorData(min_interval=30))
    evaluated(watch, ours, NOON)
    evaluated(watch, other, NOON)
    cursor = alerting.Cursor()
    watch.read_ticks(cursor)
    for minute in (0, 2, 4):
        evaluated(watch, ours, NOON + timedelta(days=3, minutes=minute))
        watch.read_ticks(cursor)
        assert (watch.open != {}) is (minute == 4)


def fill(project: Project, last: date) -> None:
    for table in REFRESHED:
        project.lake.write(
            table,
            last - timedelta(days=1),
            last,
            pa.table({"cutoff": pa.array([], pa.timestamp("us", "UTC"))}),
            day_of="cutoff",
        )


def test_an_asset_that_is_late(watch: Watch, hook: Webhook) -> None:
    fill(watch.project, date(2025, 12, 1))
    materialize(watch)
    for hour in (0, 47):
        watch.at(NOON + timedelta(hours=hour))
        watch.tick()
        assert watch.open == {}, "nothing is in Production"
    point_at(watch.project.home.current, Current("churn:1", "r-1", "1", 1, NOON))
    for hour in range(48, 85, 12):
        watch.at(NOON + timedelta(hours=hour))
        watch.tick()
    # The refresh by its day, the log by its hour; the report has been missing for too short.
    assert set(watch.open) == {
        "late/customer_features",
        "late/prediction_log",
        "late/serving_health",
    }
    watch.at(NOON + timedelta(hours=98))
    watch.tick()
    assert "late/drift_report" in watch.open
    materialize(watch)
    materialize(watch, name="customer_features")
    watch.at(NOON + timedelta(hours=99))
    watch.tick()
    assert set(watch.open) == {
        "late/performance_report",
        "late/prediction_log",
        "late/serving_health",
    }


def test_the_last_day_of_a_live_source_is_expected(watch: Watch) -> None:
    fill(watch.project, date(2026, 2, 27))
    tables = {
        "orders": {"from": "o.csv", "columns": {"order_id": "o", "customer_id": "c"}},
        "customers": {"derive_from": "orders"},
    }
    tables["orders"]["columns"] |= {"occurred_at": "t", "amount": "a"}
    source = msgspec.convert({"kind": "tables", "tables": tables}, SourceConfig)
    live = msgspec.structs.replace(with_alerts(), source=source)
    watch.project = Project(watch.project.home, live)
    # The refresh at 02:00 may take until 05:00.
    for moment, late in (
        (datetime(2026, 3, 1, 4, tzinfo=UTC), False),
        (datetime(2026, 3, 1, 5, tzinfo=UTC), True),
    ):
        watch.at(moment)
        watch.tick()
        assert ("late/data" in watch.open) is late
    assert "should have brought in 2026-02-28" in watch.open["late/data"]
    fill(watch.project, date(2026, 2, 28))
    watch.at(datetime(2026, 3, 1, 6, tzinfo=UTC))
    watch.tick()
    assert watch.open == {}


def test_without_a_url_it_is_said_once_and_nothing_fails(watch: Watch, hook: Webhook) -> None:
    watch.project = Project(watch.project.home, with_alerts())
    evaluate(watch, passed=False)
    said = [watch.tick().skip_message for _ in range(3)]
    assert ["no URL is configured" in line for line in said] == [True, False, False]
    assert list(watch.open) == ["check/drift_report.no_drift"]
    assert hook.accepted == []


def test_what_cannot_be_delivered_is_shown_and_comes_when_it_can(
    watch: Watch, hook: Webhook, tmp_path: Path
) -> None:
    with webhook() as other:
        urls = (other.url("other"), hook.url("a-secret-word"))
        watch.project = Project(watch.project.home, with_alerts(urls=urls))
        hook.status = 500
        evaluate(watch, passed=False)
        shown = []
        for minute in range(5):
            watch.at(NOON + timedelta(minutes=minute))
            shown += watch.tick().asset_events
        checks = [e for e in shown if isinstance(e, dg.AssetCheckEvaluation)]
        assert [c.passed for c in checks] == [True, False]
        assert checks[-1].description == f"messages wait for json://127.0.0.1:{hook.port}"
        assert "a-secret-word" not in repr(shown)
        made = [e for e in shown if isinstance(e, dg.AssetMaterialization)]
        assert made[-1].metadata["undelivered"].value == 1
        assert not alerting.state_of(alerting.outbox_of(watch.project))[1]
        assert len(other.accepted) == 1
        hook.status = 200
        watch.at(NOON + timedelta(minutes=8))
        last = watch.tick().asset_events
        assert [e.passed for e in last if isinstance(e, dg.AssetCheckEvaluation)] == [True]
        assert (len(hook.accepted), len(other.accepted)) == (1, 1)


def test_the_sensor_knows_the_checks_and_sensors_of_its_code_location(watch: Watch) -> None:
    evaluate(watch, passed=False, asset="somebody_elses")
    watch.tick(definitions=defs)
    assert watch.open == {}
    evaluate(watch, passed=False)
    watch.tick(definitions=defs)
    assert list(watch.open) == ["check/drift_report.no_drift"]


def test_the_intervals_of_cron_expressions() -> None:
    hour = timedelta(hours=1)
    assert alert_events.cron_interval("7 * * * *", "UTC", NOON) == hour
    assert alert_events.cron_interval("0 4 * * *", "UTC", NOON) == 24 * hour
    assert alert_events.last_fire("0 2 * * *", "Europe/Berlin", NOON) == NOON.replace(hour=1)


@pytest.fixture
def churn(
    watch: Watch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Generator[Any]:
    config = watch.project.home.root / "churn.yaml"
    config.write_text(
        "source: {kind: shop}\ncalendar: {start: 2024-01-01}\nalerts: {urls: ['${HOOK_URL}']}\n"
    )
    monkeypatch.setenv("CHURN_HOME", str(watch.project.home.root))
    monkeypatch.setenv("CHURN_CONFIG", str(config))
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["churn", "alerts", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), "".join(capsys.readouterr())

    yield call
    signal.signal(signal.SIGTERM, before)


def test_the_command_lists_tests_and_closes(churn, watch: Watch, hook: Webhook) -> None:
    assert churn() == (
        0,
        f"0 open\n0 not delivered\nsent to json://127.0.0.1:{hook.port} (${{HOOK_URL}})\n",
    )
    hook.status = 500
    code, said = churn("test")
    assert code == 1
    assert "did not arrive" in said
    assert "500" in said
    evaluate(watch, passed=False)
    watch.tick()
    code, said = churn()
    assert code == 0
    for part in ("1 open", "drift_report.no_drift did not pass", "1 not delivered", "1 attempts"):
        assert part in said
    assert "a-secret-word" not in said
    hook.status = 200
    assert churn("test")[0] == 0
    assert hook.titles == ["[INFO] A test of churn_assets"]
    code, said = churn("close", "check/drift_report.no_drift", "--who", "ada", "--why", "known")
    assert (code, watch.open) == (0, {})
    assert churn("close", "check/drift_report.no_drift", "--why", "known")[0] == 2
    code, said = churn("check")
    assert code == 2
    assert "make run" in said


def test_a_storage_of_dagster_that_is_down_is_an_alert_and_one_line(
    churn, watch: Watch, hook: Webhook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs in Dagster cannot tell of it, so `alerts check` does, and loses nothing."""
    pytest.importorskip("dagster_postgres", reason="it is of the extra `platform`")
    for name in watch.project.home.environment():
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("CHURN_HOME", str(watch.project.home.root))
    mine = tmp_path / "mine.yaml"
    where = f"dagster:t0psecret@127.0.0.1:{free_port()}"
    mine.write_text(f"storage: {{postgres: {{postgres_url: 'postgresql://{where}/dagster'}}}}\n")
    monkeypatch.setenv("CHURN_DAGSTER_YAML", str(mine))
    watch.project.home.dagster.mkdir(exist_ok=True)
    monkeypatch.setattr("dagster_postgres.utils.time.sleep", lambda _: None)
    # A process of its own would have read the configuration of this home.
    monkeypatch.setattr(Project, "of", lambda _: watch.project)
    hook.status = 500
    evaluate(watch, passed=False)
    watch.tick()
    hook.status = 200
    watch.at(NOON + timedelta(minutes=5))
    code, said = churn("check")
    assert code == 2
    (line,) = said.splitlines()
    assert line.startswith("error: Dagster's storage cannot be had (")
    assert "Connection refused" in line
    assert "mine.yaml" in line
    # The one that waited arrives, too, and nothing is closed by what could not be read.
    assert set(watch.open) == {"check/drift_report.no_drift", "storage"}
    assert sorted(hook.titles) == [
        "[CRITICAL] Dagster's storage cannot be had",
        "[WARNING] drift_report.no_drift did not pass",
    ]
    code, said = churn()
    assert code == 0
    assert "2 open" in said
    assert "t0psecret" not in f"{line}{said}{hook.accepted}"
    monkeypatch.delenv("CHURN_DAGSTER_YAML")
    churn("check")
    assert "storage" not in watch.open
