"""A calibrated model as one scikit-learn classifier; importing this imports scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin

from churn_assets.modeling.calibration import calibrated


class CalibratedClassifier(ClassifierMixin, BaseEstimator):
    """A fitted classifier whose P(churn) goes through a calibration.

    estimator: fitted, with classes False and True. It stays a scikit-learn classifier, so that the
    calibrated model as a whole is what is kept, converted, compared and explained.
    """

    def __init__(self, estimator: Any, slope: float = 1.0, intercept: float = 0.0) -> None:
        self.estimator = estimator
        self.slope = slope
        self.intercept = intercept

    @property
    def classes_(self) -> NDArray[Any]:
        """The classes, in the order of the columns of `predict_proba`."""
        return self.estimator.classes_

    @property
    def n_features_in_(self) -> int:
        """How many features a row has."""
        return self.estimator.n_features_in_

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict_proba(self, x: NDArray[Any]) -> NDArray[np.float64]:
        """P of each class, [rows, 2], of `x` [rows, features]."""
        p = self.estimator.predict_proba(x)[:, 1]
        churned = calibrated(p, self.slope, self.intercept)
        return np.column_stack([1.0 - churned, churned])

    def predict(self, x: NDArray[Any]) -> NDArray[Any]:
        """The more likely class [rows] of `x` [rows, features]."""
        return self.classes_[(self.predict_proba(x)[:, 1] > 0.5).astype(int)]
