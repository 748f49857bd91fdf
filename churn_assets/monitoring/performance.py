"""How the version in Production does on what has become known: matured labels of its predictions.

Before labels mature, the accuracy to expect is estimated from the probabilities alone. Once they
are there, the report says how far that estimate was off, and whether the model still ranks
customers as well as its evaluation promised: if it does not, what it learned no longer holds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from churn_assets.data.lake import Lake
from churn_assets.data.prediction_log import read_log
from churn_assets.data.windows import cutoff_of, midnight, partition_of
from churn_assets.errors import UserError
from churn_assets.modeling.bootstrap import (
    Interval,
    Resampling,
    Scored,
    interval_text,
    intervals,
    mean_interval,
)
from churn_assets.monitoring.metric import Metric, Verdict
from churn_assets.monitoring.outcomes import (
    LABELS,
    PREDICTION_LOG,
    UTC_MOMENT,
    Outcomes,
    counted_once,
    label_cutoffs,
    matured_labels,
    outcomes_of,
)

FIGURES = ("accuracy", "auc", "log_loss", "brier", "calibration_error")
RELEASES_KEPT = 20
ROWS_AT_A_TIME = 200_000

_DAY = timedelta(days=1)
_COLUMNS = (
    "request_id",
    "at",
    "customer_id",
    "probability",
    "champion",
    "challenger",
    "arm",
    "model_version",
    "release_id",
    "cutoff",
    "holdout",
)
EMPTY_LOGGED = pd.DataFrame(
    {
        "request_id": pd.Series(dtype="str"),
        "at": pd.Series(dtype=UTC_MOMENT),
        "customer_id": pd.Series(dtype="str"),
        "cutoff": pd.Series(dtype=UTC_MOMENT),
        "release_id": pd.Series(dtype="str"),
        "answered": pd.Series(dtype="float64"),
        "p": pd.Series(dtype="float64"),
        "holdout": pd.Series(dtype="bool"),
    }
)


@dataclass(frozen=True)
class PerformancePolicy:
    """What a model in Production must show on outcomes.

    min_accuracy: at the decision threshold. max_auc_loss: the AUC may be so much below what its
    evaluation promised; more than that, for the whole interval, is decay.
    max_expected_accuracy_error: how far the accuracy that was expected may be from the realised.
    window_days: of data time; outcomes whose labels matured in the last of them count. min_rows:
    fewer outcomes are no evidence. max_days_without_labels: of data time. Raises UserError for a
    value that says nothing.
    """

    min_accuracy: float = 0.8
    max_auc_loss: float = 0.03
    max_expected_accuracy_error: float = 0.05
    window_days: int = 28
    min_rows: int = 300
    max_days_without_labels: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.min_accuracy < 1:
            raise UserError(
                f"performance.min_accuracy is {self.min_accuracy}; set a share between 0 and 1"
            )
        if not 0 <= self.max_auc_loss < 0.5:
            raise UserError(
                f"performance.max_auc_loss is {self.max_auc_loss}; set a number from 0 to below 0.5"
            )
        if not 0 < self.max_expected_accuracy_error < 1:
            raise UserError(
                "performance.max_expected_accuracy_error is "
                f"{self.max_expected_accuracy_error}; set a share between 0 and 1"
            )
        for name, least in (("window_days", 1), ("min_rows", 50), ("max_days_without_labels", 1)):
            if getattr(self, name) < least:
                raise UserError(
                    f"performance.{name} is {getattr(self, name)}; set at least {least}"
                )


class ReleaseLine(msgspec.Struct, frozen=True):
    """What one release answered, on the outcomes of the window.

    figures: of the answers it gave, by name of FIGURES; empty for fewer than 2 outcomes or when
    there is one class only. waiting: predictions whose labels have not come.
    """

    release_id: str
    outcomes: int
    waiting: int
    figures: dict[str, Interval]


class PerformanceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How the version in Production does.

    verdict: the worst of `accuracy` and `matured_auc`. first, until: outcomes matured in
    [first, until), data time. population: whether the figures are of the customers held out from
    treatment or of all; holdout and everyone have both. rows: outcomes that count. promised_auc:
    of the evaluation; decay: that minus the AUC of the outcomes. newest_labels: the day whose
    labels matured last.
    """

    verdict: Verdict
    reason: str
    version: str | None
    release_id: str | None
    first: datetime
    until: datetime
    rows: int
    population: str
    figures: dict[str, Interval]
    everyone: dict[str, Interval]
    holdout: dict[str, Interval]
    promised_auc: Interval | None
    decay: Interval | None
    expected_accuracy: float | None
    expected_accuracy_error: Interval | None
    releases: tuple[ReleaseLine, ...]
    counts: dict[str, int]
    newest_labels: date | None
    metrics: tuple[Metric, ...]
    at: datetime

    def metric(self, name: str) -> Metric:
        """One of the metrics. Raises KeyError for another name."""
        return {metric.name: metric for metric in self.metrics}[name]


