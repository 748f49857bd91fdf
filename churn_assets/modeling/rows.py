"""Rows of a training set as a model sees them, by the day of their cutoff."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from churn_assets.data.windows import cutoff_of
from churn_assets.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

RECENCY = "days_since_last_order"


class Part(NamedTuple):
    """Rows as a model sees them: x float32 [rows, features], y bool [rows] (true: churned)."""

    x: NDArray[np.float32]
    y: NDArray[np.bool_]

    @property
    def both_outcomes(self) -> bool:
        """Whether some customers churned and some stayed."""
        return bool(self.y.any() and not self.y.all())


Parts = Mapping[date, Part]


def parts_of(
    frame: pd.DataFrame, days: Sequence[date], features: Sequence[str]
) -> dict[date, Part]:
    """The rows of `frame` at each cutoff of the feature `days`.

    Raises UserError for a day without rows, a label that is missing, and a missing or not finite
    feature.
    """
    return {
        day: Part(feature_matrix(rows, features), outcomes(rows))
        for day in days
        for rows in [rows_of(frame, [day])]
    }


def joined(parts: Parts, days: Sequence[date]) -> Part:
    """The rows of several days as one part."""
    chosen = [parts[day] for day in days]
    return Part(np.vstack([p.x for p in chosen]), np.concatenate([p.y for p in chosen]))


def feature_matrix(frame: pd.DataFrame, features: Sequence[str]) -> NDArray[np.float32]:
    """The rows of `frame` as the model sees them: float32 [rows, features].

    float32 from the start, because the served ONNX graph takes float32: what is trained, judged
    and served is then one and the same function. Raises UserError for a missing column or a
    value that is not finite.
    """
    missing = [name for name in features if name not in frame.columns]
    if missing:
        raise UserError(f"the training set has no column {missing[0]}; materialize it again")
    exact = frame[list(features)].to_numpy(dtype=np.float64, na_value=np.nan)
    with np.errstate(over="ignore"):
        matrix = exact.astype(np.float32)
    bad = ~np.isfinite(matrix)
    if bad.any():
        column = int(bad.any(axis=0).argmax())
        raise UserError(
            f"{int(bad[:, column].sum())} rows have no finite {features[column]}; "
            "fix the feature or quarantine the rows before training"
        )
    return matrix


def outcomes(frame: pd.DataFrame) -> NDArray[np.bool_]:
    """Who churned [rows]. Raises UserError when a label is missing."""
    if frame["churned"].isna().any():
        raise UserError("some rows of the training set have no label; materialize it again")
    return frame["churned"].to_numpy(dtype=np.bool_)


def rows_of(frame: pd.DataFrame, days: Sequence[date]) -> pd.DataFrame:
    """The rows of `frame` at the cutoffs of the feature `days`.

    Raises UserError naming the first day that has none.
    """
    import pandas as pd

    cutoffs = {pd.Timestamp(cutoff_of(day)): day for day in days}
    rows = frame[frame["cutoff"].isin(list(cutoffs))]
    present = set(rows["cutoff"].unique())
    for cutoff, day in cutoffs.items():
        if cutoff not in present:
            raise UserError(
                f"no customer was active on {day}, so there is nothing to learn from it; "
                "if the source has ended, set calendar.end to its last day"
            )
    return rows
