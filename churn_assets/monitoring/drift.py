"""Has the world moved away from what the model was trained on? Feature by feature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from churn_assets.errors import UserError
from churn_assets.monitoring.ks import ks_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    Rows = pd.DataFrame | pa.Table | Mapping[str, ArrayLike]

Verdict = Literal["ok", "drift", "insufficient"]
Severity = Literal["none", "minor", "major"]
Finding = Literal["constant", "all missing"]

CUSTOMER = "customer_id"


@dataclass(frozen=True)
class DriftPolicy:
    """When a feature has drifted, by the Kolmogorov-Smirnov statistic D (0 to 1).

    Severity is none below `minor_from`, minor below `major_from`, major from there on. A feature
    alerts when D > `alert_above` and chance cannot be the reason. It is never judged by the p-value
    alone: with many rows every harmless difference is "significant".
    prediction_shift: the mean prediction may be so far from that on the training rows.
    window_days: how many days are compared. min_rows, min_customers: fewer of either on either side
    are too few to say anything.
    false_alarm_rate: with what probability, at most, chance alone raises an alert in
    `false_alarm_days` daily reports, all features and the predictions together. One comparison
    may then be chance with this rate divided by all of them (Bonferroni, which holds however they
    depend on each other, as those of overlapping windows do). Where D is above the limit and chance
    is not ruled out, the feature is insufficient.
    report_rows: rows of each side drawn for Evidently's report. workspace_runs: how many reports
    Evidently's workspace keeps. draw: whether Evidently draws each report, those with drift or
    none.
    """

    alert_above: float = 0.15
    minor_from: float = 0.1
    major_from: float = 0.2
    prediction_shift: float = 0.1
    window_days: int = 7
    min_rows: int = 500
    min_customers: int = 200
    false_alarm_rate: float = 0.01
    false_alarm_days: int = 30
    report_rows: int = 5000
    workspace_runs: int = 60
    draw: Literal["always", "on_drift", "never"] = "always"

    def __post_init__(self) -> None:
        if self.draw not in ("always", "on_drift", "never"):
            raise UserError(f"drift.draw is {self.draw!r}; set always, on_drift or never")
        for name in (
            "alert_above",
            "minor_from",
            "major_from",
            "prediction_shift",
            "false_alarm_rate",
        ):
            limit = getattr(self, name)
            if not (math.isfinite(limit) and 0 < limit < 1):
                raise UserError(f"drift.{name} is {limit}; set a number between 0 and 1")
        if self.minor_from >= self.major_from:
            raise UserError(
                f"drift.minor_from {self.minor_from} is not below drift.major_from "
                f"{self.major_from}; swap or change them"
            )
        for name in ("min_rows", "min_customers", "report_rows"):
            if getattr(self, name) < 2:
                raise UserError(f"drift.{name} is {getattr(self, name)}; set at least 2")
        for name in ("window_days", "false_alarm_days", "workspace_runs"):
            if getattr(self, name) < 1:
                raise UserError(f"drift.{name} is {getattr(self, name)}; set at least 1")

    def chance_allowed(self, comparisons: int) -> float:
        """The p-value below which chance is ruled out, for one of a report's `comparisons`."""
        return self.false_alarm_rate / (max(1, comparisons) * self.false_alarm_days)


class Sizes(NamedTuple):
    """How many rows, of how many customers, and how many independent ones they are worth."""

    rows: int
    customers: int
    effective: float


@dataclass(frozen=True)
class FeatureDrift:
    """One feature, then and now.

    statistic: two-sample Kolmogorov-Smirnov D of the rows that have a finite value, None when there
    are too few; it is `error_bound` too small at most. p_value: of that D, for as many independent
    rows as the rows are worth. The counts are of rows with a finite value and their customers, the
    missing figures count the rest. limit: of the statistic. finding: what looks like a fault of the
    data: every value is missing, or all are the same, which by the reference rows is no chance.
    """

    feature: str
    verdict: Verdict
    statistic: float | None
    p_value: float | None
    severity: Severity | None
    alert: bool
    reference_rows: int
    current_rows: int
    reference_missing: int
    current_missing: int
    reference_mean: float | None
    current_mean: float | None
    reason: str
    limit: float
    reference_customers: int = 0
    current_customers: int = 0
    error_bound: float = 0.0
    finding: Finding | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures in JSON's types."""
        return asdict(self)


