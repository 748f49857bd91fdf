"""Registry: a version that passed every gate goes to Staging, with the evaluation as evidence."""

import dagster as dg

from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.lifecycle.history import Evidence
from churn_assets.lifecycle.records import EvaluationRecord, RegisteredModel
from churn_assets.lifecycle.registry import PIPELINE, transition


@dg.asset(group_name="registry", kinds={"mlflow"}, owners=[f"team:{SETTINGS.team}"])
def registered_model(
    context: dg.AssetExecutionContext,
    project: dg.ResourceParam[Project],
    evaluation_report: EvaluationRecord,
):
    """The version the gates let into Staging. A refused version stays in None, with the reasons."""
    if not evaluation_report.passed:
        refused = "; ".join(g.reason for g in evaluation_report.gates if not g.passed)
        raise dg.Failure(f"the gates did not pass: {refused or 'there is no evidence'}")
    model = evaluation_report.model
    step = transition(
        project.mlflow_client(),
        model.name,
        model.version,
        "Staging",
        who=PIPELINE,
        why="every quality gate passed",
        evidence=Evidence("gates", {gate.name: gate.reason for gate in evaluation_report.gates}),
        now=project.now(),
    )
    record = RegisteredModel(
        name=model.name,
        version=model.version,
        stage=step.target,
        release_dir=evaluation_report.release_dir,
        release_id=evaluation_report.release_id,
    )
    return dg.MaterializeResult(
        value=record,
        metadata={
            "version": record.version,
            "stage": record.stage,
            "evidence": step.evidence.line(),
            "mlflow_run": dg.MetadataValue.url(project.mlflow_run_url(model.mlflow_run)),
        },
    )
