"""Serving: the release in Production, packaged as a bento that has answered a real request."""

from pathlib import Path

import dagster as dg

from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.home import PROJECT_ROOT
from churn_assets.lifecycle.bento import build_bento
from churn_assets.lifecycle.model_card import add_bento
from churn_assets.lifecycle.pointer import Current, point_at
from churn_assets.lifecycle.records import BentoRecord, ProductionRelease
from churn_assets.lifecycle.registry import get_version, read_registry
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
    production_release: ProductionRelease,
):
    """The service with one release baked in. It needs neither Dagster, MLflow nor scikit-learn.

    Once it has answered as its model does, the running service is pointed at it.
    """
    bento = build_bento(
        Path(production_release.release_dir), project.home.bentoml, project_root=PROJECT_ROOT
    )
    try:
        customer = project.newest_customer()
    except Exception as error:
        # A lake that is down must not stand in the way of a rollback.
        context.log.warning(f"asked about no customer, the lake cannot be read: {error}")
        customer = None
    answer = ask_bento(bento, project.home.bentoml, customer)
    record = BentoRecord(
        tag=bento.tag,
        path=str(bento.path),
        model_version=production_release.version,
        release_id=production_release.release_id,
        request=answer.request,
        response=answer.response,
        latency_ms=answer.latency_ms,
    )
    card = add_bento(project.home.model_card(record.model_version), bento.tag)
    if card is not None:
        version = get_version(
            project.mlflow_client(), production_release.name, record.model_version
        )
        log_card(project.mlflow_client(), str(version.run_id), card)
    registry = read_registry(project.mlflow_client(), production_release.name)
    serves = registry.production, registry.trial.id if registry.trial else None
    if answer.as_expected and serves == (production_release.version, production_release.trial):
        current = Current(
            bento=bento.tag,
            release_id=record.release_id,
            model_version=record.model_version,
            step=production_release.step.number,
            at=project.now(),
        )
        point_at(project.home.current, current)
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
