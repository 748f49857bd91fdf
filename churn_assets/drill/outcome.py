"""What a case of the drill came to: measured on every logged prediction, by what customers did.

Three models answer the same requests: the one that was served, the first one (doing nothing), and
an oracle that is trained anew each day on the newest matured labels. Each is judged by the true
outcomes, which the simulator knows also where no label has matured yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta
from itertools import takewhile
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from churn_assets.drill.cases import Case
from churn_assets.modeling.metrics import auc

HARM = 0.02
"""AUC that doing nothing must lose for a case to be harmful, and within which one is healed."""

WINDOW_DAYS = 10
OUTCOME = "drill/outcome.json"
"""Where a case's own home keeps what it came to."""
_DAY = timedelta(days=1)
_FEWEST = 300


class Day(msgspec.Struct, frozen=True):
    """AUC over the requests of the WINDOW_DAYS up to a day; None where there were too few."""

    day: date
    served: float | None
    nothing: float | None
    oracle: float | None


class Event(msgspec.Struct, frozen=True):
    """Something that was noticed or done. kind: `alert`, `decision`, or `step` of the registry."""

    at: datetime
    kind: str
    what: str
    why: str


class Treated(msgspec.Struct, frozen=True, kw_only=True):
    """What retention offers did, by the last treatment report, and by the shop, which knows.

    effect, lower, upper: churn rate of the hold-out minus that of the others, with its interval;
    None without outcomes. true_effect: by how much more of the others the churn rate would have
    been, at the same cutoffs, had nobody got an offer. held_out, others: outcomes. offers: served.
    scores: of the model, in the hold-out and outside. intact: whether the hold-out is.
    """

    verdict: str
    effect: float | None
    lower: float | None
    upper: float | None
    true_effect: float | None
    held_out: int
    others: int
    offers: int
    scores: dict[str, dict[str, float]]
    intact: str

    def line(self) -> str:
        """In a sentence."""
        told = self.verdict
        if self.effect is not None and self.lower is not None and self.upper is not None:
            told += f", {self.effect:+.1%} [{self.lower:+.1%}, {self.upper:+.1%}]"
        if self.true_effect is not None:
            told += f", in truth {self.true_effect:+.1%}"
        accuracies = [self.scores.get(side, {}).get("accuracy") for side in ("held_out", "others")]
        accuracy = " and ".join("unknown" if a is None else f"{a:.3f}" for a in accuracies)
        return (
            f"{told}; {self.offers:,} offers, outcomes of {self.held_out:,} held out and "
            f"{self.others:,} others; accuracy {accuracy}"
        )


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A case and how it ended. Days count from the change; None is `not` or `does not apply`.

    harm: AUC that doing nothing lost against the oracle at worst, or the share of requests that
    failed or were late. days_to_heal: see `healed_on`. days_after_labels: the same, counted from
    the first day on which a label of the time after the change can have matured. auc_gap: of the
    last WINDOW_DAYS. auc_lost, auc_lost_doing_nothing: the mean gap to the oracle from the change
    on. false_retrains: asked for by drift or decay where nothing harmful had happened. human_steps:
    of the registry, the forced release apart. failed_runs: and evaluations of sensors that failed.
    treated: where offers were served; the AUCs are of the hold-out then, whose outcomes no offer
    changed.
    """

    name: str
    title: str
    change: date
    sabotaged: bool
    harmful: bool
    harm: float
    detected: bool
    days_to_detect: int | None
    detected_by: str | None
    false_retrains: int
    false_rollbacks: int
    retrains: int
    rollbacks: int
    alerts_before: int
    healed: bool | None
    days_to_heal: int | None
    days_after_labels: int | None
    auc_gap: float | None
    auc_lost: float | None
    auc_lost_doing_nothing: float | None
    human_steps: int
    failed_runs: int
    requests: int
    days: tuple[Day, ...]
    events: tuple[Event, ...]
    seconds: float
    treated: Treated | None = None


def rolling_auc(
    days: Sequence[date],
    day_of: NDArray[Any],
    churned: NDArray[np.bool_],
    scores: Mapping[str, NDArray[np.float64]],
) -> tuple[Day, ...]:
    """The AUC of each of `served`, `nothing` and `oracle` over the window that ends with each day.

    day_of: the day of each request, numpy datetime64[D]. scores: P(churn) of each request; a
    request a model has no score for is NaN and left out for all.
    """
    known = np.logical_and.reduce([np.isfinite(one) for one in scores.values()])
    found = []
    for day in days:
        low = np.datetime64(day - (WINDOW_DAYS - 1) * _DAY)
        rows = known & (low <= day_of) & (day_of <= np.datetime64(day))
        enough = rows.sum() >= _FEWEST and 0 < churned[rows].sum() < rows.sum()
        found.append(
            Day(
                day,
                **{k: auc(churned[rows], p[rows]) if enough else None for k, p in scores.items()},
            )
        )
    return tuple(found)


def gaps(days: Sequence[Day], of: str, since: date) -> list[tuple[date, float]]:
    """How much AUC less than the oracle's a model has, by day from `since` on."""
    return [
        (one.day, one.oracle - value)
        for one in days
        if one.day >= since and one.oracle is not None and (value := getattr(one, of)) is not None
    ]


