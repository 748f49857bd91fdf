"""The schedules: the daily refresh, Monday's training, the daily and hourly looks at all of it."""

import os
from datetime import UTC, date, datetime, timedelta

import dagster as dg
from dagster._utils.schedules import is_valid_cron_schedule

from churn_assets.contract.clock import is_turned
from churn_assets.data.late import Plan, plan_refresh
from churn_assets.defs import jobs
from churn_assets.defs.partitions import SETTINGS, range_tags
from churn_assets.defs.resources import Project
from churn_assets.defs.weekly import trained_in, week_of, week_tags
from churn_assets.errors import UserError
from churn_assets.lifecycle.history import trials
from churn_assets.lifecycle.registry import read_registry

ON = dg.DefaultScheduleStatus.RUNNING
UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
ZONE = SETTINGS.schedules.timezone


def cron(key: str) -> str:
    """The cron expression of a schedule. Raises UserError when it is none."""
    expression = getattr(SETTINGS.schedules, key)
    if not is_valid_cron_schedule(expression):
        raise UserError(
            f"schedules.{key} is {expression!r}, not a cron expression such as 0 2 * * *"
        )
    return expression


def days_to_refresh(
    newest: date, now: datetime, end: date | None, *, one_at_a_time: bool
) -> tuple[date, date] | None:
    """The first and last day a refresh has to bring in, or None when nothing is missing.

    A live source catches up to the last day that is complete at `now`. The built-in shop lives in
    the past, and each tick produces its next day, unless the clock is turned for it.
    """
    complete = now.astimezone(UTC).date() - timedelta(days=1)
    last = min(complete, end) if end else complete
    first = newest + timedelta(days=1)
    if last < first:
        return None
    return first, first if one_at_a_time else last


def refreshed_up_to(project: Project) -> date | None:
    """The newest day for which everything the refresh makes is there; None without any data.

    A day whose events came in but whose features did not is refreshed again.
    """
    tables = (*project.settings.raw_tables, "customer_features", "churn_labels")
    days = [project.lake.days(table) for table in tables]
    return min(there[-1] for there in days) if all(days) else None


def refresh_request(first: date, last: date) -> dg.RunRequest:
    """One run for all the days, so that none of them runs before the day it looks back to.

    Without a run key: Dagster makes a tick's run once anyway, and a key would keep the next tick
    from trying a day again whose run failed.
    """
    if first == last:
        return dg.RunRequest(partition_key=first.isoformat())
    return dg.RunRequest(tags=range_tags(first, last))


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
    cron_schedule=cron("daily_refresh"),
    execution_timezone=ZONE,
    default_status=ON,
)
def daily_refresh_schedule(
    context: dg.ScheduleEvaluationContext, project: dg.ResourceParam[Project]
) -> list[dg.RunRequest] | dg.SkipReason:
    """Bring in late and corrected events, then the days that have become complete since."""
    newest = refreshed_up_to(project)
    if newest is None:
        return dg.SkipReason("there is no history yet; `make run` brings it in")
    unfinished = dg.RunsFilter(job_name=jobs.daily_refresh.name, statuses=UNFINISHED)
    if context.instance.get_runs(unfinished, limit=1):
        return dg.SkipReason("a refresh is still running")
    late = late_requests(context, project)
    days = days_to_refresh(
        newest,
        context.scheduled_execution_time,
        project.settings.calendar.end,
        one_at_a_time=project.settings.is_shop and not is_turned(os.environ),
    )
    if days is None and not late:
        return dg.SkipReason(f"every day up to {newest} is there and no later one is complete")
    return [*late, *([refresh_request(*days)] if days else [])]


def late_requests(context: dg.ScheduleEvaluationContext, project: Project) -> list[dg.RunRequest]:
    """What late and corrected events ask for; a source that cannot be read only says so."""
    try:
        plan = plan_refresh(
            project.lake,
            project.source,
            SETTINGS.raw_tables,
            SETTINGS.windows,
            SETTINGS.late_events,
            now=project.now(),
        )
    except UserError as error:
        context.log.warning(f"not looked for late events: {error}")
        return []
    return requests_for_late_events(plan, context.scheduled_execution_time.date())


@dg.schedule(
    job=jobs.training,
    cron_schedule=cron("training"),
    execution_timezone=ZONE,
    default_status=ON,
)
def training_schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """Train, unless somebody has for this week: a person or a workflow, with `churn train`."""
    if SETTINGS.retraining.modes.scheduled != "automatic":
        return dg.SkipReason(f"retraining.modes.scheduled is {SETTINGS.retraining.modes.scheduled}")
    week = week_of(context.scheduled_execution_time, ZONE)
    if run := trained_in(context.instance, week):
        return dg.SkipReason(f"run {run.run_id} is the training of {week}")
    return dg.RunRequest(tags=week_tags(week))


drift_schedule = dg.ScheduleDefinition(
    job=jobs.drift,
    cron_schedule=cron("drift_report"),
    execution_timezone=ZONE,
    default_status=ON,
)


@dg.schedule(
    job=jobs.trial,
    cron_schedule=cron("trial_report"),
    execution_timezone=ZONE,
    default_status=ON,
)
def trial_schedule(
    context: dg.ScheduleEvaluationContext, project: dg.ResourceParam[Project]
) -> dg.RunRequest | dg.SkipReason:
    """Judge the trial that is going on, or the last one while its outcomes still come."""
    found = trials(read_registry(project.mlflow_client(), SETTINGS.model_name).history)[-1:]
    late = timedelta(days=SETTINGS.windows.horizon_days + 2)
    if not found:
        return dg.SkipReason("no version has been on trial")
    ended = found[0].until
    if ended is not None and context.scheduled_execution_time > ended + late:
        return dg.SkipReason(f"{found[0].id} ended on {ended:%Y-%m-%d}, and its outcomes are known")
    return dg.RunRequest()


treatment_schedule = dg.ScheduleDefinition(
    job=jobs.treatment,
    cron_schedule=cron("treatment_report"),
    execution_timezone=ZONE,
    default_status=ON,
)

prediction_log_schedule = dg.ScheduleDefinition(
    name="prediction_log_schedule",
    job=jobs.ingest_predictions,
    cron_schedule=cron("prediction_log"),
    execution_timezone=ZONE,
    default_status=ON,
)

decisions_schedule = dg.ScheduleDefinition(
    job=jobs.decisions,
    cron_schedule=cron("decisions"),
    execution_timezone=ZONE,
    default_status=ON,
)

performance_schedule = dg.ScheduleDefinition(
    name="performance_schedule",
    job=jobs.performance,
    cron_schedule=cron("performance_report"),
    execution_timezone=ZONE,
    default_status=ON,
)

serving_health_schedule = dg.ScheduleDefinition(
    name="serving_health_schedule",
    job=jobs.watch_service,
    cron_schedule=cron("serving_health"),
    execution_timezone=ZONE,
    default_status=ON,
)

health_schedule = dg.ScheduleDefinition(
    job=jobs.health,
    cron_schedule=cron("health_page"),
    execution_timezone=ZONE,
    default_status=ON,
)

clean_archive_schedule = dg.ScheduleDefinition(
    job=jobs.clean_archive,
    cron_schedule=cron("clean_archive"),
    execution_timezone=ZONE,
    default_status=ON,
)

SCHEDULES = [
    daily_refresh_schedule,
    training_schedule,
    drift_schedule,
    trial_schedule,
    treatment_schedule,
    prediction_log_schedule,
    decisions_schedule,
    performance_schedule,
    serving_health_schedule,
    health_schedule,
    clean_archive_schedule,
]
