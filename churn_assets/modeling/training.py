"""Train the candidates, choose one on the validation cutoff, refit it on all that has matured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from churn_assets.data.windows import cutoff_of
from churn_assets.errors import UserError
from churn_assets.modeling.candidates import (
    DEFAULT_PARAMS,
    FAMILIES,
    Family,
    build_estimator,
    limited_threads,
)
from churn_assets.modeling.metrics import Scores, score
from churn_assets.modeling.split import Split

if TYPE_CHECKING:
    import pandas as pd

Criterion = Literal["log_loss", "brier", "auc"]


@dataclass(frozen=True)
class TrainingPolicy:
    """How a model is trained.

    max_train_cutoffs: at most this many cutoffs to learn from, one horizon apart.
    select_by: the validation figure that chooses between families. Log loss, because the service
    hands out a probability and names a risk level by it: it is the one figure here that is
    optimal only for the true probability (a proper score) and that does punish being sure and
    wrong. AUC would not see that a probability is off by a factor.
    families: the candidates, in the order that breaks ties.
    refit: after the choice, fit the chosen family again on the training cutoffs and the validation
    cutoff. The newest matured behaviour is the most like what the model will see, and the embargo
    holds: validation labels have matured by the test cutoff.
    decision_threshold: predicted to churn when P(churn) is above it; what accuracy and F1 use.
    n_jobs: most threads to train on, -1 for every core.
    """

    max_train_cutoffs: int = 6
    select_by: Criterion = "log_loss"
    families: tuple[Family, ...] = FAMILIES
    refit: bool = True
    decision_threshold: float = 0.5
    n_jobs: int = -1

    def __post_init__(self) -> None:
        if self.max_train_cutoffs < 1:
            raise UserError(
                f"training.max_train_cutoffs is {self.max_train_cutoffs}; set at least 1"
            )
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
        if not 0 < self.decision_threshold < 1:
            raise UserError(
                f"training.decision_threshold is {self.decision_threshold}; "
                "set a number between 0 and 1"
            )
        if self.n_jobs == 0 or self.n_jobs < -1:
            raise UserError(f"training.n_jobs is {self.n_jobs}; set -1 or a number of threads")


@dataclass(frozen=True)
class CandidateResult:
    """A family on the validation cutoff, with the seconds its fit took."""

    family: Family
    params: dict[str, Any]
    scores: Scores
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The result in JSON's types."""
        return asdict(self)


@dataclass(frozen=True)
class TrainedModel:
    """The chosen model and how it was chosen.

    estimator: a fitted scikit-learn classifier of [rows, len(features)] float32 values, classes
    False and True. params: its hyper-parameters. candidates: every family's validation figures,
    best first. fitted_on: the feature days its final fit saw.
    """

    family: Family
    estimator: Any
    params: dict[str, Any]
    features: tuple[str, ...]
    split: Split
    candidates: tuple[CandidateResult, ...]
    selected_by: Criterion
    fitted_on: tuple[date, ...]
    fitted_rows: int
    seed: int
    seconds: float

    @property
    def reason(self) -> str:
        """Why this family, in one line."""
        ranked = ", ".join(
            f"{c.family} {_figure(c, self.selected_by):.4f}" for c in self.candidates
        )
        direction = "highest" if self.selected_by == "auc" else "lowest"
        return (
            f"{self.family}: {direction} {self.selected_by} on {self.split.validation} ({ranked})"
        )

    def predict(self, x: NDArray[Any]) -> NDArray[np.float64]:
        """P(churn) [rows] of `x` [rows, features]."""
        return predict_churn(self.estimator, x)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the estimator, in JSON's types."""
        return {
            "family": self.family,
            "params": self.params,
            "features": list(self.features),
            "split": self.split.to_dict(),
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "selected_by": self.selected_by,
            "reason": self.reason,
            "fitted_on": [day.isoformat() for day in self.fitted_on],
            "fitted_rows": self.fitted_rows,
            "seed": self.seed,
            "seconds": self.seconds,
        }


def feature_matrix(frame: pd.DataFrame, features: Sequence[str]) -> NDArray[np.float32]:
    """The rows of `frame` as the model sees them: float32 [rows, features].

    float32 from the start, because the served ONNX graph takes float32: what is trained, judged
    and served is then one and the same function. Raises UserError for a missing column or a
    value that is not finite.
    """
    missing = [name for name in features if name not in frame.columns]
    if missing:
        raise UserError(f"the training set has no column {missing[0]}; materialize it again")
    exact = frame[list(features)].to_numpy(dtype=np.float64, na_value=np.nan)
    with np.errstate(over="ignore"):
        matrix = exact.astype(np.float32)
    bad = ~np.isfinite(matrix)
    if bad.any():
        column = int(bad.any(axis=0).argmax())
        raise UserError(
            f"{int(bad[:, column].sum())} rows have no finite {features[column]}; "
            "fix the feature or quarantine the rows before training"
        )
    return matrix


