"""The schedules: the daily refresh, Monday's training, the daily drift report."""

from collections.abc import Iterator
from datetime import date, timedelta

import dagster as dg

from churn_assets.data.late import Plan, plan_refresh
from churn_assets.defs import jobs
from churn_assets.defs.partitions import DAILY, SETTINGS, range_tags
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


def requests_for_late_events(plan: Plan, scheduled: date) -> list[dg.RunRequest]:
    """The runs that bring the existing partitions up to date, in the order they must go.

    A plan is asked for once a day: should a run fail, the next day's refresh asks again.
    """
    stages = (
        ("raw", plan.raw_tables, plan.raw_days),
        ("features", ("customer_features", "online_features"), plan.features),
        ("labels", ("churn_labels",), plan.labels),
    )
    reasons = [found.reason for found in plan.raw]
    why = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if reasons[3:] else "")
    return [
        dg.RunRequest(
            run_key=f"late-{stage}-{scheduled}-{plan.key}",
            asset_selection=[dg.AssetKey(asset) for asset in assets],
            tags=range_tags(*days) | {"churn/late": why or "what an unfinished refresh left"},
        )
        for stage, assets, days in stages
        if days
    ]


@dg.schedule(
    job=jobs.daily_refresh,
    cron_schedule=SETTINGS.schedules.daily_refresh,
    execution_timezone=ZONE,
    default_status=ON,
)
def daily_refresh_schedule(
    context: dg.ScheduleEvaluationContext, project: dg.ResourceParam[Project]
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """Bring in late and corrected events, then the days that have become complete since."""
    try:
        newest = project.data_time()
    except UserError as error:
        yield dg.SkipReason(f"{error}, or run `make run`")
        return
    late: list[dg.RunRequest] = []
    try:
        plan = plan_refresh(
            project.lake,
            project.source,
            SETTINGS.raw_tables,
            SETTINGS.windows,
            SETTINGS.late_events,
            now=project.now(),
        )
        late = requests_for_late_events(plan, context.scheduled_execution_time.date())
    except UserError as error:
        context.log.warning(f"not looked for late events: {error}")
    yield from late
    with dg.partition_loading_context(effective_dt=context.scheduled_execution_time):
        last_key = DAILY.get_last_partition_key()
    days = days_to_refresh(
        newest,
        date.fromisoformat(last_key) if last_key else newest,
        one_at_a_time=SETTINGS.is_shop,
    )
    if not days and not late:
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
