"""A trial of two models on live requests: what it showed, and whether it may end in a promotion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from churn_assets.contract.logged import Arm
from churn_assets.contract.trial import assignment
from churn_assets.data.lake import Lake
from churn_assets.data.windows import partition_of
from churn_assets.lifecycle.history import Evidence, TrialRun
from churn_assets.lifecycle.trials import TrialPolicy
from churn_assets.monitoring.confidence import confidence_sequence
from churn_assets.monitoring.outcomes import (
    PREDICTION_LOG,
    UTC_MOMENT,
    Outcomes,
    Predictions,
    counted_once,
    label_cutoffs,
    matured_labels,
    moments,
    outcomes_of,
)

LATENCY_REQUESTS = 100
LATENCY_FLOOR_MS = 1.0
LOOKS_KEPT = 200
# float32 has no probability closer to 0 or 1.
TINY = 1e-7

Verdict = Literal[
    "challenger better", "no worse within margin", "worse", "not yet", "stopped by a guard rail"
]
STOPPED: Verdict = "stopped by a guard rail"
HARMFUL: tuple[Verdict, ...] = ("worse", STOPPED)
PASSING: tuple[Verdict, ...] = ("challenger better", "no worse within margin")

EMPTY_LOG = pd.DataFrame(
    {
        "request_id": pd.Series(dtype="str"),
        "at": pd.Series(dtype=UTC_MOMENT),
        "customer_id": pd.Series(dtype="str"),
        "champion": pd.Series(dtype="float64"),
        "challenger": pd.Series(dtype="float64"),
        "arm": pd.Series(dtype="str"),
        "release_id": pd.Series(dtype="str"),
        "cutoff": pd.Series(dtype=UTC_MOMENT),
        "latency_us": pd.Series(dtype="int64"),
    }
)


class Guard(msgspec.Struct, frozen=True):
    """One guard rail: `value` is null while there is too little to tell.

    state: `kept`, `hit`, or `unknown`, which keeps a trial from any verdict in the challenger's
    favour.
    """

    name: str
    state: Literal["kept", "hit", "unknown"]
    value: float | None
    limit: float
    reason: str


class Look(msgspec.Struct, frozen=True):
    """The difference of log loss, challenger minus champion, once a cutoff's labels had matured.

    rows: outcomes up to then. lower, upper: of the confidence sequence.
    """

    cutoff: datetime
    rows: int
    difference: float
    lower: float
    upper: float


class TrialReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a trial has shown so far, and what follows from it.

    verdict: never in the challenger's favour while evidence is missing. figures: by name; what
    could not be measured is not there. rows: outcomes that count. counts: how the logged
    predictions became those. policy: the values it was judged by.
    """

    trial: str
    champion: str
    challenger: str
    verdict: Verdict
    reason: str
    rows: int
    figures: dict[str, float]
    counts: dict[str, int]
    guards: tuple[Guard, ...]
    looks: tuple[Look, ...]
    policy: dict[str, float | bool]
    at: datetime

    @property
    def passed(self) -> bool:
        """Whether the policy lets the challenger take the champion's place."""
        return self.verdict in PASSING

    def lines(self) -> list[str]:
        """The report for a person."""
        counts = ", ".join(f"{name} {count:,}" for name, count in self.counts.items())
        guards = [f"{g.name} {g.state}: {g.reason}" for g in self.guards]
        judged = f"{self.verdict}: {self.reason} (judged {self.at:%Y-%m-%d %H:%M} UTC)"
        return [judged, *guards, counts]

    def evidence(self) -> Evidence | str:
        """The report as evidence for a promotion, or why it is none yet."""
        if not self.rows or "log_loss_difference" not in self.figures:
            return f"the trial {self.trial} has no verdict: {self.reason}"
        figures: dict[str, float | str] = {"trial": self.trial, "verdict": self.verdict}
        return Evidence("trial", figures | self.figures, self.passed, self.champion, self.rows)


@dataclass(frozen=True)
class Traffic:
    """The requests of a trial, as they were logged.

    requests, p95_ms: by arm, of the customers' assignment; latency is None without a request.
    asked: requests the challenger should have scored. failed: those it has no score for.
    misplaced: answered by another arm than the assignment says, though its model scored.
    """

    requests: dict[Arm, int]
    p95_ms: dict[Arm, float | None]
    asked: int
    failed: int
    misplaced: int


