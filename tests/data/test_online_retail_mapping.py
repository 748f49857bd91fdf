from __future__ import annotations

import csv
import gzip
from collections import Counter, defaultdict
from datetime import UTC, date, datetime
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

import churn_assets
from churn_assets.data.sources import open_source
from churn_assets.data.tables import ORDERS
from churn_assets.data.validation import validate_events
from churn_assets.settings import load_settings

CONFIG = Path(churn_assets.__file__).parent / "config" / "online_retail.yaml"


@pytest.fixture(scope="module")
def retail(online_retail):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHURN_DATA", online_retail)
        settings = load_settings(CONFIG)
    source = open_source(settings.source, settings.calendar.start)
    assert settings.calendar.end is not None
    return settings, source, source.read("orders", settings.calendar.start, settings.calendar.end)


def test_every_line_is_accounted_for(retail):
    _, _, read = retail
    assert read.rows_read == 541_909
    assert read.filtered == read.outside == 0
    assert read.rows_read == read.used + read.quarantined.num_rows
    assert Counter(read.quarantined["reason"].to_pylist()) == {
        "missing_customer_id": 135_080,
        "cancelled_invoice": 8_905,
        "exact_duplicate": 5_192,
        "price_not_positive": 40,
    }
    assert read.quarantined["day"].null_count == 0


def test_paid_orders_and_their_customers(retail):
    settings, source, read = retail
    assert read.events.num_rows == 18_532
    assert len(set(read.events["customer_id"].to_pylist())) == 4_338
    customers = source.read("customers", settings.calendar.start, settings.calendar.end)
    assert customers.events.num_rows == 4_338
    assert source.tables == ("customers", "orders")


def test_the_calendar_is_that_of_the_file(retail):
    settings, _, read = retail
    assert (settings.calendar.start, settings.calendar.end) == (
        date(2010, 12, 1),
        date(2011, 12, 9),
    )
    moments = read.events["occurred_at"].to_pylist()
    assert moments[0] == datetime(2010, 12, 1, 8, 26, tzinfo=UTC)
    assert moments[-1] == datetime(2011, 12, 9, 12, 50, tzinfo=UTC)
    assert not any(moment.weekday() == 5 for moment in moments)


def test_every_order_is_what_the_file_says(retail, online_retail):
    _, _, read = retail
    amounts: dict[str, Decimal] = defaultdict(Decimal)
    moments: dict[str, datetime] = {}
    owners: dict[str, str] = {}
    seen = set()
    with gzip.open(online_retail, "rt", encoding="utf-8", newline="") as lines:
        for line in csv.reader(lines):
            invoice, _, _, quantity, moment, price, customer, _ = line
            if not customer or invoice == "InvoiceNo" or invoice.startswith("C"):
                continue
            if int(quantity) <= 0 or Decimal(price) <= 0 or tuple(line) in seen:
                continue
            seen.add(tuple(line))
            amounts[invoice] += int(quantity) * Decimal(price)
            local = datetime.fromisoformat(moment).replace(tzinfo=ZoneInfo("Europe/London"))
            moments[invoice] = min(moments.get(invoice, local), local)
            owners[invoice] = customer.removesuffix(".0")
    expected = {
        invoice: (
            owners[invoice],
            moments[invoice],
            int((amount * 100).quantize(Decimal(1), ROUND_HALF_EVEN)),
        )
        for invoice, amount in amounts.items()
    }
    columns = ("order_id", "customer_id", "occurred_at", "amount_minor")
    found = {
        invoice: rest
        for invoice, *rest in zip(*(read.events[c].to_pylist() for c in columns), strict=True)
    }
    assert {invoice: tuple(order) for invoice, order in found.items()} == expected


def test_the_orders_pass_validation(retail):
    settings, _, read = retail
    checked = validate_events(
        ORDERS,
        read.events,
        settings.calendar.start,
        settings.calendar.end,
        datetime(2011, 12, 10, tzinfo=UTC),
    )
    assert checked.valid.num_rows == read.events.num_rows


def test_one_month_is_read_alone(retail):
    _, source, read = retail
    march = source.read("orders", date(2011, 3, 1), date(2011, 3, 31))
    expected = [m for m in read.events["occurred_at"].to_pylist() if (m.year, m.month) == (2011, 3)]
    assert march.events["occurred_at"].to_pylist() == expected
    assert march.rows_read == 541_909
    assert march.rows_read == march.used + march.quarantined.num_rows + march.outside
