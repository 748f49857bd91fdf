"""Probabilities made honest: a line through the log-odds, fitted on a window of its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Nobody's churn is known better than to one in a thousand. It also keeps float32, the type of the
# served graph, within 1e-5 of float64: there the 1 - P of a P next to 1 has too few digits left.
MARGIN = 1e-3

# The order of customers is the model's; a calibration may flatten it, never turn it round.
LEAST_SLOPE = 1e-2


@dataclass(frozen=True)
class Calibration:
    """P -> sigmoid(slope * log-odds(P) + intercept), and the window it was fitted on.

    log_loss_before, log_loss_after: on those same rows, so the second is never larger by more than
    what the margin costs.
    """

    slope: float
    intercept: float
    rows: int
    log_loss_before: float
    log_loss_after: float

    def to_dict(self) -> dict[str, Any]:
        """The calibration in JSON's types."""
        return asdict(self)


def calibrated(p: ArrayLike, slope: float, intercept: float) -> NDArray[np.float64]:
    """The calibrated probabilities of `p` [rows]."""
    return 1.0 / (1.0 + np.exp(-(slope * log_odds(p) + intercept)))


def log_odds(p: ArrayLike) -> NDArray[np.float64]:
    """log(p / (1 - p)) [rows], of probabilities kept `MARGIN` away from 0 and 1."""
    kept = np.clip(np.asarray(p, dtype=np.float64), MARGIN, 1.0 - MARGIN)
    return np.log(kept) - np.log1p(-kept)


def fit_calibration(y: ArrayLike, p: ArrayLike) -> Calibration:
    """The slope and intercept with the lowest log loss on outcomes `y` and predictions `p` [rows].

    Method: Platt, Probabilistic outputs for support vector machines (1999), on the log-odds, so
    that probabilities that are calibrated already stay as they are. The slope is kept above 0.
    Raises ValueError without both outcomes.
    """
    from scipy.optimize import minimize

    truth = np.asarray(y, dtype=np.float64)
    if not len(truth) or truth.min() == truth.max():
        raise ValueError("a calibration needs both churned and retained customers")
    z = log_odds(p)

    def loss(line: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scores = line[0] * z + line[1]
        missed = 1.0 / (1.0 + np.exp(-scores)) - truth
        value = np.mean(np.logaddexp(0.0, scores) - truth * scores)
        return float(value), np.array([np.mean(missed * z), np.mean(missed)])

    before = loss(np.array([1.0, 0.0]))[0]
    found = minimize(
        loss,
        np.array([1.0, 0.0]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(LEAST_SLOPE, None), (None, None)],
        options={"ftol": 1e-14, "gtol": 1e-10},
    )
    slope, intercept = (float(value) for value in found.x)
    return Calibration(slope, intercept, len(truth), before, float(found.fun))
