"""The schedules: the daily refresh, Monday's training, the daily drift report."""

from collections.abc import Iterator
from datetime import date, timedelta

import dagster as dg

from churn_assets.defs import jobs
from churn_assets.defs.partitions import DAILY, SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.errors import UserError

ON = dg.DefaultScheduleStatus.RUNNING
ZONE = SETTINGS.schedules.timezone


def days_to_refresh(newest: date, last_available: date, *, one_at_a_time: bool) -> list[date]:
    """The days a refresh has to bring in, oldest first.

    A live source catches up to the last available day; the built-in shop lives in the past and
    each tick produces its next day.
    """
    missing = (last_available - newest).days
    wanted = min(missing, 1) if one_at_a_time else missing
    return [newest + timedelta(days=step) for step in range(1, wanted + 1)]


@dg.schedule(
    job=jobs.daily_refresh,
    cron_schedule=SETTINGS.schedules.daily_refresh,
    execution_timezone=ZONE,
    default_status=ON,
)
def daily_refresh_schedule(
    context: dg.ScheduleEvaluationContext, project: dg.ResourceParam[Project]
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """Bring in the days that have become complete since the newest one in the lake."""
    try:
        newest = project.data_time()
    except UserError as error:
        yield dg.SkipReason(f"{error}, or run `make run`")
        return
    last_key = DAILY.get_last_partition_key(context.scheduled_execution_time)
    days = days_to_refresh(
        newest,
        date.fromisoformat(last_key) if last_key else newest,
        one_at_a_time=SETTINGS.is_shop,
    )
    if not days:
        yield dg.SkipReason(f"every day up to {newest} is there and no later one is complete")
    for day in days:
        yield dg.RunRequest(run_key=f"refresh-{day}", partition_key=day.isoformat())


training_schedule = dg.ScheduleDefinition(
    job=jobs.training,
    cron_schedule=SETTINGS.schedules.training,
    execution_timezone=ZONE,
    default_status=ON,
)
drift_schedule = dg.ScheduleDefinition(
    job=jobs.drift,
    cron_schedule=SETTINGS.schedules.drift_report,
    execution_timezone=ZONE,
    default_status=ON,
)

SCHEDULES = [daily_refresh_schedule, training_schedule, drift_schedule]
