"""Where answered predictions are kept before their answers leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from churn_assets.contract.logged import LoggedPrediction


class PredictionLog(Protocol):
    """What the endpoint needs of a log."""

    async def keep(self, predictions: Sequence[LoggedPrediction]) -> None:
        """Return when `predictions` are durable. Raises Refusal when they cannot be kept."""


class NotLogged:
    """Keeps nothing."""

    async def keep(self, predictions: Sequence[LoggedPrediction]) -> None:
        """Return at once."""
