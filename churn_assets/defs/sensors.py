"""The sensors: a new version that passed gets its bento; MLflow hears how runs really ended."""

import dagster as dg
import msgspec

from churn_assets.defs import jobs
from churn_assets.defs.resources import Project, read_record
from churn_assets.errors import UserError
from churn_assets.lifecycle.experiments import Ending, reconcile
from churn_assets.lifecycle.records import BentoRecord, RegisteredModel

ON = dg.DefaultSensorStatus.RUNNING

ENDINGS: dict[dg.DagsterRunStatus, Ending] = {
    dg.DagsterRunStatus.SUCCESS: "FINISHED",
    dg.DagsterRunStatus.FAILURE: "FAILED",
    dg.DagsterRunStatus.CANCELED: "KILLED",
}


@dg.asset_sensor(asset_key=dg.AssetKey("registered_model"), job=jobs.build_bento, default_status=ON)
def bento_for_new_version(
    context: dg.SensorEvaluationContext,
    asset_event: dg.EventLogEntry,
    project: dg.ResourceParam[Project],
) -> dg.RunRequest | dg.SkipReason:
    """Build the bento of a version that the gates let into Staging, once."""
    record = read_record(project.home.records, "registered_model", asset_event.run_id)
    registered = msgspec.json.decode(record, type=RegisteredModel)
    if registered.stage != "Staging":
        return dg.SkipReason(f"version {registered.version} is in {registered.stage}")
    if _has_bento(project, registered.version):
        return dg.SkipReason(f"version {registered.version} has its bento")
    return dg.RunRequest(run_key=f"bento-{registered.version}")


def _has_bento(project: Project, version: str) -> bool:
    try:
        newest = msgspec.json.decode(
            read_record(project.home.records, "churn_bento"), type=BentoRecord
        )
    except UserError:
        return False
    return newest.model_version == version


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


SENSORS = [bento_for_new_version, mlflow_failed_runs, mlflow_canceled_runs]
