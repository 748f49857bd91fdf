"""What retention offers change, and how the model does where its own use changed nothing.

Whoever acts on a prediction changes its outcome: customers who were kept look like false alarms,
and the better the offers work, the worse the model seems. The hold-out (contract/holdout.py) is
treated by nobody, and being in it is an accident, so what differs between it and the others is what
the offers did.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from statistics import NormalDist
from typing import Literal

import msgspec
import numpy as np
import pandas as pd
import pyarrow.compute as pc

from churn_assets.contract.holdout import Holdout
from churn_assets.data.lake import Lake
from churn_assets.data.offers import read_offers
from churn_assets.data.prediction_log import PREDICTION_LOG, read_log
from churn_assets.data.windows import partition_of
from churn_assets.errors import UserError
from churn_assets.modeling.costs import CostPolicy
from churn_assets.modeling.metrics import score
from churn_assets.monitoring.metric import Metric
from churn_assets.monitoring.metric import Verdict as MetricVerdict
from churn_assets.monitoring.outcomes import (
    Outcomes,
    Predictions,
    label_cutoffs,
    matured_labels,
    outcomes_of,
)

# Customers of the hold-out to be expected before its share says anything.
SHARE_ROWS = 20

Verdict = Literal[
    "offers keep customers", "offers drive customers away", "no effect seen", "insufficient"
]
Intact = Literal["ok", "alert", "insufficient"]

_COLUMNS = ("customer_id", "at", "request_id", "cutoff", "probability", "holdout")
_DAY = timedelta(days=1)


@dataclass(frozen=True)
class TreatmentPolicy:
    """How much evidence is asked for. Raises UserError for values that make no sense.

    window_days: of operational time, whose predictions count. min_rows: outcomes on either side.
    confidence: of the intervals. alpha: the chance that groups which are alike are called unlike.
    """

    window_days: int = 180
    min_rows: int = 100
    confidence: float = 0.95
    alpha: float = 0.001

    def __post_init__(self) -> None:
        for name in ("window_days", "min_rows"):
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"treatment.{name} is {value}; give a whole number from 1 on")
        for name in ("confidence", "alpha"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise UserError(f"treatment.{name} is {value}; give a number between 0 and 1")


class Group(msgspec.Struct, frozen=True):
    """Customers whom the policy would treat, of the hold-out or of the others.

    entered: how many there are, whatever is known of them. rows: of those, with an outcome.
    churned: of rows. mean_probability: over `entered`, None without any. offered: of `entered`,
    those who got an offer, None where no offers are recorded.
    """

    entered: int
    rows: int
    churned: int
    mean_probability: float | None
    offered: int | None

    @property
    def churn_rate(self) -> float:
        """NaN without an outcome."""
        return self.churned / self.rows if self.rows else math.nan


class Intactness(msgspec.Struct, frozen=True):
    """Whether the hold-out can be compared with the others: `alert` says what speaks against it."""

    verdict: Intact
    reason: str
    figures: dict[str, float]


class TreatmentReport(msgspec.Struct, frozen=True, kw_only=True):
    """What offers change among the customers above the threshold, and the model on either group.

    effect: churn rate of the hold-out minus that of the others, intention to treat, with `lower`
    and `upper` of its interval; None without outcomes on both sides. figures: what follows from it.
    scores: the model on the newest outcome of each customer, of the hold-out and of the others.
    counts: how the logged predictions became those.
    """

    verdict: Verdict
    reason: str
    threshold: float
    held_out: Group
    others: Group
    effect: float | None
    lower: float | None
    upper: float | None
    figures: dict[str, float]
    scores: dict[str, dict[str, float]]
    intact: Intactness
    counts: dict[str, int]
    policy: dict[str, float]
    until: datetime
    at: datetime

    def metrics(self) -> list[Metric]:
        """The effect, and whether the hold-out is intact, for the series."""
        verdicts: dict[Verdict, MetricVerdict] = {
            "insufficient": "insufficient",
            "offers drive customers away": "alert",
        }
        verdict = verdicts.get(self.verdict, "ok")
        known = verdict != "insufficient"
        z, limit = (self.intact.figures.get(name) for name in ("probability_z", "z_limit"))
        return [
            Metric(
                name="offer_effect",
                verdict=verdict,
                value=self.effect if known else None,
                limit=0.0,
                reason=self.reason,
                at=self.at,
                until=self.until,
                rows=self.held_out.rows + self.others.rows,
            ),
            Metric(
                name="holdout_balance",
                verdict=self.intact.verdict,
                value=None if self.intact.verdict == "insufficient" or z is None else abs(z),
                limit=limit or 0.0,
                reason=self.intact.reason,
                at=self.at,
                until=self.until,
                rows=self.held_out.entered + self.others.entered,
            ),
        ]


def difference_interval(
    first: tuple[int, int], second: tuple[int, int], confidence: float
) -> tuple[float, float]:
    """The interval of the first proportion minus the second, each (hits, rows), rows above 0.

    Newcombe's, from the two Wilson intervals (Interval estimation for the difference between
    independent proportions, Statistics in Medicine 17, 1998, method 10). For one look.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    (p, low, high), (q, other_low, other_high) = (_wilson(*counts, z) for counts in (first, second))
    return (
        p - q - math.hypot(p - low, other_high - q),
        p - q + math.hypot(high - p, q - other_low),
    )


