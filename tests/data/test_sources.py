from __future__ import annotations

import gzip
import json
import os
import sqlite3
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from churn_assets.data import sources
from churn_assets.data.mapping import minor_amounts
from churn_assets.data.sources import MappedSource, SourceConfig, open_source
from churn_assets.data.tables import CUSTOMERS, ORDERS
from churn_assets.data.validation import QUARANTINE_SCHEMA, validate_events
from churn_assets.errors import UserError

FIRST, LAST = date(2024, 1, 1), date(2024, 1, 31)
HEADER = "id,customer,at,amount\n"
COLUMNS = {"order_id": "id", "customer_id": "customer", "occurred_at": "at", "amount": "amount"}


def source(place: Path | str, tmp_path: Path, **orders: Any):
    orders = {"from": str(place), "columns": COLUMNS, **orders}
    config = {
        "kind": "tables",
        "tables": {"orders": orders, "customers": {"derive_from": "orders"}},
    }
    return open_source(msgspec.convert(config, SourceConfig), FIRST, base=tmp_path)


def csv_source(text: str | bytes, tmp_path: Path, **orders: Any) -> MappedSource:
    path = tmp_path / "orders.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return source(path, tmp_path, **orders)


def from_of(config: SourceConfig) -> str | None:
    assert isinstance(config, sources.TablesSourceConfig)
    assert config.tables.orders is not None
    return config.tables.orders.from_


def reasons(read) -> dict[str, int]:
    return dict(Counter(read.quarantined["reason"].to_pylist()))


def accounted(read) -> bool:
    return read.rows_read == (read.used + read.quarantined.num_rows + read.filtered + read.outside)


def test_rows_become_events_of_the_raw_schema(tmp_path):
    text = HEADER + "b,c1,2024-01-02 10:00:00,6.95\na,c2,2024-01-01T00:00:00Z,0\n"
    read = csv_source(text, tmp_path).read("orders", FIRST, LAST)
    assert read.events.schema == ORDERS.schema
    assert read.events.to_pylist() == [
        {
            "order_id": "a",
            "customer_id": "c2",
            "occurred_at": datetime(2024, 1, 1, tzinfo=UTC),
            "ingested_at": None,
            "amount_minor": 0,
        },
        {
            "order_id": "b",
            "customer_id": "c1",
            "occurred_at": datetime(2024, 1, 2, 10, tzinfo=UTC),
            "ingested_at": None,
            "amount_minor": 695,
        },
    ]
    assert (read.rows_read, read.used, read.outside) == (2, 2, 0)


def test_money_is_exact_and_rounded_once_half_to_even(tmp_path):
    lines = [
        "a,c,2024-01-01,3,6.95",  # 20.85, which binary floats miss
        "b,c,2024-01-01,1,0.005",  # each would round to 0.00 by itself
        "b,c,2024-01-01,1,0.01",
        "c,c,2024-01-01,1,0.125",
        "d,c,2024-01-01,1,0.135",
        "e,c,2024-01-01,1000000,0.1",
    ]
    text = "id,customer,at,quantity,price\n" + "\n".join(lines)
    columns = {**COLUMNS, "amount": {"product": ["quantity", "price"]}}
    read = csv_source(text, tmp_path, columns=columns, one_event_per="order_id").read(
        "orders", FIRST, LAST
    )
    amounts = dict(
        zip(*(read.events[c].to_pylist() for c in ("order_id", "amount_minor")), strict=True)
    )
    assert amounts == {"a": 2085, "b": 2, "c": 12, "d": 14, "e": 10_000_000}


def test_minor_amounts_of_a_currency_without_minor_units():
    amounts = pa.chunked_array([pa.array(["1.5", "2.5", None]).cast(pa.decimal128(38, 12))])
    assert minor_amounts(amounts, 1).to_pylist() == [2, 2, None]


def test_corrupt_lines_are_put_aside_with_their_number(tmp_path):
    text = (HEADER + "a,c,2024-01-01,1\nb,c\nc,c,2024-01-01,1,9\n").encode()
    text += b'd,caf\xe9,2024-01-01,1\ne,"c"x,2024-01-01,1\nf,"c\nd",2024-01-01,2\n'
    read = csv_source(text, tmp_path).read("orders", FIRST, LAST)
    assert read.events["order_id"].to_pylist() == ["a", "f"]
    assert reasons(read) == {"corrupt_line": 4}
    assert read.quarantined["day"].to_pylist() == [None] * 4
    details = read.quarantined["detail"].to_pylist()
    assert [detail.split(":")[0] for detail in details] == [f"line {n}" for n in (3, 4, 5, 6)]
    assert json.loads(read.quarantined["row"][0].as_py()) == {"line": 3, "text": "b,c"}
    assert read.rows_read == 6
    assert accounted(read)