def traffic_of(log: pd.DataFrame, trial: TrialRun) -> Traffic:
    """What the logged predictions of `trial` say of its requests.

    log: rows of the table `prediction_log`, at least customer_id, arm, challenger, champion and
    latency_us, of the release of the trial.
    """
    assigned = _assigned(log["customer_id"], trial)
    challenged = assigned == "challenger"
    asked = challenged | trial.shadow
    failed = asked & log["challenger"].isna().to_numpy()
    answered = log["arm"].to_numpy() == "challenger"
    latency = log["latency_us"].to_numpy(dtype=np.float64) / 1000

    def p95(rows: NDArray[np.bool_]) -> float | None:
        return float(np.quantile(latency[rows], 0.95)) if rows.any() else None

    return Traffic(
        requests={"champion": int((~challenged).sum()), "challenger": int(challenged.sum())},
        p95_ms={"champion": p95(~challenged), "challenger": p95(challenged)},
        asked=int(asked.sum()),
        failed=int(failed.sum()),
        misplaced=int(((answered != challenged) & ~failed).sum()),
    )


def predictions_of(
    log: pd.DataFrame, trial: TrialRun, *, horizon_days: int, behind: timedelta = timedelta()
) -> Predictions:
    """The predictions of `trial` that outcomes will count for, each with the cutoff of its label.

    Their rows have champion, challenger and answered (P(churn), NaN where a model did not score)
    and arm (as assigned). Which count, and by which label: see `outcomes.py`.
    """
    rows = pd.DataFrame(
        {
            "customer_id": log["customer_id"],
            "cutoff": label_cutoffs(log, behind),
            "at": log["at"],
            "request_id": log["request_id"],
            "champion": log["champion"].astype("float64"),
            "challenger": log["challenger"].astype("float64"),
            "arm": _assigned(log["customer_id"], trial),
        }
    )
    by_challenger = log["arm"].to_numpy() == "challenger"
    rows["answered"] = np.where(by_challenger, rows["challenger"], rows["champion"])
    return counted_once(rows, horizon_days)


def judge(
    trial: TrialRun,
    predictions: Predictions,
    outcomes: Outcomes,
    traffic: Traffic,
    policy: TrialPolicy,
    *,
    now: datetime,
) -> TrialReport:
    """What the outcomes say of the challenger, and whether a guard rail was hit.

    With shadow scoring the same customers are scored by both models, and their differences of log
    loss are judged; without it, the mean log loss of those each model was assigned.
    """
    guards = guard_rails(traffic, policy)
    rows, looks, figures = (_paired if trial.shadow else _by_arm)(outcomes.rows, policy)
    days = (now - trial.since) / timedelta(days=1)
    verdict, reason = _verdict(rows, looks, figures, guards, policy, days)
    figures |= {"days": round(days, 2)}
    return TrialReport(
        trial=trial.id,
        champion=trial.champion,
        challenger=trial.challenger,
        verdict=verdict,
        reason=reason,
        rows=rows,
        figures=figures,
        counts={
            "logged": predictions.logged,
            "repeated": predictions.repeated,
            "overlapping": predictions.overlapping,
            "waiting": outcomes.waiting,
            "unlabelled": outcomes.unlabelled,
            "without_a_score": len(outcomes.rows) - rows,
            "champion_requests": traffic.requests["champion"],
            "challenger_requests": traffic.requests["challenger"],
            "challenger_asked": traffic.asked,
            "challenger_failed": traffic.failed,
        },
        guards=guards,
        looks=looks[-LOOKS_KEPT:],
        policy=asdict(policy),
        at=now,
    )


def guard_rails(traffic: Traffic, policy: TrialPolicy) -> tuple[Guard, ...]:
    """What the challenger must not do, whatever it predicts.

    Its errors may be `max_error_rate` of its requests, or of `min_rows` requests while there are
    fewer: one in the first ten is no rate. Latencies below LATENCY_FLOOR_MS count as that. With
    shadow scoring every request waits for both models, so that only the limit in milliseconds tells
    anything of the challenger's.
    """
    champion, challenger = traffic.p95_ms["champion"], traffic.p95_ms["challenger"]
    few = min(traffic.requests.values()) < LATENCY_REQUESTS
    ratio = None
    if champion is not None and challenger is not None:
        ratio = max(challenger, LATENCY_FLOOR_MS) / max(champion, LATENCY_FLOOR_MS)
    errors = traffic.failed / max(traffic.asked, policy.min_rows) if traffic.asked else None
    return (
        _guard(
            "error_rate",
            errors,
            policy.max_error_rate,
            f"the challenger has no score for {traffic.failed:,} of {traffic.asked:,} requests",
        ),
        _guard(
            "latency_ratio",
            None if few else ratio,
            policy.max_latency_ratio,
            f"95 % of its requests take {_ms(challenger)}, of the champion's {_ms(champion)}",
        ),
        _guard(
            "latency_ms",
            None if few else challenger,
            policy.max_latency_ms,
            f"95 % of its requests take {_ms(challenger)}",
        ),
        _guard(
            "assignment",
            float(traffic.misplaced) if traffic.asked else None,
            0.0,
            f"{traffic.misplaced:,} requests were answered by the other model",
        ),
    )


