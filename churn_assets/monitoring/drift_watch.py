"""The daily look at drift: what the service was asked, against what its model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Literal

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa

from churn_assets.data.lake import Lake
from churn_assets.data.prediction_log import PREDICTION_LOG, SCHEMA
from churn_assets.data.windows import cutoff_of, days_between, midnight, partition_of
from churn_assets.errors import UserError
from churn_assets.modeling.onnx_export import ModelFails
from churn_assets.monitoring.drift import (
    CUSTOMER,
    DriftPolicy,
    DriftReport,
    FeatureDrift,
    PredictionShift,
    Verdict,
    drift_report,
    prediction_shift,
)
from churn_assets.monitoring.metric import Metric
from churn_assets.monitoring.metric import Verdict as MetricVerdict
from churn_assets.monitoring.reference import Reference

Source = Literal["requests", "customers", "none"]

FEATURES_TABLE = "customer_features"


class DriftRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The drift of the days [first, last], and of which version it is.

    source: whether the rows compared are the logged requests of these days, by operational time;
    or the customers' features, by data time, while there are too few requests; or nothing, while
    nothing is in Production. requests: what is to be said of the requests. reference: the hash of
    the training set. reference_drift: the features that drift between the oldest and the newest
    training cutoff, with their statistics. days_missing: days of the window without a request,
    after the first there was. future_rows: requests logged later than now, which were left out.
    """

    verdict: Verdict
    reason: str
    source: Source
    requests: str
    version: str | None
    release_id: str | None
    reference: str | None
    first: date
    last: date
    until: datetime
    at: datetime
    rows: int
    customers: int
    features: tuple[FeatureDrift, ...]
    prediction: PredictionShift
    reference_drift: dict[str, float]
    reference_reason: str
    days_missing: tuple[date, ...]
    future_rows: int
    page: str = ""

    @property
    def statistics(self) -> dict[str, float | None]:
        """The KS statistic of each feature."""
        return {f.feature: f.statistic for f in self.features}

    @property
    def drifted(self) -> tuple[str, ...]:
        """The features that alert."""
        return tuple(f.feature for f in self.features if f.alert)

    @property
    def constant(self) -> tuple[str, ...]:
        """The features with one value only: the data's fault, most likely, not the world's."""
        return tuple(f.feature for f in self.features if f.finding == "constant")

    @property
    def all_missing(self) -> tuple[str, ...]:
        """The features without a value: the data's fault, most likely."""
        return tuple(f.feature for f in self.features if f.finding == "all missing")

    @property
    def steady(self) -> bool:
        """Whether every feature was judged, none drifts, and nothing looks like a fault."""
        return self.verdict == "ok" and not self.constant and not self.all_missing

    def metrics(self) -> list[Metric]:
        """The metrics of the record: `ks/<feature>` and `prediction_shift`."""
        of = "logged requests" if self.source == "requests" else "customers' features, no requests"
        release = self.release_id if self.source == "requests" else None

        def metric(
            name: str, verdict: Verdict, value: float | None, limit: float, reason: str, rows: int
        ) -> Metric:
            said: MetricVerdict = "alert" if verdict == "drift" else verdict
            kept = None if said == "insufficient" else value
            return Metric(
                name, said, kept, limit, f"{reason} ({of})", self.at, self.until, rows, release
            )

        if self.source == "none":
            return []
        shift = self.prediction
        return [
            *(
                metric(f"ks/{f.feature}", f.verdict, f.statistic, f.limit, f.reason, f.current_rows)
                for f in self.features
            ),
            metric(
                "prediction_shift",
                shift.verdict,
                None if shift.shift is None else abs(shift.shift),
                shift.limit,
                shift.reason,
                shift.rows,
            ),
        ]


@dataclass(frozen=True)
class Window:
    """Rows of the days [first, last]: customer_id and features, and of a log also the answers.

    until: the end of the window, in the time the rows are of.
    """

    first: date
    last: date
    until: datetime
    rows: pd.DataFrame
    days_missing: tuple[date, ...] = ()
    future_rows: int = 0

    @property
    def customers(self) -> int:
        """How many different customers the rows are of."""
        return int(self.rows[CUSTOMER].nunique()) if len(self.rows) else 0


@dataclass(frozen=True)
class Watched:
    """The record of a look at drift, and what its page is drawn from."""

    record: DriftRecord
    report: DriftReport
    reference: pd.DataFrame = field(repr=False)
    current: pd.DataFrame = field(repr=False)


def logged_window(lake: Lake, features: Sequence[str], days: int, now: datetime) -> Window:
    """The requests of the last `days` complete days before `now`, whatever answered them.

    A day without rows is missing when the log had some before. What was logged after `now`, before
    a clock was set back, is counted and left out.
    """
    today = partition_of(now)
    first, last = today - timedelta(days=days), today - timedelta(days=1)
    there = lake.days(PREDICTION_LOG)
    wanted = [name for name in SCHEMA.names if name in _LOGGED or name in features]
    tables = [SCHEMA.empty_table().select(wanted)]
    for day in (day for day in there if first <= day <= last):
        # What was written before the contract had a feature has no column for it.
        stored = lake.read(PREDICTION_LOG, days=[day])
        tables.append(stored.select([name for name in wanted if name in stored.column_names]))
    rows = pa.concat_tables(tables, promote_options="default").to_pandas()
    later = [day for day in there if day > today]
    future = sum(lake.row_counts(PREDICTION_LOG, later[0], later[-1]).values()) if later else 0
    if today in there:
        at = lake.read(PREDICTION_LOG, days=[today], columns=["at"]).to_pandas()["at"]
        future += int((at > now).sum())
    missing = [
        day for day in days_between(first, last) if there and there[0] < day and day not in there
    ]
    return Window(first, last, midnight(today), rows, tuple(missing), future)