def test_a_quote_never_closed_says_how_much_it_takes_in(tmp_path):
    text = HEADER + 'a,c,2024-01-01,1\nb,"c,2024-01-01,1\n' + "x,c,2024-01-01,1\n" * 5
    read = csv_source(text, tmp_path).read("orders", FIRST, LAST)
    assert "the 5 lines after it" in read.quarantined["detail"][0].as_py()


@pytest.mark.parametrize("zipped", [False, True])
def test_lines_may_end_in_different_ways(tmp_path, zipped):
    text = "".join(f"{n},c,2024-01-01,1\r\n" for n in range(3))
    text = (
        HEADER + text + 'short\r\nlong,c,2024-01-01,1,9\nx,"c\nd",2024-01-01,1\nopen,"c\n'
    ).encode()
    path = tmp_path / ("o.csv.gz" if zipped else "o.csv")
    path.write_bytes(gzip.compress(text) if zipped else text)
    read = source(path, tmp_path).read("orders", FIRST, LAST)
    assert read.events["order_id"].to_pylist() == ["0", "1", "2", "x"]
    assert reasons(read) == {"corrupt_line": 3}
    details = read.quarantined["detail"].to_pylist()
    assert [detail.split(":")[0] for detail in details] == [f"line {n}" for n in (5, 6, 8)]
    assert not any("takes in" in detail for detail in details)
    assert json.loads(read.quarantined["row"][0].as_py())["text"] == "short"
    assert accounted(read)


def test_line_ends_across_blocks_are_made_one(tmp_path):
    # The block read at a time ends between the two characters of a line end.
    before = HEADER + "a,c,2024-01-01,1\n"
    filler = "y" * ((1 << 20) - len(before) - len("b,,2024-01-01,1") - 1)
    text = f"{before}b,{filler},2024-01-01,1\r\nd,c,2024-01-01,1\n"
    assert text[(1 << 20) - 1] == "\r"
    read = csv_source(text, tmp_path).read("orders", FIRST, LAST)
    assert read.events["order_id"].to_pylist() == ["a", "b", "d"]
    assert not read.quarantined.num_rows


def test_what_lies_after_now_is_handed_over_for_quarantine(tmp_path):
    text = HEADER + "a,c,2024-01-01,1\nf,c,2124-01-01,1\nz,c,2024-03-01,1\n"
    now = datetime(2024, 6, 1, tzinfo=UTC)
    read = csv_source(text, tmp_path).read("orders", FIRST, LAST, now)
    assert read.events["order_id"].to_pylist() == ["a", "f"]
    assert read.outside == 1
    checked = validate_events(ORDERS, read.events, FIRST, LAST, now)
    assert checked.quarantined["reason"].to_pylist() == ["future_occurred_at"]


