"""Whom an offer pays for: the threshold that a cost matrix gives, and what it would have earned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from churn_assets.errors import UserError
from churn_assets.modeling.bootstrap import Interval, Resampling, mean_interval

GRID = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class CostPolicy:
    """The cost matrix of a retention offer, in currency units.

    offer: what one costs, whoever gets it. customer_value: what a customer who stays is worth more
    than one who leaves. success_rate: the share of those about to leave whom an offer keeps.
    Raises UserError when the numbers make no sense, or no offer could ever pay.
    """

    offer: float = 10.0
    customer_value: float = 120.0
    success_rate: float = 0.3

    def __post_init__(self) -> None:
        for name in ("offer", "customer_value"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"costs.{name} is {value}; set a positive amount")
        if not 0 < self.success_rate <= 1:
            raise UserError(
                f"costs.success_rate is {self.success_rate}; set a share above 0, at most 1"
            )
        if self.offer >= self.success_rate * self.customer_value:
            raise UserError(
                f"costs: an offer of {self.offer:g} keeps at best {self.success_rate:g} x "
                f"{self.customer_value:g} = {self.success_rate * self.customer_value:g}, so no "
                "offer ever pays; set a lower offer, or a higher customer_value or success_rate"
            )

    @property
    def threshold(self) -> float:
        """The P(churn) above which an offer pays on average.

        The expected gain of an offer is P * success_rate * customer_value - offer (Elkan, The
        foundations of cost-sensitive learning, IJCAI 2001); for that P has to be calibrated.
        """
        return self.offer / (self.success_rate * self.customer_value)

    def gains(self, y: ArrayLike) -> NDArray[np.float64]:
        """What an offer to each row earns [rows], given who would have churned, `y` [rows]."""
        churned = np.asarray(y, dtype=np.float64)
        return churned * self.success_rate * self.customer_value - self.offer


@dataclass(frozen=True)
class ProfitCurve:
    """What offers would have earned on held-out rows, a customer, in currency units.

    thresholds, profits: the curve: an offer to everyone with P(churn) above the threshold.
    threshold: the one the cost matrix gives; offered: the share of customers above it; profit: with
    its interval. best_threshold, best_profit: the peak of the curve, known only in hindsight.
    everyone: an offer to all. perfect: to exactly those who churned.
    """

    thresholds: tuple[float, ...]
    profits: tuple[float, ...]
    threshold: float
    offered: float
    profit: Interval
    best_threshold: float
    best_profit: float
    everyone: float
    perfect: float


def profit_curve(
    y: ArrayLike, p: ArrayLike, policy: CostPolicy, resampling: Resampling, *, seed: int
) -> ProfitCurve:
    """The profit of offers by P(churn) `p` [rows], given who churned, `y` [rows]."""
    gains, probability = policy.gains(y), np.asarray(p, dtype=np.float64)
    order = np.argsort(-probability, kind="stable")
    earned = np.r_[0.0, np.cumsum(gains[order])] / len(gains)
    above = np.searchsorted(-probability[order], -GRID, side="left")
    profits = earned[above]
    best = int(np.argmax(profits))
    chosen = probability > policy.threshold
    return ProfitCurve(
        thresholds=tuple(GRID.tolist()),
        profits=tuple(profits.tolist()),
        threshold=policy.threshold,
        offered=float(chosen.mean()),
        profit=mean_interval(np.where(chosen, gains, 0.0), resampling, seed=seed),
        best_threshold=float(GRID[best]),
        best_profit=float(profits[best]),
        everyone=float(gains.mean()),
        perfect=float(np.maximum(gains, 0.0).mean()),
    )
