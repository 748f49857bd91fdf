"""Alerts: raised from what Dagster has recorded, kept in the outbox, and sent from there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import dagster as dg
import msgspec
from dagster import DagsterEventType, DagsterInstance
from dagster._core.scheduler.instigation import TickStatus

from churn_assets.defs import alert_events as log
from churn_assets.defs.dagster_storage import quiet_retries, reason_of, storage_error
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.defs.schedules import ZONE, days_to_refresh, refreshed_up_to
from churn_assets.home import Home
from churn_assets.lifecycle.pointer import read_current
from churn_assets.monitoring import alert_sources as sources
from churn_assets.monitoring.alert_delivery import AppriseSender, Channel, channels_of
from churn_assets.monitoring.alert_outbox import Outbox, Waiting
from churn_assets.monitoring.alerts import NO_URL, Alert
from churn_assets.up import DAGSTER

NAME = "alert_sensor"
INTERVAL_S = 45
DECISIONS = ("retraining_decision", "rollback_decision", "promotion_decision")
# Made while something is in Production; each has its cron expression in `schedules`.
WATCHED = ("drift_report", "serving_health", "performance_report", "prediction_log")
# Tables and plots are behind the link.
PLAIN = (
    dg.TextMetadataValue,
    dg.IntMetadataValue,
    dg.FloatMetadataValue,
    dg.BoolMetadataValue,
    dg.JsonMetadataValue,
)

# A database may show an event before one with a lower id. What is read twice changes nothing.
_OVERLAP = 200
# The lake is listed for it; nothing becomes late within seconds.
_LOOK_EVERY = timedelta(minutes=10)
# The daily refresh has so long before its day counts as missing.
_REFRESH_TIME = timedelta(hours=3)
# A URL that was busy for a moment is no news.
_ATTEMPTS_IN_VAIN = 3


class Seen(msgspec.Struct):
    """The newest materialization of an asset, and the operational time it was first seen."""

    position: int | None
    at: datetime


class Cursor(msgspec.Struct):
    """How far the sensor has read. Without it, the sensor begins with how things stand.

    floors: where it began so; what lies before is never read one by one.
    """

    positions: dict[str, int] = {}
    floors: dict[str, int] = {}
    seen: dict[str, Seen] = {}
    looked_at: datetime | None = None
    last_tick: float | None = None
    alive_since: float | None = None
    shown: str = ""


@dataclass
class Pass:
    """One evaluation: what it reads, where it keeps alerts, and how far it had read before."""

    instance: DagsterInstance
    project: Project
    outbox: Outbox
    cursor: Cursor
    now: datetime
    location: str | None = None
    checks: frozenset[str] | None = None
    instigators: frozenset[str] | None = None

    def link(self, path: str) -> str:
        """A page of Dagster's UI."""
        base = self.project.settings.alerts.dagster_url or DAGSTER.url
        return f"{base.rstrip('/')}/{path}"

    def unread(self, name: str) -> tuple[int, int, bool]:
        """The ids to read as (after, up to), and whether only how things stand is wanted."""
        newest, before = log.newest_position(self.instance), self.cursor.positions.get(name)
        # A log that is shorter than what was read of it is another one.
        if before is None or newest < before:
            self.cursor.floors[name] = newest
            return 0, newest, True
        return max(self.cursor.floors.get(name, 0), before - _OVERLAP), newest, False

    def settle(self, key: str, alert: Alert | None, why: str = "", at: int | None = None) -> None:
        """The condition `key` is as `alert` says, or is over."""
        if alert is not None:
            self.outbox.raise_alert(alert, position=at)
        else:
            self.outbox.clear(key, now=self.now, why=why, position=at)


def read_checks(look: Pass) -> None:
    """A check that does not pass is an alert until it does."""
    after, up_to, anew = look.unread("checks")
    found = log.events(look.instance, [DagsterEventType.ASSET_CHECK_EVALUATION], after, up_to)
    evaluations = []
    for record in found:
        event = record.event_log_entry.dagster_event
        assert event is not None
        evaluation = event.asset_check_evaluation_data
        asset = evaluation.asset_key.path[-1]
        name = f"{asset}.{evaluation.check_name}"
        if look.checks is None or name in look.checks:
            evaluations.append((record, evaluation, asset, name))
    if anew:
        look.outbox.forget_positions(sources.CHECK)
        # How things stand is what each check said last.
        evaluations = list({each[-1]: each for each in evaluations}.values())
    for record, evaluation, asset, name in evaluations:
        alert = None
        if not evaluation.passed:
            alert = sources.check_alert(
                asset,
                evaluation.check_name,
                id=f"{name}-{record.storage_id}",
                at=look.now,
                error=evaluation.severity is dg.AssetCheckSeverity.ERROR,
                blocking=bool(evaluation.blocking),
                description=evaluation.description,
                figures={
                    k: v.value for k, v in evaluation.metadata.items() if isinstance(v, PLAIN)
                },
                link=look.link(f"assets/{asset}"),
            )
        why = sources.first_line(evaluation.description or "the check passes")
        look.settle(f"{sources.CHECK}{name}", alert, why, record.storage_id)
    look.cursor.positions["checks"] = up_to


