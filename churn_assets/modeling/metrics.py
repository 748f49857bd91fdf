"""How good a model is: figures of its probabilities, beside what one gets without a model.

Churned is the positive class throughout. Probabilities are P(churn).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from churn_assets.modeling.candidates import limited_threads

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# Float32 scores of an ONNX tree ensemble may end a rounding error outside of [0, 1].
ROUNDING = 1e-5

CALIBRATION_BINS = 10
TOP_SHARE = 0.1


@dataclass(frozen=True)
class Scores:
    """Figures of one set of probabilities on labelled rows.

    accuracy, f1: at `threshold` (churned is predicted when P > threshold).
    auc: area under the ROC curve. pr_auc: average precision. log_loss: mean, natural logarithm.
    brier: mean squared error of P. calibration_error, top_decile_lift: see the functions of these
    names. mean_prediction beside churn_rate shows whether P is too high or too low as a whole.
    A figure that has no value on these rows is None, and `undefined` says why.
    """

    rows: int
    churn_rate: float
    mean_prediction: float
    threshold: float
    accuracy: float
    f1: float | None
    auc: float | None
    pr_auc: float | None
    log_loss: float
    brier: float
    calibration_error: float
    top_decile_lift: float | None
    undefined: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The figures in JSON's types."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """A model on held-out rows, and the baselines on the same rows.

    majority: every customer gets the churn rate of the training rows, hence the majority class.
    recency: days since the last order alone; `auc` and `pr_auc` are those of the raw number, the
    other figures those of its best monotone fit (isotonic regression) on the training rows.
    oracle_auc: AUC of the probabilities the outcomes were drawn from, where a simulator knows
    them; out of reach for anyone who sees events only.
    """

    model: Scores
    majority: Scores
    recency: Scores | None
    oracle_auc: float | None

    def to_dict(self) -> dict[str, Any]:
        """The evaluation in JSON's types."""
        return asdict(self)

    def figures(self) -> dict[str, float]:
        """Every figure that has a value, flat, with baselines prefixed: for an experiment log."""
        flat = _figures("", self.model) | _figures("majority_", self.majority)
        if self.recency is not None:
            flat |= _figures("recency_", self.recency)
        if self.oracle_auc is not None:
            flat["oracle_auc"] = self.oracle_auc
        return flat


@dataclass(frozen=True)
class Importance:
    """What a feature is worth: the AUC lost when its values are shuffled among the rows."""

    feature: str
    mean: float
    std: float


def score(y: ArrayLike, p: ArrayLike, *, threshold: float = 0.5) -> Scores:
    """Score probabilities `p` [rows] against outcomes `y` [rows] (true where churned).

    Raises ValueError for no rows, unequal lengths, outcomes other than 0 and 1, and probabilities
    that are not finite or outside of [0, 1].
    """
    truth, probability = _outcomes(y), _probabilities(p)
    _same_length(truth, probability)
    from sklearn import metrics

    undefined = _one_class(truth)
    predicted = probability > threshold
    f1 = None
    if truth.any() or predicted.any():
        f1 = float(metrics.f1_score(truth, predicted, zero_division=0.0))
    else:
        undefined["f1"] = "no customer churned and none was predicted to"
    return Scores(
        rows=len(truth),
        churn_rate=float(truth.mean()),
        mean_prediction=float(probability.mean()),
        threshold=threshold,
        accuracy=float((truth == predicted).mean()),
        f1=f1,
        auc=None if "auc" in undefined else float(metrics.roc_auc_score(truth, probability)),
        pr_auc=(
            None
            if "pr_auc" in undefined
            else float(metrics.average_precision_score(truth, probability))
        ),
        log_loss=float(metrics.log_loss(truth, probability, labels=[False, True])),
        brier=float(np.mean((probability - truth) ** 2)),
        calibration_error=calibration_error(truth, probability),
        top_decile_lift=None if "auc" in undefined else top_decile_lift(truth, probability),
        undefined=undefined,
    )


def auc(y: ArrayLike, ranking: ArrayLike) -> float | None:
    """Area under the ROC curve of any number that ranks rows; None when only one class is there.

    Equals P(ranking of a churned row > that of a retained one) + half the ties.
    """
    truth = _outcomes(y)
    values = np.asarray(ranking, dtype=np.float64)
    _same_length(truth, values)
    if not np.isfinite(values).all():
        raise ValueError("a ranking must be finite")
    if _one_class(truth):
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truth, values))


def calibration_bins(p: ArrayLike) -> NDArray[np.int64]:
    """The bin [rows] of each probability: ten bins of equally many rows, in order of P.

    Rows with the same P share the bin most of them fall into, so that their order does not matter.
    """
    values = np.asarray(p, dtype=np.float64)
    distinct, of_row, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - counts / 2
    wanted = min(CALIBRATION_BINS, len(distinct))
    return np.minimum((middle / len(values) * wanted).astype(np.int64), wanted - 1)[of_row]


def calibration_error(y: ArrayLike, p: ArrayLike) -> float:
    """How far P is from the share that churned: the mean over the rows of the gap of their bin.

    Method: expected calibration error (Naeini, Cooper, Hauskrecht, AAAI 2015) in bins of equal
    size.
    """
    truth, probability = _outcomes(y), _probabilities(p)
    _same_length(truth, probability)
    gaps = np.bincount(calibration_bins(probability), weights=probability - truth)
    return float(np.abs(gaps).sum() / len(truth))