def test_files_are_looked_at_before_they_are_read(tmp_path):
    def look(**orders):
        config = {"orders": {"from": str(tmp_path / "o.csv"), "columns": COLUMNS, **orders}}
        config["customers"] = {"derive_from": "orders"}
        sources.check_files(msgspec.convert({"kind": "tables", "tables": config}, SourceConfig))

    with pytest.raises(UserError, match=r"orders: there is no file .*o\.csv"):
        look()
    (tmp_path / "o.csv").write_text(HEADER + "not,a,sound\n")
    look()
    with pytest.raises(UserError, match=r"has no column Amount .did you mean amount"):
        look(columns={**COLUMNS, "amount": "Amount"})
    pq.write_table(pa.table({"id": ["a"], "customer": ["c"], "at": ["x"]}), tmp_path / "o.parquet")
    with pytest.raises(UserError, match="has no column amount"):
        look(**{"from": str(tmp_path / "o.parquet")})
    (tmp_path / "o.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"cannot be read.*is the file complete"):
        look(**{"from": str(tmp_path / "o.parquet")})
    look(**{"from": "postgresql://nowhere/db", "table": "t"})


def test_another_encoding_can_be_named(tmp_path):
    text = (HEADER + "a,café,2024-01-01,1\n").encode("latin-1")
    read = csv_source(text, tmp_path, encoding="latin-1").read("orders", FIRST, LAST)
    assert read.events["customer_id"].to_pylist() == ["café"]


def test_each_row_has_the_first_reason_that_applies(tmp_path):
    lines = [
        "a,c,2024-01-01,1",
        ",c,2024-01-01,1",
        "b, ,2024-01-01,1",
        "c,c,,1",
        "d,c,yesterday,1",
        "e,c,infinity,1",
        "f,c,2024-01-01,",
        "g,c,2024-01-01,one",
        "h,c,2024-01-01,9999999999999999",
        "Cx,,2024-01-01,-1",
    ]
    rules = [
        {"reason": "cancelled", "column": "id", "must_not": {"starts_with": "C"}},
        {"reason": "not_positive", "column": "amount", "must": {"above": 0}},
    ]
    text = HEADER + "\n".join(lines)
    read = csv_source(text, tmp_path, rules=rules).read("orders", FIRST, LAST)
    found = [
        (json.loads(row["row"])["id"], row["reason"], row["day"])
        for row in read.quarantined.to_pylist()
    ]
    day = date(2024, 1, 1)
    assert found == [
        (None, "missing_order_id", day),
        ("b", "missing_customer_id", day),
        ("c", "missing_occurred_at", None),
        ("d", "invalid_occurred_at", None),
        ("e", "invalid_occurred_at", None),
        ("f", "not_positive", day),
        ("g", "not_positive", day),
        ("h", "invalid_amount", day),
        ("Cx", "cancelled", day),
    ]
    details = dict(
        zip(*(read.quarantined[c].to_pylist() for c in ("reason", "detail")), strict=True)
    )
    assert details["cancelled"] == "id must not start with C"
    assert details["not_positive"] == "amount must be above 0"
    assert accounted(read)


@pytest.mark.parametrize(
    ("test", "kept"),
    [
        ({"equals": "x"}, ["x"]),
        ({"equals": 7}, ["7", "7.0"]),
        ({"one_of": ["x", 8]}, ["x", "8"]),
        ({"starts_with": "x"}, ["x", "xy"]),
        ({"matches": "x|8"}, ["x", "8"]),
        ({"at_least": 8}, ["8"]),
        ({"above": 7, "below": 9}, ["8"]),
        ({"at_most": 7}, ["7", "7.0"]),
        ("not_null", ["x", "xy", "7", "7.0", "8"]),
    ],
)
def test_what_conditions_hold_for(tmp_path, test, kept):
    values = ["x", "xy", "7", "7.0", "8", ""]
    text = "id,customer,at,amount,v\n" + "".join(
        f"{n},c,2024-01-01,1,{value}\n" for n, value in enumerate(values)
    )
    wanted = [str(values.index(value)) for value in kept]
    other = [str(n) for n in range(len(values)) if str(n) not in wanted]
    keep = csv_source(text, tmp_path, filters=[{"column": "v", "keep": test}])
    assert keep.read("orders", FIRST, LAST).events["order_id"].to_pylist() == wanted
    drop = csv_source(text, tmp_path, filters=[{"column": "v", "drop": test}])
    assert drop.read("orders", FIRST, LAST).events["order_id"].to_pylist() == other


def test_filtered_rows_are_counted_apart_and_not_judged(tmp_path):
    text = "id,customer,at,amount,country\n,,,,FR\na,c,2024-01-01,1,UK\nb,,2024-01-01,1,UK\n"
    filters = [{"column": "country", "keep": {"equals": "UK"}}]
    read = csv_source(text, tmp_path, filters=filters).read("orders", FIRST, LAST)
    assert (read.rows_read, read.used, read.filtered) == (3, 1, 1)
    assert reasons(read) == {"missing_customer_id": 1}


def test_values_of_the_configuration_are_never_sql(tmp_path):
    nasty = "'; DROP TABLE source; --"
    text = f'id,customer,"a""t",amount\na,c,2024-01-01,1\nb,"{nasty}",2024-01-01,1\n'
    filters = [{"column": "customer", "drop": {"equals": nasty}}]
    columns = {**COLUMNS, "occurred_at": 'a"t'}
    read = csv_source(text, tmp_path, filters=filters, columns=columns).read("orders", FIRST, LAST)
    assert (read.used, read.filtered) == (1, 1)


@pytest.mark.parametrize(
    ("written", "mapping", "hour"),
    [
        ("2024-01-10 12:00:00", {}, 11),
        ("2024-01-10T12:00:00Z", {}, 12),
        ("2024-01-10 12:00:00.250+05:30", {}, 6),
        ("2024-01-10 12:00:00", {"timezone": "America/New_York"}, 17),
        ("1/10/2024 12:00", {"format": "%m/%d/%Y %H:%M"}, 11),
        ("10.01.2024 12:00 +0200", {"format": "%d.%m.%Y %H:%M %z"}, 10),
        ("1704888000", {"as": "unix_seconds"}, 12),
        ("1704888000000", {"as": "unix_milliseconds"}, 12),
    ],
)
def test_times_are_brought_to_utc(tmp_path, written, mapping, hour):
    path = tmp_path / "orders.csv"
    path.write_text(HEADER + f"a,c,{written},1\n")
    columns = {**COLUMNS, "occurred_at": {"column": "at", **mapping}}
    orders = {"from": str(path), "columns": columns}
    tables = {"orders": orders, "customers": {"derive_from": "orders"}}
    config = {"kind": "tables", "timezone": "Europe/Paris", "tables": tables}
    read = open_source(msgspec.convert(config, SourceConfig), FIRST).read("orders", FIRST, LAST)
    assert [moment.hour for moment in read.events["occurred_at"].to_pylist()] == [hour]


def test_an_event_of_several_rows(tmp_path):
    lines = [
        "a,c,2024-01-02 09:00,1,2024-01-03",
        "a,c,2024-01-01 23:00,2.50,2024-01-04",
        "a,c,2024-01-02 09:00,1,2024-01-03",  # exact duplicate
        "b,c,2024-01-05,1,",
        "b,d,2024-01-05,1,",
    ]
    text = "id,customer,at,amount,known\n" + "\n".join(lines)
    columns = {**COLUMNS, "ingested_at": "known"}
    both = csv_source(text, tmp_path, columns=columns, one_event_per="order_id")
    read = both.read("orders", FIRST, LAST)
    assert read.events.to_pylist() == [
        {
            "order_id": "a",
            "customer_id": "c",
            "occurred_at": datetime(2024, 1, 1, 23, tzinfo=UTC),
            "ingested_at": datetime(2024, 1, 4, tzinfo=UTC),
            "amount_minor": 350,
        }
    ]
    assert reasons(read) == {"exact_duplicate": 1, "conflicting_customer_id": 2}
    assert accounted(read)
    keep = csv_source(
        text, tmp_path, columns=columns, one_event_per="order_id", exact_duplicates="keep"
    ).read("orders", FIRST, LAST)
    assert keep.events["amount_minor"].to_pylist() == [450]


def test_an_identifier_belongs_to_its_earliest_event(tmp_path):
    text = HEADER + "a,late,2024-01-09,1\na,early,2024-01-02,1\nb,c,2024-01-03,1\n"
    read = csv_source(text, tmp_path).read("orders", FIRST, LAST)
    assert read.events["customer_id"].to_pylist() == ["early", "c"]
    assert reasons(read) == {"duplicate_order_id": 1}
    assert read.quarantined["day"].to_pylist() == [date(2024, 1, 9)]


def test_identifiers_can_be_whole_numbers_or_put_together(tmp_path):
    text = HEADER + "1.0,17850.0,2024-01-01,1\nx,12.5,2024-01-01,1\n"
    columns = {**COLUMNS, "order_id": {"join": ["customer", "at"]}}
    columns["customer_id"] = {"column": "customer", "as": "integer_text"}
    read = csv_source(text, tmp_path, columns=columns).read("orders", FIRST, LAST)
    assert read.events["customer_id"].to_pylist() == ["17850"]
    assert read.events["order_id"].to_pylist() == ["17850.0|2024-01-01"]
    assert reasons(read) == {"invalid_customer_id": 1}


def test_customers_appear_with_their_first_usable_order(tmp_path):
    lines = ["a,c1,2024-01-02,-1", "b,c1,2024-01-05,1", "d,c2,2024-01-03,1", "e,c2,2024-01-04,1"]
    both = csv_source(HEADER + "\n".join(lines), tmp_path)
    read = both.read("customers", FIRST, LAST)
    assert read.events.schema.names == CUSTOMERS.schema.names
    assert read.events.schema.types == CUSTOMERS.schema.types
    days = {row["customer_id"]: row["occurred_at"].day for row in read.events.to_pylist()}
    assert days == {"c2": 3, "c1": 5}
    assert (read.rows_read, read.used, read.quarantined.num_rows) == (0, 0, 0)
    assert both.read("customers", FIRST, date(2024, 1, 4)).events.num_rows == 1


def test_the_same_rows_from_any_kind_of_place(tmp_path):
    text = HEADER + "a,c,2024-01-01 10:00:00,1.25\nb,d,2024-01-02 10:00:00,2\n"
    (tmp_path / "one.csv").write_text(text)
    (tmp_path / "zip.csv.gz").write_bytes(gzip.compress(text.encode()))
    rows = pa.table(
        {
            "id": ["a", "b"],
            "customer": ["c", "d"],
            "at": pa.array([datetime(2024, 1, d, 10) for d in (1, 2)], pa.timestamp("us")),
            "amount": [1.25, 2.0],
        }
    )
    pq.write_table(rows.slice(0, 1), tmp_path / "part-1.parquet")
    pq.write_table(rows.slice(1, 1), tmp_path / "part-2.parquet")
    with duckdb.connect(tmp_path / "shop.duckdb") as con:
        con.execute("CREATE TABLE sales AS SELECT * FROM rows")
    con = sqlite3.connect(tmp_path / "shop.sqlite")
    con.execute("CREATE TABLE sales (id TEXT, customer TEXT, at TEXT, amount REAL)")
    con.executemany(
        "INSERT INTO sales VALUES (?, ?, ?, ?)",
        [("a", "c", "2024-01-01 10:00:00", 1.25), ("b", "d", "2024-01-02 10:00:00", 2)],
    )
    con.commit()
    con.close()
    expected = source("one.csv", tmp_path).read("orders", FIRST, LAST).events
    assert expected.num_rows == 2
    for place, more in [
        ("zip.csv.gz", {}),
        ("part-*.parquet", {}),
        ("duckdb://shop.duckdb", {"table": "sales"}),
        ("sqlite://shop.sqlite", {"table": "sales"}),
    ]:
        assert source(place, tmp_path, **more).read("orders", FIRST, LAST).events == expected, place


def test_nan_is_a_null(tmp_path):
    rows = pa.table(
        {
            "id": ["a", "b"],
            "customer": [1.0, float("nan")],
            "at": ["2024-01-01"] * 2,
            "amount": [1, 1],
        }
    )
    pq.write_table(rows, tmp_path / "o.parquet")
    read = source("o.parquet", tmp_path).read("orders", FIRST, LAST)
    assert reasons(read) == {"missing_customer_id": 1}


def test_a_file_is_parsed_once_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "orders.csv"
    path.write_text(HEADER + "a,c,2024-01-01,1\n")
    loads = []
    real = sources.load_files
    monkeypatch.setattr(sources, "load_files", lambda *a, **k: loads.append(1) or real(*a, **k))
    read = source(path, tmp_path)
    read.read("orders", FIRST, LAST)
    read.read("customers", FIRST, LAST)
    assert len(loads) == 1
    path.write_text(HEADER + "a,c,2024-01-01,1\nb,c,2024-01-01,1\n")
    assert read.read("orders", FIRST, LAST).events.num_rows == 2


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", "", "X1"]),
        st.sampled_from(["c1", "c2", ""]),
        st.sampled_from(["2024-01-01", "2024-01-02 23:59:59.999999", "2024-01-03", "no", ""]),
        st.sampled_from(["1", "0.125", "-2", "one", ""]),
    ),
    max_size=12,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=ROWS, per_order=st.booleans())
