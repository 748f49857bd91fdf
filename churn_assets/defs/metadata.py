"""What a person sees of an asset in Dagster's UI: schemas, samples, row counts, plots, verdicts."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import dagster as dg
import pyarrow as pa

from churn_assets.contract.features import FEATURES, Feature
from churn_assets.data.checks import CheckResult
from churn_assets.data.tables import RawTable
from churn_assets.lifecycle.records import GateRecord
from churn_assets.modeling.metrics import Evaluation
from churn_assets.modeling.training import TrainedModel
from churn_assets.monitoring.drift import DriftReport

SAMPLE_ROWS = 5


def raw_schema(table: RawTable) -> dg.TableSchema:
    """The columns of a raw table."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                column.name,
                str(column.type),
                description=column.description,
                constraints=dg.TableColumnConstraints(
                    nullable=column.nullable, unique=column.name == table.key
                ),
            )
            for column in table.columns
        ]
    )


def _key_columns() -> list[dg.TableColumn]:
    required = dg.TableColumnConstraints(nullable=False)
    return [
        dg.TableColumn("customer_id", "string", "The customer", constraints=required),
        dg.TableColumn(
            "cutoff",
            "timestamp[us, tz=UTC]",
            "Features see only what happened before it, labels only what came from it on",
            constraints=required,
        ),
    ]


def feature_schema(features: Sequence[Feature] = FEATURES) -> dg.TableSchema:
    """The columns of the feature table."""
    return dg.TableSchema(
        columns=[
            *_key_columns(),
            *(
                dg.TableColumn(
                    feature.name,
                    "int64" if feature.dtype == "int" else "double",
                    f"{feature.meaning} ({feature.unit})",
                    constraints=dg.TableColumnConstraints(
                        nullable=False, other=[f"{feature.minimum:g} to {feature.maximum:g}"]
                    ),
                )
                for feature in features
            ),
        ]
    )


def label_schema() -> dg.TableSchema:
    """The columns of the label table."""
    churned = dg.TableColumn(
        "churned",
        "bool",
        "True when the customer placed no order within the horizon from the cutoff on",
        constraints=dg.TableColumnConstraints(nullable=False),
    )
    return dg.TableSchema(columns=[*_key_columns(), churned])


def training_schema(features: Sequence[Feature] = FEATURES) -> dg.TableSchema:
    """The columns of the training set."""
    return dg.TableSchema(
        columns=[*feature_schema(features).columns, label_schema().columns[-1]],
    )


def sample(rows: pa.Table) -> dg.TableMetadataValue:
    """The first few rows of a table."""
    head = rows.slice(0, SAMPLE_ROWS)
    records = [
        dg.TableRecord(
            {k: v if isinstance(v, int | float | bool) else str(v) for k, v in r.items()}
        )
        for r in head.to_pylist()
    ]
    schema = dg.TableSchema([dg.TableColumn(field.name, str(field.type)) for field in head.schema])
    return dg.MetadataValue.table(records, schema=schema)


def counts_table(counts: Mapping[str, int], what: str) -> dg.TableMetadataValue:
    """A count by name, largest first."""
    schema = dg.TableSchema([dg.TableColumn(what, "string"), dg.TableColumn("rows", "int")])
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return dg.MetadataValue.table(
        [dg.TableRecord({what: name, "rows": count}) for name, count in ordered], schema=schema
    )


def add_rows_per_day(context: dg.AssetExecutionContext, rows: Mapping[date, int]) -> None:
    """Put the row count of each partition on that partition's materialization."""
    for day, count in rows.items():
        context.add_asset_metadata(
            {"dagster/partition_row_count": count}, partition_key=day.isoformat()
        )


def plot(png: bytes, title: str) -> dg.MarkdownMetadataValue:
    """A PNG as something the UI can show."""
    return dg.MetadataValue.md(
        f"![{title}](data:image/png;base64,{base64.b64encode(png).decode()})"
    )


def figures_table(rows: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Records with the same keys as a table; figures with four digits, nothing as a dash."""
    shown = [{key: _shown(value) for key, value in row.items()} for row in rows]
    columns = [dg.TableColumn(key, "string") for key in (shown[0] if shown else {})]
    return dg.MetadataValue.table(
        [dg.TableRecord(row) for row in shown], schema=dg.TableSchema(columns)
    )


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def candidates_table(trained: TrainedModel) -> dg.TableMetadataValue:
    """Every family on the validation cutoff, best first."""
    return figures_table(
        [
            {
                "family": candidate.family,
                "log_loss": candidate.scores.log_loss,
                "auc": candidate.scores.auc,
                "accuracy": candidate.scores.accuracy,
                "brier": candidate.scores.brier,
                "fit_seconds": candidate.seconds,
            }
            for candidate in trained.candidates
        ]
    )


def scores_table(evaluation: Evaluation) -> dg.TableMetadataValue:
    """The model beside its baselines on the same rows."""
    compared = {
        "model": evaluation.model,
        "recency alone": evaluation.recency,
        "majority": evaluation.majority,
    }
    rows = [
        {
            "of": name,
            "auc": scores.auc,
            "pr_auc": scores.pr_auc,
            "accuracy": scores.accuracy,
            "f1": scores.f1,
            "log_loss": scores.log_loss,
            "brier": scores.brier,
        }
        for name, scores in compared.items()
        if scores is not None
    ]
    if evaluation.oracle_auc is not None:
        rows.append(dict.fromkeys(rows[0]) | {"of": "oracle", "auc": evaluation.oracle_auc})
    return figures_table(rows)


def gates_table(gates: Sequence[GateRecord]) -> dg.TableMetadataValue:
    """A line each gate, with why."""
    return figures_table(
        [{"gate": g.name, "passed": "yes" if g.passed else "no", "why": g.reason} for g in gates]
    )


def drift_table(report: DriftReport) -> dg.TableMetadataValue:
    """A line each feature."""
    return figures_table(
        [
            {
                "feature": f.feature,
                "verdict": f.verdict,
                "severity": f.severity,
                "ks_statistic": f.statistic,
                "p_value": f.p_value,
                "reference_mean": f.reference_mean,
                "current_mean": f.current_mean,
                "reference_rows": f.reference_rows,
                "current_rows": f.current_rows,
            }
            for f in report.features
        ]
    )


def check_outcome(
    result: CheckResult,
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR,
    name: str | None = None,
) -> dg.AssetCheckResult:
    """A pure check's result as Dagster's."""
    return dg.AssetCheckResult(
        check_name=name,
        passed=bool(result.passed),
        severity=severity,
        description=result.reason,
        metadata=dict(result.figures),
    )
