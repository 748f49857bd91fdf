"""Search for a candidate by a backtest, fit it on every training cutoff, and calibrate it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, get_args

from numpy.typing import NDArray

from churn_assets.errors import UserError
from churn_assets.modeling.backtest import (
    CandidateResult,
    fitted,
    predict_churn,
    usable_folds,
)
from churn_assets.modeling.calibration import Calibration, fit_calibration
from churn_assets.modeling.candidates import FAMILIES, Family
from churn_assets.modeling.rows import joined, parts_of
from churn_assets.modeling.search import Effort, search
from churn_assets.modeling.split import Split, rolling_origins

if TYPE_CHECKING:
    import pandas as pd

    from churn_assets.modeling.calibrated_classifier import CalibratedClassifier

Criterion = Literal["log_loss", "brier", "auc"]


@dataclass(frozen=True)
class TrainingPolicy:
    """How a model is trained.

    max_train_cutoffs: at most this many cutoffs to learn from, one horizon apart.
    folds: at most this many origins of the backtest that compares candidates.
    select_by: the figure whose mean over the folds chooses. Log loss, because the service
    hands out a probability and names a risk level by it: it is the one figure here that is
    optimal only for the true probability (a proper score) and that does punish being sure and
    wrong. AUC would not see that a probability is off by a factor.
    families: the candidates, in the order that breaks ties.
    trials: how many candidates are tried, at least one of each family. time_budget_s: seconds after
    which no further one is; it ends a search that is too slow for the machine.
    decision_threshold: predicted to churn when P(churn) is above it; what accuracy and F1 use.
    n_jobs: most threads to train on, -1 for every core.
    """

    max_train_cutoffs: int = 6
    folds: int = 3
    select_by: Criterion = "log_loss"
    families: tuple[Family, ...] = FAMILIES
    trials: int = 12
    time_budget_s: float = 60.0
    decision_threshold: float = 0.5
    n_jobs: int = -1

    def __post_init__(self) -> None:
        for name in ("max_train_cutoffs", "folds"):
            if getattr(self, name) < 1:
                raise UserError(f"training.{name} is {getattr(self, name)}; set at least 1")
        if self.select_by not in get_args(Criterion):
            raise UserError(
                f"training.select_by is {self.select_by!r}; "
                f"choose from {', '.join(get_args(Criterion))}"
            )
        if (
            not self.families
            or not set(self.families) <= set(FAMILIES)
            or len(set(self.families)) != len(self.families)
        ):
            raise UserError(
                f"training.families is {list(self.families)}; "
                f"name one or more of {', '.join(FAMILIES)}, each once"
            )
        if self.trials < len(self.families):
            raise UserError(
                f"training.trials is {self.trials}; set at least {len(self.families)}, one for "
                "each of training.families"
            )
        if not 0 < self.time_budget_s < math.inf:
            raise UserError(
                f"training.time_budget_s is {self.time_budget_s}; set a positive number of seconds"
            )
        if not 0 < self.decision_threshold < 1:
            raise UserError(
                f"training.decision_threshold is {self.decision_threshold}; "
                "set a number between 0 and 1"
            )
        if self.n_jobs == 0 or self.n_jobs < -1:
            raise UserError(f"training.n_jobs is {self.n_jobs}; set -1 or a number of threads")

    @property
    def effort(self) -> Effort:
        """How long to search for what."""
        return Effort(
            families=self.families,
            trials=self.trials,
            seconds=self.time_budget_s,
            select_by=self.select_by,
            n_jobs=self.n_jobs,
            threshold=self.decision_threshold,
        )


@dataclass(frozen=True)
class TrainedModel:
    """The chosen model and how it was chosen.

    estimator: a fitted, calibrated scikit-learn classifier of [rows, len(features)] float32
    values, classes False and True. params: its hyper-parameters over the library's defaults.
    candidates: every candidate over the folds, best first. fitted_on: the feature days its fit saw;
    the calibration saw the split's calibration day only.
    """

    family: Family
    estimator: CalibratedClassifier
    params: dict[str, Any]
    features: tuple[str, ...]
    split: Split
    calibration: Calibration
    candidates: tuple[CandidateResult, ...]
    selected_by: Criterion
    folds_wanted: int
    trials: int
    trials_wanted: int
    fitted_on: tuple[date, ...]
    fitted_rows: int
    seed: int
    seconds: float

    @property
    def chosen(self) -> CandidateResult:
        """The candidate that won, with its backtest."""
        return self.candidates[0]

    @property
    def reason(self) -> str:
        """Why this candidate, in one line."""
        best = best_of_families(self.candidates)
        ranked = ", ".join(f"{c.family} {c.figure(self.selected_by):.4f}" for c in best)
        direction = "highest" if self.selected_by == "auc" else "lowest"
        days = ", ".join(str(fold.fold.judged) for fold in self.chosen.folds)
        return f"{self.family}: {direction} mean {self.selected_by} on {days} ({ranked})"

    def predict(self, x: NDArray[Any]) -> NDArray[Any]:
        """P(churn) [rows] of `x` [rows, features]."""
        return predict_churn(self.estimator, x)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the estimator, in JSON's types."""
        return {
            "family": self.family,
            "params": self.params,
            "features": list(self.features),
            "split": self.split.to_dict(),
            "calibration": self.calibration.to_dict(),
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "selected_by": self.selected_by,
            "folds_wanted": self.folds_wanted,
            "trials": self.trials,
            "trials_wanted": self.trials_wanted,
            "reason": self.reason,
            "fitted_on": [day.isoformat() for day in self.fitted_on],
            "fitted_rows": self.fitted_rows,
            "seed": self.seed,
            "seconds": self.seconds,
        }