def top_decile_lift(y: ArrayLike, ranking: ArrayLike) -> float | None:
    """Churn rate of the tenth of the rows ranked highest, divided by that of all.

    Rows that tie at the edge count in part. None when nobody churned.
    """
    truth, values = _outcomes(y), np.asarray(ranking, dtype=np.float64)
    _same_length(truth, values)
    if not truth.any():
        return None
    _, group, sizes = np.unique(-values, return_inverse=True, return_counts=True)
    rates = np.bincount(group, weights=truth) / sizes
    target = TOP_SHARE * len(truth)
    taken = np.clip(target - (np.cumsum(sizes) - sizes), 0, sizes)
    return float((taken * rates).sum() / target / truth.mean())


def evaluate(
    y: ArrayLike,
    p: ArrayLike,
    *,
    train_y: ArrayLike,
    recency: ArrayLike | None = None,
    train_recency: ArrayLike | None = None,
    oracle: ArrayLike | None = None,
    threshold: float = 0.5,
) -> Evaluation:
    """Judge `p` [rows] on held-out outcomes `y` [rows], beside baselines on the same rows.

    train_y [training rows] fits the baselines; recency [rows] and train_recency [training rows]
    are days since the last order, both or neither; oracle [rows] are true probabilities.
    Raises ValueError for what `score` refuses.
    """
    if (recency is None) != (train_recency is None):
        raise ValueError("give recency and train_recency, or neither")
    learned = _outcomes(train_y)
    rows = len(_outcomes(y))
    by_recency = None
    if recency is not None and train_recency is not None:
        by_recency = _score_recency(y, recency, learned, train_recency, threshold)
    return Evaluation(
        model=score(y, p, threshold=threshold),
        majority=score(y, np.full(rows, learned.mean()), threshold=threshold),
        recency=by_recency,
        oracle_auc=None if oracle is None else auc(y, oracle),
    )


def fit_recency(train_y: ArrayLike, train_recency: ArrayLike, recency: ArrayLike) -> Floats:
    """P(churn) [rows] of days since the last order: the best monotone fit to the training rows."""
    from sklearn.isotonic import IsotonicRegression

    learned = _outcomes(train_y)
    # The bounds keep a run of equal outcomes from becoming certainty (Laplace's rule).
    margin = 1.0 / (len(learned) + 2)
    fit = IsotonicRegression(y_min=margin, y_max=1 - margin, out_of_bounds="clip")
    fit.fit(np.asarray(train_recency, dtype=np.float64), learned.astype(np.float64))
    return fit.predict(np.asarray(recency, dtype=np.float64))


def _score_recency(
    y: ArrayLike, recency: ArrayLike, train_y: Bools, train_recency: ArrayLike, threshold: float
) -> Scores:
    days = np.asarray(recency, dtype=np.float64)
    fitted = score(y, fit_recency(train_y, train_recency, days), threshold=threshold)
    # The fit is flat in places and so ties what the raw number ranks: rank by the number.
    truth = _outcomes(y)
    if fitted.auc is None:
        return fitted
    from sklearn.metrics import average_precision_score

    return replace(
        fitted,
        auc=auc(truth, days),
        pr_auc=float(average_precision_score(truth, days)),
        top_decile_lift=top_decile_lift(truth, days),
    )


def permutation_importance(
    estimator: Any,
    x: NDArray[np.floating[Any]],
    y: ArrayLike,
    features: Sequence[str],
    *,
    seed: int,
    repeats: int = 5,
    max_rows: int = 4000,
) -> tuple[Importance, ...]:
    """AUC lost by shuffling each column of `x` [rows, features] in turn, largest first.

    Method: Breiman, Random Forests (2001), sec. 10, on held-out rows. At most `max_rows` rows
    are used, drawn at random. Raises ValueError when only one class is there.
    """
    truth = _outcomes(y)
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(truth))[:max_rows])
    x, truth = x[chosen], truth[chosen]
    with limited_threads(len(truth)):
        whole = auc(truth, estimator.predict_proba(x)[:, 1])
        if whole is None:
            raise ValueError("importance needs both churned and retained customers")
        found = []
        for column, feature in enumerate(features):
            losses = []
            for _ in range(repeats):
                shuffled = x.copy()
                shuffled[:, column] = rng.permutation(shuffled[:, column])
                rest = auc(truth, estimator.predict_proba(shuffled)[:, 1])
                losses.append(whole - (rest or 0.0))
            found.append(Importance(feature, float(np.mean(losses)), float(np.std(losses))))
    return tuple(sorted(found, key=lambda item: -item.mean))


def _figures(prefix: str, scores: Scores) -> dict[str, float]:
    values = asdict(scores)
    del values["undefined"], values["threshold"]
    return {f"{prefix}{name}": float(v) for name, v in values.items() if v is not None}


def _one_class(truth: Bools) -> dict[str, str]:
    if truth.all() or not truth.any():
        only = "churned" if truth.all() else "retained"
        reason = f"every one of the {len(truth)} customers is {only}; ranking needs both"
        return {"auc": reason, "pr_auc": reason}
    return {}


def _outcomes(y: ArrayLike) -> Bools:
    values = np.asarray(y)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError("outcomes must be one column with at least one row")
    if values.dtype != np.bool_ and not np.isin(values, (0, 1)).all():
        raise ValueError("outcomes must be 0 or 1")
    return values.astype(np.bool_)


def _probabilities(p: ArrayLike) -> Floats:
    values = np.asarray(p, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("probabilities must be finite")
    if values.size and (values.min() < -ROUNDING or values.max() > 1 + ROUNDING):
        raise ValueError("probabilities must be between 0 and 1")
    return np.clip(values, 0.0, 1.0)


def _same_length(truth: Bools, values: NDArray[Any]) -> None:
    if values.shape != truth.shape:
        raise ValueError(f"{len(truth)} outcomes, but values of shape {values.shape}")
