"""The features of every customer at every cutoff, as one Ibis expression.

A window aggregate that is valid at daily cutoffs changes only where an event enters or leaves the
window. So each event becomes rows of differences: + at the first cutoff that sees it, - at the
first that no longer does, one for each window. Summed per (customer, cutoff) and accumulated over a
customer's cutoffs they give the state from one change to the next; a state is then repeated for the
cutoffs it stays valid at. Where one cutoff at most can see an event (a window no longer than the
step, or a single cutoff), nothing leaves: the sum of what enters there is the total, and the next
cutoff's is another. The cost is that of the events plus the rows that come out, not events times
cutoffs. No row looks at another customer, so any range of customers can be computed alone.

Boundaries follow from data/windows.py. All cutoffs are UTC midnights, so "seen by the cutoff" and
"inside the look-back" are decided by the UTC day of an event: an event of day e with a window of w
days is seen by the partitions [e, e + w), and by none before the day it was ingested.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa

from churn_assets.contract.features import FEATURES, Feature, features_for
from churn_assets.data.lake import DAY, Lake
from churn_assets.data.moments import epoch_microseconds
from churn_assets.data.tables import TIMESTAMP
from churn_assets.data.versions import SUPERSEDED_AT, with_superseded
from churn_assets.data.windows import Windows, cutoff_of, days_between, midnight
from churn_assets.errors import UserError

if TYPE_CHECKING:
    from ibis.backends import BaseBackend

# An Ibis integer expression: its stubs know no arithmetic on the result of a cast.
Number = Any

_BY_NAME = {feature.name: feature for feature in FEATURES}
_MICROSECONDS_A_DAY = 86_400_000_000

# A mean over what there is stays a mean, and the population always has a last order inside the
# activity window; a count over part of its window is a different feature.
_MAY_BE_CUT_SHORT = frozenset({"avg_order_value", "days_since_last_order"})


@dataclass(frozen=True)
class _Total:
    """A sum over the events of `table` in the `window_days` before a cutoff.

    `column` is what is summed; None counts events.
    """

    name: str
    table: str
    window_days: int
    column: str | None = None

    @property
    def dtype(self) -> str:
        return "int64" if self.column else "int32"


def _window(feature: str) -> int:
    return _BY_NAME[feature].window_days


def _totals(names: Collection[str]) -> tuple[_Total, ...]:
    """The sums the features `names` are made of."""
    recent, mean = _window("total_orders_30d"), _window("avg_order_value")
    tickets, logins = _window("support_tickets_90d"), _window("login_frequency_7d")
    totals = (
        _Total("recent_orders", "orders", recent),
        _Total("orders", "orders", mean),
        _Total("amount_minor", "orders", mean, "amount_minor"),
        _Total("tickets", "support_tickets", tickets),
        _Total("logins", "logins", logins),
    )
    tables = {table for name in names for table in _BY_NAME[name].tables}
    return tuple(total for total in totals if total.table in tables)


def _formulas(state: ir.Table, day_number: Number) -> dict[str, Callable[[], ir.Value]]:
    """How each feature follows from the totals of a state at the cutoff of `day_number`."""
    return {
        "total_orders_30d": lambda: state.recent_orders.cast("int64"),
        # One division, of integers that a double holds exactly: every engine rounds alike.
        "avg_order_value": lambda: state.amount_minor / (state.orders * 100),
        # A midnight is the end of the day before: an order then is a whole day old at the next.
        "days_since_last_order": lambda: (
            day_number - (state.last_order - 1) // _MICROSECONDS_A_DAY
        ).cast("int64"),
        "support_tickets_90d": lambda: state.tickets.cast("int64"),
        "login_frequency_7d": lambda: state.logins / _window("login_frequency_7d"),
    }


def customer_features(
    tables: Mapping[str, ir.Table],
    first: date,
    last: date,
    windows: Windows,
    *,
    step_days: int = 1,
) -> ir.Table:
    """The features at the cutoffs of the partitions first, first + step_days, ... up to last.

    `tables` are raw tables by name, as `Lake.scan` gives them: with their partition in `day`. They
    must reach back as far as `look_back_days` says; what lies outside of the windows is ignored.
    With a column superseded_at (data/versions.py) an event counts up to then, where it is not null.
    The features are those `tables` suffice for (contract.features.features_for).

    One row per customer of the population (an order in the `activity_days` before the cutoff) and
    cutoff: day (date), customer_id, cutoff (timestamp us UTC), then the features.

    Raises UserError without orders, or with an activity window beyond the look-back of orders.
    """
    features = features_for(tables)
    if "orders" not in tables:
        raise UserError("features need the table orders; map it in the source configuration")
    if windows.activity_days > _window("days_since_last_order"):
        raise UserError(
            f"windows.activity_days is {windows.activity_days}; it can be at most "
            f"{_window('days_since_last_order')}, the look-back of days_since_last_order"
        )
    cutoffs = days_between(first, last)[::step_days]
    totals = _totals([feature.name for feature in features])
    once = {total.name for total in totals if total.window_days <= step_days or len(cutoffs) == 1}
    changes = ibis.union(
        *(
            change
            for table in dict.fromkeys(total.table for total in totals)
            for change in _changes(
                tables[table], table, totals, once, first, step_days, len(cutoffs)
            )
        )
    )
    per_cutoff = changes.group_by("customer_id", "at").aggregate(
        last_order=changes.last_order.max(),
        # Narrow again what a sum widens (DuckDB: to 128 bits).
        **{total.name: changes[total.name].sum().cast(total.dtype) for total in totals},
    )
    by_customer = ibis.window(group_by="customer_id", order_by="at")
    so_far = ibis.cumulative_window(group_by="customer_id", order_by="at")
    states = per_cutoff.select(
        "customer_id",
        "at",
        changes_at=per_cutoff["at"].lead().over(by_customer).fill_null(len(cutoffs)),
        last_order=per_cutoff.last_order.max().over(so_far),
        **{
            total.name: per_cutoff[total.name]
            if total.name in once
            else per_cutoff[total.name].sum().over(so_far)
            for total in totals
        },
    )
    leaves_at = _cutoff_number(
        states.last_order // _MICROSECONDS_A_DAY + windows.activity_days, step_days
    )
    # False, not null-skipping, for who has no order: LEAST alone would keep them.
    states = states.mutate(leaves_at=leaves_at).filter(states["at"] < leaves_at)
    until = ibis.least(states.changes_at, states.leaves_at)
    rows = states.mutate(since=states["at"], at=ibis.range(states["at"], until).unnest())
    rows = rows.mutate(
        **{name: ibis.ifelse(rows["at"] == rows.since, rows[name], 0) for name in sorted(once)}
    )
    rows = rows.join(_cutoff_table(cutoffs), "at")
    formulas = _formulas(rows, rows.day_number)
    return rows.select(
        DAY, "customer_id", "cutoff", **{f.name: formulas[f.name]() for f in features}
    )


def _changes(
    events: ir.Table,
    table: str,
    totals: Sequence[_Total],
    once: Collection[str],
    first: date,
    step_days: int,
    cutoffs: int,
) -> list[ir.Table]:
    """The differences the events of one table make: a table of entries, one of exits per window.

    `at` numbers the cutoffs from 0; entries before the first cutoff count at it. The totals `once`
    have no exits.
    """

    own = [total for total in totals if total.table == table]
    occurred = events[DAY].delta(first, unit="day")
    start = epoch_microseconds(midnight(first))

    def day_number(moment: ir.Value) -> Number:
        return (epoch_microseconds(moment) - start) // _MICROSECONDS_A_DAY

    def last_seen(days: int) -> Number:
        if SUPERSEDED_AT not in events.columns:
            return occurred + days
        gone = day_number(events[SUPERSEDED_AT]).fill_null(occurred + days)
        return ibis.least(occurred + days, gone)

    known = day_number(events.ingested_at).fill_null(occurred)
    leaves = {days: f"leaves_{days}" for days in sorted({total.window_days for total in own})}
    seen = events.select(
        "customer_id",
        enters=_cutoff_number(ibis.greatest(occurred, known, 0), step_days),
        moment=epoch_microseconds(events.occurred_at) - start,
        **{leaves[days]: _cutoff_number(last_seen(days), step_days) for days in leaves},
        **{total.column: events[total.column] for total in own if total.column},
    )
    seen = seen.filter(seen.enters < cutoffs, seen.enters < seen[leaves[max(leaves)]])

    def differences(rows: ir.Table, at: str, sign: int, windows: Collection[int]) -> ir.Table:
        columns: dict[str, ir.Value] = {}
        for total in totals:
            value: Number = ibis.literal(0)
            if total in own and total.window_days in windows:
                is_seen = rows.enters < rows[leaves[total.window_days]]
                value = ibis.ifelse(is_seen, rows[total.column] * sign if total.column else sign, 0)
            columns[total.name] = value.cast(total.dtype)
        last_order = rows.moment if table == "orders" and sign > 0 else ibis.null("int64")
        return rows.select("customer_id", at=rows[at], last_order=last_order, **columns)

    entries = differences(seen, "enters", 1, leaves)
    exits = [
        differences(seen.filter(seen.enters < seen[name], seen[name] < cutoffs), name, -1, [days])
        for days, name in leaves.items()
        if any(total.window_days == days and total.name not in once for total in own)
    ]
    return [entries, *exits]


def _cutoff_number(day_number: Number, step_days: int) -> Number:
    """The first cutoff that is not before the partition `day_number` days after the first one."""
    if step_days > 1:
        day_number = (day_number + (step_days - 1)) // step_days
    return day_number.cast("int32")


def _cutoff_table(days: Sequence[date]) -> ir.Table:
    """The cutoffs as a small table: at (their number), day_number, day and cutoff."""
    return ibis.memtable(
        pa.table(
            {
                "at": pa.array(range(len(days)), pa.int32()),
                "day_number": pa.array([(day - days[0]).days for day in days], pa.int32()),
                DAY: pa.array(days, pa.date32()),
                "cutoff": pa.array([cutoff_of(day) for day in days], TIMESTAMP),
            }
        )
    )


def look_back_days(table: str, windows: Windows) -> int:
    """How many days of `table`, ending with the partition itself, a feature partition reads.

    0 for a table no feature needs.
    """
    needed = [feature.window_days for feature in FEATURES if table in feature.tables]
    if table == "orders":
        needed.append(windows.activity_days)
    return max(needed, default=0)


def scan_look_back(
    lake: Lake,
    con: BaseBackend,
    tables: Collection[str],
    first: date,
    last: date,
    windows: Windows,
    *,
    data_start: date,
) -> dict[str, ir.Table]:
    """The events the feature partitions first..last need, by table, unread.

    `tables` are the raw tables the source has; those no feature needs are left out. Partitions
    before `data_start` never existed. Raises UserError naming raw partitions that are missing.
    """
    reaches = {table: look_back_days(table, windows) for table in tables}
    scans = {}
    for table, reach in reaches.items():
        if reach:
            start = max(data_start, first - timedelta(days=reach - 1))
            events = lake.scan(con, table, start, last)
            scans[table] = with_superseded(lake, con, table, events, start, last)
    return scans


def earliest_feature_day(
    data_start: date, windows: Windows, features: Sequence[Feature] = FEATURES
) -> date:
    """The first partition whose counts are whole, given data from `data_start` on.

    A look-back cut short by the start of the data is allowed for averages, never for counts, of
    which the population (orders in the activity window) is one.
    """
    counts = [f.window_days for f in features if f.name not in _MAY_BE_CUT_SHORT]
    return data_start + timedelta(days=max([windows.activity_days, *counts]) - 1)


def require_look_back(
    first: date, data_start: date, windows: Windows, features: Sequence[Feature] = FEATURES
) -> None:
    """Refuse a feature partition whose counts would be cut short by the start of the data.

    Raises UserError.
    """
    earliest = earliest_feature_day(data_start, windows, features)
    if first < earliest:
        raise UserError(
            f"features of {first} would count over days before the data starts ({data_start}); "
            f"materialize customer_features from {earliest} on"
        )
