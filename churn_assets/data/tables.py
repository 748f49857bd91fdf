"""The raw tables: what every source is brought to before anything else sees it."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

TIMESTAMP = pa.timestamp("us", tz="UTC")

# How the events of a day lie in the lake: a reader of some customers then skips the others' rows.
RAW_ORDER = ("customer_id", "occurred_at")


@dataclass(frozen=True)
class Column:
    """One column of a raw table. `nullable` says whether a null is a value or a fault."""

    name: str
    type: pa.DataType
    description: str
    nullable: bool = False


@dataclass(frozen=True)
class RawTable:
    """A table of events, one row an event, in the partition of its `occurred_at` (UTC).

    `key` names the column that is unique over the whole table.
    """

    name: str
    key: str
    description: str
    columns: tuple[Column, ...]

    @property
    def schema(self) -> pa.Schema:
        """The table's columns as Arrow's."""
        return pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in self.columns])


def _event_columns(key: str, noun: str, happened: str) -> tuple[Column, ...]:
    return (
        Column(key, pa.string(), f"Identifier of the {noun}, unique over the whole table"),
        *(
            ()
            if key == "customer_id"
            else (Column("customer_id", pa.string(), f"Customer of the {noun}"),)
        ),
        Column("occurred_at", TIMESTAMP, f"When {happened}, UTC"),
        Column(
            "ingested_at",
            TIMESTAMP,
            "When the source first knew of it, UTC; null where the source does not record it",
            nullable=True,
        ),
    )


CUSTOMERS = RawTable(
    name="customers",
    key="customer_id",
    description="Customers, in the partition of the day they first appeared",
    columns=_event_columns("customer_id", "customer", "the customer first appeared"),
)
ORDERS = RawTable(
    name="orders",
    key="order_id",
    description="Paid orders, one row an order",
    columns=(
        *_event_columns("order_id", "order", "the order was placed"),
        Column("amount_minor", pa.int64(), "Order value in minor currency units (cents), >= 0"),
    ),
)
SUPPORT_TICKETS = RawTable(
    name="support_tickets",
    key="ticket_id",
    description="Support tickets, one row a ticket opened",
    columns=_event_columns("ticket_id", "ticket", "the ticket was opened"),
)
LOGINS = RawTable(
    name="logins",
    key="login_id",
    description="Logins, one row a login",
    columns=_event_columns("login_id", "login", "the customer logged in"),
)

RAW_TABLES: dict[str, RawTable] = {t.name: t for t in (CUSTOMERS, ORDERS, SUPPORT_TICKETS, LOGINS)}
