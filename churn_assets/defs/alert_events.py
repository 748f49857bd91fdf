"""What Dagster's event log and tick history hold for alerts, read in the order it was written."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime, timedelta

import dagster as dg
from dagster import DagsterEventType, DagsterInstance, EventLogRecord, EventRecordsFilter
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorTick,
    InstigatorType,
    ScheduleInstigatorData,
    SensorInstigatorData,
    TickStatus,
)
from dagster._core.storage.event_log import SqlEventLogStorage
from dagster._core.storage.tags import WILL_RETRY_TAG
from dagster._utils.schedules import schedule_execution_time_iterator
from dagster_shared.error import SerializableErrorInfo

from churn_assets.monitoring.alert_sources import Ticks, first_line, sensor_missed_since

_PAGE = 1000
# A schedule ticks at its time or, after a pause of the daemon, within minutes of its return.
_SCHEDULE_PATIENCE_S = 3600.0
_DEFAULT_INTERVAL_S = 30.0


def newest_position(instance: DagsterInstance) -> int:
    """The id of the newest event in the log, 0 when there is none."""
    return _storage(instance).get_maximum_record_id() or 0


def events(
    instance: DagsterInstance,
    kinds: Sequence[DagsterEventType],
    after: int,
    up_to: int,
    asset: str | None = None,
) -> list[EventLogRecord]:
    """The events of these kinds with ids in (after, up_to], in the order of their ids."""
    found = [
        record
        for kind in kinds
        for record in _events_of(instance, kind, after, asset)
        if record.storage_id <= up_to
    ]
    return sorted(found, key=lambda record: record.storage_id)


def _events_of(
    instance: DagsterInstance, kind: DagsterEventType, after: int, asset: str | None
) -> Iterator[EventLogRecord]:
    key = dg.AssetKey(asset) if asset else None
    while True:
        # The index of a sharded SQLite log holds all of these kinds; its own method would read
        # every run's file instead.
        page = SqlEventLogStorage.get_event_records(
            _storage(instance),
            EventRecordsFilter(event_type=kind, asset_key=key, after_cursor=after),
            limit=_PAGE,
            ascending=True,
        )
        yield from page
        if len(page) < _PAGE:
            return
        after = page[-1].storage_id


def _storage(instance: DagsterInstance) -> SqlEventLogStorage:
    storage = instance.event_log_storage
    if not isinstance(storage, SqlEventLogStorage):
        raise TypeError(f"{type(storage).__name__} is no event log in SQL; alerts need one")
    return storage


def failure_of(
    instance: DagsterInstance, run_id: str, location: str | None
) -> tuple[str | None, str] | None:
    """The step a failed run stopped at, and the first line of why.

    None when there is nothing to tell of: Dagster tries the run again, a blocking check stopped
    it, which is an alert of its own, or it is of another code location than `location`.
    """
    run = instance.get_run_by_id(run_id)
    if run is None or run.tags.get(WILL_RETRY_TAG) == "true":
        return None
    origin = run.remote_job_origin
    if location is not None and origin is not None and origin.location_name != location:
        return None
    steps = instance.get_records_for_run(run_id, of_type=DagsterEventType.STEP_FAILURE).records
    for record in steps:
        event = record.event_log_entry.dagster_event
        if event is None:
            continue
        error = _innermost(event.step_failure_data.error)
        if error is not None and error.cls_name == "DagsterAssetCheckFailedError":
            return None
        return event.step_key, first_line(error.message if error else "")
    ended = instance.get_records_for_run(run_id, of_type=DagsterEventType.RUN_FAILURE).records
    event = ended[-1].event_log_entry.dagster_event if ended else None
    if event is None:
        return None, "no step says why"
    error = _innermost(event.job_failure_data.error)
    return None, first_line((error.message if error else None) or event.message or "")


def _innermost(error: SerializableErrorInfo | None) -> SerializableErrorInfo | None:
    while error is not None and error.cause is not None:
        error = error.cause
    return error


def tick_states(
    instance: DagsterInstance, location: str | None, known: Collection[str] | None
) -> list[tuple[InstigatorState, list[InstigatorTick]]]:
    """The sensors and schedules that are switched on, with their two newest ticks each.

    location: of the code; known: the names it has now. None where that cannot be told.
    """
    return [
        (
            state,
            list(instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=2)),
        )
        for state in instance.all_instigator_state()
        if state.is_running
        and (location is None or state.repository_selector.location_name == location)
        and (known is None or state.name in known)
    ]


def newest_tick(states: Sequence[tuple[InstigatorState, list[InstigatorTick]]]) -> float | None:
    """When anything was last evaluated, by the daemon's clock, in seconds."""
    return max((tick.timestamp for _, ticks in states for tick in ticks), default=None)


def ticks_of(
    state: InstigatorState,
    ticks: Sequence[InstigatorTick],
    *,
    now: float,
    alive_since: float,
    zone: str,
) -> Ticks:
    """How one of them has been doing. Without any tick it is not known to be due."""
    ended = next((tick for tick in ticks if tick.status is not TickStatus.STARTED), None)
    failed = ended is not None and ended.status is TickStatus.FAILURE
    error = None
    if ended is not None and failed:
        inner = _innermost(ended.error)
        error = first_line(inner.message if inner else "")
    last = ticks[0].timestamp if ticks else None
    data, missed = state.instigator_data, None
    if isinstance(data, SensorInstigatorData):
        since = last if last is not None else data.last_sensor_start_timestamp
        if since is not None:
            interval = data.min_interval or _DEFAULT_INTERVAL_S
            missed = sensor_missed_since(since, interval, now, alive_since)
    elif isinstance(data, ScheduleInstigatorData):
        since = last if last is not None else data.start_timestamp
        if since is not None and now - alive_since > _SCHEDULE_PATIENCE_S:
            times = schedule_execution_time_iterator(since + 1, data.cron_schedule, zone)
            fire = next(iter(times)).timestamp()
            missed = fire if now - fire > _SCHEDULE_PATIENCE_S else None
    kind = "sensor" if state.instigator_type is InstigatorType.SENSOR else "schedule"
    return Ticks(state.name, kind, last, error, missed)


def last_fire(cron: str, zone: str, now: datetime) -> datetime:
    """The last time at or before `now` a schedule had to tick, UTC."""
    times = schedule_execution_time_iterator(now.timestamp(), cron, zone, ascending=False)
    return next(iter(times)).astimezone(UTC)


def cron_interval(cron: str, zone: str, now: datetime) -> timedelta:
    """The time between the last two times of a schedule before `now`."""
    times = schedule_execution_time_iterator(now.timestamp(), cron, zone, ascending=False)
    newer, older = next(times), next(times)
    return newer - older