def read_runs(look: Pass) -> None:
    """A failed run is an alert until the same job succeeds."""
    after, up_to, anew = look.unread("runs")
    kinds = [DagsterEventType.RUN_FAILURE, DagsterEventType.RUN_SUCCESS]
    found = [(r, _run_key(look, r)) for r in log.events(look.instance, kinds, after, up_to)]
    if anew:
        look.outbox.forget_positions(sources.RUN)
        found = list({key: (record, key) for record, key in found}.values())
    for record, key in found:
        entry = record.event_log_entry
        if entry.dagster_event_type is DagsterEventType.RUN_SUCCESS:
            look.settle(key, None, f"run {entry.run_id} succeeded", record.storage_id)
        elif failure := log.failure_of(look.instance, entry.run_id, look.location):
            alert = sources.run_alert(
                entry.job_name or "a job",
                _assets_of(look, entry.run_id),
                run_id=entry.run_id,
                at=look.now,
                step=failure[0],
                error=failure[1],
                link=look.link(f"runs/{entry.run_id}"),
            )
            look.settle(key, alert, at=record.storage_id)
    look.cursor.positions["runs"] = up_to


def _run_key(look: Pass, record: dg.EventLogRecord) -> str:
    entry = record.event_log_entry
    job = entry.job_name or "a job"
    # Only of what somebody picked is the run itself asked for its assets: there are few of these.
    return sources.run_key(job, _assets_of(look, entry.run_id) if job.startswith("__") else ())


def _assets_of(look: Pass, run_id: str) -> list[str]:
    run = look.instance.get_run_by_id(run_id)
    return [key.path[-1] for key in (run.asset_selection or ())] if run else []


def read_decisions(look: Pass) -> None:
    """A decision is told of when it says so; the next one about the same ends that."""
    after, up_to, anew = look.unread("decisions")
    kinds = [DagsterEventType.ASSET_MATERIALIZATION]
    for asset in DECISIONS:
        found = log.events(look.instance, kinds, after, up_to, asset)
        if anew:
            look.outbox.forget_positions(f"{sources.DECISION}{asset}/")
            found = found[-1:]
        for record in found:
            path = look.project.home.records / asset / f"{record.event_log_entry.run_id}.json"
            # An asset that decided nothing left none.
            if path.exists():
                _take_decision(look, asset, msgspec.json.decode(path.read_bytes()), record)
    look.cursor.positions["decisions"] = up_to


def _take_decision(
    look: Pass, asset: str, decision: Mapping[str, Any], record: dg.EventLogRecord
) -> None:
    at, link = record.storage_id, look.link(f"assets/{asset}")
    alert = sources.decision_alert(asset, decision, at=look.now, link=link)
    key = sources.decision_key(asset, decision)
    for condition in look.outbox.open(f"{sources.DECISION}{asset}/"):
        if condition.key != key or alert is None:
            why = f"the newest decision is {decision.get('verdict')}"
            look.settle(condition.key, None, why, at)
    if alert is not None:
        look.settle(key, alert, at=at)


def read_ticks(look: Pass) -> None:
    """A sensor or schedule that fails, or is on and silent, is an alert until it is evaluated.

    The time is that of the newest tick: the daemon's own clock, whatever the operational one says.
    """
    states = log.tick_states(look.instance, look.location, look.instigators)
    now, cursor = log.newest_tick(states), look.cursor
    if now is None:
        return
    # While this sensor was not evaluated itself, the silence of another one says nothing.
    if cursor.last_tick is None or not 0 <= now - cursor.last_tick <= 5 * INTERVAL_S:
        cursor.alive_since = now
    cursor.last_tick = now
    alive_since = now if cursor.alive_since is None else cursor.alive_since
    for state, ticks in states:
        if state.name == NAME:
            continue
        seen = log.ticks_of(state, ticks, now=now, alive_since=alive_since, zone=ZONE)
        page = f"locations/{state.repository_selector.location_name}"
        alert = sources.tick_alert(seen, at=look.now, link=look.link(page))
        look.settle(f"{sources.TICK}{state.name}", alert, "it is evaluated again")
    on = {f"{sources.TICK}{state.name}" for state, _ in states}
    for condition in look.outbox.open(sources.TICK):
        if condition.key not in on:
            look.settle(condition.key, None, "it is switched off")