def test_every_row_is_accounted_for_and_days_add_up(tmp_path, rows, per_order):
    text = HEADER + "z,z,2024-01-04,1\n" + "".join(",".join(row) + "\n" for row in rows)
    options = {"one_event_per": "order_id"} if per_order else {}
    filters = [{"column": "id", "drop": {"starts_with": "X"}}]
    read = csv_source(text, tmp_path, filters=filters, **options)
    whole = read.read("orders", FIRST, LAST)
    assert accounted(whole)
    assert whole.rows_read == 1 + len(rows)
    assert whole.outside == 0
    days = [FIRST + timedelta(days=n) for n in range(5)]
    each = [read.read("orders", day, day) for day in days]
    assert all(accounted(day) for day in each)
    assert pa.concat_tables(day.events for day in each) == whole.events
    undated = whole.quarantined["day"].null_count
    dated = sum(day.quarantined.num_rows - undated for day in each)
    assert dated + undated == whole.quarantined.num_rows


def no_source(place: str | Path, tmp_path: Path, **orders: Any) -> str:
    with pytest.raises(UserError) as caught:
        source(place, tmp_path, **orders).read("orders", FIRST, LAST)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_file(tmp_path):
    message = no_source("nowhere.csv", tmp_path)
    assert f"no file {tmp_path / 'nowhere.csv'}" in message
    assert no_source("*.parquet", tmp_path).startswith("orders: there is no file")
    assert "is a directory" in no_source(tmp_path, tmp_path)


