"""Which logged predictions an outcome counts for, and what became of their customers.

The one place where a request meets the cutoff of its label, for trials and for the report on the
version in Production alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from churn_assets.data.lake import Lake
from churn_assets.data.windows import label_partition, partition_of_cutoff

PREDICTION_LOG = "prediction_log"
LABELS = "churn_labels"
UTC_MOMENT = "datetime64[us, UTC]"
EMPTY_LABELS = pd.DataFrame(
    {
        "customer_id": pd.Series(dtype="str"),
        "cutoff": pd.Series(dtype=UTC_MOMENT),
        "churned": pd.Series(dtype="bool"),
    }
)

_DAY = timedelta(days=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Predictions:
    """Predictions that an outcome may come to count for, in the order they count in.

    rows: at least customer_id and cutoff (of the label). repeated, overlapping: left out, because
    the customer has been counted at that cutoff, or at one less than a horizon before.
    """

    rows: pd.DataFrame
    logged: int
    repeated: int
    overlapping: int


@dataclass(frozen=True)
class Outcomes:
    """Predictions with what became of their customers: `rows` as of Predictions, with churned.

    waiting: their labels have not matured. unlabelled: matured, but the customer was not in the
    population of that cutoff.
    """

    rows: pd.DataFrame
    waiting: int
    unlabelled: int


def label_cutoffs(log: pd.DataFrame, behind: timedelta = timedelta()) -> pd.Series:
    """The cutoff [rows] of the label each logged prediction is judged by.

    log: `at` and `cutoff` of the table `prediction_log`. A prediction from stored features is
    judged by the label of their cutoff. One whose request brought its features is judged by the
    label of the first cutoff after it, the midnight that ends its day: no outcome then lies before
    the prediction. behind: by how much data time is behind the clock of the service, in whole days.
    """
    of_requests = (log["at"] - behind).dt.floor("D") + _DAY
    return log["cutoff"].fillna(of_requests).astype(UTC_MOMENT)


def counted_once(rows: pd.DataFrame, horizon_days: int) -> Predictions:
    """The predictions of `rows` that count, in the order of cutoff, `at` and request_id.

    rows: at least customer_id, cutoff, at and request_id. The first prediction of a customer at a
    cutoff counts. After one that counts, the customer does not for a horizon: windows that overlap
    would count the same orders again.
    """
    rows = rows.sort_values(["cutoff", "at", "request_id"], kind="stable", ignore_index=True)
    first = ~rows.duplicated(["customer_id", "cutoff"]).to_numpy()
    kept, until = first.copy(), {}
    customers, cutoffs = rows["customer_id"].to_list(), rows["cutoff"].astype("int64").to_list()
    horizon = horizon_days * _DAY // timedelta(microseconds=1)
    for place in np.flatnonzero(first).tolist():
        customer, cutoff = customers[place], cutoffs[place]
        if cutoff < until.get(customer, cutoff):
            kept[place] = False
        else:
            until[customer] = cutoff + horizon
    return Predictions(
        rows[kept].reset_index(drop=True),
        logged=len(rows),
        repeated=int((~first).sum()),
        overlapping=int((first & ~kept).sum()),
    )


def outcomes_of(
    predictions: Predictions, labels: pd.DataFrame, matured: Collection[datetime]
) -> Outcomes:
    """What became of the customers of `predictions`.

    labels: customer_id, cutoff and churned. matured: the cutoffs whose labels are all there.
    """
    ready = predictions.rows["cutoff"].isin(list(matured))
    known = predictions.rows[ready].merge(
        labels[["customer_id", "cutoff", "churned"]],
        on=["customer_id", "cutoff"],
        how="left",
        validate="one_to_one",
    )
    labelled = known["churned"].notna()
    rows = known[labelled].reset_index(drop=True)
    rows["churned"] = rows["churned"].astype(bool)
    return Outcomes(rows, int((~ready).sum()), int((~labelled).sum()))


def matured_labels(
    lake: Lake, predictions: pd.DataFrame, horizon_days: int
) -> tuple[pd.DataFrame, tuple[datetime, ...]]:
    """The labels `lake` has of the customers of `predictions`, and the cutoffs that have matured.

    predictions: customer_id and cutoff.
    """
    there = set(lake.days(LABELS))
    matured = {
        cutoff.to_pydatetime(): day
        for cutoff in predictions["cutoff"].unique()
        if (day := label_partition(partition_of_cutoff(cutoff), horizon_days)) in there
    }
    if not matured:
        return EMPTY_LABELS, ()
    labels = lake.read(
        LABELS,
        days=sorted(matured.values()),
        columns=list(EMPTY_LABELS.columns),
        customers=set(predictions["customer_id"]),
    ).to_pandas()
    return labels, tuple(matured)


def moments(times: Iterable[Any] | pd.Series | pd.DatetimeIndex) -> list[datetime]:
    """Moments of a frame, microseconds and UTC, as Python's."""
    micros: NDArray[np.int64] = (
        pd.Series(times).astype(UTC_MOMENT).astype("int64").to_numpy(dtype=np.int64)
    )
    return [_EPOCH + timedelta(microseconds=moment) for moment in micros.tolist()]
