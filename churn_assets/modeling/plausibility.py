"""Whether a feature knows the outcome too well to have been known before it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from churn_assets.data.checks import CheckResult
from churn_assets.modeling.metrics import auc

if TYPE_CHECKING:
    import pandas as pd

_ROWS_OF_A_CUTOFF = 500


def judge_single_features(rows: pd.DataFrame, features: Sequence[str], most: float) -> CheckResult:
    """Does no feature by itself rank the churned above the retained with an AUC above `most`?

    rows: cutoff, churned and `features`. A feature that ranks them the other way round counts as
    much. Judged on all rows together and on every cutoff that has at least 500 of them and both
    outcomes: a leak into one cutoff would drown among the others. Figures: the AUC of each feature
    on all rows, and the highest of any cutoff.

    Does not pass without features, rows, one of them or both outcomes.
    """
    absent = [name for name in (*features, "churned", "cutoff") if name not in rows.columns]
    if absent or not features or rows.empty:
        lacking = absent[0] if absent else "features" if not features else "rows"
        return CheckResult(False, f"no evidence: the training set has no {lacking}", {})
    if rows["churned"].isna().any() or rows["churned"].nunique() < 2:
        return CheckResult(False, "no evidence: there are not both outcomes to tell apart", {})
    parts = [("all rows", rows)]
    for cutoff, part in rows.groupby("cutoff"):
        if len(part) >= _ROWS_OF_A_CUTOFF and part["churned"].nunique() == 2:
            assert isinstance(cutoff, datetime)
            parts.append((f"{cutoff:%Y-%m-%d}", part))
    figures: dict[str, float | int | str] = {"max_feature_auc": most, "cutoffs": len(parts) - 1}
    suspicious = []
    for name in features:
        if rows[name].isna().any():
            return CheckResult(False, f"no evidence: {name} is not given in every row", figures)
        ranked = {where: _either_way(part[name], part["churned"]) for where, part in parts}
        where = max(ranked, key=lambda part: ranked[part])
        figures[f"auc {name}"] = round(ranked["all rows"], 4)
        figures[f"highest auc {name}"] = round(ranked[where], 4)
        if not ranked[where] <= most:
            suspicious.append(f"{name} {ranked[where]:.3f} ({where})")
    if suspicious:
        return CheckResult(
            False,
            f"an AUC above {most:g} by itself is not plausible: {', '.join(suspicious)}; look for "
            "what the feature sees of the time after the cutoff",
            figures,
        )
    highest = max(features, key=lambda name: figures[f"auc {name}"])
    reason = f"no feature alone has an AUC above {most:g}; {highest} has the highest"
    return CheckResult(True, f"{reason}, {figures[f'auc {highest}']}", figures)


def _either_way(values: pd.Series, churned: pd.Series) -> float:
    area = auc(churned.to_numpy(dtype=bool), values.to_numpy(dtype=float))
    assert area is not None, "both outcomes are there"
    return max(area, 1 - area)
