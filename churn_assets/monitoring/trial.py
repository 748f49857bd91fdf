"""A trial of two models on live requests: what it showed, and whether it may end in a promotion."""

from __future__ import annotations

import math
from dataclasses import dataclass

from churn_assets.errors import UserError


@dataclass(frozen=True)
class TrialPolicy:
    """How two models are tried, and what is asked of the challenger.

    share: of the customers, whom the challenger answers. shadow: both models score every request,
    so that every outcome counts for both. alpha: the chance of a wrong verdict, however often one
    looks. margin: by how much the log loss may be worse. min_rows: fewer outcomes are no evidence.
    max_days: of operational time, after which a trial without a verdict stops. clip_difference,
    clip_loss: differences of log loss, and log losses, count up to these. max_error_rate: of
    requests the challenger has no score for. max_latency_ratio, max_latency_ms: of the 95th
    percentile of its requests, against the champion's and at all. Raises UserError for a value that
    says nothing.
    """

    share: float = 0.1
    shadow: bool = True
    alpha: float = 0.05
    margin: float = 0.005
    min_rows: int = 1000
    max_days: int = 90
    clip_difference: float = 1.0
    clip_loss: float = 4.0
    max_error_rate: float = 0.01
    max_latency_ratio: float = 2.0
    max_latency_ms: float = 50.0

    def __post_init__(self) -> None:
        if not 0.001 <= self.share <= 0.999:
            raise UserError(f"trial.share is {self.share}; set a share from 0.001 to 0.999")
        if not 0 < self.alpha <= 0.5:
            raise UserError(f"trial.alpha is {self.alpha}; set a chance above 0, up to 0.5")
        if not 0 <= self.margin <= 1:
            raise UserError(f"trial.margin is {self.margin}; set a log loss from 0 to 1")
        for name in ("min_rows", "max_days"):
            if getattr(self, name) < 1:
                raise UserError(f"trial.{name} is {getattr(self, name)}; set at least 1")
        for name in ("clip_difference", "clip_loss"):
            if not 0.1 <= getattr(self, name) <= 16:
                raise UserError(
                    f"trial.{name} is {getattr(self, name)}; set a log loss from 0.1 to 16"
                )
        if not 0 <= self.max_error_rate < 1:
            raise UserError(f"trial.max_error_rate is {self.max_error_rate}; set a share below 1")
        for name in ("max_latency_ratio", "max_latency_ms"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"trial.{name} is {value}; set a number above 0")
