"""The quality gates: what a model must show before it may go on. Missing evidence refuses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from churn_assets.errors import UserError


@dataclass(frozen=True)
class QualityPolicy:
    """Limits of the gates, on the newest labelled cutoff unless said otherwise.

    accuracy, auc: at least this. p95_latency_ms: at most this, of one prediction over HTTP on the
    candidate as it would be served, in milliseconds. calibration_error: at most this (see
    `metrics.calibration_error`). segment_auc: at least this in every segment large enough.
    auc_over_recency: AUC minus that of days since the last order alone; the lower end of its
    interval is above this. log_loss_over_production: log loss minus that of the model in
    production on the same rows; the lower end of its interval is at most this, so that no model
    goes on that is surely worse.
    Raises UserError for a limit that no model or every model would pass by nonsense.
    """

    accuracy: float = 0.85
    auc: float = 0.90
    p95_latency_ms: float = 50.0
    calibration_error: float = 0.05
    segment_auc: float = 0.65
    auc_over_recency: float = 0.0
    log_loss_over_production: float = 0.0

    def __post_init__(self) -> None:
        for name, (least, most) in _LIMITS.items():
            limit = getattr(self, name)
            if not (math.isfinite(limit) and least <= limit <= most):
                wanted = (
                    f"set a number from {least:g} to {most:g}"
                    if math.isfinite(most)
                    else "set a positive number of milliseconds"
                )
                raise UserError(f"quality_gates.{name} is {limit}; {wanted}")


# What a limit may be.
_LIMITS: Mapping[str, tuple[float, float]] = {
    "accuracy": (0.0, 1.0),
    "auc": (0.0, 1.0),
    "p95_latency_ms": (1e-3, math.inf),
    "calibration_error": (0.0, 1.0),
    "segment_auc": (0.0, 1.0),
    "auc_over_recency": (-1.0, 1.0),
    "log_loss_over_production": (0.0, 10.0),
}
# What a figure can be; what lies outside is no evidence.
_POSSIBLE = _LIMITS | {
    "p95_latency_ms": (0.0, math.inf),
    "log_loss_over_production": (-math.inf, math.inf),
}
_AT_LEAST = ("accuracy", "auc", "segment_auc")
_ABOVE = ("auc_over_recency",)

NO_PRODUCTION = "no production model: there is nothing it could be worse than"


@dataclass(frozen=True)
class Gate:
    """One gate's verdict. `value` is None when there was no usable evidence, or none was needed."""

    name: str
    passed: bool
    value: float | None
    limit: float
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The verdict in JSON's types."""
        return asdict(self)


def judge_gates(
    policy: QualityPolicy,
    evidence: Mapping[str, float | None],
    *,
    no_production: bool = False,
    missing: Mapping[str, str] | None = None,
) -> tuple[Gate, ...]:
    """Hold `evidence`, a figure by the name of each limit, against `policy`, a gate each.

    A gate whose evidence is missing, None, not finite or impossible (an accuracy or AUC outside
    of [0, 1], a negative latency) does not pass, and says so; `missing` says why, where that is
    known. no_production: it is known that no model is in production, so none can be beaten.
    """
    return tuple(
        Gate(name, True, None, getattr(policy, name), NO_PRODUCTION)
        if name == "log_loss_over_production" and no_production
        else _gate(name, evidence.get(name), getattr(policy, name), (missing or {}).get(name))
        for name in _LIMITS
    )


def all_passed(gates: tuple[Gate, ...]) -> bool:
    """Whether every gate passed; no gates at all is a no."""
    return bool(gates) and all(gate.passed for gate in gates)


def _gate(name: str, value: float | None, limit: float, why: str | None) -> Gate:
    if value is None:
        return Gate(name, False, None, limit, f"no evidence: {why or f'{name} was not measured'}")
    number = float(value)
    least, most = _POSSIBLE[name]
    if not math.isfinite(number):
        return Gate(name, False, None, limit, f"no evidence: {name} is {number}")
    if not least <= number <= most:
        return Gate(name, False, None, limit, f"no evidence: {name} of {number:g} is impossible")
    if name in _ABOVE:
        passed, relation = number > limit, ("is not above", "is above")
    elif name in _AT_LEAST:
        passed, relation = number >= limit, ("is below", "is at least")
    else:
        passed, relation = number <= limit, ("is above", "is at most")
    return Gate(name, passed, number, limit, f"{name} {number:.4g} {relation[passed]} {limit:g}")
