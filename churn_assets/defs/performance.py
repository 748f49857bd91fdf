"""Monitoring: has the version in Production kept what its evaluation promised?"""

import dagster as dg

from churn_assets.defs.metadata import (
    figures_table,
    intervals_table,
    metric_check,
    metrics_table,
    plot,
    released_table,
)
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.lifecycle.pointer import read_current
from churn_assets.lifecycle.production import promised_auc
from churn_assets.lifecycle.registry import read_registry
from churn_assets.modeling.plots import over_time_plot
from churn_assets.monitoring.metric import read_metrics
from churn_assets.monitoring.performance import InProduction, Judging, judge_performance

POLICY = SETTINGS.performance
ACCURACIES = ("accuracy", "expected_accuracy")


@dg.asset(
    group_name="monitoring",
    kinds={"scikitlearn"},
    owners=[f"team:{SETTINGS.team}"],
    deps=["prediction_log", "churn_labels", "production_release"],
    check_specs=[
        dg.AssetCheckSpec(
            "accuracy_holds",
            asset="performance_report",
            description=(
                f"The accuracy on matured labels is at least {POLICY.min_accuracy:g}; "
                "too few outcomes do not pass."
            ),
        ),
        dg.AssetCheckSpec(
            "no_decay",
            asset="performance_report",
            description=(
                f"The AUC is not surely more than {POLICY.max_auc_loss:g} below what was promised; "
                "too few outcomes do not pass."
            ),
        ),
    ],
)
def performance_report(context: dg.AssetExecutionContext, project: dg.ResourceParam[Project]):
    """The version in Production on outcomes that have become known, and what to expect of the rest.

    Accuracy and AUC are of customers held out from retention where there are enough of them.
    """
    record = judge_performance(
        project.lake, in_production(project), JUDGING, behind=project.behind(), now=project.now()
    )
    project.add_metrics(record.metrics)
    context.log.info("%s: %s", record.verdict, record.reason)
    return dg.MaterializeResult(
        value=record,
        metadata={
            "verdict": record.verdict,
            "reason": record.reason,
            "version": record.version or "nothing is in Production",
            "matured": f"{record.first:%Y-%m-%d} to {record.until:%Y-%m-%d}",
            "metrics": metrics_table(record.metrics),
            "figures": intervals_table(record.figures),
            "held_out": intervals_table(record.holdout),
            "everyone": intervals_table(record.everyone),
            "releases": released_table(record.releases),
            "counts": figures_table([record.counts]),
            **({"over_time": _over_time(project)} if SETTINGS.plots else {}),
        },
        check_results=[
            metric_check("accuracy_holds", record.metric("accuracy")),
            metric_check("no_decay", record.metric("matured_auc")),
        ],
    )


JUDGING = Judging(
    POLICY,
    SETTINGS.windows.horizon_days,
    SETTINGS.training.decision_threshold,
    SETTINGS.evaluation.resampling,
    SETTINGS.seed,
)


def in_production(project: Project) -> InProduction:
    """What is in Production, and the AUC it promised."""
    client = project.mlflow_client()
    registry = read_registry(client, SETTINGS.model_name)
    if registry.production is None:
        return InProduction(None)
    current = read_current(project.home.current)
    its = current is not None and current.model_version == registry.production
    return InProduction(
        registry.production,
        current.release_id if its else None,
        promised_auc(client, registry.version(registry.production)),
    )


def _over_time(project: Project) -> dg.MarkdownMetadataValue:
    series = {
        name: [
            (metric.until, metric.value)
            for metric in read_metrics(project.home.metrics)
            if metric.name == name and metric.value is not None
        ]
        for name in (*ACCURACIES, "matured_auc")
    }
    shown = {name.replace("_", " "): points for name, points in series.items()}
    title = "Expected and matured performance"
    return plot(over_time_plot(shown, title, "", limit=POLICY.min_accuracy), title)