@dataclass(frozen=True)
class InProduction:
    """What is judged: the version, its release where that is known, and the AUC it promised."""

    version: str | None
    release_id: str | None = None
    promised_auc: Interval | None = None


@dataclass(frozen=True)
class Judging:
    """How it is judged: the policy, and what the settings say of labels, threshold, intervals."""

    policy: PerformancePolicy
    horizon_days: int
    threshold: float
    resampling: Resampling
    seed: int


@dataclass(frozen=True)
class Window:
    """The moments of one report. until: data time; behind: how far it is behind the clock."""

    now: datetime
    behind: timedelta
    policy: PerformancePolicy
    horizon_days: int

    @property
    def until(self) -> datetime:
        """The last midnight of data time: labels that matured before it should be there."""
        return midnight(partition_of(self.now - self.behind))

    @property
    def first(self) -> datetime:
        """Labels that matured from here on count."""
        return self.until - self.policy.window_days * _DAY

    @property
    def first_cutoff(self) -> datetime:
        """The first cutoff whose labels matured in the window."""
        return self.first + (1 - self.horizon_days) * _DAY

    @property
    def last_cutoff(self) -> datetime:
        """The last cutoff whose labels are due."""
        return self.until - self.horizon_days * _DAY


def scored_by(log: pd.DataFrame, version: str | None) -> NDArray[np.float64]:
    """P(churn) [rows] by `version`, NaN where it did not score; unrounded.

    log: rows of the table `prediction_log`. A version scores as the champion of its release, and
    while on trial as the challenger of another one. Which version a release has as which is told
    by the rows each answered.
    """
    scores = np.full(len(log), np.nan)
    for arm in ("champion", "challenger"):
        of_arm = log[log["arm"] == arm]
        version_of = dict(zip(of_arm["release_id"], of_arm["model_version"], strict=True))
        is_its = (log["release_id"].map(version_of) == version).to_numpy(dtype=np.bool_)
        given = log[arm].to_numpy(dtype=np.float64)
        # Logs without the unrounded score have the answered one.
        answered = (log["arm"] == arm).to_numpy() & np.isnan(given)
        given = np.where(answered, log["probability"].to_numpy(dtype=np.float64), given)
        scores = np.where(is_its, given, scores)
    return scores


