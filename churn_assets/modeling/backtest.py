"""Rolling-origin backtest: the whole procedure repeated on earlier days, to compare candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from churn_assets.errors import UserError
from churn_assets.modeling.calibration import calibrated, fit_calibration
from churn_assets.modeling.candidates import Family, build_estimator, limited_threads
from churn_assets.modeling.metrics import Scores, auc, score
from churn_assets.modeling.rows import RECENCY, Part, Parts, joined
from churn_assets.modeling.split import Fold


@dataclass(frozen=True)
class FoldResult:
    """A candidate at one origin, beside days since the last order alone on the same rows."""

    fold: Fold
    scores: Scores
    recency_auc: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The result in JSON's types."""
        return asdict(self) | {"fold": self.fold.to_dict()}


@dataclass(frozen=True)
class CandidateResult:
    """A family with its parameters over the folds of a backtest, newest fold first.

    pruned: it was given up before the last fold, because it was behind the others.
    """

    family: Family
    params: dict[str, Any]
    folds: tuple[FoldResult, ...]
    pruned: bool = False

    @property
    def seconds(self) -> float:
        """The time its fits took."""
        return sum(fold.seconds for fold in self.folds)

    def figure(self, name: str) -> float:
        """The mean of a figure of `Scores` over the folds."""
        values = [getattr(fold.scores, name) for fold in self.folds]
        return float(np.mean([value for value in values if value is not None]))

    def to_dict(self) -> dict[str, Any]:
        """The result in JSON's types."""
        return {
            "family": self.family,
            "params": self.params,
            "pruned": self.pruned,
            "folds": [fold.to_dict() for fold in self.folds],
            "seconds": self.seconds,
        }


def judge_fold(
    parts: Parts,
    fold: Fold,
    family: Family,
    params: Mapping[str, Any],
    *,
    features: Sequence[str],
    seed: int,
    n_jobs: int = -1,
    threshold: float = 0.5,
) -> FoldResult:
    """Train a candidate before the fold's origin, calibrate it, and judge it on the cutoff."""
    begun = perf_counter()
    estimator = fitted(joined(parts, fold.train), family, params, seed=seed, n_jobs=n_jobs)
    judged = parts[fold.judged]
    p = predict_churn(estimator, judged.x)
    if fold.calibration is not None:
        x, y = parts[fold.calibration]
        line = fit_calibration(y, predict_churn(estimator, x))
        p = calibrated(p, line.slope, line.intercept)
    recency = judged.x[:, list(features).index(RECENCY)] if RECENCY in features else None
    return FoldResult(
        fold=fold,
        scores=score(judged.y, p, threshold=threshold),
        recency_auc=None if recency is None else auc(judged.y, recency),
        seconds=perf_counter() - begun,
    )


def usable_folds(parts: Parts, folds: Sequence[Fold]) -> tuple[Fold, ...]:
    """The folds in which both outcomes are there to learn, to calibrate on and to judge.

    Raises UserError when there is none.
    """
    kept = tuple(
        fold
        for fold in folds
        if joined(parts, fold.train).both_outcomes
        and parts[fold.judged].both_outcomes
        and (fold.calibration is None or parts[fold.calibration].both_outcomes)
    )
    if not kept:
        raise UserError(
            "no cutoff to compare candidates on has both churned and retained customers; "
            "check the newest orders of the source, or load more history"
        )
    return kept


def fitted(
    part: Part, family: Family, params: Mapping[str, Any], *, seed: int, n_jobs: int = -1
) -> Any:
    """A classifier of `family` with `params`, fitted on `part`."""
    estimator = build_estimator(family, seed=seed, n_jobs=n_jobs, params=params)
    with limited_threads(len(part.x), n_jobs):
        estimator.fit(part.x.astype(np.float64), part.y)
    if family == "random_forest":
        # Threads add up the trees in the order they finish, so the last bits of a probability
        # would differ from call to call.
        estimator.set_params(n_jobs=1)
    return estimator


def predict_churn(estimator: Any, x: NDArray[Any]) -> NDArray[np.float64]:
    """P(churn) [rows] of `x` [rows, features], rounded to float32 first as in service."""
    rounded = np.asarray(x).astype(np.float32).astype(np.float64)
    with limited_threads(len(rounded)):
        return np.asarray(estimator.predict_proba(rounded)[:, 1], dtype=np.float64)