def test_an_unknown_column_lists_those_there_are(tmp_path):
    (tmp_path / "o.csv").write_text("id,Customer_ID,at,amount\na,c,2024-01-01,1\n")
    columns = {**COLUMNS, "customer_id": "customer_id"}
    message = no_source("o.csv", tmp_path, columns=columns)
    assert "has no column customer_id (did you mean Customer_ID?)" in message
    assert "it has id, Customer_ID, at, amount" in message
    (tmp_path / "s.csv").write_text("id;customer;at;amount\na;c;2024-01-01;1\n")
    assert "is the delimiter right?" in no_source("s.csv", tmp_path)
    assert source("s.csv", tmp_path, delimiter=";").read("orders", FIRST, LAST).used == 1


def test_nothing_to_read(tmp_path):
    (tmp_path / "zero.csv").write_text("")
    assert "has no rows" in no_source("zero.csv", tmp_path)
    (tmp_path / "header.csv").write_text(HEADER)
    assert "has no rows" in no_source("header.csv", tmp_path)
    (tmp_path / "bad.csv").write_text(HEADER + "a\nb\n")
    assert "has no rows (all 2 lines are corrupt)" in no_source("bad.csv", tmp_path)
    (tmp_path / "useless.csv").write_text(HEADER + "a,,2024-01-01,1\nb,,2024-01-01,1\n")
    message = no_source("useless.csv", tmp_path)
    assert "none of the 2 rows" in message
    assert "missing_customer_id 2" in message