def logged_predictions(
    lake: Lake, days: Sequence[date], version: str | None, behind: timedelta
) -> pd.DataFrame:
    """The first prediction of each customer, label cutoff and release in the partitions `days`.

    Columns: see EMPTY_LOGGED. Some days at a time, so that a customer asked about every minute is
    not in memory a thousand times. holdout: false where the log does not say.
    """
    parts = [EMPTY_LOGGED]
    for some in _some_at_a_time(lake, days):
        log = read_log(lake, some, _COLUMNS).to_pandas()
        if log.empty:
            continue
        rows = log[["request_id", "at", "customer_id", "release_id"]].copy()
        rows["cutoff"] = label_cutoffs(log, behind)
        arm = np.where(log["arm"] == "challenger", log["challenger"], log["champion"])
        rows["answered"] = pd.Series(arm, dtype="float64").fillna(log["probability"])
        rows["p"] = scored_by(log, version)
        rows["holdout"] = log["holdout"].eq(True).to_numpy(dtype=bool, na_value=False)
        rows = rows.sort_values(["at", "request_id"], kind="stable")
        parts.append(rows.drop_duplicates(["customer_id", "cutoff", "release_id"]))
    frames = [part for part in parts if len(part)]
    return pd.concat(frames, ignore_index=True) if frames else EMPTY_LOGGED


def _some_at_a_time(lake: Lake, days: Sequence[date]) -> list[list[date]]:
    """The partitions `days`, in order, those together that have few rows."""
    rows = lake.row_counts(PREDICTION_LOG, min(days), max(days)) if days else {}
    some: list[list[date]] = []
    together = 0
    for day in days:
        together += rows[day]
        if some and together <= ROWS_AT_A_TIME:
            some[-1].append(day)
        else:
            some.append([day])
            together = rows[day]
    return some


def confidence_of(p: NDArray[np.float64], threshold: float) -> NDArray[np.float64]:
    """The chance [rows] that each prediction is right, if the probabilities `p` are calibrated.

    Its mean estimates the accuracy without labels. Method: average confidence (Guillory et al.,
    Predicting with Confidence on Unseen Distributions, ICCV 2021; Garg et al., ICLR 2022), also
    called confidence-based performance estimation. It sees a shift of the customers towards harder
    ones, and is blind where the relation of features and outcome itself has changed.
    """
    return np.where(p > threshold, p, 1 - p)


def decay_of(promised: Interval, matured: Interval) -> Interval | None:
    """`promised` minus `matured`, with an interval; None when either has none.

    Method: MOVER, the variances recovered from both intervals (Zou and Donner, Construction of
    confidence limits about effect measures, Statistics in Medicine 2008). The two are of different
    customers at different times, hence independent. A promise without an interval is taken as one
    that is exact.
    """
    p, m, low, high = promised.value, matured.value, matured.low, matured.high
    if p is None or m is None or low is None or high is None:
        return None
    below = p - promised.low if promised.low is not None else 0.0
    above = promised.high - p if promised.high is not None else 0.0
    return Interval(p - m, p - m - math.hypot(below, high - m), p - m + math.hypot(above, m - low))


def judge_performance(
    lake: Lake, of: InProduction, judging: Judging, *, behind: timedelta, now: datetime
) -> PerformanceRecord:
    """How the version `of` does, by the prediction log and the labels in `lake`.

    behind: by how much data time is behind `now`, in whole days.
    """
    window = Window(now, behind, judging.policy, judging.horizon_days)
    logged = lake.days(PREDICTION_LOG)
    first = partition_of(window.first_cutoff + behind) - _DAY
    days = [day for day in logged if day >= first]
    rows = logged_predictions(lake, days, of.version, behind)
    labels, matured = matured_labels(lake, rows, judging.horizon_days)
    labelled = lake.days(LABELS)
    span = range((days[-1] - days[0]).days + 1) if days else ()
    return performance_of(
        rows,
        labels,
        matured,
        of,
        judging,
        window,
        newest_labels=labelled[-1] if labelled else None,
        first_logged=logged[0] if logged else None,
        days_not_logged=len(span) - len(days),
    )


