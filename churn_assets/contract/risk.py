"""Risk levels: what a churn probability is called."""

from __future__ import annotations

from typing import Literal

import msgspec

RiskLevel = Literal["high", "medium", "low"]


class RiskThresholds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A probability above `high` is high, one above `medium` is medium, every other one low.

    Both bounds are exclusive: exactly 0.7 is medium. Raises ValueError unless
    0 <= medium <= high <= 1.
    """

    high: float = 0.7
    medium: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.medium <= self.high <= 1:
            raise ValueError(
                f"risk thresholds need 0 <= medium <= high <= 1, got {self.medium} and {self.high}"
            )

    def level(self, probability: float) -> RiskLevel:
        """The level of `probability` in [0, 1]."""
        if probability > self.high:
            return "high"
        return "medium" if probability > self.medium else "low"