def read_assets(look: Pass) -> None:
    """An asset its schedule should have materialized is an alert until it is."""
    before = look.cursor.looked_at
    if before is not None and timedelta(0) <= look.now - before < _LOOK_EVERY:
        return
    positions = _materialized(look)
    newest = refreshed_up_to(look.project)
    if newest is not None:
        settings = look.project.settings
        end, shop = settings.calendar.end, settings.is_shop
        due = days_to_refresh(newest, look.now, end, one_at_a_time=shop)
        if shop:
            _judge_late(look, "customer_features", "daily_refresh", positions, due is not None)
        else:
            cron = settings.schedules.daily_refresh
            fired = log.last_fire(cron, ZONE, look.now - _REFRESH_TIME)
            days = days_to_refresh(newest, fired, end, one_at_a_time=False)
            link = look.link("assets/customer_features")
            expected = days[1] if days else newest
            alert = sources.late_data_alert(newest, expected, at=look.now, link=link)
            look.settle(f"{sources.LATE}data", alert, f"the newest day is {newest}")
    serving = read_current(look.project.home.current) is not None
    for asset in WATCHED:
        _judge_late(look, asset, asset, positions, serving)
    look.cursor.looked_at = look.now


def _materialized(look: Pass) -> dict[str, int | None]:
    """The id of the newest materialization of each asset that is to be in time."""
    keys = [dg.AssetKey(name) for name in ("customer_features", *WATCHED)]
    return {
        record.asset_entry.asset_key.path[-1]: record.asset_entry.last_materialization_storage_id
        for record in look.instance.get_asset_records(keys)
    }


def _judge_late(
    look: Pass, asset: str, schedule: str, positions: Mapping[str, int | None], wanted: bool
) -> None:
    cron = getattr(look.project.settings.schedules, schedule, None)
    if cron is None:
        return
    position, seen = positions.get(asset), look.cursor.seen.get(asset)
    if seen is None or seen.position != position or not wanted or seen.at > look.now:
        seen = look.cursor.seen[asset] = Seen(position, look.now)
    interval = log.cron_interval(cron, ZONE, look.now)
    link = look.link(f"assets/{asset}")
    alert = sources.late_alert(asset, seen.at, interval, at=look.now, link=link)
    look.settle(f"{sources.LATE}{asset}", alert, "it is there")


SOURCES: Mapping[str, Callable[[Pass], None]] = {
    "checks": read_checks,
    "runs": read_runs,
    "decisions": read_decisions,
    "ticks": read_ticks,
    "assets": read_assets,
}


def take_in(look: Pass, warn: Callable[[str], object]) -> None:
    """Read every source. One that cannot be read is an alert, and keeps no other from it."""
    for name, read in SOURCES.items():
        key = f"{sources.SOURCE}{name}"
        try:
            read(look)
        # Whatever it is, it is told, and the other sources are read.
        except Exception as error:
            warn(f"{name}: {type(error).__name__}: {error}")
            link = look.link("overview/sensors")
            alert = sources.source_alert(name, error, at=look.now, link=link)
            look.settle(key, alert)
        else:
            look.settle(key, None, "it is read again")


def outbox_of(project: Project) -> Outbox:
    """The outbox of the project's home."""
    return Outbox(project.home.alerts, project.settings.alerts)


def channels(project: Project) -> list[Channel]:
    """Where the project's alerts go."""
    return channels_of(project.settings.alerts.places, os.environ)


def send_due(project: Project, outbox: Outbox, now: datetime) -> str:
    """Make the messages that are due, send what waits, and say what was done."""
    to = channels(project)
    outbox.make_messages(now, anybody=bool(to))
    done = outbox.deliver(to, now, AppriseSender(os.environ))
    waiting = len(outbox.waiting())
    said = f"{len(outbox.open())} alerts open, {done.sent} messages sent, {waiting} waiting"
    return f"{said}; {NO_URL}" if outbox.say_once("no URL", holds=not to) else said


@dg.sensor(
    name=NAME, minimum_interval_seconds=INTERVAL_S, default_status=dg.DefaultSensorStatus.RUNNING
)
def alert_sensor(
    context: dg.SensorEvaluationContext, project: dg.ResourceParam[Project]
) -> dg.SensorResult:
    """Raise alerts from checks, runs, decisions, ticks and late assets, and send what is due.

    What was read is in the outbox before the cursor moves, and reading it twice changes nothing.
    """
    cursor = msgspec.json.decode(context.cursor, type=Cursor) if context.cursor else Cursor()
    look = _pass(context, project, cursor)
    take_in(look, context.log.warning)
    said = send_due(project, look.outbox, look.now)
    metadata, passed, reason, severity = state_of(look.outbox)
    events: list[dg.AssetMaterialization | dg.AssetCheckEvaluation] = []
    if (shown := f"{passed} {metadata['open_keys']} {metadata['failing_urls']}") != cursor.shown:
        cursor.shown = shown
        events = [
            dg.AssetMaterialization("alerts", metadata=metadata),
            dg.AssetCheckEvaluation(
                asset_key=dg.AssetKey("alerts"),
                check_name="delivered",
                passed=passed,
                severity=severity,
                description=reason,
                metadata={"failing_urls": metadata["failing_urls"]},
            ),
        ]
    return dg.SensorResult(
        skip_reason=said, cursor=msgspec.json.encode(cursor).decode(), asset_events=events
    )


