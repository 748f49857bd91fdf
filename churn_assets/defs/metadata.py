"""What a person sees of an asset in Dagster's UI: schemas, samples, row counts, plots, verdicts."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any

import dagster as dg
import msgspec
import pyarrow as pa

from churn_assets.contract.features import FEATURES, Feature
from churn_assets.data.checks import CheckResult
from churn_assets.data.prediction_log import SCHEMA as PREDICTIONS
from churn_assets.data.tables import RawTable
from churn_assets.lifecycle.history import Step, Tenure
from churn_assets.lifecycle.records import GateRecord
from churn_assets.modeling.bootstrap import Interval, interval_text
from churn_assets.modeling.costs import ProfitCurve
from churn_assets.modeling.metrics import Evaluation, Scores
from churn_assets.modeling.segments import Segment
from churn_assets.modeling.training import TrainedModel
from churn_assets.monitoring.drift import DriftReport
from churn_assets.monitoring.feeds import Fault
from churn_assets.monitoring.metric import Metric
from churn_assets.monitoring.performance import FIGURES, ReleaseLine
from churn_assets.monitoring.retraining import Trigger
from churn_assets.monitoring.treatment import TreatmentReport
from churn_assets.monitoring.trial import Guard, Look

SAMPLE_ROWS = 5
HISTORY_ROWS = 100


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


def prediction_log_schema() -> dg.TableSchema:
    """The columns of the prediction log."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                field.name,
                str(field.type),
                constraints=dg.TableColumnConstraints(
                    nullable=field.nullable, unique=field.name == "key"
                ),
            )
            for field in PREDICTIONS
        ]
    )


def rows_by_day_table(
    added: Mapping[date, int], there: Mapping[date, int]
) -> dg.TableMetadataValue:
    """The newest days of the prediction log: rows this pass added, and all there are."""
    newest = sorted(there, reverse=True)[:HISTORY_ROWS]
    return figures_table(
        [{"day": str(day), "added": added.get(day, 0), "rows": there[day]} for day in newest]
    )


def served_table(served: Mapping[tuple[str, str], int]) -> dg.TableMetadataValue:
    """How many of the added predictions each arm of each release answered."""
    return figures_table(
        [
            {"release": release, "arm": arm, "predictions": rows}
            for (arm, release), rows in served.items()
        ]
    )


def sample(rows: pa.Table) -> dg.TableMetadataValue:
    """A few rows of a table, from its beginning to its end."""
    step = max(1, rows.num_rows // SAMPLE_ROWS)
    places = range(0, rows.num_rows, step)[:SAMPLE_ROWS]
    picked = rows.take(pa.array(places, pa.int64()))
    records = [
        dg.TableRecord({name: _cell(value) for name, value in row.items()})
        for row in picked.to_pylist()
    ]
    schema = dg.TableSchema(
        [dg.TableColumn(field.name, str(field.type)) for field in picked.schema]
    )
    return dg.MetadataValue.table(records, schema=schema)


def _cell(value: Any) -> str | int | float | bool:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M}"
    if isinstance(value, float):
        return round(value, 4)
    return value if isinstance(value, int) else "" if value is None else str(value)


def quarantine_counts(counts: Mapping[str, int]) -> dict[str, Any]:
    """Metadata on the rows in quarantine: how many and, when there are any, for which reason."""
    if not counts:
        return {"rows_quarantined": 0}
    columns = [dg.TableColumn("reason", "string"), dg.TableColumn("rows", "int")]
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    by_reason = dg.MetadataValue.table(
        [dg.TableRecord({"reason": reason, "rows": count}) for reason, count in ordered],
        schema=dg.TableSchema(columns),
    )
    return {"rows_quarantined": sum(counts.values()), "quarantined_by_reason": by_reason}


def day_list(days: Sequence[date]) -> str:
    """Days on one line."""
    return ", ".join(day.isoformat() for day in days)


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
    """Every candidate over the folds of the backtest, best first."""
    return figures_table(
        [
            {
                "family": candidate.family,
                **{
                    name: candidate.figure(name)
                    for name in ("log_loss", "auc", "accuracy", "brier")
                },
                "folds": f"{len(candidate.folds)}{', given up' if candidate.pruned else ''}",
                "seconds": candidate.seconds,
                "parameters": ", ".join(f"{k} {_shown(v)}" for k, v in candidate.params.items()),
            }
            for candidate in trained.candidates
        ]
    )


