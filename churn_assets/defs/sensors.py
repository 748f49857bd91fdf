"""The sensors: decisions are carried out; MLflow hears how runs really ended."""

import dagster as dg
import msgspec

from churn_assets.defs import jobs
from churn_assets.defs.healing import decided, rollback_request, train_request
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project, read_record
from churn_assets.errors import UserError
from churn_assets.lifecycle.experiments import Ending, reconcile
from churn_assets.lifecycle.promotion import PromotionDecision
from churn_assets.lifecycle.registry import POLICY, read_registry
from churn_assets.monitoring.retraining import RetrainingDecision
from churn_assets.monitoring.rollback import RollbackDecision
from churn_assets.monitoring.trial import HARMFUL, TrialReport

ON = dg.DefaultSensorStatus.RUNNING
_CARRIERS = [jobs.training, jobs.rollback]

ENDINGS: dict[dg.DagsterRunStatus, Ending] = {
    dg.DagsterRunStatus.SUCCESS: "FINISHED",
    dg.DagsterRunStatus.FAILURE: "FAILED",
    dg.DagsterRunStatus.CANCELED: "KILLED",
}


@dg.asset_sensor(asset_key=dg.AssetKey("promotion_decision"), job=jobs.promotion, default_status=ON)
def promotion_decided(
    context: dg.SensorEvaluationContext,
    asset_event: dg.EventLogEntry,
    project: dg.ResourceParam[Project],
) -> dg.RunRequest | dg.SkipReason:
    """Carry a decision to promote to a run, once. One that waits for a person is left alone."""
    record = read_record(project.home.records, "promotion_decision", asset_event.run_id)
    decision = msgspec.json.decode(record, type=PromotionDecision)
    if decision.verdict != "promote":
        return dg.SkipReason(f"version {decision.version}: {'; '.join(decision.reasons)}")
    if decision.by_person:
        return dg.SkipReason(f"{decision.id} is carried out by the run it was approved in")
    history = read_registry(project.mlflow_client(), decision.name).history
    if any(step.decision == decision.id for step in history):
        return dg.SkipReason(f"{decision.id} has been carried out")
    return dg.RunRequest(run_key=decision.id)


@dg.asset_sensor(asset_key=dg.AssetKey("trial_report"), job=jobs.stop_trial, default_status=ON)
def trial_judged(
    context: dg.SensorEvaluationContext,
    asset_event: dg.EventLogEntry,
    project: dg.ResourceParam[Project],
) -> dg.RunRequest | dg.SkipReason:
    """End a trial whose version is surely worse or hit a guard rail, once."""
    try:
        record = read_record(project.home.records, "trial_report", asset_event.run_id)
    except UserError:
        return dg.SkipReason("no version has been on trial")
    report = msgspec.json.decode(record, type=TrialReport)
    trial = read_registry(project.mlflow_client(), SETTINGS.model_name).trial
    if report.verdict not in HARMFUL:
        return dg.SkipReason(f"{report.trial}: {report.verdict}")
    if trial is None or trial.id != report.trial:
        return dg.SkipReason(f"{report.trial} is not going on")
    change = {"what": "stop_trial", "who": POLICY, "why": f"{report.verdict}: {report.reason}"}
    return dg.RunRequest(
        run_key=f"stop-{report.trial}",
        run_config={"ops": {"production_release": {"config": change}}},
    )


@dg.asset_sensor(asset_key=dg.AssetKey("retraining_decision"), default_status=ON, jobs=_CARRIERS)
def retraining_decided(
    context: dg.SensorEvaluationContext,
    asset_event: dg.EventLogEntry,
    project: dg.ResourceParam[Project],
) -> dg.RunRequest | dg.SkipReason:
    """Carry a decision to train, or to restore a version, to a run, once.

    What is restored is the version before one that does without a feature, while that is there.
    """
    decision = decided(
        project.home.records, "retraining_decision", asset_event.run_id, RetrainingDecision
    )
    if decision.verdict in ("retrain", "fall_back"):
        return train_request(decision)._replace(job_name=jobs.training.name)
    if decision.verdict == "restore":
        registry = read_registry(project.mlflow_client(), SETTINGS.model_name)
        version = registry.production
        if version is None or not registry.version(version).without:
            return dg.SkipReason(f"version {version} does without nothing: there is no way back")
        request = rollback_request(decision.id, decision.at, decision.reasons)
        return request._replace(job_name=jobs.rollback.name)
    return dg.SkipReason(f"{decision.verdict}: {'; '.join(decision.reasons)}")


@dg.asset_sensor(asset_key=dg.AssetKey("rollback_decision"), job=jobs.rollback, default_status=ON)
def rollback_decided(
    context: dg.SensorEvaluationContext,
    asset_event: dg.EventLogEntry,
    project: dg.ResourceParam[Project],
) -> dg.RunRequest | dg.SkipReason:
    """Carry a decision to roll back to a run, once, while the version is still there."""
    decision = decided(
        project.home.records, "rollback_decision", asset_event.run_id, RollbackDecision
    )
    if decision.verdict != "rollback":
        return dg.SkipReason(f"{decision.verdict}: {'; '.join(decision.reasons)}")
    registry = read_registry(project.mlflow_client(), SETTINGS.model_name)
    if registry.production != decision.version:
        return dg.SkipReason(f"version {decision.version} is not in Production any more")
    return rollback_request(decision.id, decision.at, decision.reasons, decision.to)


def _tell_mlflow(context: dg.RunStatusSensorContext, project: Project) -> None:
    run = context.dagster_run
    reconcile(project.mlflow_client(), {run.run_id: ENDINGS[run.status]})


@dg.run_status_sensor(
    run_status=dg.DagsterRunStatus.FAILURE, default_status=ON, name="mlflow_failed_runs"
)
def mlflow_failed_runs(
    context: dg.RunStatusSensorContext, project: dg.ResourceParam[Project]
) -> None:
    """A run that failed in Dagster says FAILED in MLflow."""
    _tell_mlflow(context, project)


@dg.run_status_sensor(
    run_status=dg.DagsterRunStatus.CANCELED, default_status=ON, name="mlflow_canceled_runs"
)
def mlflow_canceled_runs(
    context: dg.RunStatusSensorContext, project: dg.ResourceParam[Project]
) -> None:
    """A run that was canceled in Dagster says KILLED in MLflow."""
    _tell_mlflow(context, project)


SENSORS = [
    promotion_decided,
    trial_judged,
    retraining_decided,
    rollback_decided,
    mlflow_failed_runs,
    mlflow_canceled_runs,
]