@dataclass(frozen=True)
class DriftReport:
    """Every feature, and one verdict: drift if any feature alerts, ok only if all were judged."""

    verdict: Verdict
    reason: str
    features: tuple[FeatureDrift, ...]
    policy: DriftPolicy

    @property
    def drifted(self) -> tuple[str, ...]:
        """The features that alert."""
        return tuple(f.feature for f in self.features if f.alert)

    @property
    def insufficient(self) -> tuple[str, ...]:
        """The features that could not be judged."""
        return tuple(f.feature for f in self.features if f.verdict == "insufficient")

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON's types."""
        return {**asdict(self), "drifted": list(self.drifted)}


@dataclass(frozen=True)
class PredictionShift:
    """How far the mean prediction is from that on the training rows.

    shift: now minus then, None when there is too little to tell. p_value: two-sided, of that shift.
    limit: of its size. rows, customers: of the predictions now.
    """

    verdict: Verdict
    shift: float | None
    p_value: float | None
    reference_mean: float | None
    current_mean: float | None
    rows: int
    customers: int
    reason: str
    limit: float

    @property
    def alert(self) -> bool:
        """Whether the predictions have moved further than they may."""
        return self.verdict == "drift"


def ks_statistic(reference: ArrayLike, current: ArrayLike) -> tuple[float, float]:
    """Two-sample Kolmogorov-Smirnov statistic and the p-value of independent rows (asymptotic).

    The statistic is exact to 50,000 rows a side, and within 5e-4 beyond. Source of the p-value:
    Hodges, The significance probability of the Smirnov two-sample test (1958), as in
    `scipy.stats.ks_2samp(method="asymp")`. Raises ValueError for a value that is not finite, and
    for a sample without any.
    """
    then, now = np.asarray(reference), np.asarray(current)
    statistic = _rounded(ks_of(then, now).statistic)
    return statistic, ks_p_value(statistic, len(then), len(now))


def ks_p_value(statistic: float, reference: float, current: float) -> float:
    """P(D >= `statistic`) for two samples worth so many independent rows of one distribution."""
    from scipy.stats import kstwo

    together = max(1, round(reference * current / (reference + current)))
    return float(np.clip(kstwo.sf(statistic, together), 0.0, 1.0))


def sizes_of(customers: NDArray[np.int64] | None, rows: int) -> Sizes:
    """What `rows` rows are worth, by the numbers of their customers [rows]; None: one row each.

    Rows of one customer say the same thing again, at worst. The variance of a mean over n rows, k
    of each customer, is then that over (sum k)^2 / sum k^2 independent ones: the effective sample
    size of Kish (Survey Sampling, 1965). It is the number of customers when each has as many rows,
    and less when a few have most of them.
    """
    if customers is None or not rows:
        return Sizes(rows, rows, float(rows))
    each = np.bincount(customers).astype(np.float64)
    return Sizes(rows, int((each > 0).sum()), float(each.sum() ** 2 / (each**2).sum()))


