"""The trial: what the version on trial has shown on live requests, and what follows."""

import dagster as dg

from churn_assets.defs.metadata import guards_table, looks_table
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.lifecycle.history import Evidence, TrialRun, trials
from churn_assets.lifecycle.registry import Registry, read_registry
from churn_assets.monitoring.trial import HARMFUL, TrialReport, judge_trial


@dg.asset(
    group_name="monitoring",
    kinds={"scipy"},
    owners=[f"team:{SETTINGS.team}"],
    deps=["prediction_log", "churn_labels", "production_release"],
    check_specs=[
        dg.AssetCheckSpec(
            "no_harm",
            asset="trial_report",
            description="The version on trial hit no guard rail and is not surely worse.",
        )
    ],
)
def trial_report(context: dg.AssetExecutionContext, project: dg.ResourceParam[Project]):
    """What the trial has shown: the difference of log loss, with bounds that hold at every look.

    Of the trial that is going on, or the last one, since outcomes of its predictions still come.
    Without a trial there is nothing to tell.
    """
    found = trials(read_registry(project.mlflow_client(), SETTINGS.model_name).history)
    if not found:
        return dg.MaterializeResult(
            metadata={"verdict": "no trial"},
            check_results=[_no_harm(True, "no version has been on trial")],
        )
    report = judged(project, found[-1])
    context.log.info("%s: %s", report.verdict, report.reason)
    return dg.MaterializeResult(
        value=report,
        metadata={
            "verdict": report.verdict,
            "reason": report.reason,
            "trial": found[-1].line(),
            "outcomes": report.rows,
            "figures": dict(report.figures),
            "counts": dict(report.counts),
            "guard_rails": guards_table(report.guards),
            "looks": looks_table(report.looks),
        },
        check_results=[
            _no_harm(report.verdict not in HARMFUL, f"{report.verdict}: {report.reason}")
        ],
    )


def judged(project: Project, trial: TrialRun) -> TrialReport:
    """`trial` by the predictions and labels there are now."""
    return judge_trial(
        project.lake,
        trial,
        SETTINGS.trial,
        horizon_days=SETTINGS.windows.horizon_days,
        behind=project.behind(),
        now=project.now(),
    )


def tried_beside_incumbent(
    project: Project, registry: Registry, version: str
) -> Evidence | str | None:
    """The evidence of the last trial of `version` beside the version in Production.

    Returns why, when there is none, and None when nothing is in Production.
    """
    if registry.production is None:
        return None
    found = [
        trial
        for trial in trials(registry.history)
        if (trial.challenger, trial.champion) == (version, registry.production)
    ]
    if not found:
        return (
            f"version {version} has not been on trial beside it, and promotion.evidence is trial; "
            f"begin one with `churn trial start {version}`"
        )
    return judged(project, found[-1]).evidence()


def _no_harm(passed: bool, reason: str) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name="no_harm",
        passed=passed,
        severity=dg.AssetCheckSeverity.WARN,
        description=reason,
    )
