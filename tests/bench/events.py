"""Generated event tables of three sizes, in a lake: what the cost of features is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from churn_assets.data.lake import Lake
from churn_assets.data.tables import RAW_ORDER, RAW_TABLES, TIMESTAMP
from churn_assets.data.windows import midnight

CUTOFFS, STEP_DAYS = 26, 7
FIRST_CUTOFF_DAY = date(2025, 1, 1)
LAST_CUTOFF_DAY = FIRST_CUTOFF_DAY + timedelta(days=STEP_DAYS * (CUTOFFS - 1))
DATA_START = FIRST_CUTOFF_DAY - timedelta(days=364)
DAYS = (LAST_CUTOFF_DAY - DATA_START).days + 1
TABLES = ("orders", "support_tickets", "logins")
# As in the built-in shop: of a hundred events 18 are orders, 2 tickets, 80 logins.
_SHARES = {"orders": 0.18, "support_tickets": 0.02, "logins": 0.80}
_MICROSECONDS_A_DAY = 86_400_000_000
_DAYS_A_WRITE = 28


@dataclass(frozen=True)
class Size:
    """How many customers and events; the events spread over the DAYS up to the last cutoff."""

    name: str
    customers: int
    events: int


SIZES = {
    size.name: size
    for size in (
        Size("S", 10_000, 1_000_000),
        Size("M", 100_000, 10_000_000),
        Size("L", 1_000_000, 100_000_000),
    )
}


def generate(lake: Lake, size: Size, seed: int = 0) -> None:
    """Write the three tables, where they are not whole already.

    Customers come and go: each is there for some months, and some are far busier than others.
    """
    for number, table in enumerate(TABLES):
        if len(lake.days(table)) == DAYS:
            continue
        draw = np.random.default_rng([seed, number])
        for first, rows in _stretches(table, size, draw):
            last = min(LAST_CUTOFF_DAY, first + timedelta(days=_DAYS_A_WRITE - 1))
            lake.write(table, first, last, rows, day_of="occurred_at", order_by=RAW_ORDER)


def _stretches(
    table: str, size: Size, draw: np.random.Generator
) -> Iterator[tuple[date, pa.Table]]:
    ids = pa.array([f"c-{number:07d}" for number in range(size.customers)], pa.string())
    a_day = round(size.events * _SHARES[table] / DAYS)
    written = 0
    for start in range(0, DAYS, _DAYS_A_WRITE):
        days = min(_DAYS_A_WRITE, DAYS - start)
        rows = a_day * days
        day = np.repeat(np.arange(start, start + days), a_day)
        # A slice of all customers is active at a time; the slice moves on through the year.
        place = draw.random(rows) ** 1.5 * 0.6 + 0.4 * day / DAYS
        who = (place * size.customers).astype(np.int64)
        # A multiplication that mixes: neighbours in the slice are not neighbours in the order.
        who = who * 7_368_787 % size.customers
        moment = day * _MICROSECONDS_A_DAY + draw.integers(0, _MICROSECONDS_A_DAY, rows)
        moment += int(midnight(DATA_START).timestamp()) * 1_000_000
        columns: dict[str, pa.Array] = {
            RAW_TABLES[table].key: pc.cast(
                pa.array(np.arange(written, written + rows)), pa.string()
            ),
            "customer_id": ids.take(pa.array(who)),
            "occurred_at": pa.array(moment).cast(pa.timestamp("us")).cast(TIMESTAMP),
            "ingested_at": pa.array(moment + 60_000_000).cast(pa.timestamp("us")).cast(TIMESTAMP),
        }
        if table == "orders":
            cents = np.round(draw.lognormal(8.3, 0.7, rows)).astype(np.int64)
            columns["amount_minor"] = pa.array(cents)
        written += rows
        schema = RAW_TABLES[table].schema
        yield (
            DATA_START + timedelta(days=start),
            pa.table([columns[name] for name in schema.names], schema=schema),
        )
