"""The retention offers customers were served, in the lake: every one once, by its UTC day.

Whoever serves offers says so here. The treatment report counts them, and the customers of the
built-in shop react to them.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from churn_assets.data.lake import Lake
from churn_assets.data.readers import columns_of, connect, find_files, load_files
from churn_assets.data.tables import TIMESTAMP
from churn_assets.errors import UserError
from churn_assets.simulator.params import Offer

OFFERS = "offers"
SCHEMA = pa.schema(
    [
        pa.field("customer_id", pa.string(), nullable=False),
        pa.field("served_at", TIMESTAMP, nullable=False),
    ]
)
"""One row an offer. served_at is in data time: the time of the events."""

_ORDER = ("served_at", "customer_id")
_EPOCH = date(1970, 1, 1)
_MICROSECONDS_A_DAY = 86_400_000_000
_EXAMPLE = "2024-03-01T10:00:00Z"


def offers_table(offers: Iterable[Offer]) -> pa.Table:
    """`offers` as rows of SCHEMA, in their order. Raises UserError for a time without a zone."""
    rows = [(offer.customer_id, _in_utc(offer.served_at)) for offer in offers]
    ids, times = zip(*rows, strict=True) if rows else ((), ())
    return pa.table([pa.array(ids, pa.string()), pa.array(times, TIMESTAMP)], SCHEMA)


def read_offers_file(path: Path, now: datetime) -> pa.Table:
    """The offers of a CSV or parquet file with the columns customer_id and served_at, in its order.

    Other columns are left alone. SCHEMA; the same offer may be there twice. Raises UserError naming
    the file, the first row that cannot be used and what to do, also for an offer served after
    `now`.
    """
    files = find_files(glob.escape(str(path.expanduser())))
    names = columns_of(files[0])
    if missing := [name for name in SCHEMA.names if name not in names]:
        raise UserError(
            f"{path} has no column {' and no column '.join(missing)}; give customer_id and "
            f"served_at (it has {', '.join(names) or 'none'})"
        )
    connection = connect()
    try:
        corrupt = load_files(connection, "offers", files)
        if corrupt.num_rows:
            first = corrupt.slice(0, 1).to_pylist()[0]
            raise UserError(f"{path}, line {first['line']}: {first['problem']}; correct the line")
        # The rows come as they are in the file: nothing here sorts or filters.
        found = connection.sql("SELECT customer_id, served_at FROM offers").to_arrow_table()
    except duckdb.Error as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    finally:
        connection.close()
    return _checked(found, path, now)


def record_offers(lake: Lake, offers: pa.Table) -> int:
    """Add to the table `offers` those it does not have; how many they were.

    offers: SCHEMA; the same customer at the same time is one offer. Whatever the lake has stays. A
    day is complete or as it was, so whoever was stopped records the same again. Hold the home
    while calling it. Raises RuntimeError when another writer replaced a day meanwhile.
    """
    days = offers["served_at"].cast(pa.int64()).to_numpy() // _MICROSECONDS_A_DAY
    there, new = set(lake.days(OFFERS)), 0
    for number in np.unique(days):
        day = _EPOCH + timedelta(days=int(number))
        new += _add(lake, day, offers.filter(pa.array(days == number)), known=day in there)
    return new


def read_offers(lake: Lake) -> pa.Table | None:
    """Every offer, SCHEMA, the oldest first; None where none was ever recorded."""
    days = lake.days(OFFERS)
    return lake.read(OFFERS, days=days, columns=SCHEMA.names) if days else None


def offered_between(lake: Lake, since: datetime, until: datetime) -> set[str]:
    """The customers who were served an offer in [since, until), data time."""
    first, last = since.astimezone(UTC).date(), until.astimezone(UTC).date()
    days = [day for day in lake.days(OFFERS) if first <= day <= last]
    if not days:
        return set()
    rows = lake.read(OFFERS, days=days, columns=SCHEMA.names)
    at = rows["served_at"]
    inside = pc.and_(
        pc.greater_equal(at, pa.scalar(since, TIMESTAMP)), pc.less(at, pa.scalar(until, TIMESTAMP))
    )
    return set(rows.filter(inside)["customer_id"].to_pylist())


def offers_of(lake: Lake) -> tuple[Offer, ...]:
    """Every offer, for the shop, the oldest first."""
    found = read_offers(lake)
    return () if found is None else offers_from(found)


def offers_from(rows: pa.Table) -> tuple[Offer, ...]:
    """The rows of SCHEMA, in their order, as offers."""
    return tuple(Offer(row["customer_id"], row["served_at"]) for row in rows.to_pylist())


def _add(lake: Lake, day: date, rows: pa.Table, *, known: bool) -> int:
    there = SCHEMA.empty_table()
    if known:
        there = lake.read(OFFERS, days=[day], columns=SCHEMA.names)
    together = _distinct(pa.concat_tables([there, rows.cast(SCHEMA)]))
    new = together.num_rows - _distinct(there).num_rows
    if not new:
        return 0
    lake.write(OFFERS, day, day, together, day_of="served_at", order_by=_ORDER)
    stored = _distinct(lake.read(OFFERS, days=[day], columns=SCHEMA.names))
    if _distinct(pa.concat_tables([stored, together])).num_rows != stored.num_rows:
        raise RuntimeError(
            f"offers of {day} are not in the lake: another writer replaced the day; try again"
        )
    return new


def _distinct(rows: pa.Table) -> pa.Table:
    return rows.group_by(SCHEMA.names, use_threads=False).aggregate([]).select(SCHEMA.names)


def _checked(rows: pa.Table, path: Path, now: datetime) -> pa.Table:
    ids, times = rows["customer_id"], rows["served_at"]
    if pa.types.is_integer(ids.type):
        ids = ids.cast(pa.string())
    if not (pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)):
        raise UserError(f"{path}: customer_id is {ids.type}; write it as text")
    of_text = pa.types.is_string(times.type) or pa.types.is_large_string(times.type)
    if not of_text and getattr(times.type, "tz", None) is None:
        raise UserError(
            f"{path}: served_at is {times.type}, which has no time zone; write it in UTC, with the "
            "zone in the column's type"
        )
    served = []
    # A Python datetime holds microseconds.
    values = times if of_text else times.cast(TIMESTAMP, safe=False)
    for row, (customer, value) in enumerate(
        zip(ids.to_pylist(), values.to_pylist(), strict=True), 1
    ):
        where = f"{path}, row {row} below the header"
        if customer is None or not customer.strip():
            raise UserError(f"{where}: customer_id is empty; name the customer or remove the row")
        if value is None:
            raise UserError(f"{where}: served_at is empty; write it like {_EXAMPLE}")
        moment = _moment(value, where) if isinstance(value, str) else value
        if moment > now:
            raise UserError(
                f"{where}: served_at is {moment.isoformat()}, which is still to come; record "
                "an offer once it was served"
            )
        served.append(moment)
    return pa.table([pc.cast(ids, pa.string()), pa.array(served, TIMESTAMP)], SCHEMA)


def _moment(text: str, where: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise UserError(
            f"{where}: served_at is {text!r}, which is no time; write it like {_EXAMPLE}"
        ) from None
    try:
        return _in_utc(moment)
    except UserError:
        raise UserError(
            f"{where}: served_at is {text!r}, without a time zone; write it like {_EXAMPLE}"
        ) from None
    except OverflowError:
        raise UserError(f"{where}: served_at is {text!r}; no calendar has that in UTC") from None


def _in_utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise UserError(f"an offer was served at {moment}, without a time zone; give it in UTC")
    return moment.astimezone(UTC)