def worst_gap(days: Sequence[Day], since: date) -> float:
    """The most that doing nothing loses against the oracle; 0 when it never does."""
    return max((gap for _, gap in gaps(days, "nothing", since)), default=0.0)


def healed_on(days: Sequence[Day], since: date) -> date | None:
    """The first day from which on what is served stays within HARM of the oracle.

    None when that is seen for less than WINDOW_DAYS: one good day at the end proves nothing.
    """
    latest_first = reversed(gaps(days, "served", since))
    held = [day for day, _ in takewhile(lambda one: one[1] <= HARM, latest_first)]
    return held[-1] if held and held[0] - held[-1] >= WINDOW_DAYS * _DAY else None


def outcome(
    case: Case,
    days: tuple[Day, ...],
    events: Sequence[Event],
    *,
    lost: float | None,
    human_steps: int,
    failed_runs: int,
    requests: int,
    horizon_days: int,
    seconds: float,
    treated: Treated | None = None,
) -> Outcome:
    """What `case` came to. lost: the share of requests a slow or failing release spoiled."""
    change = case.change
    harm = worst_gap(days, change) if lost is None else lost
    harmful = harm > (HARM if lost is None else 0.01)
    after = [e for e in events if e.at.date() >= change and _notices(e)]
    first = after[0] if after else None
    asked = [e for e in events if e.what.startswith(("retrain:drift", "retrain:concept_drift"))]
    rolled = [e for e in events if e.what == "rollback"]
    counted = [e for e in asked if not harmful or e.at.date() < change]
    false_rollbacks = [e for e in rolled if case.sabotage is None or e.at.date() < change]
    served = gaps(days, "served", change)
    nothing = gaps(days, "nothing", change)
    end = healed_on(days, change) if lost is None else _mended(events, change)
    healing = None if not harmful or end is None else max(0, (end - change).days)
    return Outcome(
        name=case.name,
        title=case.title,
        change=change,
        sabotaged=case.sabotage is not None,
        harmful=harmful,
        harm=round(harm, 4),
        detected=first is not None,
        days_to_detect=(first.at.date() - change).days if first else None,
        detected_by=first.what if first else None,
        false_retrains=len(counted),
        false_rollbacks=len(false_rollbacks),
        retrains=sum(e.what.startswith("retrain:") for e in events),
        rollbacks=len(rolled),
        alerts_before=sum(e.kind == "alert" and e.at.date() < change for e in events),
        healed=None if not harmful else healing is not None,
        days_to_heal=healing,
        days_after_labels=None
        if healing is None or case.sabotage
        else healing - horizon_days - case.labels_late,
        auc_gap=round(served[-1][1], 4) if served else None,
        auc_lost=_mean(served),
        auc_lost_doing_nothing=_mean(nothing),
        human_steps=human_steps,
        failed_runs=failed_runs,
        requests=requests,
        days=days,
        events=tuple(events),
        seconds=round(seconds, 1),
        treated=treated,
    )


def _notices(event: Event) -> bool:
    return event.kind == "alert" or event.what.startswith(
        ("retrain:drift", "retrain:concept", "rollback", "fall_back", "suppress", "investigate")
    )


def _mended(events: Sequence[Event], change: date) -> date | None:
    """When the bad release was taken back."""
    rolled = [e.at.date() for e in events if e.what == "rollback" and e.at.date() >= change]
    return rolled[0] if rolled else None


def _mean(of: Sequence[tuple[date, float]]) -> float | None:
    return round(float(np.mean([gap for _, gap in of])), 4) if of else None
