"""Monitoring: are the customers of the last week like those the model was trained on?"""

from datetime import timedelta

import dagster as dg

from churn_assets.data.training_set import restore_training_set
from churn_assets.defs.metadata import drift_table
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.lifecycle.records import DriftRecord, TrainingSetRecord
from churn_assets.modeling.rows import rows_of
from churn_assets.monitoring.drift import drift_report as judge_drift
from churn_assets.monitoring.evidently_report import evidently_report

CURRENT_DAYS = 7


@dg.asset(
    group_name="monitoring",
    kinds={"scipy", "evidently"},
    owners=[f"team:{SETTINGS.team}"],
    deps=["customer_features"],
    check_specs=[
        dg.AssetCheckSpec(
            "no_drift",
            asset="drift_report",
            description=(
                f"No feature's KS statistic is above {SETTINGS.drift.alert_above:g}; "
                "too few rows do not pass."
            ),
        )
    ],
)
def drift_report(
    context: dg.AssetExecutionContext,
    project: dg.ResourceParam[Project],
    training_set: TrainingSetRecord,
):
    """Each feature of the last seven days against the training rows: KS statistic and severity.

    Judged by the statistic, never by the p-value. Evidently's page shows the distributions.
    """
    last = project.lake.days("customer_features")[-1]
    first = last - timedelta(days=CURRENT_DAYS - 1)
    current = project.lake.read("customer_features", first, last, strict=False)
    trained_on = restore_training_set(project.lake, training_set.data_hash).to_pandas()
    reference = rows_of(trained_on, training_set.train)
    report = judge_drift(reference, current, training_set.features, SETTINGS.drift)
    path = project.home.reports / "drift" / f"{last}.html"
    evidently_report(report, reference, current, path, seed=SETTINGS.seed)
    record = DriftRecord(
        verdict=report.verdict,
        reason=report.reason,
        first=first,
        last=last,
        statistics={f.feature: f.statistic for f in report.features},
        reference=training_set.data_hash,
        page=str(path),
    )
    return dg.MaterializeResult(
        value=record,
        metadata={
            "verdict": report.verdict,
            "reason": report.reason,
            "features": drift_table(report),
            "evidently": dg.MetadataValue.url(project.report_url(path)),
            "reference_rows": len(reference),
            "current_rows": current.num_rows,
        },
        check_results=[
            dg.AssetCheckResult(
                check_name="no_drift",
                passed=report.verdict == "ok",
                severity=dg.AssetCheckSeverity.WARN,
                description=report.reason,
                metadata={"verdict": report.verdict},
            )
        ],
    )
