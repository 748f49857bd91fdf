"""The quality gates: what a model must show before it may go on. Missing evidence refuses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from churn_assets.errors import UserError


@dataclass(frozen=True)
class QualityPolicy:
    """Limits of the gates.

    accuracy, auc: at least this, on the newest labelled cutoff. p95_latency_ms: at most this, of
    one prediction over HTTP on the candidate as it would be served, in milliseconds.
    Raises UserError for a limit that no model or every model would pass by nonsense.
    """

    accuracy: float = 0.85
    auc: float = 0.90
    p95_latency_ms: float = 50.0

    def __post_init__(self) -> None:
        for name in ("accuracy", "auc"):
            limit = getattr(self, name)
            if not (math.isfinite(limit) and 0 <= limit <= 1):
                raise UserError(f"quality_gates.{name} is {limit}; set a number from 0 to 1")
        if not (math.isfinite(self.p95_latency_ms) and self.p95_latency_ms > 0):
            raise UserError(
                f"quality_gates.p95_latency_ms is {self.p95_latency_ms}; "
                "set a positive number of milliseconds"
            )


@dataclass(frozen=True)
class Gate:
    """One gate's verdict. `value` is None when there was no usable evidence."""

    name: str
    passed: bool
    value: float | None
    limit: float
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The verdict in JSON's types."""
        return asdict(self)


def judge_gates(policy: QualityPolicy, evidence: Mapping[str, float | None]) -> tuple[Gate, ...]:
    """Hold `evidence` (accuracy, auc, p95_latency_ms) against `policy`, a gate each.

    A gate whose evidence is missing, None, not finite or impossible (an accuracy or AUC outside
    of [0, 1], a negative latency) does not pass, and says so.
    """
    return (
        _gate("accuracy", evidence, policy.accuracy, at_least=True, most=1.0),
        _gate("auc", evidence, policy.auc, at_least=True, most=1.0),
        _gate("p95_latency_ms", evidence, policy.p95_latency_ms, at_least=False, most=math.inf),
    )


def all_passed(gates: tuple[Gate, ...]) -> bool:
    """Whether every gate passed; no gates at all is a no."""
    return bool(gates) and all(gate.passed for gate in gates)


def _gate(
    name: str, evidence: Mapping[str, float | None], limit: float, *, at_least: bool, most: float
) -> Gate:
    value = evidence.get(name)
    if value is None:
        return Gate(name, False, None, limit, f"no evidence: {name} was not measured")
    number = float(value)
    if not math.isfinite(number):
        return Gate(name, False, None, limit, f"no evidence: {name} is {number}")
    if not 0 <= number <= most:
        return Gate(name, False, None, limit, f"no evidence: {name} of {number:g} is impossible")
    passed = number >= limit if at_least else number <= limit
    relation = {
        (True, True): "is at least",
        (False, True): "is below",
        (True, False): "is at most",
        (False, False): "is above",
    }[passed, at_least]
    return Gate(name, passed, number, limit, f"{name} {number:.4g} {relation} {limit:g}")