def drift_report(
    reference: Rows,
    current: Rows,
    features: Sequence[str],
    policy: DriftPolicy | None = None,
) -> DriftReport:
    """Compare each of `features` between `reference` rows (training) and `current` rows.

    Both are tables with a column for each feature: a pandas DataFrame, a pyarrow Table or a
    mapping of arrays. Where they have a column customer_id, the rows of one customer count as one
    when chance is judged. Missing values are left out and counted. A feature that one side does not
    have, or has too few values of, is insufficient, never ok.
    """
    policy = policy or DriftPolicy()
    # The predictions are one more comparison of the same report.
    allowed = policy.chance_allowed(len(features) + 1)
    then, now = _customers(reference), _customers(current)
    judged = tuple(
        _judge(name, (reference, then), (current, now), policy, allowed) for name in features
    )
    drifted = [f for f in judged if f.alert]
    unjudged = [f for f in judged if f.verdict == "insufficient"]
    verdict: Verdict
    if drifted:
        verdict = "drift"
        reason = "; ".join(f"{f.feature}: {f.reason}" for f in drifted)
    elif unjudged or not judged:
        verdict = "insufficient"
        reason = "; ".join(f"{f.feature}: {f.reason}" for f in unjudged) or "no features to compare"
    else:
        verdict = "ok"
        worst = max(judged, key=lambda f: f.statistic or 0.0)
        reason = (
            f"no feature above {policy.alert_above:g}; "
            f"the largest is {worst.feature} at {worst.statistic:.3f}"
        )
    return DriftReport(verdict, reason, judged, policy)


def prediction_shift(
    reference: tuple[ArrayLike, ArrayLike | None],
    current: tuple[ArrayLike, ArrayLike | None],
    policy: DriftPolicy,
    comparisons: int,
) -> PredictionShift:
    """The mean of `current` predictions against that of the `reference` ones, each with customers.

    It alerts when it is further away than `policy.prediction_shift` and chance is ruled out: by the
    two-sample z-test (Welch's, at sizes where t is normal) with Kish's effective sample sizes, as
    one of the report's `comparisons`.
    """
    sides = [(np.asarray(values, np.float64), _codes(of)) for values, of in (reference, current)]
    (then, _), (now, _) = sides
    sizes = [sizes_of(codes, len(values)) for values, codes in sides]
    means = [float(values.mean()) if len(values) else None for values, _ in sides]
    short = _too_few("reference", "predictions", sizes[0], policy) or _too_few(
        "current", "predictions", sizes[1], policy
    )

    def told(
        verdict: Verdict, reason: str, shift: float | None = None, p_value: float | None = None
    ) -> PredictionShift:
        return PredictionShift(
            verdict=verdict,
            shift=shift,
            p_value=p_value,
            reference_mean=means[0],
            current_mean=means[1],
            rows=sizes[1].rows,
            customers=sizes[1].customers,
            reason=reason,
            limit=policy.prediction_shift,
        )

    if short:
        return told("insufficient", short)
    shift = _rounded(float(now.mean() - then.mean()))
    error = math.sqrt(
        float(then.var()) / sizes[0].effective + float(now.var()) / sizes[1].effective
    )
    p_value = math.erfc(abs(shift) / error / math.sqrt(2)) if error else float(not shift)
    what = f"the mean prediction is {means[1]:.3f}, on the training rows {means[0]:.3f}"
    if abs(shift) <= policy.prediction_shift:
        return told("ok", f"{what}; {policy.prediction_shift:g} apart are allowed", shift, p_value)
    allowed = policy.chance_allowed(comparisons)
    if p_value > allowed:
        return told("insufficient", f"{what}, {_by_chance(sizes[1], p_value)}", shift, p_value)
    return told("drift", f"{what}: above {policy.prediction_shift:g} apart", shift, p_value)


def severity_of(statistic: float, policy: DriftPolicy) -> Severity:
    """The severity of a statistic; a value on a limit belongs to the severer side."""
    if statistic >= policy.major_from:
        return "major"
    return "minor" if statistic >= policy.minor_from else "none"


def finite_values(rows: Rows, feature: str) -> tuple[NDArray[np.float64] | None, int]:
    """The finite values of a column and how many are missing; None when there is no column."""
    values, finite = _column(rows, feature)
    if values is None:
        return None, 0
    return values[finite], len(values) - int(finite.sum())


def _column(
    rows: Rows, feature: str
) -> tuple[NDArray[np.float64], NDArray[np.bool_]] | tuple[None, NDArray[np.bool_]]:
    """The values of a column and which of them are finite."""
    if not _has(rows, feature):
        return None, np.zeros(0, np.bool_)
    values = np.asarray(cast("Any", rows)[feature], dtype=np.float64)
    return values, np.isfinite(values)