def backtest_table(trained: TrainedModel) -> dg.TableMetadataValue:
    """The chosen candidate at every origin, beside recency alone."""
    return figures_table(
        [
            {
                "judged": str(result.fold.judged),
                "calibrated": str(result.fold.calibration or "-"),
                "trained": f"{result.fold.train[0]} to {result.fold.train[-1]}",
                "rows": result.scores.rows,
                "log_loss": result.scores.log_loss,
                "auc": result.scores.auc,
                "recency_auc": result.recency_auc,
            }
            for result in trained.chosen.folds
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
            "calibration_error": scores.calibration_error,
            "top_decile_lift": scores.top_decile_lift,
        }
        for name, scores in compared.items()
        if scores is not None
    ]
    if evaluation.oracle_auc is not None:
        rows.append(dict.fromkeys(rows[0]) | {"of": "oracle", "auc": evaluation.oracle_auc})
    return figures_table(rows)


def intervals_table(figures: Mapping[str, Interval]) -> dg.TableMetadataValue:
    """A line each figure, with its interval."""
    return figures_table(
        [
            {"figure": name, "value": one.value, "low": one.low, "high": one.high}
            for name, one in figures.items()
        ]
    )


def against_table(against: Mapping[str, Mapping[str, Interval]]) -> dg.TableMetadataValue:
    """A line for each figure of the model minus that of another, on the same rows."""
    return figures_table(
        [
            {"model minus": other, "figure": name}
            | {"difference": one.value, "low": one.low, "high": one.high}
            for other, figures in against.items()
            for name, one in figures.items()
        ]
    )


def offers_table(profit: ProfitCurve, scores: Scores) -> dg.TableMetadataValue:
    """What offers above the threshold of the cost matrix would have earned, a customer."""
    return figures_table(
        [
            {
                "offer above P": profit.threshold,
                "customers": f"{profit.offered:.1%}",
                "profit": interval_text(profit.profit),
                "best in hindsight": f"{profit.best_profit:.4f} above {profit.best_threshold:.2f}",
                "offer to everyone": profit.everyone,
                "knowing who leaves": profit.perfect,
                "accuracy there": scores.accuracy,
                "f1 there": scores.f1,
            }
        ]
    )


def segments_table(segments: Sequence[Segment]) -> dg.TableMetadataValue:
    """A line each segment."""
    return figures_table(
        [
            {
                "by": segment.by,
                "segment": segment.name,
                "rows": segment.rows,
                "churn_rate": segment.churn_rate,
                **{
                    name: interval_text(segment.figures[name])
                    for name in ("auc", "accuracy", "log_loss", "calibration_error")
                },
                "judged": segment.too_small or "yes",
            }
            for segment in segments
        ]
    )


def gates_table(gates: Sequence[GateRecord]) -> dg.TableMetadataValue:
    """A line each gate, with why."""
    return figures_table(
        [{"gate": g.name, "passed": "yes" if g.passed else "no", "why": g.reason} for g in gates]
    )


def steps_table(steps: Sequence[Step]) -> dg.TableMetadataValue:
    """The newest steps of the registry's history, the newest first."""
    return figures_table(
        [
            {
                "step": step.number,
                "at": f"{step.at:%Y-%m-%d %H:%M:%S}",
                "version": step.version,
                "from": step.source,
                "to": step.target,
                "who": step.who,
                "why": step.why,
                "evidence": step.evidence.line(),
            }
            for step in reversed(steps[-HISTORY_ROWS:])
        ]
    )


def guards_table(guards: Sequence[Guard]) -> dg.TableMetadataValue:
    """The guard rails of a trial."""
    return figures_table([msgspec.structs.asdict(guard) for guard in guards])


def metrics_table(metrics: Sequence[Metric]) -> dg.TableMetadataValue:
    """Metrics as they were measured."""
    return figures_table(
        [
            {
                "metric": metric.name,
                "verdict": metric.verdict,
                "value": metric.value,
                "limit": metric.limit,
                "rows": metric.rows,
                "reason": metric.reason,
            }
            for metric in metrics
        ]
    )