def performance_of(
    rows: pd.DataFrame,
    labels: pd.DataFrame,
    matured: Collection[datetime],
    of: InProduction,
    judging: Judging,
    window: Window,
    *,
    newest_labels: date | None,
    first_logged: date | None,
    days_not_logged: int = 0,
) -> PerformanceRecord:
    """The report on logged predictions and labels; see `logged_predictions` and `outcomes_of`.

    Of each customer one prediction a horizon counts, so that outcomes do not share orders.
    """
    due = rows["cutoff"].between(window.first_cutoff, window.last_cutoff)
    labelled = rows["cutoff"].isin(list(matured))
    scored = rows["p"].notna()
    counted = counted_once(rows[due & scored], judging.horizon_days)
    outcomes = outcomes_of(counted, labels, matured)
    pending = counted_once(
        rows[scored & ~labelled & (rows["cutoff"] >= window.first_cutoff)], judging.horizon_days
    ).rows
    found = _Figures(outcomes.rows, judging)
    expected = confidence_of(pending["p"].to_numpy(dtype=np.float64), judging.threshold)
    about = _About(of, judging.policy, window, newest_labels, first_logged, outcomes)
    metrics = (
        about.accuracy(found),
        about.expected_accuracy(expected),
        about.expected_accuracy_error(found),
        about.matured_auc(found),
        about.matured_log_loss(found),
        about.days_without_labels(),
    )
    verdict, reason = _verdict(metrics)
    auc = found.figures.get("auc")
    return PerformanceRecord(
        verdict=verdict,
        reason=reason,
        version=of.version,
        release_id=of.release_id,
        first=window.first,
        until=window.until,
        rows=len(found.rows),
        population=found.population,
        figures=found.figures,
        everyone=found.everyone,
        holdout=found.holdout,
        promised_auc=of.promised_auc,
        decay=decay_of(of.promised_auc, auc) if of.promised_auc and auc else None,
        expected_accuracy=float(expected.mean()) if len(expected) else None,
        expected_accuracy_error=found.expected_error,
        releases=_by_release(rows, due, labels, matured, judging),
        counts={
            "predictions": counted.logged,
            "repeated": counted.repeated,
            "overlapping": counted.overlapping,
            "overdue": outcomes.waiting,
            "unlabelled": outcomes.unlabelled,
            "outcomes": len(outcomes.rows),
            "held_out": int(outcomes.rows["holdout"].sum()),
            "pending": len(pending),
            "scored_by_another_version": int((due & ~scored).sum()),
            "days_not_logged": days_not_logged,
        },
        newest_labels=newest_labels,
        metrics=metrics,
        at=window.now,
    )


class _Figures:
    """Figures of the outcomes: of all, of those held out, and of the population that is judged."""

    def __init__(self, rows: pd.DataFrame, judging: Judging) -> None:
        held = rows[rows["holdout"].astype(bool)]
        enough = len(held) >= judging.policy.min_rows
        self.population = "held out" if enough else "everyone"
        self.rows = held if enough else rows
        self.held_out = len(held)
        self.everyone = figures_of(rows, judging, "p")
        self.holdout = figures_of(held, judging, "p")
        self.figures = self.holdout if enough else self.everyone
        self.expected_error = None
        if len(self.rows) >= 2:
            p = self.rows["p"].to_numpy(dtype=np.float64)
            right = (p > judging.threshold) == self.rows["churned"].to_numpy(dtype=np.bool_)
            error = confidence_of(p, judging.threshold) - right
            self.expected_error = mean_interval(
                error,
                judging.resampling,
                seed=judging.seed,
                customers=self.rows["customer_id"].to_numpy(),
            )


def figures_of(rows: pd.DataFrame, judging: Judging, column: str) -> dict[str, Interval]:
    """FIGURES of the probabilities in `column` on `churned`; {} for fewer than 2 rows."""
    if len(rows) < 2:
        return {}
    scored = Scored(rows["churned"], rows[column], threshold=judging.threshold)
    found = intervals(
        scored,
        judging.resampling,
        seed=judging.seed,
        customers=rows["customer_id"].to_numpy(),
    )
    return {name: found[name] for name in FIGURES}


