"""What a check finds, and the check that no feature saw past its cutoff."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from churn_assets.contract.features import FEATURES
from churn_assets.data.tables import TIMESTAMP
from churn_assets.data.windows import Interval, Windows, look_back

MAX_CUSTOMERS = 20_000
"""How many customers of a cutoff are compared, at most."""

_MICROSECONDS_A_DAY = 86_400_000_000
_LOOK_BACK = {feature.name: feature.window_days for feature in FEATURES}


@dataclass(frozen=True)
class CheckResult:
    """The outcome of a check: whether it passed, why, and the figures it looked at."""

    passed: bool
    reason: str
    figures: dict[str, float | int | str] = field(default_factory=dict)


def no_event_after_cutoff(
    features: pa.Table,
    tables: Mapping[str, pa.Table],
    windows: Windows,
    *,
    cutoff: datetime | None = None,
    max_customers: int = MAX_CUSTOMERS,
) -> CheckResult:
    """Whether the features of one cutoff are those of the events before it, and nothing else.

    Recomputes population and features from the raw events with occurred_at inside the look-back
    and known by the cutoff, by direct filters that share nothing with data/features.py, and
    compares exactly. An event at or after the cutoff that was counted, or one before it that was
    not, shows as a difference.

    features: customer_id, cutoff, then features, of one cutoff (`cutoff` says which when there
    are no rows). tables: raw events of the look-back and of at least a day after the cutoff, where
    there are any: a leak shows on customers who did something then, so with more than
    `max_customers` of them these are looked at first.
    """
    cutoffs = pc.call_function("unique", [features["cutoff"]]).to_pylist()
    if cutoff is None and len(cutoffs) == 1:
        cutoff = cutoffs[0]
    if cutoff is None or any(found != cutoff for found in cutoffs):
        return CheckResult(
            False,
            f"the features are of {len(cutoffs)} cutoffs, not of one",
            {"cutoffs": len(cutoffs)},
        )
    names = [name for name in features.column_names if name in _LOOK_BACK]
    known = {name: events.filter(_known_by(events, cutoff)) for name, events in tables.items()}
    population = _customers(_within(known["orders"], look_back(cutoff, windows.activity_days)))
    present = _customers(features)
    later = {name: events.filter(_at_or_after(events, cutoff)) for name, events in tables.items()}
    active = set().union(*(_customers(events) for events in later.values()))
    chosen = choose_customers(population | present, active, max_customers)

    missing = sorted((chosen & population) - present)
    unexpected = sorted((chosen & present) - population)
    rows = features.filter(_is_in(features["customer_id"], chosen & population))
    customers = _text(rows["customer_id"])
    expected = _recompute(known, customers, names, cutoff)
    differing = {
        name: int(np.sum(rows[name].to_numpy() != expected[name]))
        if rows[name].null_count == 0
        else len(customers)
        for name in names
    }
    figures: dict[str, float | int | str] = {
        "cutoff": cutoff.isoformat(),
        "customers_compared": len(chosen),
        "customers_in_population": len(population),
        "customers_missing": len(missing),
        "customers_unexpected": len(unexpected),
        "duplicate_rows": features.num_rows - len(present),
        "events_at_or_after_cutoff": sum(events.num_rows for events in later.values()),
        **{f"different_{name}": count for name, count in differing.items()},
    }
    faults = [
        *([f"{len(missing)} customers are missing (such as {missing[0]})"] if len(missing) else []),
        *(
            [f"{len(unexpected)} customers had no order before it (such as {unexpected[0]})"]
            if len(unexpected)
            else []
        ),
        *(
            [f"{features.num_rows - len(present)} rows are there twice"]
            if features.num_rows > len(present)
            else []
        ),
        *(
            f"{name} differs for {count} of {len(customers)} customers"
            for name, count in differing.items()
            if count
        ),
    ]
    if faults:
        reason = f"the features at {cutoff:%Y-%m-%d %H:%M} are not those of the events before it: "
        return CheckResult(False, reason + "; ".join(faults), figures)
    return CheckResult(
        True,
        f"the features of {len(chosen)} customers follow from events before the cutoff alone",
        figures,
    )


def _recompute(
    known: Mapping[str, pa.Table], customers: np.ndarray, names: Sequence[str], cutoff: datetime
) -> dict[str, np.ndarray]:
    """Each feature of `customers` (in their order), from the events known by the cutoff."""
    theirs = {
        name: events.filter(_is_in(events["customer_id"], customers))
        for name, events in known.items()
    }

    def total(table: str, feature: str, column: str, how: str) -> np.ndarray:
        events = _within(theirs[table], look_back(cutoff, _LOOK_BACK[feature]))
        groups = events.select(["customer_id", column]).group_by("customer_id")
        groups = groups.aggregate([(column, how)])
        found = np.zeros(len(customers), np.int64)
        if groups.num_rows:
            ids = _text(groups["customer_id"])
            order = np.argsort(ids)
            at = np.minimum(np.searchsorted(ids[order], customers), len(ids) - 1)
            there = ids[order][at] == customers
            values = groups[f"{column}_{how}"].cast(pa.int64()).to_numpy()
            found[there] = values[order][at][there]
        return found

    def count(table: str, feature: str) -> np.ndarray:
        return total(table, feature, "occurred_at", "count")

    def mean_order(name: str) -> np.ndarray:
        return total("orders", name, "amount_minor", "sum") / (count("orders", name) * 100)

    def whole_days(name: str) -> np.ndarray:
        last = total("orders", name, "occurred_at", "max")
        return (_microseconds(cutoff) - last) // _MICROSECONDS_A_DAY

    recipes = {
        "total_orders_30d": lambda name: count("orders", name),
        "avg_order_value": mean_order,
        "days_since_last_order": whole_days,
        "support_tickets_90d": lambda name: count("support_tickets", name),
        "login_frequency_7d": lambda name: count("logins", name) / _LOOK_BACK[name],
    }
    return {name: recipes[name](name) for name in names}


def choose_customers(everyone: set[str], active: set[str], most: int) -> set[str]:
    """At most `most` of everyone: half of them from `active`, all of them spread evenly."""
    if len(everyone) <= most:
        return everyone
    chosen = _evenly(everyone & active, most // 2)
    return chosen | _evenly(everyone - chosen, most - len(chosen))


def _evenly(customers: set[str], most: int) -> set[str]:
    ordered = sorted(customers)
    step = max(1, -(-len(ordered) // max(1, most)))
    return set(ordered[::step])


def _known_by(events: pa.Table, cutoff: datetime) -> pa.ChunkedArray:
    moment = pa.scalar(cutoff, TIMESTAMP)
    known = pc.call_function("less", [events["ingested_at"], moment])
    return pc.call_function("coalesce", [known, pa.scalar(True)])


def _at_or_after(events: pa.Table, cutoff: datetime) -> pa.ChunkedArray:
    return pc.call_function("greater_equal", [events["occurred_at"], pa.scalar(cutoff, TIMESTAMP)])


def _within(events: pa.Table, interval: Interval) -> pa.Table:
    start, end = pa.scalar(interval.start, TIMESTAMP), pa.scalar(interval.end, TIMESTAMP)
    return events.filter(
        pc.call_function(
            "and",
            [
                pc.call_function("greater_equal", [events["occurred_at"], start]),
                pc.call_function("less", [events["occurred_at"], end]),
            ],
        )
    )


def _is_in(column: pa.ChunkedArray, customers: Iterable[str]) -> pa.ChunkedArray:
    values = pc.SetLookupOptions(value_set=pa.array(customers, pa.string()))
    return pc.call_function("is_in", [column.cast(pa.string())], values)


def _customers(rows: pa.Table) -> set[str]:
    return set(rows["customer_id"].unique().to_pylist())


def _text(column: pa.ChunkedArray) -> np.ndarray:
    # Python strings, not numpy's fixed width ones: those drop trailing NULs and would merge ids.
    return column.to_numpy(zero_copy_only=False).astype(object)


def _microseconds(moment: datetime) -> int:
    return pa.scalar(moment, TIMESTAMP).cast(pa.int64()).as_py()
