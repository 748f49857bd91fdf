"""Features and labels by their definition: a customer and a cutoff at a time, in plain Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta

import ibis
import ibis.expr.types as ir
import pyarrow as pa
from hypothesis import strategies as st

from churn_assets.data.tables import RAW_TABLES
from churn_assets.data.windows import Windows, midnight

DAY = timedelta(days=1)
TICK = timedelta(microseconds=1)
FIRST = date(2024, 3, 1)


@dataclass(frozen=True)
class Event:
    customer_id: str
    occurred_at: datetime
    ingested_at: datetime | None = None
    amount_minor: int = 0


Events = Mapping[str, Sequence[Event]]


def features_at(events: Events, cutoff: datetime, windows: Windows) -> dict[str, dict]:
    """The features of each customer of the population at `cutoff`."""

    def seen(table: str, customer: str, days: int) -> list[Event]:
        return [
            event
            for event in events[table]
            if event.customer_id == customer
            and cutoff - days * DAY <= event.occurred_at < cutoff
            and (event.ingested_at is None or event.ingested_at < cutoff)
        ]

    rows = {}
    for customer in {event.customer_id for event in events["orders"]}:
        if not seen("orders", customer, windows.activity_days):
            continue
        year = seen("orders", customer, 365)
        row = {
            "total_orders_30d": len(seen("orders", customer, 30)),
            "avg_order_value": sum(e.amount_minor for e in year) / (100 * len(year)),
            "days_since_last_order": (cutoff - max(e.occurred_at for e in year)) // DAY,
        }
        if "support_tickets" in events:
            row["support_tickets_90d"] = len(seen("support_tickets", customer, 90))
        if "logins" in events:
            row["login_frequency_7d"] = len(seen("logins", customer, 7)) / 7
        rows[customer] = row
    return rows


def churned(events: Events, customer: str, cutoff: datetime, windows: Windows) -> bool:
    return not any(
        order.customer_id == customer
        and cutoff <= order.occurred_at < cutoff + windows.horizon_days * DAY
        for order in events["orders"]
    )


def raw_table(name: str, events: Sequence[Event]) -> pa.Table:
    table = RAW_TABLES[name]
    columns = {
        table.key: [f"{name}-{number}" for number in range(len(events))],
        **{
            field: [getattr(event, field) for event in events]
            for field in ("customer_id", "occurred_at", "ingested_at", "amount_minor")
        },
    }
    return pa.table({field: columns[field] for field in table.schema.names}, schema=table.schema)


def scanned(name: str, events: Sequence[Event]) -> ir.Table:
    """The events as `Lake.scan` gives them: with their partition in `day`."""
    days = pa.array([event.occurred_at.date() for event in events], pa.date32())
    return ibis.memtable(raw_table(name, events).append_column("day", days))


# Days before the first cutoff at which a window opens or closes, and their neighbours.
_EDGES = sorted({w + near for w in (0, 5, 7, 30, 60, 90, 365) for near in (-1, 0, 1)})


def moments(days: int) -> st.SearchStrategy[datetime]:
    """Moments around the cutoffs of FIRST and the `days` - 1 after it, often exactly on an edge."""
    start = midnight(FIRST) + DAY
    near_edge = st.builds(
        lambda before, after, tick: start - before * DAY + after * DAY + tick * TICK,
        st.sampled_from(_EDGES),
        st.integers(0, days),
        st.sampled_from((-1, 0, 1)),
    )
    anywhere = st.integers(-400 * 86_400_000_000, (days + 40) * 86_400_000_000).map(
        lambda microseconds: start + microseconds * TICK
    )
    return near_edge | anywhere


def events(days: int, customers: str = "abc", late: bool = True) -> st.SearchStrategy[Event]:
    delays = st.none()
    if late:
        delays |= st.sampled_from((0 * DAY, TICK, DAY, 3 * DAY, 31 * DAY)) | st.just(None)

    def event(customer: str, moment: datetime, delay: timedelta | None, amount: int) -> Event:
        ingested = None if delay is None else moment + delay
        if delay == DAY:  # at the very midnight that follows
            ingested = midnight(moment.date()) + DAY
        return Event(customer, moment, ingested, amount)

    return st.builds(
        event, st.sampled_from(customers), moments(days), delays, st.integers(0, 10**9)
    )


def histories(days: int, **options: bool) -> st.SearchStrategy[dict[str, list[Event]]]:
    """Orders, tickets and logins of a few customers; some of them have no order at all."""
    return st.fixed_dictionaries(
        {
            "orders": st.lists(events(days, "abc", **options), max_size=12),
            "support_tickets": st.lists(events(days, "abcd", **options), max_size=6),
            "logins": st.lists(events(days, "abcd", **options), max_size=8),
        }
    )
