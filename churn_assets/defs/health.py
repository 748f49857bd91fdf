"""The health page: every metric over time, what was done about it, and what is open."""

from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from churn_assets.defs.healing import every_record
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.home import Home
from churn_assets.lifecycle.history import Step
from churn_assets.lifecycle.registry import read_registry
from churn_assets.monitoring.alert_outbox import Outbox
from churn_assets.monitoring.health_page import Mark, write_health_page
from churn_assets.monitoring.metric import read_metrics
from churn_assets.monitoring.retraining import RetrainingDecision
from churn_assets.monitoring.rollback import RollbackDecision
from churn_assets.up import DAGSTER, MLFLOW


def page_of(home: Home) -> Path:
    """Where the page of a home is."""
    return home.reports / "health" / "index.html"


@dg.asset(
    group_name="monitoring",
    kinds={"html"},
    owners=[f"team:{SETTINGS.team}"],
    deps=[
        "drift_report",
        "performance_report",
        "serving_health",
        "prediction_log",
        "feed_health",
        "retraining_decision",
        "rollback_decision",
    ],
)
def health_page(project: dg.ResourceParam[Project]) -> dg.MaterializeResult:
    """One page for whoever is on call: newest values, open alerts, every metric over time.

    Promotions, rollbacks, trials and decisions are marked on the time axis.
    """
    home = project.home
    path, metrics = page_of(home), read_metrics(home.metrics)
    history = read_registry(project.mlflow_client(), SETTINGS.model_name).history
    marks = [*marks_of_history(history), *marks_of_decisions(home.records)]
    alerts = [
        f"{c.alert.severity} since {c.since:%Y-%m-%d %H:%M} UTC: {c.alert.title}. {c.alert.doing}"
        for c in Outbox(home.alerts, SETTINGS.alerts).open()
    ]
    write_health_page(
        path, metrics, marks, now=project.now(), links=links_of(project), open_alerts=alerts
    )
    return dg.MaterializeResult(
        metadata={
            "page": dg.MetadataValue.url(project.report_url(path)),
            "metrics": len(metrics),
            "marks": len(marks),
            "open_alerts": len(alerts),
        }
    )


def marks_of_history(history: Sequence[Step]) -> list[Mark]:
    """The steps of the registry that change what answers: promotions, rollbacks, trials."""
    marks = []
    for step in history:
        version, said = step.version, step.line()
        if step.evidence.kind == "rollback":
            marks.append(Mark(step.at, "rollback", f"rollback to version {version}", said))
        elif step.target == "Production":
            marks.append(Mark(step.at, "promotion", f"version {version} to Production", said))
        elif step.evidence.kind in ("trial_begins", "trial_ends"):
            what = "begins" if step.evidence.kind == "trial_begins" else "ends"
            marks.append(Mark(step.at, "trial", f"trial of version {version} {what}", said))
    return marks


def marks_of_decisions(records: Path) -> list[Mark]:
    """The stored decisions to do something, and those that call for a person."""
    decisions = [
        *(("retraining", d) for d in every_record(records, "retraining_decision",
                                                  RetrainingDecision)),
        *(("rollback", d) for d in every_record(records, "rollback_decision", RollbackDecision)),
    ]  # fmt: skip
    return [
        Mark(
            decision.at,
            "decision",
            f"{of}: {decision.verdict}",
            "; ".join([*decision.reasons, decision.action]),
        )
        for of, decision in decisions
        if decision.alert or decision.verdict not in ("wait", "keep")
    ]


def links_of(project: Project) -> dict[str, str]:
    """Where to look further, by what it is called."""
    links = {"Dagster": DAGSTER.url, "MLflow": MLFLOW.url}
    # Each is named after its day.
    pages = sorted((project.home.reports / "drift").glob("*.html"))
    return {**links, "Drift in detail": project.report_url(pages[-1])} if pages else links
