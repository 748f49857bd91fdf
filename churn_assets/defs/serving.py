"""Serving: the version in Staging, packaged as a bento that has answered a real request."""

from pathlib import Path

import dagster as dg

from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.home import PROJECT_ROOT
from churn_assets.lifecycle.bento import build_bento
from churn_assets.lifecycle.model_card import add_bento
from churn_assets.lifecycle.records import BentoRecord, RegisteredModel
from churn_assets.lifecycle.registry import get_version
from churn_assets.lifecycle.serving import ask_bento
from churn_assets.lifecycle.tracking import log_card


@dg.asset(
    group_name="serving",
    kinds={"bentoml", "onnx"},
    owners=[f"team:{SETTINGS.team}"],
    check_specs=[
        dg.AssetCheckSpec(
            "answers",
            asset="churn_bento",
            blocking=True,
            description="The built bento, served, answers a real request as its model does.",
        )
    ],
)
def churn_bento(
    context: dg.AssetExecutionContext,
    project: dg.ResourceParam[Project],
    registered_model: RegisteredModel,
):
    """The service with one release baked in. It needs neither Dagster, MLflow nor scikit-learn."""
    bento = build_bento(
        Path(registered_model.release_dir), project.home.bentoml, project_root=PROJECT_ROOT
    )
    answer = ask_bento(bento, project.home.bentoml, project.newest_customer())
    record = BentoRecord(
        tag=bento.tag,
        path=str(bento.path),
        model_version=registered_model.version,
        release_id=registered_model.release_id,
        request=answer.request,
        response=answer.response,
        latency_ms=answer.latency_ms,
    )
    card = add_bento(project.home.model_card(record.model_version), bento.tag)
    if card is not None:
        version = get_version(project.mlflow_client(), registered_model.name, record.model_version)
        log_card(project.mlflow_client(), str(version.run_id), card)
    return dg.MaterializeResult(
        value=record,
        metadata={
            **({"model_card": dg.MetadataValue.url(project.report_url(card.page))} if card else {}),
            "tag": record.tag,
            "path": dg.MetadataValue.path(record.path),
            "request": record.request,
            "response": record.response,
            "latency_ms": record.latency_ms,
        },
        check_results=[
            dg.AssetCheckResult(
                check_name="answers", passed=answer.as_expected, description=answer.reason
            )
        ],
    )
