"""A version judged once on its held-out window, with all the evidence in one record."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import msgspec
import pyarrow as pa

from churn_assets.data.contents import content_hash
from churn_assets.data.windows import cutoff_of
from churn_assets.lifecycle.ledger import Look, Window
from churn_assets.lifecycle.records import (
    EvaluationRecord,
    GateRecord,
    ModelRecord,
    PairedReplay,
)
from churn_assets.modeling.gates import QualityPolicy, judge_gates
from churn_assets.modeling.segments import lowest_auc

if TYPE_CHECKING:
    import pandas as pd

    from churn_assets.data.windows import Windows
    from churn_assets.lifecycle.incumbent import Incumbent
    from churn_assets.lifecycle.ledger import Use
    from churn_assets.modeling.held_out import Judged


def look_at(
    frame: pd.DataFrame, model: ModelRecord, windows: Windows, dagster_run: str, at: datetime
) -> Look:
    """The look at the held-out rows of `frame` that judging `model` is."""
    import pandas as pd

    test = model.training_set.test
    rows = frame[frame["cutoff"] == pd.Timestamp(cutoff_of(test))]
    return Look(
        window=Window(test, windows.horizon_days, windows.activity_days),
        rows_hash=content_hash(pa.Table.from_pandas(rows, preserve_index=False)),
        data_hash=model.training_set.data_hash,
        model=model.name,
        version=model.version,
        mlflow_run=model.mlflow_run,
        dagster_run=dagster_run,
        at=at,
    )


def asked(
    incumbent: Incumbent | None, features: tuple[str, ...]
) -> tuple[bytes | None, str | None]:
    """The incumbent's graph, if it can judge rows of `features`, or else why it cannot."""
    if incumbent is None:
        return None, None
    if incumbent.onnx is None:
        return None, incumbent.problem
    if incumbent.features != features:
        return None, (
            f"version {incumbent.version} in production takes other features "
            f"({', '.join(incumbent.features)})"
        )
    return incumbent.onnx, None


def judgement(
    model: ModelRecord,
    judged: Judged,
    latency: dict[str, float],
    policy: QualityPolicy,
    *,
    incumbent: Incumbent | None,
    problem: str | None,
    use: Use,
    release_dir: str,
    release_id: str,
    at: datetime,
) -> EvaluationRecord:
    """The record of a judgement: figures, intervals, comparisons, and a gate each.

    latency: figures in milliseconds. incumbent: the model in production, None when the registry
    knows of none; problem: why it could not be compared with.
    """
    over_recency = judged.against.get("recency", {}).get("auc")
    over_production = judged.against.get("production", {}).get("log_loss")
    weakest = lowest_auc(judged.segments)
    metrics = judged.evaluation.figures() | latency
    found = {
        "auc_over_recency": over_recency.low if over_recency else None,
        "log_loss_over_production": over_production.low if over_production else None,
        "segment_auc": weakest[0] if weakest else None,
    }
    metrics |= _at_offers(judged)
    metrics |= {name: value for name, value in found.items() if value is not None}
    gates = judge_gates(
        policy,
        metrics,
        no_production=incumbent is None,
        missing={
            "log_loss_over_production": problem or "",
            "segment_auc": "no segment has enough customers of both outcomes",
            "auc_over_recency": "recency could not be compared with",
        },
    )
    verdicts = {gate.name: gate.passed for gate in gates}
    return EvaluationRecord(
        model=model,
        metrics=metrics,
        gates=tuple(msgspec.convert(gate.to_dict(), GateRecord) for gate in gates),
        release_dir=release_dir,
        release_id=release_id,
        at=at,
        intervals=judged.intervals,
        against=judged.against,
        segments=judged.segments,
        profit=judged.profit,
        paired_replay=(
            PairedReplay(
                incumbent=incumbent.version,
                day=model.training_set.test,
                rows=judged.evaluation.model.rows,
                differences=judged.against["production"],
                no_worse=verdicts["log_loss_over_production"],
            )
            if incumbent is not None and "production" in judged.against
            else None
        ),
        held_out_use=use,
    )


def _at_offers(judged: Judged) -> dict[str, float]:
    """The figures at the threshold of the cost matrix; profits are of a customer."""
    scores, profit = judged.at_offers, judged.profit
    found = {
        "offer_threshold": profit.threshold,
        "offer_share": profit.offered,
        "offer_accuracy": scores.accuracy,
        "offer_f1": scores.f1,
        "offer_profit": profit.profit.value,
        "offer_profit_best_in_hindsight": profit.best_profit,
        "offer_profit_everyone": profit.everyone,
    }
    return {name: value for name, value in found.items() if value is not None}
