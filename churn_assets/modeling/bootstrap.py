"""How sure a figure is: percentile intervals from resampled customers.

Method: Efron and Tibshirani, An Introduction to the Bootstrap (1993), ch. 13. A resample is a
weight for every row, how often its customer was drawn, and every figure is computed for all
resamples at once from the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from churn_assets.errors import UserError
from churn_assets.modeling.metrics import TOP_SHARE, calibration_bins

Floats = NDArray[np.float64]

FIGURES = (
    "accuracy",
    "f1",
    "auc",
    "pr_auc",
    "log_loss",
    "brier",
    "calibration_error",
    "top_decile_lift",
)
COMPARED = ("log_loss", "auc", "brier")

# Weights held in memory at a time.
_WEIGHTS = 4_000_000
# A probability of 0 for what did happen would cost an infinite loss; scikit-learn stops here too.
_LEAST = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Resampling:
    """How intervals are made.

    resamples: how often the customers are drawn anew. confidence: of the interval, in its middle.
    Raises UserError for what gives no interval.
    """

    resamples: int = 300
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 50 <= self.resamples <= 100_000:
            raise UserError(
                f"evaluation.resamples is {self.resamples}; set a number from 50 to 100000"
            )
        if not 0.5 <= self.confidence < 1:
            raise UserError(
                f"evaluation.confidence is {self.confidence}; set a number from 0.5 to below 1"
            )


@dataclass(frozen=True)
class Interval:
    """A figure and where it would lie for other customers of the same kind.

    None when the figure has no value, or none in too many of the resamples.
    """

    value: float | None
    low: float | None
    high: float | None


def interval_text(found: Interval) -> str:
    """A figure with its interval, for a person; a dash when it has no value."""
    if found.value is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.value:.4f}"
    return f"{found.value:.4f} ({found.low:.4f} to {found.high:.4f})"


class Scored:
    """Probabilities `p` on outcomes `y`, prepared for weights; [rows] each.

    ranking orders the rows for AUC, average precision and lift, where it is not `p` itself.
    """

    def __init__(
        self,
        y: ArrayLike,
        p: ArrayLike,
        *,
        threshold: float = 0.5,
        ranking: ArrayLike | None = None,
    ) -> None:
        self.y = np.asarray(y, dtype=np.float64)
        self.p = np.clip(np.asarray(p, dtype=np.float64), 0.0, 1.0)
        kept = np.clip(self.p, _LEAST, 1 - _LEAST)
        predicted = self.p > threshold
        self._correct = (predicted == (self.y > 0)).astype(np.float64)
        self._predicted = predicted.astype(np.float64)
        self._loss = -(self.y * np.log(kept) + (1 - self.y) * np.log1p(-kept))
        self._squared = (self.p - self.y) ** 2
        ranked = -(self.p if ranking is None else np.asarray(ranking, dtype=np.float64))
        self._order = np.argsort(ranked, kind="stable")
        ordered = ranked[self._order]
        self._ties = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        bins = calibration_bins(self.p)
        self._gaps = np.zeros((len(self.p), int(bins.max()) + 1))
        self._gaps[np.arange(len(self.p)), bins] = self.p - self.y

    def figures(self, weights: Floats, names: Sequence[str] = FIGURES) -> dict[str, Floats]:
        """Each figure [resamples] under `weights` [resamples, rows]; NaN where it has no value."""
        found: dict[str, Floats] = {}
        total = weights.sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            for name, per_row in (
                ("accuracy", self._correct),
                ("log_loss", self._loss),
                ("brier", self._squared),
            ):
                if name in names:
                    found[name] = weights @ per_row / total
            if "f1" in names:
                hits = weights @ (self._predicted * self.y)
                found["f1"] = 2 * hits / (weights @ self._predicted + weights @ self.y)
            if "calibration_error" in names:
                found["calibration_error"] = np.abs(weights @ self._gaps).sum(axis=1) / total
            if {"auc", "pr_auc", "top_decile_lift"} & set(names):
                ranked = self._ranked(weights)
                found |= {name: values for name, values in ranked.items() if name in names}
        return found

    def _ranked(self, weights: Floats) -> dict[str, Floats]:
        ordered = weights[:, self._order]
        churned = np.add.reduceat(ordered * self.y[self._order], self._ties, axis=1)
        everyone = np.add.reduceat(ordered, self._ties, axis=1)
        caught, flagged = churned.cumsum(axis=1), everyone.cumsum(axis=1)
        retained = everyone - churned
        positives, rows = caught[:, -1], flagged[:, -1]
        above = caught - churned
        won = (retained * (above + churned / 2)).sum(axis=1)
        # Within a group of ties the flagged churn at the group's own rate.
        target = TOP_SHARE * rows
        place = (flagged < target[:, None]).sum(axis=1)[:, None]
        rate = np.take_along_axis(churned / everyone, place, axis=1)[:, 0]
        before = np.take_along_axis(flagged - everyone, place, axis=1)[:, 0]
        top = np.take_along_axis(above, place, axis=1)[:, 0] + rate * (target - before)
        both = (positives > 0) & (positives < rows)
        precision = np.divide(caught, flagged, out=np.zeros_like(caught), where=flagged > 0)
        return {
            "auc": won / (positives * (rows - positives)),
            "pr_auc": np.where(both, (churned * precision).sum(axis=1) / positives, np.nan),
            "top_decile_lift": np.where(both, top / target / (positives / rows), np.nan),
        }


def intervals(
    scored: Scored, resampling: Resampling, *, seed: int, customers: ArrayLike | None = None
) -> dict[str, Interval]:
    """Every figure of `scored` with its interval.

    customers: whose row it is [rows], where a customer has several; they are drawn together.
    """
    return _intervals(lambda weights: scored.figures(weights), scored, resampling, seed, customers)


def differences(
    ours: Scored,
    theirs: Scored,
    resampling: Resampling,
    *,
    seed: int,
    customers: ArrayLike | None = None,
) -> dict[str, Interval]:
    """Log loss, AUC and Brier score of `ours` minus those of `theirs`, on the same rows.

    Paired: every resample draws the same customers for both, so that what is hard about them
    cancels. Raises ValueError when the outcomes are not the same.
    """
    if not np.array_equal(ours.y, theirs.y):
        raise ValueError("a paired comparison needs the same rows on both sides")

    def lost(weights: Floats) -> dict[str, Floats]:
        mine, others = (side.figures(weights, COMPARED) for side in (ours, theirs))
        return {name: mine[name] - others[name] for name in COMPARED}

    return _intervals(lost, ours, resampling, seed, customers)


def mean_interval(
    values: ArrayLike, resampling: Resampling, *, seed: int, customers: ArrayLike | None = None
) -> Interval:
    """The mean of `values` [rows] with its interval.

    customers: whose row it is [rows], where a customer has several; they are drawn together.
    """
    numbers = np.asarray(values, dtype=np.float64)
    drawn = np.concatenate(
        [
            w @ numbers / w.sum(axis=1)
            for w in _weights(len(numbers), resampling.resamples, seed, customers)
        ]
    )
    low, high = np.percentile(drawn, _tails(resampling))
    return Interval(float(numbers.mean()), float(low), float(high))


def _tails(resampling: Resampling) -> tuple[float, float]:
    return 50 * (1 - resampling.confidence), 50 * (1 + resampling.confidence)


def _intervals(
    figures: Any, scored: Scored, resampling: Resampling, seed: int, customers: ArrayLike | None
) -> dict[str, Interval]:
    rows = len(scored.y)
    whole: Mapping[str, Floats] = figures(np.ones((1, rows)))
    parts: dict[str, list[Floats]] = {name: [] for name in whole}
    for weights in _weights(rows, resampling.resamples, seed, customers):
        for name, values in figures(weights).items():
            parts[name].append(values)
    found = {}
    for name, value in whole.items():
        drawn = np.concatenate(parts[name])
        drawn = drawn[np.isfinite(drawn)]
        if not np.isfinite(value[0]):
            found[name] = Interval(None, None, None)
        elif len(drawn) < 0.9 * resampling.resamples:
            found[name] = Interval(float(value[0]), None, None)
        else:
            low, high = np.percentile(drawn, _tails(resampling))
            found[name] = Interval(float(value[0]), float(low), float(high))
    return found


def _weights(
    rows: int, resamples: int, seed: int, customers: ArrayLike | None
) -> Iterator[NDArray[np.float64]]:
    """Weights [some resamples, rows], `resamples` of them in all."""
    rng = np.random.default_rng(seed)
    if customers is None:
        units, of_row = rows, None
    else:
        names, of_row = np.unique(np.asarray(customers), return_inverse=True)
        units = len(names)
    step = max(1, _WEIGHTS // rows)
    for start in range(0, resamples, step):
        some = min(step, resamples - start)
        # One draw after the other, so that the weights do not depend on how many are made at once.
        counts = np.stack(
            [np.bincount(rng.integers(0, units, units), minlength=units) for _ in range(some)]
        ).astype(np.float64)
        yield counts if of_row is None else counts[:, of_row]
