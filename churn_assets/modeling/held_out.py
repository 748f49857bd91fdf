"""The one look at the test cutoff: figures and plots of the served graph on held-out customers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from churn_assets.contract.features import features_named
from churn_assets.data.windows import cutoff_of
from churn_assets.modeling import plots
from churn_assets.modeling.metrics import Evaluation, evaluate, permutation_importance
from churn_assets.modeling.onnx_export import predict_onnx
from churn_assets.modeling.rows import RECENCY, feature_matrix, outcomes, rows_of
from churn_assets.modeling.split import Split

if TYPE_CHECKING:
    import pandas as pd

GOLDEN_ROWS = 20
REQUEST_ROWS = 200

Oracle = Callable[[Sequence[str], datetime, int], np.ndarray]


@dataclass(frozen=True)
class Judged:
    """A model on the test cutoff.

    golden: (rows [n, features], P(churn) [n]) that a release carries to prove itself. requests:
    bodies of real customers, to ask the service. reference: the training rows of each feature.
    plots: PNG by name.
    """

    evaluation: Evaluation
    golden: tuple[np.ndarray, np.ndarray]
    requests: list[dict[str, str | int | float]]
    reference: dict[str, np.ndarray]
    plots: dict[str, bytes]


def judge_held_out(
    frame: pd.DataFrame,
    split: Split,
    features: Sequence[str],
    *,
    onnx: bytes,
    estimator: Any,
    fitted_on: Sequence[date],
    oracle: Oracle | None,
    threshold: float,
    seed: int,
) -> Judged:
    """Judge `onnx` on the rows of the test cutoff of `frame`.

    frame: as `training.fit` takes it. estimator: the same model in scikit-learn, for importance.
    fitted_on: the feature days the model's final fit saw; the baselines see the same.
    oracle: gives the true probabilities of customers at a cutoff, where a simulator knows them.
    Raises UserError when the frame lacks a day or a column of the split.
    """
    test, train = rows_of(frame, [split.test]), rows_of(frame, fitted_on)
    x, y = feature_matrix(test, features), outcomes(test)
    p = predict_onnx(onnx, x)
    has_recency = RECENCY in features
    recency = test[RECENCY].to_numpy() if has_recency else None
    true_p = (
        oracle(test["customer_id"].tolist(), cutoff_of(split.test), split.horizon_days)
        if oracle
        else None
    )
    evaluation = evaluate(
        y,
        p,
        train_y=outcomes(train),
        recency=recency,
        train_recency=train[RECENCY].to_numpy() if has_recency else None,
        oracle=true_p,
        threshold=threshold,
    )
    chosen = np.random.default_rng(seed).permutation(len(x))
    golden = np.sort(chosen[:GOLDEN_ROWS])
    figures = {
        "confusion_matrix": plots.confusion_matrix_plot(y, p, threshold=threshold),
        "reliability": plots.reliability_plot(y, p),
        "scores": plots.score_histogram(y, p, threshold=threshold),
    }
    if evaluation.model.auc is not None:
        importance = permutation_importance(estimator, x, y, features, seed=seed)
        figures["importance"] = plots.importance_plot(importance)
        figures["roc"] = plots.roc_plot(y, p, recency=recency)
    return Judged(
        evaluation=evaluation,
        golden=(x[golden].astype(np.float64), p[golden]),
        requests=_bodies(test.iloc[chosen[:REQUEST_ROWS]], features),
        reference={name: train[name].to_numpy(dtype=np.float64) for name in features},
        plots=figures,
    )


def _bodies(rows: pd.DataFrame, features: Sequence[str]) -> list[dict[str, str | int | float]]:
    """Rows as the service is asked about them."""
    kinds = {f.name: int if f.dtype == "int" else float for f in features_named(features)}
    return [
        {"customer_id": str(row["customer_id"])}
        | {name: kind(row[name]) for name, kind in kinds.items()}
        for row in rows.to_dict("records")
    ]
