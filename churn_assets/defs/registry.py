"""Registry: a version that passed every gate goes to Staging; what happened to every version."""

import dagster as dg

from churn_assets.defs.metadata import steps_table, tenures_table
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.lifecycle.history import Evidence, tenures
from churn_assets.lifecycle.records import EvaluationRecord, HistoryRecord, RegisteredModel
from churn_assets.lifecycle.registry import PIPELINE, finish_pending, read_registry, transition


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


@dg.asset(
    group_name="registry",
    kinds={"mlflow"},
    owners=[f"team:{SETTINGS.team}"],
    deps=["registered_model"],
    check_specs=[
        dg.AssetCheckSpec(
            "registry_consistent",
            asset="registry_history",
            description="Tags, aliases and history say the same of every version.",
        )
    ],
)
def registry_history(context: dg.AssetExecutionContext, project: dg.ResourceParam[Project]):
    """Every transition there was: who made it, when, why, and on what evidence.

    A step that a killed caller left unfinished is finished first.
    """
    client = project.mlflow_client()
    finish_pending(client, SETTINGS.model_name)
    registry = read_registry(client, SETTINGS.model_name)
    faults = registry.faults()
    return dg.MaterializeResult(
        value=HistoryRecord(SETTINGS.model_name, registry.production, registry.history),
        metadata={
            "production": registry.production or "none",
            "steps": len(registry.history),
            "history": steps_table(registry.history),
            "in_production": tenures_table(tenures(registry.history)),
        },
        check_results=[
            dg.AssetCheckResult(
                check_name="registry_consistent",
                passed=not faults,
                description="; ".join(faults) or "tags, aliases and history agree",
            )
        ],
    )