def _by_release(
    rows: pd.DataFrame,
    due: pd.Series,
    labels: pd.DataFrame,
    matured: Collection[datetime],
    judging: Judging,
) -> tuple[ReleaseLine, ...]:
    """What each release answered; the one with the newest predictions first."""
    lines = []
    newest = rows.groupby("release_id")["at"].max().sort_values(ascending=False)
    for release in newest.index[:RELEASES_KEPT]:
        its = rows[(rows["release_id"] == release) & rows["answered"].notna()]
        known = outcomes_of(
            counted_once(its[due.loc[its.index]], judging.horizon_days), labels, matured
        )
        lines.append(
            ReleaseLine(
                str(release),
                len(known.rows),
                int((~its["cutoff"].isin(list(matured))).sum()),
                figures_of(known.rows, judging, "answered"),
            )
        )
    return tuple(lines)


@dataclass(frozen=True)
class _About:
    """What the metrics of one report have in common."""

    of: InProduction
    policy: PerformancePolicy
    window: Window
    newest_labels: date | None
    first_logged: date | None
    outcomes: Outcomes

    def accuracy(self, found: _Figures) -> Metric:
        limit = self.policy.min_accuracy
        if short := self._too_few(found):
            return self._metric("accuracy", None, limit, short, len(found.rows))
        one = found.figures["accuracy"]
        said = f"{interval_text(one)} on {self._whose(found)}, at least {limit:g} is wanted"
        # Written so that a NaN alerts.
        verdict = "ok" if one.value is not None and one.value >= limit else "alert"
        return self._metric("accuracy", one.value, limit, said, len(found.rows), verdict)

    def expected_accuracy(self, expected: NDArray[np.float64]) -> Metric:
        limit, rows = self.policy.min_accuracy, len(expected)
        if rows < self.policy.min_rows:
            said = f"{rows:,} predictions wait for labels, {self.policy.min_rows:,} are needed"
            return self._metric("expected_accuracy", None, limit, said, rows)
        value = float(expected.mean())
        said = f"by their probabilities, {value:.4f} of {rows:,} predictions without labels hold"
        verdict = "ok" if value >= limit else "alert"
        return self._metric("expected_accuracy", value, limit, said, rows, verdict)

    def expected_accuracy_error(self, found: _Figures) -> Metric:
        name, limit = "expected_accuracy_error", self.policy.max_expected_accuracy_error
        error, rows = found.expected_error, len(found.rows)
        if (short := self._too_few(found)) or error is None:
            return self._metric(name, None, limit, short or "no outcome is known", rows)
        said = (
            f"expected minus realised accuracy {interval_text(error)}, at most {limit:g} either way"
        )
        known = error.low is not None and error.high is not None
        off = known and (error.low > limit or error.high < -limit)
        return self._metric(name, error.value, limit, said, rows, "alert" if off else "ok")

    def matured_auc(self, found: _Figures) -> Metric:
        promised, rows = self.of.promised_auc, len(found.rows)
        if promised is None or promised.value is None:
            said = f"what version {self.of.version} promised is not known"
            return self._metric("matured_auc", None, 0.0, said, rows)
        limit = promised.value - self.policy.max_auc_loss
        if short := self._too_few(found):
            return self._metric("matured_auc", None, limit, short, rows)
        auc = found.figures["auc"]
        decay = decay_of(promised, auc)
        if decay is None or decay.low is None:
            said = f"no AUC with an interval on {rows:,} outcomes: nearly all ended alike"
            return self._metric("matured_auc", None, limit, said, rows)
        decayed = decay.low > self.policy.max_auc_loss
        said = (
            f"{interval_text(auc)} on {self._whose(found)}; promised {promised.value:.4f}, lost "
            f"{interval_text(decay)}: {'surely' if decayed else 'not surely'} more than "
            f"{self.policy.max_auc_loss:g}"
        )
        return self._metric(
            "matured_auc", auc.value, limit, said, rows, "alert" if decayed else "ok"
        )

    def matured_log_loss(self, found: _Figures) -> Metric:
        """Held against saying the churn rate of these very outcomes to everyone."""
        rows = len(found.rows)
        rate = float(found.rows["churned"].mean()) if rows else 0.0
        without = -sum(q * math.log(q) for q in (rate, 1 - rate) if q > 0)
        if short := self._too_few(found):
            return self._metric("matured_log_loss", None, without, short, rows)
        loss = found.figures["log_loss"]
        worse = loss.low is not None and loss.low > without
        said = f"{interval_text(loss)} on {self._whose(found)}; {without:.4f} without a model"
        return self._metric(
            "matured_log_loss", loss.value, without, said, rows, "alert" if worse else "ok"
        )

    def days_without_labels(self) -> Metric:
        name, limit = "days_without_labels", float(self.policy.max_days_without_labels)
        since = self._labels_until()
        if since is None:
            return self._metric(name, None, limit, "nothing was logged and no label has come", 0)
        days = (self.window.until - since) / _DAY
        if self.newest_labels is None and days < 0:
            said = f"no label has come yet; the first are due on {since:%Y-%m-%d}"
            return self._metric(name, None, limit, said, 0)
        said = f"the newest labels matured by {since:%Y-%m-%d}"
        if self.newest_labels is None:
            said = f"no label has ever come; the first were due on {since:%Y-%m-%d}"
        verdict = "alert" if days > limit else "ok"
        return self._metric(name, max(days, 0.0), limit, said, 0, verdict)

    def _labels_until(self) -> datetime | None:
        """When labels stopped, or the first were due; None while nothing tells."""
        if self.newest_labels is not None:
            return cutoff_of(self.newest_labels)
        if self.first_logged is None:
            return None
        first = cutoff_of(self.first_logged) - self.window.behind
        return first + self.window.horizon_days * _DAY

    def _too_few(self, found: _Figures) -> str | None:
        """Why the outcomes are no evidence; None when they are."""
        if self.of.version is None:
            return "nothing is in Production"
        if len(found.rows) >= self.policy.min_rows:
            return None
        said = (
            f"{len(found.rows):,} outcomes of version {self.of.version} matured from "
            f"{self.window.first:%Y-%m-%d} to {self.window.until:%Y-%m-%d}, "
            f"{self.policy.min_rows:,} are needed"
        )
        since = self._labels_until()
        if self.outcomes.waiting and since is not None:
            return (
                f"{said}; labels of {self.outcomes.waiting:,} predictions are overdue, none has "
                f"come since {since:%Y-%m-%d}"
            )
        return said

    def _whose(self, found: _Figures) -> str:
        rows = f"{len(found.rows):,} outcomes"
        if found.population == "held out":
            return f"{rows} of customers held out from retention"
        if found.held_out:
            return f"{rows} of all customers, of whom {found.held_out:,} held out are too few"
        return f"{rows} of all customers"

    def _metric(
        self,
        name: str,
        value: float | None,
        limit: float,
        reason: str,
        rows: int,
        verdict: Verdict = "insufficient",
    ) -> Metric:
        return Metric(
            name,
            verdict,
            value,
            limit,
            reason,
            at=self.window.now,
            until=self.window.until,
            rows=rows,
            release_id=self.of.release_id,
        )


def _verdict(metrics: Sequence[Metric]) -> tuple[Verdict, str]:
    judged = [metric for metric in metrics if metric.name in ("accuracy", "matured_auc")]
    verdicts = {metric.verdict for metric in judged}
    verdict: Verdict = "ok"
    if "alert" in verdicts:
        verdict = "alert"
    elif "insufficient" in verdicts:
        verdict = "insufficient"
    told = [f"{metric.name}: {metric.reason}" for metric in judged if metric.verdict == verdict]
    return verdict, "; ".join(dict.fromkeys(told))
