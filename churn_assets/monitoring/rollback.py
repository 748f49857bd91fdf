"""Whether to take the version in Production back: by what it does live, and by matured labels.

A release is watched for some time after it came into Production. Two things speak against it: it
is slow or fails, by the metrics of its own requests; or the version before it is surely better on
the newest labelled customers, which nobody has to wait for. It then goes back to the last known
good version, and the same is not done again for a while, so that it cannot flap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

import msgspec

from churn_assets.errors import UserError
from churn_assets.lifecycle.history import Evidence, Step, last_known_good, tenures
from churn_assets.lifecycle.promotion import population_of
from churn_assets.monitoring.metric import Metric

LIVE = ("p95_latency_ms", "error_rate")
_DAY = timedelta(days=1)
_ATTEMPTS = 3
_CHANCE = 1e-4


@dataclass(frozen=True)
class WatchPolicy:
    """When a release is taken back. Days are of operational time.

    mode: `automatic`, `manual` (a person decides, and is told), or `off`. watch_days: for how long
    a release is watched. hold_off_days: after a rollback that was done by itself, no other is.
    min_requests: live metrics of fewer say nothing, but for failures that chance cannot explain.
    margin: by so much the log loss may be worse than that of the version before. min_rows: fewer
    labelled customers are no evidence.
    """

    mode: Literal["automatic", "manual", "off"] = "automatic"
    watch_days: int = 14
    hold_off_days: int = 7
    min_requests: int = 100
    margin: float = 0.01
    min_rows: int = 300

    def __post_init__(self) -> None:
        if self.mode not in ("automatic", "manual", "off"):
            raise UserError(f"rollback.mode is {self.mode!r}; set automatic, manual or off")
        for name in ("watch_days", "hold_off_days", "min_requests", "min_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"rollback.{name} is {getattr(self, name)}; set at least 1")
        if not 0 <= self.margin <= 1:
            raise UserError(f"rollback.margin is {self.margin}; set a log loss from 0 to 1")


class RollbackDecision(msgspec.Struct, frozen=True):
    """Whether the version in Production is taken back, and all that was seen.

    verdict: `rollback` to the version `to`; `wait` where a person or the hold-off decides; `keep`.
    evidence: live metrics of the release. replay: the version before on the newest labelled
    customers against it, or why there is none.
    """

    id: str
    verdict: Literal["rollback", "wait", "keep"]
    version: str | None
    to: str | None
    reasons: tuple[str, ...]
    action: str
    alert: bool
    at: datetime
    evidence: tuple[Metric, ...] = ()
    replay: Evidence | str | None = None
    policy: dict[str, Any] = {}


def decide_rollback(
    history: Sequence[Step],
    live: Sequence[Metric],
    replay: Evidence | str | None,
    policy: WatchPolicy,
    *,
    automatic: str,
    endings: Mapping[str, str],
    now: datetime,
) -> RollbackDecision:
    """Decide on the version that `history` says is in Production.

    live: the newest metrics of its release. replay: that version (the candidate) against the last
    known good one (the incumbent) on labelled customers, or why they cannot be compared. automatic:
    who rolls back when this says so, as the history has it. endings: of the runs that carried
    decisions out, by the decision's id; a rollback that failed is decided again, under another id,
    until it has been tried three times.
    """
    held = tenures(history)
    tenure = held[-1] if held else None
    version = tenure.version if tenure else None
    to = last_known_good(history)
    since = tenure.since if tenure else None

    def named(verdict: str, attempt: int = 0) -> str:
        """The same id for the same verdict on the same tenure, until an attempt at it fails."""
        content = msgspec.json.encode([verdict, version, since, to, attempt])
        return f"{verdict}-{version or 'none'}-{hashlib.sha256(content).hexdigest()[:12]}"

    failed = 0
    while endings.get(named("rollback", failed)) == "failed":
        failed += 1

    def made(
        verdict: Literal["rollback", "wait", "keep"],
        reasons: Sequence[str],
        action: str,
        *,
        alert: bool = False,
    ) -> RollbackDecision:
        return RollbackDecision(
            id=named(verdict, failed),
            verdict=verdict,
            version=version,
            to=to,
            reasons=tuple(reasons),
            action=action,
            alert=alert,
            at=now,
            evidence=tuple(live),
            replay=replay,
            policy=asdict(policy),
        )

    if tenure is None:
        return made("keep", ["nothing is in Production"], "nothing")
    if policy.mode == "off":
        return made("keep", ["rollback.mode is off"], "nothing")
    age = (now - tenure.since) / _DAY
    if age > policy.watch_days:
        told = f"version {version} has been there for {age:.0f} days, longer than it is watched"
        return made("keep", [told], "nothing")
    against = [*_live_faults(live, policy), *_worse(replay, policy)]
    if not against:
        unknown = f"; nothing can be said of labels: {replay}" if isinstance(replay, str) else ""
        return made("keep", [f"nothing speaks against version {version}{unknown}"], "nothing")
    if to is None:
        against.append("there is no version to go back to")
        return made("wait", against, "a person decides: nothing good is there", alert=True)
    rollbacks = [s for s in history if s.evidence.kind == "rollback" and s.who == automatic]
    if rollbacks and (now - rollbacks[-1].at) / _DAY < policy.hold_off_days:
        against.append(
            f"the last rollback was on {rollbacks[-1].at:%Y-%m-%d %H:%M}, and for "
            f"{policy.hold_off_days} days none is done by itself"
        )
        return made("wait", against, "a person decides, with `churn rollback`", alert=True)
    if policy.mode == "manual":
        against.append("rollback.mode is manual")
        return made("wait", against, "a person decides, with `churn rollback`", alert=True)
    if failed >= _ATTEMPTS:
        against.append(f"the rollback to version {to} failed {failed} times")
        return made("wait", against, "a person decides, with `churn rollback`", alert=True)
    return made("rollback", against, f"version {to} comes back", alert=True)


def _live_faults(live: Sequence[Metric], policy: WatchPolicy) -> list[str]:
    return [
        f"{metric.name}: {metric.reason}"
        for metric in live
        if metric.name in LIVE
        and metric.verdict == "alert"
        and (metric.rows >= policy.min_requests or _fails_beyond_chance(metric))
    ]


def _fails_beyond_chance(metric: Metric) -> bool:
    """Whether few requests have failed so often that the share allowed cannot explain it.

    An exact binomial test, as strict as looks every hour of the watch window ask for.
    """
    if metric.name != "error_rate" or not metric.value or metric.limit is None:
        return False
    errors = round(metric.value * metric.rows)
    # Where it is asked; it takes a second to import.
    from scipy.stats import binomtest

    return binomtest(errors, metric.rows, metric.limit, "greater").pvalue < _CHANCE


def _worse(replay: Evidence | str | None, policy: WatchPolicy) -> list[str]:
    """Why the version before is surely better, if it is."""
    if not isinstance(replay, Evidence) or (replay.rows or 0) < policy.min_rows:
        return []
    mean = replay.figures.get("log_loss_difference")
    most = replay.figures.get("log_loss_difference_at_most")
    if not isinstance(mean, float) or not isinstance(most, float):
        return []
    # The interval is symmetric about the mean.
    least = 2 * mean - most
    if least <= policy.margin:
        return []
    return [
        f"its log loss is at least {least:.4f} above that of version {replay.incumbent} on "
        f"{replay.rows:,} labelled customers{population_of(replay)}, and "
        f"{policy.margin:g} is allowed"
    ]
