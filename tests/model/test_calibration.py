from __future__ import annotations

import math

import numpy as np
import pytest

from churn_assets.modeling.calibration import MARGIN, calibrated, fit_calibration, log_odds
from churn_assets.modeling.metrics import auc


def drawn(rows: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """True probabilities, and outcomes drawn from them."""
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-rng.normal(-1, 2, rows)))
    return p, rng.random(rows) < p


def test_a_known_distortion_is_taken_back() -> None:
    p, y = drawn(200_000)
    distorted = calibrated(p, 2.0, 1.5)
    line = fit_calibration(y, distorted)
    assert line.slope == pytest.approx(0.5, abs=0.02)
    assert line.intercept == pytest.approx(-0.75, abs=0.03)
    assert line.log_loss_after < line.log_loss_before
    assert calibrated(distorted, line.slope, line.intercept).mean() == pytest.approx(
        y.mean(), abs=1e-6
    )


def test_what_is_calibrated_stays_as_it_is() -> None:
    p, y = drawn(200_000)
    line = fit_calibration(y, p)
    assert line.slope == pytest.approx(1.0, abs=0.02)
    assert line.intercept == pytest.approx(0.0, abs=0.02)
    np.testing.assert_allclose(calibrated([0.2, 0.5], 1.0, 0.0), [0.2, 0.5])


def test_the_order_of_customers_is_never_turned_round() -> None:
    p, y = drawn(5_000)
    line = fit_calibration(~y, p)
    assert line.slope > 0
    assert auc(y, calibrated(p, line.slope, line.intercept)) == pytest.approx(auc(y, p), abs=1e-3)


def test_certainty_is_kept_finite() -> None:
    assert log_odds([0.0, 1.0]) == pytest.approx([-log_odds(1 - MARGIN), log_odds(1 - MARGIN)])
    line = fit_calibration([True, False, False, True], [0.0, 0.0, 1.0, 1.0])
    assert math.isfinite(line.log_loss_after)


@pytest.mark.parametrize("y", [[], [True, True], [False]])
def test_one_outcome_calibrates_nothing(y: list[bool]) -> None:
    with pytest.raises(ValueError, match="both churned and retained"):
        fit_calibration(y, [0.5] * len(y))
