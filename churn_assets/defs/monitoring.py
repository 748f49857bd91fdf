"""Monitoring: are the requests of the last week like the rows the model was trained on?"""

from pathlib import Path

import dagster as dg
import msgspec

from churn_assets.defs.metadata import drift_table
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.monitoring.drift_watch import DriftRecord, watch
from churn_assets.monitoring.evidently_report import Shelf, evidently_report
from churn_assets.monitoring.reference import production_reference


@dg.asset(
    group_name="monitoring",
    kinds={"scipy", "evidently"},
    owners=[f"team:{SETTINGS.team}"],
    deps=["customer_features", "prediction_log", "production_release"],
    check_specs=[
        dg.AssetCheckSpec(
            "no_drift",
            asset="drift_report",
            description=(
                f"No feature's KS statistic is above {SETTINGS.drift.alert_above:g}, none is "
                "constant or gone; too few rows do not pass."
            ),
        ),
        dg.AssetCheckSpec(
            "prediction_mean_stable",
            asset="drift_report",
            description=(
                f"The mean prediction is at most {SETTINGS.drift.prediction_shift:g} from that on "
                "the training rows; too few predictions do not pass."
            ),
        ),
    ],
)
def drift_report(project: dg.ResourceParam[Project]):
    """The last seven days of logged requests against the training rows of what is in Production.

    While there are too few requests, all customers' features stand in, and the report says so.
    Judged by the KS statistic; the p-value only keeps chance out. Evidently's page shows the
    distributions.
    """
    home, now = project.home, project.now()
    reference = production_reference(
        project.mlflow_client(), SETTINGS.model_name, project.lake, home.releases
    )
    watched = watch(project.lake, reference, SETTINGS.drift, now)
    record = watched.record
    draw = SETTINGS.drift.draw
    if draw == "always" or (draw == "on_drift" and record.verdict == "drift"):
        path = home.reports / "drift" / f"{record.last}.html"
        evidently_report(
            watched.report,
            watched.reference,
            watched.current,
            path,
            seed=SETTINGS.seed,
            shelf=Shelf(home.evidently, now),
        )
        record = msgspec.structs.replace(record, page=str(path))
    project.add_metrics(record.metrics())
    return dg.MaterializeResult(
        value=record,
        metadata={
            "verdict": record.verdict,
            "reason": record.reason,
            "compared": record.source,
            "requests": record.requests,
            "version": record.version or "none",
            "features": drift_table(watched.report),
            "prediction_shift": record.prediction.reason,
            "reference_drift": record.reference_reason,
            **_page(project, record),
            "reference_rows": len(watched.reference),
            "current_rows": record.rows,
            "customers": record.customers,
        },
        check_results=[
            _check("no_drift", record.steady, record.reason, record),
            _check(
                "prediction_mean_stable",
                record.prediction.verdict == "ok",
                record.prediction.reason,
                record,
            ),
        ],
    )


def _page(project: Project, record: DriftRecord) -> dict[str, dg.MetadataValue]:
    if not record.page:
        return {}
    return {"evidently": dg.MetadataValue.url(project.report_url(Path(record.page)))}


def _check(name: str, passed: bool, reason: str, record: DriftRecord) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name=name,
        passed=passed,
        severity=dg.AssetCheckSeverity.WARN,
        description=reason,
        metadata={"verdict": record.verdict, "compared": record.source},
    )