def judge_trial(
    lake: Lake,
    trial: TrialRun,
    policy: TrialPolicy,
    *,
    horizon_days: int,
    behind: timedelta,
    now: datetime,
) -> TrialReport:
    """`trial`, judged by the prediction log and the labels in `lake`. See `predictions_of`."""
    last = partition_of(now if trial.until is None else trial.until) + timedelta(days=1)
    days = [d for d in lake.days(PREDICTION_LOG) if partition_of(trial.since) <= d <= last]
    log = EMPTY_LOG
    if days:
        log = lake.read(PREDICTION_LOG, days=days, columns=list(EMPTY_LOG.columns)).to_pandas()
    log = log[log["release_id"] == trial.release_id].reset_index(drop=True)
    predictions = predictions_of(log, trial, horizon_days=horizon_days, behind=behind)
    labels, matured = matured_labels(lake, predictions.rows, horizon_days)
    outcomes = outcomes_of(predictions, labels, matured)
    return judge(trial, predictions, outcomes, traffic_of(log, trial), policy, now=now)


def last_report(records: Path, trial: str) -> TrialReport | None:
    """The newest report of `trial` in the folder of records; None when it has not been judged."""
    try:
        written = (records / "trial_report" / "latest.json").read_bytes()
        report = msgspec.json.decode(written, type=TrialReport)
    except (OSError, msgspec.MsgspecError):
        return None
    return report if report.trial == trial else None


def _assigned(customers: pd.Series, trial: TrialRun) -> NDArray[np.object_]:
    arm_of = assignment(trial.id, trial.share)
    arms = {customer: arm_of(customer) for customer in customers.unique()}
    return customers.map(arms).to_numpy(dtype=object)


def _guard(name: str, value: float | None, limit: float, reason: str) -> Guard:
    if value is None:
        return Guard(name, "unknown", None, limit, "too few requests to tell")
    # Written so that a NaN, which compares false, is a hit.
    state = "kept" if value <= limit else "hit"
    return Guard(name, state, value, limit, f"{reason}; at most {limit:g} is allowed")


def _ms(latency: float | None) -> str:
    return "no time" if latency is None else f"{latency:.2f} ms"


def _log_losses(churned: NDArray[np.bool_], p: NDArray[np.float64]) -> NDArray[np.float64]:
    clipped = np.clip(p, TINY, 1 - TINY)
    return -np.where(churned, np.log(clipped), np.log1p(-clipped))


Judged = tuple[int, tuple[Look, ...], dict[str, float]]


def _paired(rows: pd.DataFrame, policy: TrialPolicy) -> Judged:
    """The differences of customers both models scored."""
    rows = rows[rows["champion"].notna() & rows["challenger"].notna()]
    if rows.empty:
        return 0, (), {}
    churned = rows["churned"].to_numpy(dtype=np.bool_)
    champion, challenger = (
        _log_losses(churned, rows[arm].to_numpy()) for arm in ("champion", "challenger")
    )
    exact = challenger - champion
    clip = policy.clip_difference
    clipped = np.clip(exact, -clip, clip)
    cutoffs, ends = _ends(rows["cutoff"])
    found = confidence_sequence(clipped, -clip, clip, policy.alpha, ends)
    looks = tuple(
        Look(cutoff, int(end), float(mean), float(lower), float(upper))
        for cutoff, end, mean, lower, upper in zip(moments(cutoffs), ends, *found, strict=True)
    )
    figures = _figures(looks[-1]) | {
        "champion_log_loss": float(champion.mean()),
        "challenger_log_loss": float(challenger.mean()),
        "log_loss_difference_unclipped": float(exact.mean()),
        "clipped_share": float((np.abs(exact) > clip).mean()),
    }
    return len(rows), looks, figures


