"""The labels: which customers of a cutoff's population placed no order within the horizon.

A label is stored in the partition of the day it matures (data/windows.py), so that making label
partition d needs the features of d - horizon and the orders of the horizon days up to d: it only
looks back.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import date, timedelta
from typing import TYPE_CHECKING

import ibis
import ibis.expr.types as ir

from churn_assets.data.checks import CheckResult
from churn_assets.data.lake import DAY, Lake
from churn_assets.data.windows import (
    Windows,
    cutoff_of,
    days_between,
    label_window,
    labelled_partition,
    partition_of,
)

if TYPE_CHECKING:
    from ibis.backends import BaseBackend


def churn_labels(
    orders: ir.Table, features: ir.Table, first: date, last: date, windows: Windows
) -> ir.Table:
    """The labels of the label partitions first..last.

    `orders` with their partition in `day` and `features` with `day`, customer_id and cutoff, as
    `Lake.scan` gives them (`scan_label_inputs`). Orders count by when they occurred.

    One row per row of those features: day (the label partition, date), customer_id, cutoff
    (timestamp us UTC), churned (bool).
    """
    horizon = windows.horizon_days
    first_labelled = labelled_partition(first, horizon)
    last_labelled = labelled_partition(last, horizon)

    # An order of day d keeps the customer from having churned at the feature partitions
    # [d - horizon, d). Overlapping stretches of a customer are merged: few are left to join.
    number = orders[DAY].delta(first_labelled, unit="day").cast("int32")
    ordered = orders.select("customer_id", number=number).distinct()
    by_customer = ibis.window(group_by="customer_id", order_by="number")
    gap = ordered.number - ordered.number.lag().over(by_customer)
    ordered = ordered.mutate(starts=ibis.ifelse(gap <= horizon, 0, 1))
    stretch = ordered.starts.sum().over(
        ibis.cumulative_window(group_by="customer_id", order_by="number")
    )
    ordered = ordered.mutate(stretch=stretch)
    retained = ordered.group_by("customer_id", "stretch").aggregate(
        start=ordered.number.min() - horizon, end=ordered.number.max()
    )

    population = features.filter(features[DAY].between(first_labelled, last_labelled))
    population = population.select(
        "customer_id",
        "cutoff",
        number=population[DAY].delta(first_labelled, unit="day").cast("int32"),
        label_day=population[DAY] + ibis.interval(days=horizon),
    )
    labelled = population.left_join(
        retained,
        [
            population.customer_id == retained.customer_id,
            population.number >= retained.start,
            population.number < retained.end,
        ],
    )
    return labelled.select(
        labelled.label_day.cast("date").name(DAY),
        "customer_id",
        "cutoff",
        churned=labelled.start.isnull(),
    )


def scan_label_inputs(
    lake: Lake, con: BaseBackend, first: date, last: date, windows: Windows
) -> tuple[ir.Table, ir.Table]:
    """The orders and the features that label partitions first..last need, unread.

    Raises UserError naming partitions that are missing.
    """
    horizon = windows.horizon_days
    first_labelled = labelled_partition(first, horizon)
    orders = lake.scan(con, "orders", first_labelled + timedelta(days=1), last)
    features = lake.scan(
        con, "customer_features", first_labelled, labelled_partition(last, horizon)
    )
    return orders, features


def label_window_complete(
    order_days: Collection[date], label_day: date, horizon_days: int
) -> CheckResult:
    """Whether every day the labels of `label_day` looked at was there.

    `order_days` are the partitions of orders present. Without one of them a customer who ordered
    that day counts as churned.
    """
    window = label_window(
        cutoff_of(labelled_partition(label_day, horizon_days)), horizon_days=horizon_days
    )
    first, last = partition_of(window.start), label_day
    present = set(order_days)
    missing = [day for day in days_between(first, last) if day not in present]
    figures: dict[str, float | int | str] = {
        "label_day": label_day.isoformat(),
        "window_start": window.start.isoformat(),
        "window_end": window.end.isoformat(),
        "days_needed": horizon_days,
        "days_missing": len(missing),
    }
    if missing:
        figures["first_missing"] = missing[0].isoformat()
        return CheckResult(
            False,
            f"{len(missing)} of the {horizon_days} days of orders from {first} to {last} are "
            f"missing (the first is {missing[0]}); materialize orders for them",
            figures,
        )
    return CheckResult(True, f"all {horizon_days} days from {first} to {last} are there", figures)
