"""What `make run` tells: collected from the records and the lake, printed, and kept as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg
import msgspec
import pyarrow.compute as pc

from churn_assets.data.quarantine import read_quarantine
from churn_assets.data.refresh import count_reasons
from churn_assets.defs.health import page_of
from churn_assets.defs.resources import Project, read_record
from churn_assets.home import Home
from churn_assets.lifecycle.promotion import PromotionDecision
from churn_assets.lifecycle.records import BentoRecord, EvaluationRecord
from churn_assets.lifecycle.registry import read_registry
from churn_assets.monitoring.drift_watch import DriftRecord
from churn_assets.up import DAGSTER, MLFLOW

COMPARED = (
    "auc",
    "accuracy",
    "brier",
    "log_loss",
    "f1",
    "pr_auc",
    "calibration_error",
    "top_decile_lift",
)


def collect(
    project: Project,
    instance: dg.DagsterInstance,
    run_id: str,
    refused_by: Mapping[str, str],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Everything a person wants to know of training run `run_id`, in JSON's types."""
    record = msgspec.json.decode(
        read_record(project.home.records, "evaluation_report", run_id), type=EvaluationRecord
    )
    model, data = record.model, record.model.training_set
    metrics = record.metrics
    registry = read_registry(project.mlflow_client(), model.name)
    drift = msgspec.json.decode(read_record(project.home.records, "drift_report"), type=DriftRecord)
    tables = project.settings.raw_tables
    quarantined = {
        table: count_reasons(read_quarantine(project.lake, table))
        for table in (*tables, "customer_features")
    }
    newest = project.lake.read("churn_labels", project.data_time(), project.data_time())
    summary: dict[str, Any] = {
        "rows_read": {table: rows_read(instance, table) for table in tables},
        "rows_quarantined": {name: counts for name, counts in quarantined.items() if counts},
        "days": [str(project.lake.days("orders")[0]), str(project.data_time())],
        "eligible_rows": newest.num_rows,
        "training_rows": data.rows,
        "churn_rate": pc.mean(newest["churned"]).as_py(),
        "features": list(data.features),
        "data_hash": data.data_hash,
        "model": {
            "family": model.family,
            **{name: metrics.get(name) for name in (*COMPARED, "oracle_auc")},
            "baselines": {
                baseline: {name: metrics.get(f"{baseline}_{name}") for name in COMPARED}
                for baseline in ("recency", "majority")
            },
        },
        "evidence": {
            "held_out": record.held_out_use.sentence if record.held_out_use else None,
            "use": record.held_out_use.number if record.held_out_use else None,
            "intervals": msgspec.to_builtins(record.intervals),
            "model_minus": msgspec.to_builtins(record.against),
            "segments": msgspec.to_builtins(record.segments),
            "offers": {k: v for k, v in metrics.items() if k.startswith("offer_")},
            "production": record.paired_replay.incumbent if record.paired_replay else None,
        },
        "gates": [msgspec.to_builtins(gate) for gate in record.gates],
        "refused_by": dict(refused_by),
        "registered": {"version": model.version, "stage": registry.version(model.version).stage},
        "promotion": None,
        "bento": None,
        "prediction": None,
        "drift": {
            "verdict": drift.verdict,
            "reason": drift.reason,
            "source": drift.source,
            "version": drift.version,
            "prediction_shift": drift.prediction.shift,
            "statistics": drift.statistics,
            "page": drift.page,
        },
        "health": {"page": str(page_of(project.home))},
        "seconds": dict(seconds),
    }
    if record.passed:
        decided = read_record(project.home.records, "promotion_decision", run_id)
        decision = msgspec.json.decode(decided, type=PromotionDecision)
        summary["promotion"] = {"verdict": decision.verdict, "reasons": list(decision.reasons)}
    if record.passed and registry.production is not None:
        bento = msgspec.json.decode(
            read_record(project.home.records, "churn_bento"), type=BentoRecord
        )
        summary["bento"] = bento.tag
        summary["prediction"] = {
            "request": bento.request,
            "response": bento.response,
            "latency_ms": bento.latency_ms,
        }
    return summary


def rows_read(instance: dg.DagsterInstance, table: str) -> int | None:
    """The source rows looked at when `table` was last materialized."""
    event = instance.get_latest_materialization_event(dg.AssetKey(table))
    materialization = event.asset_materialization if event else None
    if materialization is None or "rows_read" not in materialization.metadata:
        return None
    value = materialization.metadata["rows_read"].value
    return value if isinstance(value, int) else None


