"""The model families that compete. All are plain scikit-learn, and all convert to ONNX."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

from churn_assets.errors import UserError

Family = Literal["logistic_regression", "random_forest", "hist_gradient_boosting"]
FAMILIES: tuple[Family, ...] = get_args(Family)

DEFAULT_PARAMS: Mapping[Family, Mapping[str, Any]] = {
    "logistic_regression": {"C": 1.0, "max_iter": 1000},
    "random_forest": {
        "n_estimators": 200,
        "max_depth": 15,
        "min_samples_split": 5,
        "class_weight": "balanced",
    },
    # No early stopping: scikit-learn's would hold out random rows, and the same customer at
    # another cutoff would still be trained on.
    "hist_gradient_boosting": {
        "learning_rate": 0.08,
        "max_iter": 150,
        "max_leaf_nodes": 15,
        "min_samples_leaf": 40,
        "l2_regularization": 1.0,
        "early_stopping": False,
    },
}

# Where the search begins. The defaults' forest, which is the one teams begin with, takes ten times
# as long as this one and is the worse for growing each tree to the end.
STARTS: Mapping[Family, Mapping[str, Any]] = {
    "logistic_regression": {"C": 1.0},
    "random_forest": {
        "n_estimators": 50,
        "max_depth": 9,
        "min_samples_leaf": 10,
        "max_samples": 0.4,
        "class_weight": None,
    },
    "hist_gradient_boosting": {
        "learning_rate": 0.08,
        "max_iter": 100,
        "max_leaf_nodes": 10,
        "min_samples_leaf": 40,
        "l2_regularization": 1.0,
    },
}

# The threads inside BLAS and boosting spin while they wait for each other: below this many rows
# they save less than a second, and on a busy machine they cost ten. The forest's threads do not.
ROWS_WORTH_THREADS = 200_000


def limited_threads(rows: int, n_jobs: int = -1) -> AbstractContextManager[Any]:
    """Within it, work on `rows` rows uses no more native threads than pay, and at most `n_jobs`."""
    from threadpoolctl import threadpool_limits

    threads = 1 if rows < ROWS_WORTH_THREADS else os.cpu_count() or 1
    return threadpool_limits(min(threads, n_jobs) if n_jobs > 0 else threads)


def build_estimator(
    family: Family, *, seed: int, n_jobs: int = -1, params: Mapping[str, Any] | None = None
) -> Any:
    """An unfitted scikit-learn classifier of `family`, with `params` over the defaults.

    Raises UserError for a family that does not exist.
    """
    if family not in FAMILIES:
        raise UserError(f"there is no model family {family!r}; choose from {', '.join(FAMILIES)}")
    chosen = {**DEFAULT_PARAMS[family], **(params or {})}
    if family == "logistic_regression":
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        return make_pipeline(StandardScaler(), LogisticRegression(random_state=seed, **chosen))
    if family == "random_forest":
        from sklearn.ensemble import RandomForestClassifier

        return RandomForestClassifier(random_state=seed, n_jobs=n_jobs, **chosen)
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(random_state=seed, **chosen)
