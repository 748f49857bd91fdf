"""Healing: whether to retrain and whether to roll back, each a stored decision."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

import dagster as dg
import msgspec
from dagster import DagsterInstance, DagsterRunStatus, RunsFilter

from churn_assets.defs.metadata import faults_table, metrics_table, triggers_table
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project, read_record
from churn_assets.defs.weekly import REASON
from churn_assets.errors import UserError
from churn_assets.lifecycle.history import Evidence, last_known_good, tenures
from churn_assets.lifecycle.records import TrainingSetRecord, every_record, records_by_run
from churn_assets.lifecycle.registry import POLICY, Registry, read_registry
from churn_assets.monitoring.drift_watch import DriftRecord
from churn_assets.monitoring.feeds import feed_metric, find_faults
from churn_assets.monitoring.metric import Metric, read_metrics
from churn_assets.monitoring.retraining import (
    Ending,
    RetrainingDecision,
    RetrainingEvidence,
    Training,
    decide_retraining,
)
from churn_assets.monitoring.rollback import decide_rollback

GROUP = "healing"
OWNERS = [f"team:{SETTINGS.team}"]
DECISION = "churn/decision"
BY_DECISION = {"churn/by": "decision"}

_FRESH = timedelta(days=3)
_FAILED = {DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED}
_Record = TypeVar("_Record")


@dg.asset(
    group_name=GROUP,
    kinds={"python"},
    owners=OWNERS,
    deps=[table for table in SETTINGS.raw_tables if table != "customers"],
    check_specs=[
        dg.AssetCheckSpec(
            "feeds_sound",
            asset="feed_health",
            description="As many events as usual on such days came in, of every table.",
        )
    ],
)
def feed_health(context: dg.AssetExecutionContext, project: dg.ResourceParam[Project]):
    """The feeds of raw events: days on which far fewer came in than usual, and what they touch."""
    counts, policy = project.feed_counts(), SETTINGS.feeds
    found = {table: find_faults(table, days, policy) for table, days in counts.items()}
    day, now = project.data_time(), project.now()
    metrics = [
        feed_metric(table, counts[table], faults, day, policy, now=now)
        for table, faults in found.items()
    ]
    project.add_metrics(metrics)
    broken = [fault for faults in found.values() for fault in faults if fault.open]
    return dg.MaterializeResult(
        metadata={
            "broken": ", ".join(fault.table for fault in broken) or "none",
            "feeds": metrics_table(metrics),
            "faults": faults_table([fault for faults in found.values() for fault in faults]),
        },
        check_results=[
            dg.AssetCheckResult(
                check_name="feeds_sound",
                passed=not broken,
                severity=dg.AssetCheckSeverity.WARN,
                description="; ".join(fault.line() for fault in broken) or "every feed is sound",
            )
        ],
    )


@dg.asset(
    group_name=GROUP,
    kinds={"python"},
    owners=OWNERS,
    deps=["feed_health", "drift_report", "churn_labels", "production_release"],
)
def retraining_decision(context: dg.AssetExecutionContext, project: dg.ResourceParam[Project]):
    """Whether to train now, by the five triggers: verdict, reasons, evidence, policy.

    Nothing is trained here; a sensor carries the decision to a run, once.
    """
    registry = read_registry(project.mlflow_client(), SETTINGS.model_name)
    decision = decide_retraining(
        retraining_evidence(project, registry, context.instance),
        SETTINGS.retraining,
        data_day=project.data_time(),
        horizon_days=SETTINGS.windows.horizon_days,
        now=project.now(),
    )
    context.log.info("%s: %s", decision.verdict, "; ".join(decision.reasons))
    return dg.MaterializeResult(
        value=decision,
        metadata={
            "verdict": decision.verdict,
            "action": decision.action,
            "reasons": "; ".join(decision.reasons),
            "proposal": decision.proposal or "none",
            "triggers": triggers_table(decision.triggers),
            "evidence": metrics_table(decision.evidence),
            "policy": decision.policy,
            "id": decision.id,
        },
    )


@dg.asset(
    group_name=GROUP,
    kinds={"python"},
    owners=OWNERS,
    deps=["feed_health", "churn_labels", "production_release"],
)
def rollback_decision(context: dg.AssetExecutionContext, project: dg.ResourceParam[Project]):
    """Whether the version in Production is taken back: by its live metrics and matured labels.

    Nothing is moved here; a sensor carries the decision to a run, once.
    """
    registry = read_registry(project.mlflow_client(), SETTINGS.model_name)
    decision = decide_rollback(
        registry.history,
        live_metrics(project, registry),
        former_version_replayed(project, registry),
        SETTINGS.rollback,
        automatic=POLICY,
        endings=endings_of(context.instance),
        now=project.now(),
    )
    context.log.info("%s: %s", decision.verdict, "; ".join(decision.reasons))
    return dg.MaterializeResult(
        value=decision,
        metadata={
            "verdict": decision.verdict,
            "action": decision.action,
            "version": decision.version or "none",
            "to": decision.to or "none",
            "reasons": "; ".join(decision.reasons),
            "evidence": metrics_table(decision.evidence),
            "replay": _line(decision.replay),
            "policy": decision.policy,
            "id": decision.id,
        },
    )


def retraining_evidence(
    project: Project, registry: Registry, instance: DagsterInstance
) -> RetrainingEvidence:
    """Everything a decision to retrain is made from, as it is now."""
    records, production = project.home.records, registry.production
    trainings = [
        Training(record.at, record.test, record.plan, record.without, record.decision)
        for run_id, record in records_by_run(records, "training_set", TrainingSetRecord).items()
        if record.at is not None and came_to_a_model(instance, records, run_id)
    ]
    held = tenures(registry.history)
    return RetrainingEvidence(
        metrics=read_metrics(project.home.metrics),
        faults=[fault for found in project.faults().values() for fault in found],
        trainings=trainings,
        labelled_days=project.sound_days(project.labelled_days()),
        production=production,
        since=held[-1].since if held else None,
        without=registry.version(production).without if production else (),
        earlier=earlier_decisions(records),
        endings=endings_of(instance),
        spoiled=spoiled_features(records, project.now()),
    )


def spoiled_features(records: Path, now: datetime) -> dict[str, str]:
    """The features that the newest drift report finds constant or gone, while it is news."""
    try:
        found = msgspec.json.decode(read_record(records, "drift_report"), type=DriftRecord)
    except (UserError, msgspec.ValidationError):
        return {}
    if now - found.at > _FRESH:
        return {}
    return {f.feature: f.reason for f in found.features if f.finding is not None}


def earlier_decisions(records: Path) -> list[RetrainingDecision]:
    """Every decision on retraining there has been, oldest first."""
    found = every_record(records, "retraining_decision", RetrainingDecision)
    return sorted(found, key=lambda decision: decision.at)


def came_to_a_model(instance: DagsterInstance, records: Path, run_id: str) -> bool:
    """Whether a training did, or may still: one that broke off before has to be done again."""
    if (records / "trained_model" / f"{run_id}.json").exists():
        return True
    run = instance.get_run_by_id(run_id)
    return run is None or run.status not in _FAILED


def endings_of(instance: DagsterInstance) -> dict[str, Ending]:
    """How the runs ended that carried decisions out; the newest run of each decision counts."""
    runs = instance.get_runs(RunsFilter(tags=BY_DECISION))
    endings: dict[str, Ending] = {}
    for run in reversed(runs):
        if run.status in _FAILED:
            endings[run.tags[DECISION]] = "failed"
        else:
            done = run.status is DagsterRunStatus.SUCCESS
            endings[run.tags[DECISION]] = "succeeded" if done else "running"
    return endings


def live_metrics(project: Project, registry: Registry) -> list[Metric]:
    """The newest metric of each name that is of the release in Production."""
    held = tenures(registry.history)
    if not held:
        return []
    release = registry.version(held[-1].version).tags.get("release_id")
    newest = {
        metric.name: metric
        for metric in read_metrics(project.home.metrics, since=held[-1].since)
        if metric.release_id == release
    }
    return list(newest.values())


def former_version_replayed(project: Project, registry: Registry) -> Evidence | str:
    """The version in Production against the last known good one, on the newest labelled day."""
    production, former = registry.production, last_known_good(registry.history)
    if production is None or former is None:
        return "there is no version before it"
    if registry.version(production).without:
        return "it was trained for a broken feed, whose labelled days are of the time before"
    days = project.sound_days(project.labelled_days())
    if not days:
        return "no labelled day is untouched by faults of the feeds"
    return project.comparison(registry).on_day(
        production, former, days[-1], min_rows=SETTINGS.rollback.min_rows
    )


def train_request(decision: RetrainingDecision) -> dg.RunRequest:
    """The run that carries a decision to train out."""
    config = {
        "plan": decision.plan,
        "until": decision.until.isoformat() if decision.until else None,
        "without": list(decision.without),
        "decision": decision.id,
    }
    return dg.RunRequest(
        run_key=decision.id,
        run_config={"ops": {"training_set": {"config": config}}},
        tags=decision_tags(decision.id, decision.at)
        | {REASON: f"{decision.trigger}: {'; '.join(decision.reasons)}"},
    )


def rollback_request(
    identity: str, at: datetime, reasons: Sequence[str], to: str | None = None
) -> dg.RunRequest:
    """The run that takes the version in Production back because a decision says so."""
    change = {
        "what": "rollback",
        "who": POLICY,
        "why": "; ".join(reasons),
        "to": to,
        "decision": identity,
    }
    return dg.RunRequest(
        run_key=identity,
        run_config={"ops": {"production_release": {"config": change}}},
        # A decision is carried out once, however often it is tried; a person's word is not told
        # apart from the same word said twice.
        tags=decision_tags(identity, at) | {"dagster/max_retries": "2"},
    )


def decision_tags(identity: str, at: datetime) -> dict[str, str]:
    """The tags of a run that carries a decision out."""
    return {DECISION: identity, "churn/decided_at": at.isoformat(), **BY_DECISION}


def _line(replay: Evidence | str | None) -> str:
    return replay.line() if isinstance(replay, Evidence) else replay or "none"


def decided(records: Path, asset: str, run_id: str, kind: type[_Record]) -> _Record:
    """The decision that a run of `asset` made. Raises UserError when it left none."""
    return msgspec.json.decode(read_record(records, asset, run_id), type=kind)