def best_of_families(candidates: Sequence[CandidateResult]) -> list[CandidateResult]:
    """The first candidate of every family, in the order given."""
    first: dict[Family, CandidateResult] = {}
    for candidate in candidates:
        first.setdefault(candidate.family, candidate)
    return list(first.values())


def fit(
    frame: pd.DataFrame,
    split: Split,
    features: Sequence[str],
    *,
    seed: int,
    policy: TrainingPolicy | None = None,
    progress: Callable[[str], None] | None = None,
    on_trial: Callable[[int, CandidateResult], None] | None = None,
    clock: Callable[[], float] = perf_counter,
) -> TrainedModel:
    """Search by a backtest, fit the best candidate on the training cutoffs, calibrate it.

    frame: columns cutoff (UTC timestamp), the features, churned (bool); one row per customer and
    cutoff. The test cutoff is not looked at. The same frame, split, features, seed and number of
    trials give the same model. progress is told a line per trial, on_trial its number and result.
    Raises UserError when a cutoff has no rows, a feature is not finite, or a part has one class.
    """
    from churn_assets.modeling.calibrated_classifier import CalibratedClassifier

    policy = policy or TrainingPolicy()
    tell = progress or (lambda line: None)
    if not features:
        raise UserError("there are no features to train on; map at least the orders table")
    started = perf_counter()
    parts = parts_of(frame, [*split.train, split.calibration], features)
    train, held_back = joined(parts, split.train), parts[split.calibration]
    for name, part in (("training", train), ("calibration", held_back)):
        if not part.both_outcomes:
            raise UserError(
                f"every customer of the {name} cutoffs is "
                f"{'churned' if part.y.all() else 'retained'}; "
                "if the source has ended, set calendar.end to its last day; "
                "else check its newest orders"
            )
    folds = usable_folds(parts, rolling_origins(split, policy.folds))
    if len(folds) < policy.folds:
        tell(f"the history has room for {len(folds)} of {policy.folds} folds of the backtest")

    def told(number: int, result: CandidateResult) -> None:
        given_up = ", given up" if result.pruned else ""
        tell(
            f"trial {number + 1} of {policy.trials}, {result.family}: log loss "
            f"{result.figure('log_loss'):.4f}, AUC {result.figure('auc'):.4f} over "
            f"{len(result.folds)} of {len(folds)} folds{given_up}, {result.seconds:.1f} s"
        )
        if on_trial is not None:
            on_trial(number, result)

    searched = search(parts, folds, features, policy.effort, seed=seed, on_trial=told, clock=clock)
    if searched.out_of_time:
        tell(
            f"the time budget of {policy.time_budget_s:g} s was used up after {searched.trials} of "
            f"{searched.wanted} trials; raise training.time_budget_s for a reproducible search"
        )
    best = searched.candidates[0]
    plain = fitted(train, best.family, best.params, seed=seed, n_jobs=policy.n_jobs)
    line = fit_calibration(held_back.y, predict_churn(plain, held_back.x))
    tell(
        f"{best.family}: fitted on {len(train.y)} rows of {len(split.train)} cutoffs, calibrated "
        f"on {line.rows} rows of {split.calibration}: slope {line.slope:.3f}, "
        f"intercept {line.intercept:.3f}"
    )
    return TrainedModel(
        family=best.family,
        estimator=CalibratedClassifier(plain, line.slope, line.intercept),
        params=dict(best.params),
        features=tuple(features),
        split=split,
        calibration=line,
        candidates=searched.candidates,
        trials=searched.trials,
        trials_wanted=searched.wanted,
        selected_by=policy.select_by,
        folds_wanted=policy.folds,
        fitted_on=split.train,
        fitted_rows=len(train.y),
        seed=seed,
        seconds=perf_counter() - started,
    )