def outcomes(frame: pd.DataFrame) -> NDArray[np.bool_]:
    """Who churned [rows]. Raises UserError when a label is missing."""
    if frame["churned"].isna().any():
        raise UserError("some rows of the training set have no label; materialize it again")
    return frame["churned"].to_numpy(dtype=np.bool_)


def rows_of(frame: pd.DataFrame, days: Sequence[date]) -> pd.DataFrame:
    """The rows of `frame` at the cutoffs of the feature `days`.

    Raises UserError naming the first day that has none.
    """
    import pandas as pd

    cutoffs = {pd.Timestamp(cutoff_of(day)): day for day in days}
    rows = frame[frame["cutoff"].isin(list(cutoffs))]
    present = set(rows["cutoff"].unique())
    for cutoff, day in cutoffs.items():
        if cutoff not in present:
            raise UserError(
                f"no customer was active on {day}, so there is nothing to learn from it; "
                "if the source has ended, set calendar.end to its last day"
            )
    return rows


def predict_churn(estimator: Any, x: NDArray[Any]) -> NDArray[np.float64]:
    """P(churn) [rows] of `x` [rows, features], rounded to float32 first as in service."""
    rounded = np.asarray(x).astype(np.float32).astype(np.float64)
    with limited_threads(len(rounded)):
        return np.asarray(estimator.predict_proba(rounded)[:, 1], dtype=np.float64)


def fit(
    frame: pd.DataFrame,
    split: Split,
    features: Sequence[str],
    *,
    seed: int,
    policy: TrainingPolicy | None = None,
    progress: Callable[[str], None] | None = None,
) -> TrainedModel:
    """Train every candidate on the training cutoffs and keep the best on the validation cutoff.

    frame: columns cutoff (UTC timestamp), the features, churned (bool); one row per customer and
    cutoff. The test cutoff is not looked at. The same frame, split, features and seed give the
    same model. progress is told a line per candidate.
    Raises UserError when a cutoff has no rows, a feature is not finite, or a part has one class.
    """
    policy = policy or TrainingPolicy()
    tell = progress or (lambda line: None)
    if not features:
        raise UserError("there are no features to train on; map at least the orders table")
    started = perf_counter()
    train, validation = rows_of(frame, split.train), rows_of(frame, [split.validation])
    train_x, train_y = feature_matrix(train, features), outcomes(train)
    valid_x, valid_y = feature_matrix(validation, features), outcomes(validation)
    for part, y in (("training", train_y), ("validation", valid_y)):
        if y.all() or not y.any():
            only = "churned" if y.all() else "retained"
            raise UserError(
                f"every customer of the {part} cutoffs is {only}; "
                "if the source has ended, set calendar.end to its last day; "
                "else check its newest orders"
            )

    fitted: dict[Family, Any] = {}
    results: list[CandidateResult] = []
    for family in policy.families:
        begun = perf_counter()
        estimator = _fitted(family, train_x, train_y, seed, policy)
        seconds = perf_counter() - begun
        scores = score(
            valid_y, predict_churn(estimator, valid_x), threshold=policy.decision_threshold
        )
        fitted[family] = estimator
        results.append(CandidateResult(family, dict(DEFAULT_PARAMS[family]), scores, seconds))
        tell(
            f"{family}: validation log loss {scores.log_loss:.4f}, AUC {scores.auc:.4f}, "
            f"{seconds:.1f} s"
        )

    sign = -1 if policy.select_by == "auc" else 1
    results.sort(key=lambda result: sign * _figure(result, policy.select_by))
    best = results[0].family
    estimator, days, rows = fitted[best], split.train, len(train_y)
    if policy.refit:
        days, rows = (*split.train, split.validation), len(train_y) + len(valid_y)
        tell(f"{best}: refit on {rows} rows of {len(days)} cutoffs")
        both_x, both_y = np.vstack([train_x, valid_x]), np.concatenate([train_y, valid_y])
        estimator = _fitted(best, both_x, both_y, seed, policy)
    return TrainedModel(
        family=best,
        estimator=estimator,
        params=dict(DEFAULT_PARAMS[best]),
        features=tuple(features),
        split=split,
        candidates=tuple(results),
        selected_by=policy.select_by,
        fitted_on=days,
        fitted_rows=rows,
        seed=seed,
        seconds=perf_counter() - started,
    )


def _fitted(
    family: Family,
    x: NDArray[np.float32],
    y: NDArray[np.bool_],
    seed: int,
    policy: TrainingPolicy,
) -> Any:
    estimator = build_estimator(family, seed=seed, n_jobs=policy.n_jobs)
    with limited_threads(len(x), policy.n_jobs):
        estimator.fit(x.astype(np.float64), y)
    if family == "random_forest":
        # Threads add up the trees in the order they finish, so the last bits of a probability
        # would differ from call to call.
        estimator.set_params(n_jobs=1)
    return estimator


def _figure(result: CandidateResult, name: Criterion) -> float:
    value = getattr(result.scores, name)
    assert value is not None, f"{name} is undefined, though validation has both classes"
    return float(value)