def _has(rows: Rows, column: str) -> bool:
    names = getattr(rows, "column_names", None)
    return column in (list(rows) if names is None else names)


def _customers(rows: Rows) -> NDArray[np.int64] | None:
    """Whose each row is, as numbers from 0; None where the rows do not say."""
    return _codes(cast("Any", rows)[CUSTOMER]) if _has(rows, CUSTOMER) else None


def _codes(customers: Any) -> NDArray[np.int64] | None:
    import pandas as pd

    if customers is None:
        return None
    return pd.factorize(np.asarray(customers, dtype=object))[0].astype(np.int64)


def _judge(
    feature: str,
    reference: tuple[Rows, NDArray[np.int64] | None],
    current: tuple[Rows, NDArray[np.int64] | None],
    policy: DriftPolicy,
    allowed: float,
) -> FeatureDrift:
    sides = []
    for rows, customers in (reference, current):
        values, finite = _column(rows, feature)
        kept = None if values is None else values[finite]
        of = None if customers is None or values is None else customers[finite]
        sides.append((kept, sizes_of(of, 0 if kept is None else len(kept)), int((~finite).sum())))
    (then, then_size, then_missing), (now, now_size, now_missing) = sides
    finding: Finding | None = None
    statistic = p_value = severity = None
    bound, alert = 0.0, False
    verdict: Verdict = "insufficient"
    if then is None or now is None:
        reason = f"the {'reference' if then is None else 'current'} rows do not have it"
    elif now_missing >= policy.min_rows and not len(now) and len(then):
        finding = "all missing"
        reason = f"all {now_missing:,} values are missing: a fault of the data, most likely"
    elif short := _too_few("reference", "values", then_size, policy) or _too_few(
        "current", "values", now_size, policy
    ):
        reason = short
    else:
        found = ks_of(then, now)
        statistic, bound = _rounded(found.statistic), found.error_bound
        p_value = ks_p_value(statistic, then_size.effective, now_size.effective)
        severity = severity_of(statistic, policy)
        above = statistic > policy.alert_above
        alert = above and p_value <= allowed
        verdict = "drift" if alert else "insufficient" if above else "ok"
        relation = "above" if above else "not above"
        reason = f"KS {statistic:.3f} is {relation} {policy.alert_above:g}"
        if above and not alert:
            reason += f", {_by_chance(now_size, p_value)}"
        if now.min() == now.max() and (then == now[0]).mean() ** now_size.effective <= allowed:
            finding = "constant"
            reason += f"; all {len(now):,} values are {now[0]:g}: a fault of the data, most likely"
    return FeatureDrift(
        feature=feature,
        verdict=verdict,
        statistic=statistic,
        p_value=p_value,
        severity=severity,
        alert=alert,
        reference_rows=then_size.rows,
        current_rows=now_size.rows,
        reference_missing=then_missing,
        current_missing=now_missing,
        reference_mean=_mean(then),
        current_mean=_mean(now),
        reason=reason,
        limit=policy.alert_above,
        reference_customers=then_size.customers,
        current_customers=now_size.customers,
        error_bound=bound,
        finding=finding,
    )


def _too_few(side: str, what: str, size: Sizes, policy: DriftPolicy) -> str | None:
    if size.rows < policy.min_rows:
        return f"{size.rows} {side} {what}, at least {policy.min_rows} are needed"
    if size.customers < policy.min_customers:
        return (
            f"{side} {what} of {size.customers} customers, at least {policy.min_customers} are "
            "needed"
        )
    return None


def _by_chance(size: Sizes, p_value: float) -> str:
    return (
        f"which chance is not ruled out for: {size.rows:,} rows of {size.customers:,} customers "
        f"(p {p_value:.2g})"
    )


def _rounded(figure: float) -> float:
    """Shares are fractions; without rounding one of exactly 0.15 comes out a little above it."""
    return round(figure, 12)


def _mean(values: NDArray[np.float64] | None) -> float | None:
    return float(values.mean()) if values is not None and len(values) else None
