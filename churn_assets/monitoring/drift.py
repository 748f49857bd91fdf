"""Has the world moved away from what the model was trained on? Feature by feature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from churn_assets.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    Rows = pd.DataFrame | pa.Table | Mapping[str, ArrayLike]

Verdict = Literal["ok", "drift", "insufficient"]
Severity = Literal["none", "minor", "major"]


@dataclass(frozen=True)
class DriftPolicy:
    """When a feature has drifted, by the Kolmogorov-Smirnov statistic D (0 to 1).

    Severity is none below `minor_from`, minor below `major_from`, major from there on. A feature
    alerts when D > `alert_above`. It is judged by D, the largest gap between the two cumulative
    distributions, and never by the p-value: with many rows every harmless difference is
    "significant".
    min_rows: fewer rows than this on either side are too few to say anything. At the default,
    chance alone lifts D above 0.15 once in 38,000 comparisons, since for equal distributions
    P(D > d) is at most about 2 exp(-2 d^2 n m / (n + m)); at 100 rows it would be one in 5.
    report_rows: rows of each side drawn for Evidently's report.
    """

    alert_above: float = 0.15
    minor_from: float = 0.1
    major_from: float = 0.2
    min_rows: int = 500
    report_rows: int = 5000

    def __post_init__(self) -> None:
        for name in ("alert_above", "minor_from", "major_from"):
            limit = getattr(self, name)
            if not (math.isfinite(limit) and 0 < limit < 1):
                raise UserError(f"drift.{name} is {limit}; set a number between 0 and 1")
        if self.minor_from >= self.major_from:
            raise UserError(
                f"drift.minor_from {self.minor_from} is not below drift.major_from "
                f"{self.major_from}; swap or change them"
            )
        for name in ("min_rows", "report_rows"):
            if getattr(self, name) < 2:
                raise UserError(f"drift.{name} is {getattr(self, name)}; set at least 2")


@dataclass(frozen=True)
class FeatureDrift:
    """One feature, then and now.

    statistic, p_value: two-sample Kolmogorov-Smirnov, of the rows that have a finite value; None
    when insufficient. reference_rows and current_rows count those, the missing figures the rest.
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


def ks_statistic(reference: ArrayLike, current: ArrayLike) -> tuple[float, float]:
    """Two-sample Kolmogorov-Smirnov statistic (exact) and p-value (asymptotic).

    Source: Hodges, The significance probability of the Smirnov two-sample test (1958), as in
    `scipy.stats.ks_2samp`. Both samples need at least two values, all finite.
    """
    from scipy.stats import ks_2samp

    result = cast("Any", ks_2samp(reference, current, method="asymp"))
    # A statistic is a fraction; without rounding one of exactly 0.15 comes out a little above it.
    return round(float(result.statistic), 12), float(result.pvalue)


def drift_report(
    reference: Rows,
    current: Rows,
    features: Sequence[str],
    policy: DriftPolicy | None = None,
) -> DriftReport:
    """Compare each of `features` between `reference` rows (training) and `current` rows.

    Both are tables with a column for each feature: a pandas DataFrame, a pyarrow Table or a
    mapping of arrays. Missing values are left out and counted. A feature that one side does not
    have, or has too few values of, is insufficient, never ok.
    """
    policy = policy or DriftPolicy()
    judged = tuple(_judge(name, reference, current, policy) for name in features)
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


def severity_of(statistic: float, policy: DriftPolicy) -> Severity:
    """The severity of a statistic; a value on a limit belongs to the severer side."""
    if statistic >= policy.major_from:
        return "major"
    return "minor" if statistic >= policy.minor_from else "none"


def finite_values(rows: Rows, feature: str) -> tuple[NDArray[np.float64] | None, int]:
    """The finite values of a column and how many are missing; None when there is no column."""
    names = getattr(rows, "column_names", None)
    if feature not in (list(rows) if names is None else names):
        return None, 0
    column = cast("Any", rows)[feature]
    values = np.asarray(column, dtype=np.float64)
    finite = values[np.isfinite(values)]
    return finite, len(values) - len(finite)


def _judge(feature: str, reference: Rows, current: Rows, policy: DriftPolicy) -> FeatureDrift:
    then, then_missing = finite_values(reference, feature)
    now, now_missing = finite_values(current, feature)
    short = _too_few("reference", then, policy) or _too_few("current", now, policy)
    statistic = p_value = severity = None
    alert = False
    verdict: Verdict = "insufficient"
    reason = short
    if short is None and then is not None and now is not None:
        statistic, p_value = ks_statistic(then, now)
        severity, alert = severity_of(statistic, policy), statistic > policy.alert_above
        verdict = "drift" if alert else "ok"
        relation = "above" if alert else "not above"
        reason = f"KS {statistic:.3f} is {relation} {policy.alert_above:g}"
    return FeatureDrift(
        feature=feature,
        verdict=verdict,
        statistic=statistic,
        p_value=p_value,
        severity=severity,
        alert=alert,
        reference_rows=0 if then is None else len(then),
        current_rows=0 if now is None else len(now),
        reference_missing=then_missing,
        current_missing=now_missing,
        reference_mean=_mean(then),
        current_mean=_mean(now),
        reason=reason or "",
    )


def _too_few(side: str, values: NDArray[np.float64] | None, policy: DriftPolicy) -> str | None:
    if values is None:
        return f"the {side} rows do not have it"
    if len(values) < policy.min_rows:
        return f"{len(values)} {side} values, at least {policy.min_rows} are needed"
    return None


def _mean(values: NDArray[np.float64] | None) -> float | None:
    return float(values.mean()) if values is not None and len(values) else None