def triggers_table(triggers: Sequence[Trigger]) -> dg.TableMetadataValue:
    """The triggers of a retraining."""
    return figures_table([msgspec.structs.asdict(trigger) for trigger in triggers])


def faults_table(faults: Sequence[Fault]) -> dg.TableMetadataValue:
    """Faults of the feeds, the newest first."""
    return figures_table(
        [
            {
                "table": fault.table,
                "first": str(fault.first),
                "last": str(fault.last),
                "open": fault.open,
                "of the usual": fault.ratio,
                "features": ", ".join(fault.features),
                "sound from": "not yet" if fault.open else str(fault.sound_from),
            }
            for fault in reversed(faults)
        ]
    )


def looks_table(looks: Sequence[Look]) -> dg.TableMetadataValue:
    """The difference of log loss at each cutoff, the newest first."""
    return figures_table(
        [
            {
                "cutoff": f"{look.cutoff:%Y-%m-%d}",
                "outcomes": look.rows,
                "difference": look.difference,
                "at least": look.lower,
                "at most": look.upper,
            }
            for look in reversed(looks[-HISTORY_ROWS:])
        ]
    )


def groups_table(report: TreatmentReport) -> dg.TableMetadataValue:
    """Whom offers would go to: those held out and the others."""
    return figures_table(
        [
            {
                "group": name,
                "above the threshold": group.entered,
                "outcomes": group.rows,
                "churned": group.churned,
                "churn rate": group.churn_rate if group.rows else None,
                "mean probability": group.mean_probability,
                "offered": group.offered,
            }
            for name, group in (("hold-out", report.held_out), ("others", report.others))
        ]
    )


def model_scores_table(scores: Mapping[str, Mapping[str, float]]) -> dg.TableMetadataValue:
    """The model on the outcomes of each group."""
    names = list(dict.fromkeys(name for figures in scores.values() for name in figures))
    return figures_table(
        [
            {"group": group} | {name: figures.get(name) for name in names}
            for group, figures in scores.items()
        ]
    )


def metric_check(name: str, metric: Metric) -> dg.AssetCheckResult:
    """A check that passes only where its metric is ok: too little to measure does not."""
    figures = {"verdict": metric.verdict, "limit": metric.limit, "rows": metric.rows}
    return dg.AssetCheckResult(
        check_name=name,
        passed=metric.verdict == "ok",
        severity=dg.AssetCheckSeverity.WARN,
        description=metric.reason,
        metadata=figures | ({} if metric.value is None else {"value": metric.value}),
    )


def released_table(lines: Sequence[ReleaseLine]) -> dg.TableMetadataValue:
    """What each release answered, on the outcomes there are."""
    return figures_table(
        [
            {
                "release": line.release_id,
                "outcomes": line.outcomes,
                "waiting": line.waiting,
                **{
                    name: interval_text(line.figures[name]) if line.figures else None
                    for name in FIGURES
                },
            }
            for line in lines
        ]
    )


def tenures_table(tenures: Sequence[Tenure]) -> dg.TableMetadataValue:
    """What has been in Production, the newest first."""
    return figures_table(
        [
            {
                "version": tenure.version,
                "since": f"{tenure.since:%Y-%m-%d %H:%M:%S}",
                "until": f"{tenure.until:%Y-%m-%d %H:%M:%S}" if tenure.until else None,
                "who": tenure.step.who,
                "why": tenure.step.why,
                "evidence": tenure.step.evidence.line(),
            }
            for tenure in reversed(tenures[-HISTORY_ROWS:])
        ]
    )


def drift_table(report: DriftReport) -> dg.TableMetadataValue:
    """A line each feature."""
    return figures_table(
        [
            {
                "feature": f.feature,
                "ks_statistic": f.statistic,
                "severity": f.severity,
                "verdict": f.verdict,
                "p_value": f.p_value,
                "rows": f.current_rows,
                "customers": f.current_customers,
                "finding": f.finding,
                "mean_then": f.reference_mean,
                "mean_now": f.current_mean,
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