def show(summary: Mapping[str, Any], home: Home) -> None:
    """Print a summary for a person."""
    print("\n".join(lines(summary, home)), flush=True)


def lines(summary: Mapping[str, Any], home: Home) -> list[str]:
    """A summary as lines of text."""
    model, drift = summary["model"], summary["drift"]
    read = ", ".join(f"{t} {n:,}" for t, n in summary["rows_read"].items() if n is not None)
    shown = [
        "",
        f"  data        {summary['days'][0]} to {summary['days'][1]}; rows read: {read}",
        f"  quarantined {_quarantined(summary['rows_quarantined'])}",
        f"  customers   {summary['eligible_rows']:,} at the newest labelled cutoff, "
        f"{summary['churn_rate']:.1%} churned; {summary['training_rows']:,} training rows",
        "",
        f"  {'':22} {'AUC':>7} {'accuracy':>9} {'Brier':>7}",
        _scores(model["family"], model),
        _scores("recency alone", model["baselines"]["recency"]),
        _scores("majority", model["baselines"]["majority"]),
    ]
    if model["oracle_auc"] is not None:
        shown.append(_scores("oracle (latent state)", {"auc": model["oracle_auc"]}))
    known = summary["evidence"]["intervals"]
    ranges = ", ".join(
        f"{title} {found['low']:.3f} to {found['high']:.3f}"
        for name, title in (("auc", "AUC"), ("accuracy", "accuracy"), ("brier", "Brier"))
        if (found := known[name])["low"] is not None
    )
    shown += [
        f"  intervals   {ranges}",
        f"  offers      {_offers(summary['evidence']['offers'])}",
        f"  held out    {summary['evidence']['held_out']}",
        "",
    ]
    for gate in summary["gates"]:
        shown.append(f"  gate        {'passed ' if gate['passed'] else 'REFUSED'} {gate['reason']}")
    registered = summary["registered"]
    shown.append(f"  model       version {registered['version']}, stage {registered['stage']}")
    promotion = summary["promotion"]
    if promotion is not None:
        shown.append(f"  promotion   {promotion['verdict']}: {'; '.join(promotion['reasons'])}")
        if promotion["verdict"] == "wait":
            shown.append('              approve it: churn approve --who NAME --why "..."')
    if promotion is None:
        shown.append("  bento       none: the gates refused the model, so nothing was promoted")
    elif summary["prediction"] is None:
        shown.append("  bento       none: nothing is in Production yet")
    else:
        prediction = summary["prediction"]
        request = dict(prediction["request"])
        customer = request.pop("customer_id")
        given = ", ".join(f"{k} {_number(v)}" for k, v in request.items())
        answer = prediction["response"]
        shown += [
            f"  bento       {summary['bento']}",
            f"  prediction  {customer} ({given})",
            f"              churn_probability {answer['churn_probability']}, risk "
            f"{answer['risk_level']}, in {prediction['latency_ms']:.1f} ms",
        ]
    total = sum(summary["seconds"].values())
    parts = ", ".join(f"{stage} {spent:.0f}" for stage, spent in summary["seconds"].items())
    shown += [
        f"  drift       {drift['verdict']}: {drift['reason']}",
        f"              {drift['page']}",
        f"  health      {summary['health']['page']}",
        f"  took        {total:.0f} s ({parts})",
        "",
        f"  `make up` shows all of it: Dagster {DAGSTER.url}, MLflow {MLFLOW.url}",
        f"  summary: {home.summary}",
    ]
    return shown


def _quarantined(by_table: Mapping[str, Mapping[str, int]]) -> str:
    if not by_table:
        return "no rows"
    return "; ".join(
        f"{table}: " + ", ".join(f"{reason} {count:,}" for reason, count in counts.items())
        for table, counts in by_table.items()
    )


def _offers(found: Mapping[str, float]) -> str:
    return (
        f"above P = {found['offer_threshold']:.3f} (cost matrix) to {found['offer_share']:.0%} of "
        f"customers: {found['offer_profit']:+.2f} a customer, to everyone "
        f"{found['offer_profit_everyone']:+.2f}; accuracy there {found['offer_accuracy']:.4f}"
    )


def _scores(name: str, figures: Mapping[str, Any]) -> str:
    def cell(key: str, width: int) -> str:
        value = figures.get(key)
        return f"{'-':>{width}}" if value is None else f"{value:>{width}.4f}"

    return f"  {name:22} {cell('auc', 7)} {cell('accuracy', 9)} {cell('brier', 7)}"


def _number(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