def _wilson(hits: int, rows: int, z: float) -> tuple[float, float, float]:
    p = hits / rows
    middle = (p + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z * math.sqrt(p * (1 - p) / rows + z * z / (4 * rows * rows)) / (1 + z * z / rows)
    return p, middle - half, middle + half


def marked_predictions(log: pd.DataFrame, *, behind: timedelta = timedelta()) -> pd.DataFrame:
    """The logged predictions in the order they were answered in, with the cutoff of their label.

    log: customer_id, at, request_id, cutoff, probability and holdout of the table `prediction_log`.
    Cutoffs are those of monitoring/outcomes.py. `holdout` is nullable here. behind: by how much
    data time is behind the clock of the service, in whole days.
    """
    rows = log.assign(cutoff=label_cutoffs(log, behind), holdout=log["holdout"].astype("boolean"))
    return rows.sort_values(["at", "request_id"], kind="stable", ignore_index=True)


def entries_of(rows: pd.DataFrame, threshold: float, before: Collection[str]) -> pd.DataFrame:
    """The first prediction above the threshold of every customer who has none in `before`.

    Then nobody has been treated yet. Later ones would not do: of the treated those come back above
    the threshold whom an offer did not help, of the hold-out all.
    """
    above = rows[(rows["probability"] > threshold) & ~rows["customer_id"].isin(list(before))]
    return above.drop_duplicates("customer_id").reset_index(drop=True)


def assess(
    rows: pd.DataFrame,
    labels: pd.DataFrame,
    offers: pd.DataFrame | None,
    *,
    matured: Collection[datetime],
    before: Collection[str],
    holdout: Holdout,
    policy: TreatmentPolicy,
    costs: CostPolicy,
    decision_threshold: float,
    horizon_days: int,
    until: datetime,
    now: datetime,
) -> TreatmentReport:
    """What the outcomes say of the offers.

    rows: of `marked_predictions`. labels: customer_id, cutoff, churned. offers: customer_id and
    served_at (data time), None where none are recorded: then everybody above the threshold outside
    of the hold-out is taken to get one. matured: the cutoffs whose labels are all there. before:
    customers who were above the threshold before `rows` begin. until: data time.
    """
    entered = entries_of(rows, costs.threshold, before)
    unmarked = entered["holdout"].isna()
    entered = entered[~unmarked].reset_index(drop=True)
    if offers is not None:
        entered["offered"] = _offered(entered, offers, horizon_days)
    known = _outcomes(entered, labels, matured)
    held_out, others = (_group(entered, known.rows, held) for held in (True, False))
    effect, interval, figures = None, None, {}
    if held_out.rows and others.rows:
        sides = (held_out.churned, held_out.rows), (others.churned, others.rows)
        effect = held_out.churn_rate - others.churn_rate
        interval = difference_interval(*sides, policy.confidence)
        figures = _worth(held_out, others, effect, interval, costs)
    verdict, reason = _verdict(held_out, others, interval, policy)
    newest = _outcomes(rows[rows["holdout"].notna()], labels, matured).rows
    newest = newest.sort_values("cutoff", kind="stable").drop_duplicates("customer_id", keep="last")
    return TreatmentReport(
        verdict=verdict,
        reason=reason,
        threshold=costs.threshold,
        held_out=held_out,
        others=others,
        effect=effect,
        lower=interval[0] if interval else None,
        upper=interval[1] if interval else None,
        figures=figures,
        scores={
            name: _scores(newest[newest["holdout"].eq(held)], policy, decision_threshold)
            for name, held in (("held_out", True), ("others", False))
        },
        intact=intactness(rows, entered, holdout, policy, (held_out, others)),
        counts={
            "logged": len(rows),
            "unmarked": int(rows["holdout"].isna().sum()),
            "entered_before": len(before),
            "entered_unmarked": int(unmarked.sum()),
            "entered": len(entered),
            "waiting": known.waiting,
            "unlabelled": known.unlabelled,
            "outcomes": len(known.rows),
        },
        policy=asdict(policy),
        until=until,
        at=now,
    )


def intactness(
    rows: pd.DataFrame,
    entered: pd.DataFrame,
    holdout: Holdout,
    policy: TreatmentPolicy,
    groups: tuple[Group, Group],
) -> Intactness:
    """Whether the hold-out is what it should be: drawn by chance, marked so, and not treated.

    Before anything was done the groups have the same mean probability, and the hold-out its share
    of the customers asked about: two tests, each at half of `alpha`. A share cannot be held against
    marks of other settings; whether they are of others now, the newest day says.
    """
    if not holdout.share:
        return Intactness("insufficient", "there is no hold-out: holdout.share is 0", {})
    limit = NormalDist().inv_cdf(1 - policy.alpha / 4)
    figures, faults = {"z_limit": limit}, []
    marks = rows[rows["holdout"].notna()].drop_duplicates(["customer_id", "holdout"])
    should = marks["customer_id"].map(holdout.membership()).astype(bool)
    wrong = marks[should.to_numpy() != marks["holdout"].to_numpy(dtype=bool)]
    if len(rows):
        newest_day = rows[rows["at"] >= rows["at"].max().floor("D")]
        now_wrong = newest_day.merge(
            wrong[["customer_id", "holdout"]], on=["customer_id", "holdout"]
        )
        figures["marked_otherwise"] = float(now_wrong["customer_id"].nunique())
        if len(now_wrong):
            faults.append(
                f"{now_wrong['customer_id'].nunique():,} customers are marked otherwise than "
                "`holdout` in the settings says; give every service the same"
            )
    held_out, others = groups
    if held_out.offered:
        figures["offered_in_holdout"] = float(held_out.offered)
        faults.append(f"{held_out.offered:,} customers of the hold-out got an offer")
    if not len(wrong) and len(marks) * holdout.share >= SHARE_ROWS:
        share, customers = float(marks["holdout"].mean()), len(marks)
        figures |= {"share": share, "share_z": _share_z(share, holdout.share, customers)}
        if abs(figures["share_z"]) > limit:
            faults.append(
                f"{share:.2%} of {customers:,} customers asked about are in the hold-out, and "
                f"{holdout.share:.2%} should be; are all asked about?"
            )
    enough = min(held_out.entered, others.entered) >= policy.min_rows
    if enough:
        figures["probability_z"] = _mean_z(entered)
        if abs(figures["probability_z"]) > limit:
            faults.append(
                f"the mean probability is {held_out.mean_probability:.4f} in the hold-out and "
                f"{others.mean_probability:.4f} outside before anybody was treated"
            )
    if faults:
        return Intactness("alert", "; ".join(faults), figures)
    if not enough:
        few = f"{held_out.entered:,} of the hold-out and {others.entered:,} others"
        why = f"{few} were above the threshold, {policy.min_rows:,} of each are needed"
        return Intactness("insufficient", why, figures)
    return Intactness(
        "ok", "the hold-out and the others are alike, and marked as they are", figures
    )


def judge_treatment(
    lake: Lake,
    holdout: Holdout,
    policy: TreatmentPolicy,
    costs: CostPolicy,
    *,
    decision_threshold: float,
    horizon_days: int,
    behind: timedelta,
    until: datetime,
    now: datetime,
) -> TreatmentReport:
    """`assess` by the prediction log, the labels and, where there are any, the offers in `lake`.

    The table `offers` is that of data/offers.py.
    """
    there = lake.days(PREDICTION_LOG)
    since = partition_of(now) - timedelta(days=policy.window_days)
    log = read_log(lake, [day for day in there if day >= since], _COLUMNS).to_pandas()
    rows = marked_predictions(log, behind=behind)
    labels, matured = matured_labels(lake, rows, horizon_days)
    offers = read_offers(lake)
    return assess(
        rows,
        labels,
        None if offers is None else offers.to_pandas(),
        matured=matured,
        before=_above_in(lake, [day for day in there if day < since], costs.threshold),
        holdout=holdout,
        policy=policy,
        costs=costs,
        decision_threshold=decision_threshold,
        horizon_days=horizon_days,
        until=until,
        now=now,
    )


def _above_in(lake: Lake, days: Iterable, threshold: float) -> set[str]:
    """Who was above the threshold on `days`; a day at a time, as there may be years of them."""
    found: set[str] = set()
    for day in days:
        table = read_log(lake, [day], ["customer_id", "probability"])
        above = table.filter(pc.call_function("greater", [table["probability"], threshold]))
        found |= set(above["customer_id"].to_pylist())
    return found


def _outcomes(rows: pd.DataFrame, labels: pd.DataFrame, matured: Collection[datetime]) -> Outcomes:
    """The outcomes of the first prediction of every customer at every cutoff."""
    first = rows.drop_duplicates(["customer_id", "cutoff"]).reset_index(drop=True)
    counted = Predictions(first, len(rows), len(rows) - len(first), 0)
    return outcomes_of(counted, labels, matured)


def _offered(entered: pd.DataFrame, offers: pd.DataFrame, horizon_days: int) -> pd.Series:
    """Who got an offer between the day of the prediction and the end of its label's window."""
    both = entered[["customer_id", "cutoff"]].merge(offers, on="customer_id")
    since, end = both["cutoff"] - _DAY, both["cutoff"] + timedelta(days=horizon_days)
    in_time = both[(both["served_at"] >= since) & (both["served_at"] < end)]
    return entered["customer_id"].isin(in_time["customer_id"])


def _group(entered: pd.DataFrame, known: pd.DataFrame, held: bool) -> Group:
    group, outcomes = (frame[frame["holdout"].eq(held)] for frame in (entered, known))
    return Group(
        entered=len(group),
        rows=len(outcomes),
        churned=int(outcomes["churned"].sum()),
        mean_probability=float(group["probability"].mean()) if len(group) else None,
        offered=int(group["offered"].sum()) if "offered" in group else None,
    )


def _worth(
    held_out: Group,
    others: Group,
    effect: float,
    interval: tuple[float, float],
    costs: CostPolicy,
) -> dict[str, float]:
    """What the effect is worth: beside what `costs` assumes, and for those who got an offer."""
    offered = 1.0
    if held_out.offered is not None and others.offered is not None:
        offered = others.offered / others.entered - held_out.offered / held_out.entered
    figures = {
        "churn_rate_held_out": held_out.churn_rate,
        "churn_rate_others": others.churn_rate,
        "assumed_success_rate": costs.success_rate,
    }
    if held_out.offered is not None:
        figures["more_offered"] = offered
    # Below that next to nobody was treated, and dividing by it would only blow up the noise.
    if offered > 0.05:
        figures |= {
            "effect_of_an_offer": effect / offered,
            "effect_of_an_offer_at_least": interval[0] / offered,
            "effect_of_an_offer_at_most": interval[1] / offered,
            "gain_of_an_offer": effect / offered * costs.customer_value - costs.offer,
        }
        if held_out.churned:
            figures["success_rate"] = effect / offered / held_out.churn_rate
    return figures


def _verdict(
    held_out: Group,
    others: Group,
    interval: tuple[float, float] | None,
    policy: TreatmentPolicy,
) -> tuple[Verdict, str]:
    if interval is None or min(held_out.rows, others.rows) < policy.min_rows:
        return "insufficient", (
            f"{held_out.rows:,} outcomes of the hold-out and {others.rows:,} of the others are "
            f"known, {policy.min_rows:,} of each are needed"
        )
    lower, upper = interval
    effect = held_out.churn_rate - others.churn_rate
    told = (
        f"{held_out.churn_rate:.1%} of {held_out.rows:,} in the hold-out churned and "
        f"{others.churn_rate:.1%} of {others.rows:,} others: {effect:+.1%} "
        f"[{lower:+.1%}, {upper:+.1%}]"
    )
    if lower > 0:
        return "offers keep customers", told
    return ("offers drive customers away" if upper < 0 else "no effect seen"), told


def _scores(
    rows: pd.DataFrame, policy: TreatmentPolicy, decision_threshold: float
) -> dict[str, float]:
    """The model on these outcomes; nothing but their number when there are too few."""
    if len(rows) < policy.min_rows:
        return {"rows": float(len(rows))}
    scores = score(
        rows["churned"].to_numpy(), rows["probability"].to_numpy(), threshold=decision_threshold
    )
    names = ("accuracy", "auc", "log_loss", "brier", "calibration_error")
    found = {name: getattr(scores, name) for name in (*names, "mean_prediction", "churn_rate")}
    return {"rows": float(len(rows))} | {k: float(v) for k, v in found.items() if v is not None}


def _mean_z(entered: pd.DataFrame) -> float:
    """The difference of mean probability, hold-out minus others, in its standard errors."""
    held, others = (
        entered.loc[entered["holdout"].eq(side), "probability"].to_numpy() for side in (True, False)
    )
    difference = float(held.mean() - others.mean())
    error = math.sqrt(np.var(held) / len(held) + np.var(others) / len(others))
    # A model that says the same of everybody has no spread, and no infinity goes into a record.
    return difference / max(error, 1e-9)


def _share_z(share: float, expected: float, customers: int) -> float:
    return (share - expected) / math.sqrt(expected * (1 - expected) / customers)
