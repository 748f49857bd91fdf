"""Dagster's daemon with a clock that can be turned: it ticks schedules and sensors, and runs jobs.

A simulated month must not take a month. The daemon here asks the schedules and sensors of the code
location what Dagster's own would ask them, at the moments of the simulated clock, and executes what
they request in this process, one run after the other. As with Dagster's own, each run carries what
it was asked for by, and what has asked once is not run again, whatever is restarted in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec
from dagster import DagsterInstance, DagsterRunStatus, RunsFilter
from dagster._core.storage.tags import (
    MAX_RETRIES_TAG,
    RETRY_NUMBER_TAG,
    RUN_KEY_TAG,
    WILL_RETRY_TAG,
)
from dagster._utils.schedules import schedule_execution_time_iterator

from churn_assets.contract.clock import set_clock
from churn_assets.errors import UserError

# A sensor that asks for a run at each of so many evaluations in a row would never be done.
_MOST_ROUNDS = 12
_ASKED_BY = "churn/asked_by"


@dataclass(frozen=True)
class SimulatedRun:
    """A run the daemon executed: of which job, asked for by what, when, and how it ended."""

    job: str
    asked_by: str
    at: datetime
    run_id: str
    success: bool
    tags: Mapping[str, str]


@dataclass(frozen=True)
class FailedTick:
    """An evaluation of a sensor that failed: of which, when, and why."""

    sensor: str
    at: datetime
    why: str


class State(msgspec.Struct):
    """What a daemon knows from one start to the next: cursors and the last tick."""

    ticked: datetime
    cursors: dict[str, str] = {}


def _as_it_is(job: str, request: dg.RunRequest, at: datetime) -> dg.RunRequest:
    return request


@dataclass
class SimulatedDaemon:
    """Ticks `definitions` on `instance` by the clock in the file `clock_path`.

    state_path: where it keeps what it must not forget; a daemon made anew goes on from there.
    alter: what becomes of a request for a run of a job at a moment, before it is executed.
    after_run: what the end of a process of its own would bring about after each run.
    sensors_every: the least time between two looks at the sensors, apart from the one at the end of
    `run_until`; with none they are looked at after each tick of a schedule.
    """

    definitions: dg.Definitions
    instance: DagsterInstance
    resources: Mapping[str, object]
    clock_path: Path
    state_path: Path
    began: datetime
    alter: Callable[[str, dg.RunRequest, datetime], dg.RunRequest] = _as_it_is
    after_run: Callable[[], None] = lambda: None
    sensors_every: timedelta = timedelta(0)
    runs: list[SimulatedRun] = field(default_factory=list)
    failed_ticks: list[FailedTick] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            self._state = msgspec.json.decode(self.state_path.read_bytes(), type=State)
        except FileNotFoundError:
            self._state = State(self.began)
        self._looked = self._state.ticked
        repository = self.definitions.get_repository_def()
        self._repository = repository
        self._schedules = [
            s
            for s in repository.schedule_defs
            if s.default_status is dg.DefaultScheduleStatus.RUNNING
        ]
        self._sensors = [
            s for s in repository.sensor_defs if s.default_status is dg.DefaultSensorStatus.RUNNING
        ]

    @property
    def ticked(self) -> datetime:
        """Up to when everything that was due has been done."""
        return self._state.ticked

    def run_until(self, end: datetime) -> None:
        """Do what is due up to `end`, in order, and leave the clock there. Both times are aware."""
        for moment, schedule in self._due(end):
            set_clock(self.clock_path, moment)
            self._tick_schedule(schedule, moment)
            if moment - self._looked >= self.sensors_every:
                self._tick_sensors(moment)
            self._state.ticked = moment
            self._keep()
        set_clock(self.clock_path, end)
        self._tick_sensors(end)
        self._state.ticked = end
        self._keep()

    def _due(self, end: datetime) -> Iterator[tuple[datetime, dg.ScheduleDefinition]]:
        """Every tick after the last one up to `end`, in order of time and then of the map."""
        ticks: list[tuple[datetime, int]] = []
        for place, schedule in enumerate(self._schedules):
            # It begins with the tick at that very moment, which has been done.
            for moment in schedule_execution_time_iterator(
                self._state.ticked.timestamp(),
                schedule.cron_schedule,
                schedule.execution_timezone or "UTC",
            ):
                if moment > end:
                    break
                if moment > self._state.ticked:
                    ticks.append((moment, place))
        for moment, place in sorted(set(ticks)):
            yield moment, self._schedules[place]

    def _tick_schedule(self, schedule: dg.ScheduleDefinition, moment: datetime) -> None:
        with dg.build_schedule_context(
            instance=self.instance,
            scheduled_execution_time=moment,
            resources=self.resources,
            repository_def=self._repository,
        ) as context:
            # Else it opens the instance anew, which takes a second.
            context._instance = self.instance
            asked = schedule.evaluate_tick(context)
        for request in asked.run_requests or []:
            # One without a key is the only one of its tick.
            keyed = request.with_replaced_attrs(run_key=request.run_key or moment.isoformat())
            self.execute(schedule.job_name, schedule.name, keyed, moment)

    def _tick_sensors(self, moment: datetime) -> None:
        """Evaluate the sensors until none of them asks for anything more."""
        self._looked = moment
        for _ in range(_MOST_ROUNDS):
            # All of them, also after one has asked for a run.
            asked = [self._tick_sensor(sensor, moment) for sensor in self._sensors]
            if not any(asked):
                return
        raise UserError(f"the sensors ask for run after run at {moment}; see the runs' tags")

    def _tick_sensor(self, sensor: dg.SensorDefinition, moment: datetime) -> bool:
        with dg.build_sensor_context(
            instance=self.instance,
            cursor=self._state.cursors.get(sensor.name),
            repository_def=self._repository,
            repository_name=self._repository.name,
            sensor_name=sensor.name,
            resources=self.resources,
        ) as context:
            try:
                asked = sensor.evaluate_tick(context)
            # As Dagster does: a sensor that fails is shown, keeps no other from its tick, and is
            # evaluated from where it was the next time.
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                self.failed_ticks.append(FailedTick(sensor.name, moment, why))
                return False
        ran = False
        for request in asked.run_requests or []:
            job = request.job_name or sensor.job_name
            ran |= self.execute(job, sensor.name, request, moment)
        # As Dagster does: a cursor moves once what it asked for is on its way.
        if asked.cursor is not None:
            self._state.cursors[sensor.name] = asked.cursor
            self._keep()
        return ran

    def execute(
        self, job: str | None, asked_by: str, request: dg.RunRequest, moment: datetime
    ) -> bool:
        """Execute what is requested; whether it was: once for a run key, whatever its end.

        That there was such a run is known from the instance, as it began: a daemon killed during a
        run has asked for it.
        """
        assert job is not None, f"{asked_by} names no job"
        marks = {_ASKED_BY: asked_by, RUN_KEY_TAG: request.run_key} if request.run_key else {}
        if marks and self.instance.get_runs(RunsFilter(tags=marks), limit=1):
            return False
        request = self.alter(job, request, moment)
        tries: dict[str, str] = {}
        for tried in count(1):
            result = self.definitions.resolve_job_def(job).execute_in_process(
                instance=self.instance,
                run_config=dict(request.run_config or {}),
                tags={**request.tags, **marks, **tries},
                partition_key=request.partition_key,
                asset_selection=list(request.asset_selection) if request.asset_selection else None,
                raise_on_error=False,
            )
            self.after_run()
            run = self.instance.get_run_by_id(result.run_id)
            done = run is not None and run.status is DagsterRunStatus.SUCCESS
            tags = dict(run.tags) if run else {}
            self.runs.append(SimulatedRun(job, asked_by, moment, result.run_id, done, tags))
            # What the instance says of a failed run, a daemon does.
            if tags.get(WILL_RETRY_TAG) != "true":
                break
            # A run executed in this process has no run it comes from, so the instance cannot count.
            left = int(tags.get(MAX_RETRIES_TAG, self.instance.run_retries_max_retries)) - 1
            tries = {RETRY_NUMBER_TAG: str(tried), MAX_RETRIES_TAG: str(left)}
        return True

    def _keep(self) -> None:
        written = self.state_path.with_name(f".{self.state_path.name}.tmp")
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        written.write_bytes(msgspec.json.encode(self._state))
        written.replace(self.state_path)


def failures(runs: list[SimulatedRun], instance: DagsterInstance) -> dict[str, Any]:
    """Why runs failed, a line each, by run id."""
    told: dict[str, Any] = {}
    for run in runs:
        if run.success:
            continue
        events = instance.all_logs(run.run_id)
        errors = [e.step_failure_data.error for e in map(_event, events) if e and e.is_step_failure]
        told[run.run_id] = errors[0].message.strip() if errors and errors[0] else run.job
    return told


def _event(entry: Any) -> Any:
    return entry.dagster_event
