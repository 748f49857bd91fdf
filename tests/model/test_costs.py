from __future__ import annotations

import numpy as np
import pytest

from churn_assets.errors import UserError
from churn_assets.modeling.bootstrap import Resampling
from churn_assets.modeling.costs import CostPolicy, ProfitCurve, profit_curve

POLICY = CostPolicy(offer=10, customer_value=100, success_rate=0.5)


def curve(y: np.ndarray, p: np.ndarray, policy: CostPolicy = POLICY) -> ProfitCurve:
    return profit_curve(y, p, policy, Resampling(100), seed=1)


def test_the_threshold_is_where_an_offer_begins_to_pay() -> None:
    assert POLICY.threshold == pytest.approx(0.2)
    assert CostPolicy(offer=1, customer_value=10, success_rate=1).threshold == pytest.approx(0.1)


def test_profits_by_hand() -> None:
    y = np.array([True, True, False, False, False])
    found = curve(y, np.array([0.9, 0.1, 0.3, 0.15, 0.05]))
    # Above 0.2: one who churned (50 - 10) and one who stayed (-10).
    assert found.profit.value == pytest.approx((40 - 10) / 5)
    assert found.offered == pytest.approx(2 / 5)
    assert found.everyone == pytest.approx((40 * 2 - 30) / 5)
    assert found.perfect == pytest.approx(80 / 5)
    assert found.profits[0] == pytest.approx(found.everyone)
    assert found.profits[-1] == 0.0
    assert found.profits[20] == pytest.approx(found.profit.value)
    assert found.best_profit == max(found.profits) == pytest.approx(60 / 5)
    assert found.best_threshold == pytest.approx(0.05)


def test_with_calibrated_probabilities_the_threshold_is_near_the_peak() -> None:
    rng = np.random.default_rng(3)
    p = rng.beta(1, 3, 200_000)
    y = rng.random(200_000) < p
    found = curve(y, p)
    assert found.profit.value is not None
    assert found.profit.value > 0.995 * found.best_profit
    assert found.best_threshold == pytest.approx(POLICY.threshold, abs=0.03)
    assert found.everyone < found.profit.value < found.perfect
    # Twice too sure of everything, the same threshold earns less.
    wrong = curve(y, np.clip(2 * p, 0, 1)).profit.value
    assert wrong is not None
    assert wrong < found.profit.value


def test_the_profit_has_an_interval() -> None:
    rng = np.random.default_rng(4)
    p = rng.random(500)
    found = curve(rng.random(500) < p, p).profit
    assert found.low is not None
    assert found.high is not None
    assert found.value is not None
    assert found.low < found.value < found.high


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"offer": 0.0}, "costs.offer is 0.0"),
        ({"offer": float("nan")}, "costs.offer is nan"),
        ({"customer_value": -1.0}, "costs.customer_value is -1.0"),
        ({"success_rate": 1.2}, "costs.success_rate is 1.2"),
        ({"success_rate": float("nan")}, "costs.success_rate is nan"),
        ({"offer": 50.0, "customer_value": 100.0, "success_rate": 0.5}, "no offer ever pays"),
    ],
)
def test_a_cost_matrix_that_makes_no_sense_is_refused(change: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        CostPolicy(**change)
