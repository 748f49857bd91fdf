"""Evaluation: the chosen model judged once, on the newest labelled cutoff, as it is served."""

import tempfile
from pathlib import Path

import dagster as dg

from churn_assets.data.training_set import restore_training_set
from churn_assets.defs.metadata import (
    against_table,
    figures_table,
    gates_table,
    intervals_table,
    offers_table,
    plot,
    scores_table,
    segments_table,
)
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.defs.training import split_of
from churn_assets.lifecycle.incumbent import production_model
from churn_assets.lifecycle.judgement import asked, judgement, look_at
from churn_assets.lifecycle.ledger import record_look
from churn_assets.lifecycle.model_card import Evidence, write_card
from churn_assets.lifecycle.records import ModelRecord
from churn_assets.lifecycle.release import build_release, reference_statistics
from churn_assets.lifecycle.serving import measure_release
from churn_assets.lifecycle.tracking import load_onnx, load_sklearn, log_card, log_evaluation
from churn_assets.modeling.held_out import judge_held_out
from churn_assets.modeling.onnx_export import session_latency

LIMITS = SETTINGS.quality_gates
GATES = {
    "accuracy": f"Accuracy of at least {LIMITS.accuracy:g}.",
    "auc": f"ROC AUC of at least {LIMITS.auc:g}.",
    "p95_latency_ms": (
        f"95 % of single predictions over HTTP within {LIMITS.p95_latency_ms:g} ms."
    ),
    "calibration_error": (
        f"P(churn) and the share that churned lie at most {LIMITS.calibration_error:g} apart."
    ),
    "segment_auc": f"ROC AUC of at least {LIMITS.segment_auc:g} in every segment.",
    "auc_over_recency": (
        f"The AUC is surely more than {LIMITS.auc_over_recency:g} above that of recency alone."
    ),
    "log_loss_over_production": (
        "The log loss is not surely worse than that of the model in production on the same rows."
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
    the service started from the candidate's own release. The look at the held-out window goes into
    the ledger before it happens.
    """
    data, client = trained_model.training_set, project.mlflow_client()
    frame = restore_training_set(project.lake, data.data_hash).to_pandas()
    onnx = load_onnx(trained_model, project.home.mlflow_uri)
    incumbent = production_model(client, trained_model.name, project.home.releases)
    production, problem = asked(incumbent, data.features)
    use = record_look(
        project.home.ledger,
        look_at(frame, trained_model, SETTINGS.windows, context.run_id, project.now()),
    )
    judged = judge_held_out(
        frame,
        split_of(data),
        data.features,
        onnx=onnx,
        estimator=load_sklearn(trained_model, project.home.mlflow_uri),
        fitted_on=trained_model.fitted_on,
        oracle=project.oracle(),
        tenure=project.tenure_days,
        production=production,
        threshold=SETTINGS.training.decision_threshold,
        seed=SETTINGS.seed,
        policy=SETTINGS.evaluation,
        costs=SETTINGS.costs,
        draw=SETTINGS.plots,
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
    times = latency.figures() | session_latency(onnx, judged.golden[0])
    record = judgement(
        trained_model,
        judged,
        times,
        SETTINGS.quality_gates,
        incumbent=incumbent,
        problem=problem,
        use=use,
        release_dir=str(release.directory),
        release_id=release.manifest.release_id,
        at=project.now(),
    )
    with tempfile.TemporaryDirectory() as folder:
        log_evaluation(client, record, judged.plots, Path(folder))
    card = write_card(
        project.home.model_card(trained_model.version),
        Evidence(record, project.about_model(trained_model.mlflow_run)),
        judged.plots,
    )
    log_card(client, trained_model.mlflow_run, card)
    return dg.MaterializeResult(
        value=record,
        metadata={
            "model_card": dg.MetadataValue.url(project.report_url(card.page)),
            "verdict": "passed" if record.passed else "refused",
            "version": trained_model.version,
            "gates": gates_table(record.gates),
            "figures": scores_table(judged.evaluation),
            "intervals": intervals_table(record.intervals),
            "model_minus_others": against_table(record.against),
            "segments": segments_table(record.segments),
            "offers": offers_table(judged.profit, judged.at_offers),
            "held_out_window": use.sentence,
            "production": incumbent.version if incumbent else "no production model",
            "latency": figures_table([times | {"requests": latency.requests}]),
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
