"""The one look at the test cutoff: figures and plots of the served graph on held-out customers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from churn_assets.contract.features import features_named
from churn_assets.data.windows import cutoff_of
from churn_assets.errors import UserError
from churn_assets.modeling import plots
from churn_assets.modeling.bootstrap import (
    Interval,
    Resampling,
    Scored,
    differences,
    intervals,
)
from churn_assets.modeling.costs import CostPolicy, ProfitCurve, profit_curve
from churn_assets.modeling.metrics import (
    Evaluation,
    Scores,
    evaluate,
    fit_recency,
    permutation_importance,
    score,
)
from churn_assets.modeling.onnx_export import predict_onnx
from churn_assets.modeling.rows import RECENCY, feature_matrix, outcomes, rows_of
from churn_assets.modeling.segments import Segment, judge_segments, segment_masks
from churn_assets.modeling.split import Split

if TYPE_CHECKING:
    import pandas as pd

GOLDEN_ROWS = 20
REQUEST_ROWS = 200

Oracle = Callable[[Sequence[str], datetime, int], np.ndarray]
FirstSeen = Callable[[Sequence[str], datetime], NDArray[np.float64]]


@dataclass(frozen=True)
class EvaluationPolicy:
    """How much evidence is asked of the held-out rows.

    resamples, confidence: see `Resampling`. least_segment_rows: a smaller segment is shown but not
    judged by.
    """

    resamples: int = 300
    confidence: float = 0.95
    least_segment_rows: int = 200

    def __post_init__(self) -> None:
        Resampling(self.resamples, self.confidence)
        if self.least_segment_rows < 1:
            raise UserError(
                f"evaluation.least_segment_rows is {self.least_segment_rows}; set at least 1"
            )

    @property
    def resampling(self) -> Resampling:
        """How intervals are made."""
        return Resampling(self.resamples, self.confidence)


@dataclass(frozen=True)
class Judged:
    """A model on the test cutoff.

    intervals: every figure of the model with its interval. against: log loss, AUC and Brier score
    of the model minus those of majority, recency and production, where they are, on the same rows.
    at_offers: the model at the threshold of the cost matrix. profit: what offers would have earned.
    golden: (rows [n, features], P(churn) [n]) that a release carries to prove itself. requests:
    bodies of real customers, to ask the service. reference: the training rows of each feature.
    plots: PNG by name.
    """

    evaluation: Evaluation
    intervals: dict[str, Interval]
    against: dict[str, dict[str, Interval]]
    segments: tuple[Segment, ...]
    at_offers: Scores
    profit: ProfitCurve
    golden: tuple[np.ndarray, np.ndarray]
    requests: list[dict[str, str | int | float]]
    reference: dict[str, np.ndarray]
    plots: dict[str, bytes] = field(repr=False)


def judge_held_out(
    frame: pd.DataFrame,
    split: Split,
    features: Sequence[str],
    *,
    onnx: bytes,
    estimator: Any,
    fitted_on: Sequence[date],
    oracle: Oracle | None,
    tenure: FirstSeen | None = None,
    production: bytes | None = None,
    threshold: float,
    seed: int,
    policy: EvaluationPolicy | None = None,
    costs: CostPolicy | None = None,
    draw: bool = True,
) -> Judged:
    """Judge `onnx` on the rows of the test cutoff of `frame`.

    frame: as `training.fit` takes it. estimator: the same model in scikit-learn, for importance.
    fitted_on: the feature days the model's final fit saw; the baselines see the same.
    oracle: gives the true probabilities of customers at a cutoff, where a simulator knows them.
    tenure: gives the days since customers first appeared, as of a cutoff. production: the graph in
    production, when there is one that takes the same features. draw: whether there are plots.
    Raises UserError when the frame lacks a day or a column of the split.
    """
    policy, costs = policy or EvaluationPolicy(), costs or CostPolicy()
    test, train = rows_of(frame, [split.test]), rows_of(frame, fitted_on)
    x, y = feature_matrix(test, features), outcomes(test)
    p = predict_onnx(onnx, x)
    customers, cutoff = test["customer_id"].tolist(), cutoff_of(split.test)
    has_recency = RECENCY in features
    recency = test[RECENCY].to_numpy() if has_recency else None
    train_recency = train[RECENCY].to_numpy() if has_recency else None
    true_p = oracle(customers, cutoff, split.horizon_days) if oracle else None
    evaluation = evaluate(
        y,
        p,
        train_y=outcomes(train),
        recency=recency,
        train_recency=train_recency,
        oracle=true_p,
        threshold=threshold,
    )
    others: dict[str, Scored] = {
        "majority": Scored(y, np.full(len(y), outcomes(train).mean()), threshold=threshold)
    }
    if recency is not None and train_recency is not None:
        fitted = fit_recency(outcomes(train), train_recency, recency)
        others["recency"] = Scored(y, fitted, threshold=threshold, ranking=recency)
    if production is not None:
        others["production"] = Scored(y, predict_onnx(production, x), threshold=threshold)
    chosen = np.random.default_rng(seed).permutation(len(x))
    golden = np.sort(chosen[:GOLDEN_ROWS])
    profit = profit_curve(y, p, costs, policy.resampling, seed=seed)
    return Judged(
        evaluation=evaluation,
        **_uncertainty(y, p, others, customers, threshold, policy.resampling, seed),
        segments=judge_segments(
            segment_masks(test, train, tenure(customers, cutoff) if tenure else None),
            y,
            p,
            policy.resampling,
            threshold=threshold,
            least_rows=policy.least_segment_rows,
            seed=seed,
        ),
        at_offers=score(y, p, threshold=costs.threshold),
        profit=profit,
        golden=(x[golden].astype(np.float64), p[golden]),
        requests=_bodies(test.iloc[chosen[:REQUEST_ROWS]], features),
        reference={name: train[name].to_numpy(dtype=np.float64) for name in features},
        plots=(
            _plots(evaluation, estimator, x, y, p, features, recency, threshold, seed, profit)
            if draw
            else {}
        ),
    )


def _uncertainty(
    y: ArrayLike,
    p: ArrayLike,
    others: Mapping[str, Scored],
    customers: Sequence[str],
    threshold: float,
    resampling: Resampling,
    seed: int,
) -> dict[str, Any]:
    ours = Scored(y, p, threshold=threshold)
    several = customers if len(set(customers)) < len(customers) else None
    return {
        "intervals": intervals(ours, resampling, seed=seed, customers=several),
        "against": {
            name: differences(ours, theirs, resampling, seed=seed, customers=several)
            for name, theirs in others.items()
        },
    }


def _plots(
    evaluation: Evaluation,
    estimator: Any,
    x: NDArray[np.float32],
    y: NDArray[np.bool_],
    p: NDArray[np.float64],
    features: Sequence[str],
    recency: NDArray[Any] | None,
    threshold: float,
    seed: int,
    profit: ProfitCurve,
) -> dict[str, bytes]:
    figures = {
        "profit": plots.profit_plot(profit),
        "confusion_matrix": plots.confusion_matrix_plot(y, p, threshold=threshold),
        "reliability": plots.reliability_plot(y, p),
        "scores": plots.score_histogram(y, p, threshold=threshold),
    }
    if evaluation.model.auc is not None:
        importance = permutation_importance(estimator, x, y, features, seed=seed)
        figures["importance"] = plots.importance_plot(importance)
        figures["roc"] = plots.roc_plot(y, p, recency=recency)
    return figures


def _bodies(rows: pd.DataFrame, features: Sequence[str]) -> list[dict[str, str | int | float]]:
    """Rows as the service is asked about them."""
    kinds = {f.name: int if f.dtype == "int" else float for f in features_named(features)}
    return [
        {"customer_id": str(row["customer_id"])}
        | {name: kind(row[name]) for name, kind in kinds.items()}
        for row in rows.to_dict("records")
    ]
