"""Training once a week, whoever asks: Dagster's schedule, a workflow elsewhere, or a person.

Every run of the training job that was asked for by the week carries it as a tag, and whoever asks
looks for the tag first. Should two ask in the same moment, the later run stops itself.
"""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import dagster as dg
from dagster import DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter

JOB = "training"
WEEK = "churn/week"
REASON = "churn/reason"

_ENDED = {DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED}


def week_of(moment: datetime, zone: str) -> str:
    """The ISO 8601 week of an aware `moment` in time zone `zone`, such as 2026-W48."""
    return moment.astimezone(ZoneInfo(zone)).strftime("%G-W%V")


def week_tags(week: str) -> dict[str, str]:
    """The tags of the run that trains for `week`."""
    return {WEEK: week, REASON: f"weekly training of {week}"}


def trained_in(instance: DagsterInstance, week: str) -> DagsterRun | None:
    """The first run that trains for `week`, or has trained; None when it is to be done.

    One that a gate refused has trained; one that ended before there was a model has not.
    """
    records = instance.get_run_records(RunsFilter(job_name=JOB, tags={WEEK: week}), ascending=True)
    return next((r.dagster_run for r in records if _counts(instance, r.dagster_run)), None)


def stop_unless_first(instance: DagsterInstance, run: DagsterRun) -> None:
    """Stop `run` when another of its week trains or has trained.

    Raises dagster.Failure, which is not tried again.
    """
    week = run.tags.get(WEEK)
    first = trained_in(instance, week) if week else None
    # A run that was executed again by hand belongs to the one it repeats.
    if first is not None and first.run_id not in (run.run_id, run.root_run_id):
        raise dg.Failure(
            f"{week} is trained for by run {first.run_id}; to train again in the same week, start "
            f"the job without the tag {WEEK}, or give a reason: churn train --reason",
            allow_retries=False,
        )


def _counts(instance: DagsterInstance, run: DagsterRun) -> bool:
    if run.status not in _ENDED or run.status is DagsterRunStatus.SUCCESS:
        return True
    made = instance.get_records_for_run(
        run.run_id, of_type=DagsterEventType.ASSET_MATERIALIZATION
    ).records
    return any(
        record.asset_key is not None and record.asset_key.path[-1] == "trained_model"
        for record in made
    )