_LOGGED = ("customer_id", "at", "probability", "model_version")


def customers_window(lake: Lake, days: int) -> Window:
    """The features of the last `days` days of data time. Raises UserError when there are none."""
    there = lake.days(FEATURES_TABLE)
    if not there:
        raise UserError(
            f"there is no partition of {FEATURES_TABLE} yet; materialize {FEATURES_TABLE} first"
        )
    last = there[-1]
    first = last - timedelta(days=days - 1)
    rows = lake.read(FEATURES_TABLE, first, last, strict=False).to_pandas()
    return Window(first, last, cutoff_of(last), rows)


def watch(lake: Lake, reference: Reference | None, policy: DriftPolicy, now: datetime) -> Watched:
    """The drift there is now: of the logged requests, or of all customers while those are too few.

    Without a reference nothing can be said, and the verdict is insufficient. Raises UserError when
    there are neither requests nor features.
    """
    if reference is None:
        return _nothing(logged_window(lake, (), policy.window_days, now), policy, now)
    logged = logged_window(lake, reference.features, policy.window_days, now)
    requests = _requests(logged, policy)
    source: Source = "requests" if requests is None else "customers"
    window = logged if requests is None else customers_window(lake, policy.window_days)
    report = drift_report(reference.rows, window.rows, reference.features, policy)
    moved = reference.drift(policy)
    unsteady = {f.feature: f.statistic or 0.0 for f in moved.features if f.alert} if moved else {}
    notes = [requests] if requests else []
    if logged.days_missing:
        days = ", ".join(map(str, logged.days_missing))
        notes.append(f"no request was logged on {days}")
    if logged.future_rows:
        notes.append(f"{logged.future_rows:,} requests logged later than now are left out")
    if unsteady:
        notes.append(f"the training rows drift themselves: {', '.join(unsteady)}")
    record = DriftRecord(
        verdict=report.verdict,
        reason="; ".join([report.reason, *notes]),
        source=source,
        requests=requests or f"{len(logged.rows):,} requests of {logged.customers:,} customers",
        version=reference.version,
        release_id=reference.release_id,
        reference=reference.data_hash,
        first=window.first,
        last=window.last,
        until=window.until,
        at=now,
        rows=len(window.rows),
        customers=window.customers,
        features=report.features,
        prediction=_shift(reference, window, source, policy),
        reference_drift=unsteady,
        reference_reason=moved.reason if moved else "the model was trained on one cutoff",
        days_missing=logged.days_missing,
        future_rows=logged.future_rows,
    )
    return Watched(record, report, reference.rows, window.rows)


def _nothing(logged: Window, policy: DriftPolicy, now: datetime) -> Watched:
    reason = "no version is in Production, so there is nothing to compare with"
    record = DriftRecord(
        verdict="insufficient",
        reason=reason,
        source="none",
        requests=_requests(logged, policy) or f"{len(logged.rows):,} requests were logged",
        version=None,
        release_id=None,
        reference=None,
        first=logged.first,
        last=logged.last,
        until=logged.until,
        at=now,
        rows=0,
        customers=0,
        features=(),
        prediction=_untold(reason, policy),
        reference_drift={},
        reference_reason=reason,
        days_missing=logged.days_missing,
        future_rows=logged.future_rows,
    )
    report = DriftReport("insufficient", reason, (), policy)
    return Watched(record, report, pd.DataFrame(), pd.DataFrame())


def _requests(logged: Window, policy: DriftPolicy) -> str | None:
    """Why the requests are too few to be judged; None when they are enough."""
    if len(logged.rows) >= policy.min_rows and logged.customers >= policy.min_customers:
        return None
    return (
        f"requests insufficient: {len(logged.rows):,} of {logged.customers:,} customers in the "
        f"{policy.window_days} days up to {logged.last}, and it takes {policy.min_rows:,} of "
        f"{policy.min_customers:,}"
    )


def _shift(
    reference: Reference, window: Window, source: Source, policy: DriftPolicy
) -> PredictionShift:
    """The answers of the version in Production, or what it would answer, against its training."""
    if reference.onnx is None:
        return _untold(reference.problem or "the released model cannot be had", policy)
    try:
        then, known = reference.predictions(reference.rows)
        of_then = reference.rows[CUSTOMER].to_numpy()[known]
        if source == "requests":
            answered = window.rows[window.rows["model_version"] == reference.version]
            now, of_now = answered["probability"].to_numpy(), answered[CUSTOMER].to_numpy()
        else:
            now, known = reference.predictions(window.rows)
            of_now = window.rows[CUSTOMER].to_numpy()[known]
    except ModelFails as error:
        return _untold(f"version {reference.version}: {error}", policy)
    comparisons = len(reference.features) + 1
    return prediction_shift((then, of_then), (np.asarray(now), of_now), policy, comparisons)


def _untold(reason: str, policy: DriftPolicy) -> PredictionShift:
    return PredictionShift(
        "insufficient", None, None, None, None, 0, 0, reason, policy.prediction_shift
    )