def _pass(context: dg.SensorEvaluationContext, project: Project, cursor: Cursor) -> Pass:
    origin, repository = context.code_location_origin, context.repository_def
    checks = instigators = None
    if repository is not None:
        graph = repository.asset_graph
        checks = frozenset(f"{k.asset_key.path[-1]}.{k.name}" for k in graph.asset_check_keys)
        named = (*repository.sensor_defs, *repository.schedule_defs)
        instigators = frozenset(each.name for each in named)
    return Pass(
        context.instance,
        project,
        outbox_of(project),
        cursor,
        project.now(),
        origin.location_name if origin else None,
        checks,
        instigators,
    )


alerts = dg.AssetSpec(
    "alerts",
    description=(
        "What is wrong at the moment, and what of it could not be sent. The alert_sensor writes "
        "it when it changes; `churn alerts` shows the same."
    ),
    group_name="monitoring",
    kinds={"sqlite"},
    owners=[f"team:{SETTINGS.team}"],
)


@dg.asset_check(
    asset="alerts", description="No message has failed three times at a URL and still waits there."
)
def delivered(project: dg.ResourceParam[Project]) -> dg.AssetCheckResult:
    """See the description."""
    metadata, passed, reason, severity = state_of(outbox_of(project))
    return dg.AssetCheckResult(
        passed=passed, severity=severity, description=reason, metadata=metadata
    )


def state_of(outbox: Outbox) -> tuple[dict[str, Any], bool, str, dg.AssetCheckSeverity]:
    """What the asset `alerts` shows: metadata, whether all arrives, a sentence, a severity."""
    open_, waiting = outbox.open(), outbox.waiting()
    failing = failing_urls(waiting)
    reason = f"messages wait for {', '.join(failing)}" if failing else "every message was accepted"
    lines = [line for each in waiting for line in each.lines()]
    metadata = {
        "open": len(open_),
        "undelivered": len(waiting),
        "open_keys": ", ".join(sorted(condition.key for condition in open_)) or "none",
        "failing_urls": ", ".join(failing) or "none",
        "waiting": dg.MetadataValue.md("\n".join(f"    {line}" for line in lines) or "nothing"),
    }
    return metadata, not failing, reason, dg.AssetCheckSeverity.WARN


def failing_urls(waiting: list[Waiting]) -> list[str]:
    """The labels of the URLs where something was tried in vain often enough to say so."""
    return sorted(
        {d.label for each in waiting for d in each.failing if d.attempts >= _ATTEMPTS_IN_VAIN}
    )


def check_daemon(home: Home) -> list[str]:
    """What keeps alerts from being raised: daemons without a heartbeat, a failing alert_sensor.

    For a cron job outside of Dagster: it raises the alert itself, and sends what waits. Raises
    UserError, after an alert of that, when Dagster's storage is elsewhere and cannot be had.
    """
    project = Project.of(home)
    outbox, now = outbox_of(project), project.now()
    page = f"{(project.settings.alerts.dagster_url or DAGSTER.url).rstrip('/')}/health"
    try:
        unhealthy = _unhealthy()
    except Exception as error:
        outbox.raise_alert(sources.storage_alert(reason_of(error), at=now, link=page))
        send_due(project, outbox, now)
        told = storage_error(error)
        if told is None:
            raise
        raise told from error
    outbox.clear(sources.STORAGE, now=now, why="it answers again")
    alert = sources.daemon_alert(unhealthy, at=now, link=page)
    if alert is not None:
        outbox.raise_alert(alert)
    else:
        outbox.clear(sources.DAEMON, now=now, why="every daemon has a heartbeat")
    send_due(project, outbox, now)
    return unhealthy


def _unhealthy() -> list[str]:
    with quiet_retries(), DagsterInstance.get() as instance:
        statuses = instance.get_daemon_statuses().values()
        unhealthy = sorted(s.daemon_type for s in statuses if s.required and not s.healthy)
        return unhealthy + [
            f"{NAME}, whose last evaluation failed"
            for state, ticks in log.tick_states(instance, None, {NAME})
            if ticks and ticks[0].status is TickStatus.FAILURE
        ]
