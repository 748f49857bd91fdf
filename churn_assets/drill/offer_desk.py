"""Whoever serves retention offers in the drill, by what the service answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from churn_assets.simulator.params import Offer


@dataclass
class OfferDesk:
    """Serves offers to customers above `threshold`, never to the hold-out.

    horizon: a customer gets one at most within it. served: when each got the last one.
    """

    threshold: float
    horizon: timedelta
    served: dict[str, datetime] = field(default_factory=dict)

    def serve(self, answers: Sequence[Mapping[str, Any]], at: datetime) -> list[Offer]:
        """The offers served at `at`. answers: predictions of the service, or errors of rows."""
        found = []
        for answer in answers:
            if "error" in answer or answer["holdout"]:
                continue
            customer = answer["customer_id"]
            last = self.served.get(customer)
            due = last is None or at - last >= self.horizon
            if due and answer["churn_probability"] > self.threshold:
                self.served[customer] = at
                found.append(Offer(customer, at))
        return found
