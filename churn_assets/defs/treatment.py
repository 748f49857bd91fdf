"""Treatment: what retention offers change, by the customers nobody treats."""

import dagster as dg

from churn_assets.data.windows import cutoff_of
from churn_assets.defs.metadata import groups_table, model_scores_table
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.monitoring.treatment import TreatmentReport, judge_treatment


@dg.asset(
    group_name="monitoring",
    kinds={"scikitlearn"},
    owners=[f"team:{SETTINGS.team}"],
    deps=["prediction_log", "churn_labels"],
    check_specs=[
        dg.AssetCheckSpec(
            "holdout_intact",
            asset="treatment_report",
            description=(
                "The hold-out is like the others before treatment, marked as the settings say, "
                "and got no offers; too few customers do not pass."
            ),
        )
    ],
)
def treatment_report(context: dg.AssetExecutionContext, project: dg.ResourceParam[Project]):
    """The effect of offers on those above the cost threshold, and the model without that effect.

    Churn rate of the hold-out minus that of the others, intention to treat, with its interval.
    """
    report = judged(project)
    project.add_metrics(report.metrics())
    context.log.info("%s: %s", report.verdict, report.reason)
    return dg.MaterializeResult(
        value=report,
        metadata={
            "verdict": report.verdict,
            "reason": report.reason,
            "groups": groups_table(report),
            "model": model_scores_table(report.scores),
            "figures": dict(report.figures),
            "counts": dict(report.counts),
            "holdout": dict(report.intact.figures),
        },
        check_results=[
            dg.AssetCheckResult(
                check_name="holdout_intact",
                passed=report.intact.verdict == "ok",
                severity=dg.AssetCheckSeverity.WARN,
                description=report.intact.reason,
                metadata={"verdict": report.intact.verdict},
            )
        ],
    )


def judged(project: Project) -> TreatmentReport:
    """The offers by the predictions and labels there are now."""
    return judge_treatment(
        project.lake,
        SETTINGS.holdout,
        SETTINGS.treatment,
        SETTINGS.costs,
        decision_threshold=SETTINGS.training.decision_threshold,
        horizon_days=SETTINGS.windows.horizon_days,
        behind=project.behind(),
        until=cutoff_of(project.data_time()),
        now=project.now(),
    )
