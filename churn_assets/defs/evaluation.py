"""Evaluation: the chosen model judged once, on the newest labelled cutoff, as it is served."""

import tempfile
from pathlib import Path

import dagster as dg
import msgspec

from churn_assets.data.training_set import restore_training_set
from churn_assets.defs.metadata import figures_table, gates_table, plot, scores_table
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.defs.training import split_of
from churn_assets.lifecycle.records import EvaluationRecord, GateRecord, ModelRecord
from churn_assets.lifecycle.release import build_release, reference_statistics
from churn_assets.lifecycle.serving import measure_release
from churn_assets.lifecycle.tracking import load_onnx, load_sklearn, log_evaluation
from churn_assets.modeling.gates import judge_gates
from churn_assets.modeling.held_out import judge_held_out

GATES = {
    "accuracy": f"Accuracy of at least {SETTINGS.quality_gates.accuracy:g}.",
    "auc": f"ROC AUC of at least {SETTINGS.quality_gates.auc:g}.",
    "p95_latency_ms": (
        f"95 % of single predictions over HTTP within {SETTINGS.quality_gates.p95_latency_ms:g} ms."
    ),
}


@dg.asset(
    group_name="evaluation",
    kinds={"scikitlearn", "onnx", "mlflow", "bentoml"},
    owners=[f"team:{SETTINGS.team}"],
    check_specs=[
        dg.AssetCheckSpec(name, asset="evaluation_report", blocking=True, description=description)
        for name, description in GATES.items()
    ],
)
def evaluation_report(
    context: dg.AssetExecutionContext,
    project: dg.ResourceParam[Project],
    trained_model: ModelRecord,
):
    """The judgement of a version: figures beside baselines, latency as served, a gate each.

    Figures are of the ONNX graph, the one that would be served; latency is measured over HTTP on
    the service started from the candidate's own release.
    """
    data = trained_model.training_set
    frame = restore_training_set(project.lake, data.data_hash).to_pandas()
    onnx = load_onnx(trained_model, project.home.mlflow_uri)
    judged = judge_held_out(
        frame,
        split_of(data),
        data.features,
        onnx=onnx,
        estimator=load_sklearn(trained_model, project.home.mlflow_uri),
        fitted_on=trained_model.fitted_on,
        oracle=project.oracle(),
        threshold=SETTINGS.training.decision_threshold,
        seed=SETTINGS.seed,
    )
    release = build_release(
        project.home.releases,
        onnx=onnx,
        model_name=trained_model.name,
        model_version=trained_model.version,
        features=data.features,
        golden=judged.golden,
        reference=reference_statistics(judged.reference, data.features),
        mlflow_run=trained_model.mlflow_run,
        dagster_run=trained_model.dagster_run,
        data_hash=data.data_hash,
        created_at=project.now(),
    )
    latency = measure_release(release.directory, judged.requests, scratch=project.home.root)
    metrics = judged.evaluation.figures() | latency.figures()
    gates = judge_gates(SETTINGS.quality_gates, metrics)
    record = EvaluationRecord(
        model=trained_model,
        metrics=metrics,
        gates=tuple(msgspec.convert(gate.to_dict(), GateRecord) for gate in gates),
        release_dir=str(release.directory),
        release_id=release.manifest.release_id,
    )
    with tempfile.TemporaryDirectory() as folder:
        log_evaluation(project.mlflow_client(), record, judged.plots, Path(folder))
    return dg.MaterializeResult(
        value=record,
        metadata={
            "verdict": "passed" if record.passed else "refused",
            "version": trained_model.version,
            "gates": gates_table(record.gates),
            "figures": scores_table(judged.evaluation),
            "latency": figures_table([latency.figures() | {"requests": latency.requests}]),
            **{name: plot(png, name) for name, png in judged.plots.items()},
            "mlflow_run": dg.MetadataValue.url(project.mlflow_run_url(trained_model.mlflow_run)),
        },
        check_results=[
            dg.AssetCheckResult(
                check_name=gate.name,
                passed=gate.passed,
                description=gate.reason,
                metadata={"limit": gate.limit}
                | ({} if gate.value is None else {"value": gate.value}),
            )
            for gate in record.gates
        ],
    )