def test_files_that_cannot_be_read(tmp_path):
    whole = gzip.compress((HEADER + "".join(f"{n},c,2024-01-01,1\n" for n in range(9999))).encode())
    (tmp_path / "half.csv.gz").write_bytes(whole[: len(whole) // 2])
    assert "is the file complete?" in no_source("half.csv.gz", tmp_path)
    (tmp_path / "plain.csv.gz").write_text(HEADER)
    assert "cannot be read" in no_source("plain.csv.gz", tmp_path)
    (tmp_path / "no.parquet").write_text("text")
    assert "cannot be read" in no_source("no.parquet", tmp_path)
    (tmp_path / "o.xlsx").write_text("text")
    assert "set format to csv or parquet" in no_source("o.xlsx", tmp_path)
    (tmp_path / "twice.csv").write_text("id,ID\n1,2\n")
    assert "two columns" in no_source("twice.csv", tmp_path)


def test_databases_that_cannot_be_read(tmp_path):
    assert "No such file" in no_source("sqlite://none.db", tmp_path, table="t")
    assert not (tmp_path / "none.db").exists()
    sqlite3.connect(tmp_path / "x.db").close()
    assert "has no table t" in no_source("sqlite://x.db", tmp_path, table="t")
    duckdb.connect(tmp_path / "x.duckdb").close()
    assert "has no table t" in no_source("duckdb://x.duckdb", tmp_path, table="t")
    assert "cannot be read" in no_source("duckdb://x.db", tmp_path, table="t")
    assert "name its table" in no_source("sqlite://x.db", tmp_path)
    secret = "postgres://shop:hunter2@127.0.0.1:1/sales"
    message = no_source(secret, tmp_path, table="t")
    assert "postgres://shop:***@127.0.0.1:1/sales" in message
    assert "hunter2" not in message


def refused(document: str) -> str:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(yaml.safe_load(document), SourceConfig)
    return str(caught.value)


def test_a_source_without_orders_or_customers_is_refused():
    orders = (
        "orders: {from: a.csv, columns: {order_id: a, customer_id: b, occurred_at: c, amount: d}}"
    )
    assert "derive_from: orders" in refused(f"{{kind: tables, tables: {{{orders}}}}}")
    assert "has no orders" in refused("{kind: tables, tables: {customers: {derive_from: orders}}}")


@pytest.mark.parametrize(
    ("orders", "complaint"),
    [
        ("{from: a, colums: {}}", "unknown field `colums`"),
        ("{}", "exactly one of from, derive_from"),
        ("{from: a, columns: {order_id: a, customer_id: b, occurred_at: c}}", "lacks amount"),
        ("{from: a, columns: {orderid: a}}", "no column orderid (did you mean order_id?)"),
        ("{from: a, columns: {order_id: {product: [a, b]}}}", "only an amount"),
        ("{from: a, columns: {order_id: {column: a, join: [b]}}}", "exactly one of column"),
        ("{from: a, columns: {occurred_at: {column: a, timezone: Mars}}}", "no time zone Mars"),
        ("{from: a, rules: [{reason: r, column: c}]}", "exactly one of must, must_not"),
        ("{from: a, rules: [{reason: r, column: c, must: {}}]}", "give one of equals"),
        ("{from: a, rules: [{reason: r, column: c, must: {matches: '('}}]}", "regular expression"),
        ("{from: a, rules: [{reason: A B, column: c, must: not_null}]}", "matching regex"),
        ("{derive_from: orders}", "only customers can be derived"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_place(orders, complaint):
    document = f"{{kind: tables, tables: {{orders: {orders}, customers: {{derive_from: orders}}}}}}"
    message = refused(document)
    assert complaint in message
    assert "$" in message


def test_paths_start_at_the_configuration_and_may_name_variables(tmp_path):
    tables = {
        "orders": {"from": "data/o.csv", "columns": COLUMNS},
        "customers": {"derive_from": "orders"},
    }
    config = msgspec.convert({"kind": "tables", "tables": tables}, SourceConfig)

    def located(place: str, **environment: str) -> str | None:
        orders = msgspec.structs.replace(config.tables.orders, from_=place)
        changed = msgspec.structs.replace(
            config, tables=msgspec.structs.replace(config.tables, orders=orders)
        )
        return from_of(sources.resolve_paths(changed, tmp_path, environment))

    assert located("data/o.csv") == str(tmp_path / "data/o.csv")
    assert located("${D}/o.csv", D="/elsewhere") == "/elsewhere/o.csv"
    assert located("${D}", D="o.csv") == str(Path.cwd() / "o.csv")
    assert located("sqlite://shop.db") == f"sqlite://{tmp_path / 'shop.db'}"
    assert located("postgres://u:${PW}@host/db", PW="x") == "postgres://u:x@host/db"
    with pytest.raises(UserError, match=r"\$\{D\}; set that environment variable"):
        located("${D}/o.csv")


def test_the_built_in_shop_is_a_source():
    config = msgspec.convert({"kind": "shop", "shop": {"customers": 60}}, SourceConfig)
    shop = open_source(config, FIRST)
    assert shop.tables == sources.source_tables(config)
    read = shop.read("orders", FIRST, FIRST + timedelta(days=6))
    assert read.events.schema.equals(ORDERS.schema)
    assert read.rows_read == read.used == read.events.num_rows > 0
    assert read.quarantined.schema == QUARANTINE_SCHEMA


def test_the_shipped_configurations_load(monkeypatch, tmp_path):
    from churn_assets import settings as project

    folder = Path(project.__file__).parent / "config"
    shop = project.load_settings(folder / "shop.yaml")
    bare = project.Settings(source=sources.ShopSourceConfig(), calendar=shop.calendar)
    assert shop == bare, "shop.yaml shows other values than the defaults"
    monkeypatch.setenv("CHURN_DATA", str(tmp_path / "x.csv"))
    retail = project.load_settings(folder / "online_retail.yaml")
    assert retail.raw_tables == ("customers", "orders")
    assert os.fspath(tmp_path / "x.csv") == from_of(retail.source)