def _by_arm(rows: pd.DataFrame, policy: TrialPolicy) -> Judged:
    """The mean log loss of the customers of each arm, by the answers they got."""
    rows = rows[rows["answered"].notna()]
    clip, arms = policy.clip_loss, ("champion", "challenger")
    losses, exact, ends_of = {}, {}, {}
    cutoffs, _ = _ends(rows["cutoff"])
    for arm in arms:
        of = rows[rows["arm"] == arm]
        exact[arm] = _log_losses(of["churned"].to_numpy(dtype=np.bool_), of["answered"].to_numpy())
        ends_of[arm] = of["cutoff"].searchsorted(cutoffs, side="right")
        losses[arm] = np.minimum(exact[arm], clip)
    # Until both have an outcome there is nothing to compare.
    begun = (ends_of["champion"] > 0) & (ends_of["challenger"] > 0)
    if not begun.any():
        return 0, (), {}
    # Four bounds hold at once, so each has a quarter of alpha.
    found = {
        arm: confidence_sequence(losses[arm], 0, clip, policy.alpha / 2, ends_of[arm][begun])
        for arm in arms
    }
    champion, challenger = found["champion"], found["challenger"]
    looks = tuple(
        Look(cutoff, int(end), float(mean), float(lower), float(upper))
        for cutoff, end, mean, lower, upper in zip(
            moments(cutoffs[begun]),
            ends_of["champion"][begun] + ends_of["challenger"][begun],
            challenger.mean - champion.mean,
            challenger.lower - champion.upper,
            challenger.upper - champion.lower,
            strict=True,
        )
    )
    figures = _figures(looks[-1]) | {
        "champion_log_loss": float(exact["champion"].mean()),
        "challenger_log_loss": float(exact["challenger"].mean()),
        "log_loss_difference_unclipped": float(
            exact["challenger"].mean() - exact["champion"].mean()
        ),
        "clipped_share": float(
            np.mean([*(exact["champion"] > clip), *(exact["challenger"] > clip)])
        ),
        "challenger_rows": float(len(losses["challenger"])),
    }
    return len(rows), looks, figures


def _ends(cutoffs: pd.Series) -> tuple[pd.DatetimeIndex, NDArray[np.int64]]:
    """The cutoffs there are, oldest first, and how many rows there are up to each."""
    counts = cutoffs.value_counts().sort_index()
    return pd.DatetimeIndex(counts.index), counts.to_numpy(dtype=np.int64).cumsum()


def _figures(look: Look) -> dict[str, float]:
    return {
        "log_loss_difference": look.difference,
        "log_loss_difference_at_least": look.lower,
        "log_loss_difference_at_most": look.upper,
    }


def _verdict(
    rows: int,
    looks: Sequence[Look],
    figures: Mapping[str, float],
    guards: Sequence[Guard],
    policy: TrialPolicy,
    days: float,
) -> tuple[Verdict, str]:
    if hit := [guard for guard in guards if guard.state == "hit"]:
        return STOPPED, "; ".join(f"{guard.name}: {guard.reason}" for guard in hit)
    unknown = [guard.name for guard in guards if guard.state == "unknown"]
    why = ""
    if rows < policy.min_rows or not looks:
        why = f"{rows:,} outcomes are known, {policy.min_rows:,} are needed"
    elif looks[-1].lower > policy.margin:
        return "worse", f"its log loss is {_interval(looks[-1], rows)}: surely above the margin"
    elif unknown:
        why = f"nothing can be said of its {', '.join(unknown)}"
    elif looks[-1].upper > policy.margin:
        why = f"its log loss is {_interval(looks[-1], rows)}, and the margin {policy.margin:g}"
    elif figures["log_loss_difference_unclipped"] > policy.margin:
        # Clipping must not hide what is rare and very wrong.
        why = (
            f"its log loss is {figures['log_loss_difference_unclipped']:+.4f} of the champion's "
            f"where outcomes count in full, and the margin {policy.margin:g}"
        )
    elif looks[-1].upper < 0:
        return "challenger better", f"its log loss is {_interval(looks[-1], rows)}"
    else:
        told = f"its log loss is {_interval(looks[-1], rows)}, the margin {policy.margin:g}"
        return "no worse within margin", told
    if days > policy.max_days:
        return STOPPED, f"after {days:.0f} days, {policy.max_days} are allowed: {why}"
    return "not yet", why


def _interval(look: Look, rows: int) -> str:
    return (
        f"{look.difference:+.4f} [{look.lower:+.4f}, {look.upper:+.4f}] of the champion's on "
        f"{rows:,} outcomes"
    )
