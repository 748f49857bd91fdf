"""How good a model is for whom: the same figures for customers of one tenure, value or activity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from churn_assets.modeling.bootstrap import Interval, Resampling, Scored, intervals

if TYPE_CHECKING:
    import pandas as pd

ACTIVITY, VALUE = "total_orders_30d", "avg_order_value"
NEW_DAYS, OLD_DAYS = 90, 365

# Of each outcome: below, an AUC is an accident.
LEAST_OF_AN_OUTCOME = 10


@dataclass(frozen=True)
class Segment:
    """The model in one segment of the held-out rows.

    by: tenure, value or activity. figures: see `bootstrap.FIGURES`. too_small: why it is not
    judged by, None when it is.
    """

    by: str
    name: str
    rows: int
    churn_rate: float
    figures: dict[str, Interval]
    too_small: str | None


def segment_masks(
    rows: pd.DataFrame, train: pd.DataFrame, tenure_days: ArrayLike | None
) -> dict[tuple[str, str], NDArray[np.bool_]]:
    """Which of the held-out `rows` are in each segment, by (what it is by, name).

    Edges come from the training rows or are round numbers, never from the rows that are judged.
    tenure_days: days since each customer first appeared [rows], where that is known.
    """
    masks: dict[tuple[str, str], NDArray[np.bool_]] = {}
    if tenure_days is not None:
        tenure = np.asarray(tenure_days, dtype=np.float64)
        masks["tenure", f"under {NEW_DAYS} days"] = tenure < NEW_DAYS
        masks["tenure", f"{NEW_DAYS} to {OLD_DAYS} days"] = (tenure >= NEW_DAYS) & (
            tenure < OLD_DAYS
        )
        masks["tenure", f"{OLD_DAYS} days or more"] = tenure >= OLD_DAYS
    if VALUE in rows.columns:
        low, high = np.quantile(train[VALUE].to_numpy(dtype=np.float64), [1 / 3, 2 / 3])
        value = rows[VALUE].to_numpy(dtype=np.float64)
        masks["value", f"average order up to {low:.2f}"] = value <= low
        masks["value", f"{low:.2f} to {high:.2f}"] = (value > low) & (value <= high)
        masks["value", f"above {high:.2f}"] = value > high
    if ACTIVITY in rows.columns:
        orders = rows[ACTIVITY].to_numpy(dtype=np.float64)
        masks["activity", "no order in 30 days"] = orders == 0
        masks["activity", "1 order in 30 days"] = orders == 1
        masks["activity", "2 orders or more"] = orders >= 2
    return masks


def judge_segments(
    masks: Mapping[tuple[str, str], NDArray[np.bool_]],
    y: ArrayLike,
    p: ArrayLike,
    resampling: Resampling,
    *,
    threshold: float,
    least_rows: int,
    seed: int,
) -> tuple[Segment, ...]:
    """The figures of outcomes `y` and probabilities `p` [rows] in every segment that has rows."""
    truth, probability = np.asarray(y, dtype=np.bool_), np.asarray(p, dtype=np.float64)
    found = []
    for (by, name), mask in masks.items():
        rows, churned = int(mask.sum()), int(truth[mask].sum())
        if not rows:
            continue
        rarer = min(churned, rows - churned)
        too_small = None
        if rows < least_rows:
            too_small = f"{rows} rows, fewer than {least_rows}"
        elif rarer < LEAST_OF_AN_OUTCOME:
            which = "churned" if churned == rarer else "stayed"
            too_small = f"{rarer} customers {which}, fewer than {LEAST_OF_AN_OUTCOME}"
        scored = Scored(truth[mask], probability[mask], threshold=threshold)
        figures = intervals(scored, resampling, seed=seed)
        found.append(Segment(by, name, rows, churned / rows, figures, too_small))
    return tuple(found)


def lowest_auc(segments: Sequence[Segment]) -> tuple[float, Segment] | None:
    """The lowest AUC of a segment that is large enough to judge by, if there is one."""
    judged = [
        (value, segment)
        for segment in segments
        if segment.too_small is None and (value := segment.figures["auc"].value) is not None
    ]
    return min(judged, key=lambda found: found[0]) if judged else None
