from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Sequence
from datetime import date, timedelta
from itertools import pairwise
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from brute_force import DAY, FIRST, TICK, Event, raw_table
from hypothesis import given, settings
from hypothesis import strategies as st

from churn_assets.data.contents import content_hash
from churn_assets.data.lake import Lake
from churn_assets.data.tables import ORDERS
from churn_assets.data.windows import days_between, midnight
from churn_assets.errors import UserError

LAST = FIRST + timedelta(days=4)
DAYS = days_between(FIRST, LAST)
CON = ibis.duckdb.connect()

# Ibis asks DuckDB for a table's schema by a name that DuckDB renamed.
pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")


def orders(*moments, amount: int = 5) -> pa.Table:
    return raw_table("orders", [Event(f"c{n}", m, None, amount) for n, m in enumerate(moments)])


def filled(tmp_path, skip: tuple[date, ...] = ()) -> Lake:
    """A lake with two orders on each of DAYS, at the first and the last instant of the day."""
    lake = Lake(str(tmp_path / "lake"))
    for day in DAYS:
        if day not in skip:
            rows = orders(midnight(day), midnight(day + DAY) - TICK)
            lake.write("orders", day, day, rows, day_of="occurred_at")
    return lake


def files(lake: Lake, table: str = "orders") -> dict[str, bytes]:
    found = {}
    for folder, _, names in os.walk(f"{lake.base}/{table}"):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, lake.base)] = file.read()
    return found


def test_each_day_is_one_hive_partition(tmp_path) -> None:
    lake = filled(tmp_path)
    assert set(files(lake)) == {f"orders/day={day}/part-0.parquet" for day in DAYS}
    assert lake.days("orders") == DAYS
    assert lake.row_counts("orders") == dict.fromkeys(DAYS, 2)
    assert lake.schema("orders", FIRST).equals(ORDERS.schema)


def test_a_row_lies_in_the_partition_of_its_day_also_at_midnight(tmp_path) -> None:
    lake = Lake(str(tmp_path))
    rows = orders(midnight(LAST), midnight(FIRST), midnight(LAST) - TICK, midnight(FIRST) + DAY)
    counts = lake.write("orders", FIRST, LAST, rows, day_of="occurred_at")
    assert list(counts.values()) == [1, 1, 0, 1, 1]
    for day in DAYS:
        moments = lake.read("orders", day, day)["occurred_at"].to_pylist()
        assert [moment.date() for moment in moments] == [day] * counts[day]


def test_what_was_written_is_read_back(tmp_path) -> None:
    lake = Lake(str(tmp_path))
    rows = orders(*(midnight(day) + 5 * TICK for day in DAYS))
    lake.write("orders", FIRST, LAST, rows, day_of="occurred_at")
    assert lake.read("orders", FIRST, LAST).equals(rows)
    assert lake.read("orders", columns=["order_id"]).column_names == ["order_id"]
    assert lake.read("orders", days=[LAST, FIRST]).equals(pa.concat_tables([rows[:1], rows[4:]]))


def test_a_day_without_rows_is_empty_and_not_missing(tmp_path) -> None:
    lake = Lake(str(tmp_path))
    lake.write("orders", FIRST, LAST, orders(midnight(FIRST)), day_of="occurred_at")
    assert lake.days("orders") == DAYS
    assert lake.row_counts("orders", LAST, LAST) == {LAST: 0}
    assert lake.read("orders", LAST, LAST).schema.equals(ORDERS.schema)
    assert lake.missing("orders", FIRST, LAST + DAY) == [LAST + DAY]


def test_a_write_replaces_exactly_its_partitions(tmp_path) -> None:
    lake = filled(tmp_path)
    before = files(lake)
    lake.write(
        "orders", DAYS[1], DAYS[2], orders(midnight(DAYS[1]), amount=9), day_of="occurred_at"
    )
    after = files(lake)
    changed = {path for path in before if before[path] != after[path]}
    assert set(after) == set(before)
    assert changed == {f"orders/day={day}/part-0.parquet" for day in DAYS[1:3]}
    assert lake.row_counts("orders", DAYS[1], DAYS[2]) == {DAYS[1]: 1, DAYS[2]: 0}


def test_rows_are_counted_once_until_a_partition_is_written_again(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, read = filled(tmp_path), []
    footers = Lake._footers

    def counted(lake: Lake, table: str, days: Sequence[date]) -> Any:
        read.append(list(days))
        return footers(lake, table, days)

    monkeypatch.setattr(Lake, "_footers", counted)
    assert lake.row_counts("orders") == Lake(lake.root).row_counts("orders")
    lake.write("orders", DAYS[1], DAYS[1], orders(midnight(DAYS[1])), day_of="occurred_at")
    assert lake.row_counts("orders")[DAYS[1]] == 1
    assert read == [DAYS, [], [DAYS[1]]]


def test_writing_the_same_again_changes_no_byte(tmp_path) -> None:
    lake = filled(tmp_path)
    before = files(lake)
    lake.write("orders", FIRST, LAST, lake.read("orders"), day_of="occurred_at")
    assert files(lake) == before


@pytest.mark.parametrize("outside", [FIRST - DAY, LAST + DAY])
def test_a_row_outside_of_the_range_leaves_everything_as_it_was(tmp_path, outside: date) -> None:
    lake = filled(tmp_path)
    before = files(lake)
    with pytest.raises(ValueError, match=f"a row of {outside} is outside"):
        lake.write(
            "orders", FIRST, LAST, orders(midnight(outside), midnight(LAST)), day_of="occurred_at"
        )
    assert files(lake) == before


def test_a_row_without_a_day_is_refused(tmp_path) -> None:
    rows = pa.table({"day": pa.array([FIRST, None], pa.date32()), "x": [1, 2]})
    with pytest.raises(ValueError, match="1 rows without a day"):
        Lake(str(tmp_path)).write("t", FIRST, LAST, rows, day_of="day")


def test_a_write_that_fails_half_way_leaves_everything_as_it_was(tmp_path, monkeypatch) -> None:
    lake = filled(tmp_path)
    before = files(lake)
    write_table, calls = pq.ParquetWriter.write_table, []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise OSError("disk full")
        return write_table(*args, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", failing)
    rows = orders(*(midnight(day) for day in DAYS))
    with pytest.raises(OSError, match="disk full"):
        lake.write("orders", FIRST, LAST, rows, day_of="occurred_at")
    assert files(lake) == before


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave_workspace(lake: Lake, host: str, pid: int) -> str:
    workspace = f"{lake.base}/orders/.tmp-{host}-{pid}-{'0' * 32}"
    os.makedirs(workspace)
    with open(f"{workspace}/{FIRST}.tmp", "w") as file:
        file.write("half a file")
    return workspace


def test_what_a_killed_run_left_is_not_read_and_goes_with_the_next_write(tmp_path) -> None:
    lake = filled(tmp_path)
    killed = leave_workspace(lake, socket.gethostname(), dead_pid())
    at_work = leave_workspace(lake, socket.gethostname(), os.getpid())
    elsewhere = leave_workspace(lake, "another-machine", os.getpid())
    assert lake.days("orders") == DAYS
    assert lake.read("orders").num_rows == 10
    assert CON.to_pyarrow(lake.scan(CON, "orders").count()).as_py() == 10
    lake.write("orders", FIRST, FIRST, orders(midnight(FIRST)), day_of="occurred_at")
    assert [os.path.exists(path) for path in (killed, at_work, elsewhere)] == [False, True, True]
    tomorrow = Lake(lake.root, clock=lambda: os.path.getmtime(elsewhere) + 86_401)
    tomorrow.write("orders", FIRST, FIRST, orders(midnight(FIRST)), day_of="occurred_at")
    assert [os.path.exists(path) for path in (at_work, elsewhere)] == [True, False]


def test_a_partition_that_was_begun_is_no_partition(tmp_path) -> None:
    lake = filled(tmp_path)
    os.makedirs(os.path.dirname(lake.path("orders", LAST + DAY)))
    assert lake.days("orders") == DAYS


def test_a_scan_reads_the_days_asked_for_with_their_day(tmp_path) -> None:
    lake = filled(tmp_path)
    rows = CON.to_pyarrow(lake.scan(CON, "orders", DAYS[1], DAYS[2]).order_by("occurred_at"))
    assert rows.column_names == [*ORDERS.schema.names, "day"]
    assert rows["day"].type == pa.date32()
    assert rows["occurred_at"].type == pa.timestamp("us", "UTC")
    moments = rows["occurred_at"].to_pylist()
    assert rows["day"].to_pylist() == [moment.date() for moment in moments]
    assert set(rows["day"].to_pylist()) == set(DAYS[1:3])
    scattered = lake.scan(CON, "orders", days=[DAYS[0], DAYS[4]])
    assert CON.to_pyarrow(scattered.day.max()).as_py() == DAYS[4]
    assert CON.to_pyarrow(scattered.count()).as_py() == 4


def test_missing_days_are_named_with_what_to_do(tmp_path) -> None:
    lake = filled(tmp_path, skip=(DAYS[1], DAYS[3]))
    told = f"2 day.s. .{DAYS[1]}, {DAYS[3]}.; materialize orders for {DAYS[1]} to {DAYS[3]}"
    with pytest.raises(UserError, match=told):
        lake.scan(CON, "orders", FIRST, LAST)
    with pytest.raises(UserError, match=told):
        lake.read("orders")
    with pytest.raises(UserError, match="1 day"):
        lake.read("orders", days=[FIRST, DAYS[1]])
    with pytest.raises(UserError, match="materialize orders"):
        lake.content_hash("orders", DAYS[1])
    assert lake.read("orders", FIRST, LAST, strict=False).num_rows == 6


def test_a_table_that_was_never_written(tmp_path) -> None:
    lake = Lake(str(tmp_path / "nowhere"))
    assert lake.days("orders") == []
    assert lake.row_counts("orders") == {}
    with pytest.raises(UserError, match="materialize orders first"):
        lake.read("orders")
    with pytest.raises(UserError, match=f"materialize orders for {FIRST} to {FIRST}"):
        lake.scan(CON, "orders", FIRST, FIRST)
    empty = lake.scan(CON, "orders", strict=False)
    assert CON.to_pyarrow(empty).num_rows == 0
    assert "day" in empty.columns
    assert lake.read("orders", strict=False).schema.equals(ORDERS.schema)
    with pytest.raises(UserError, match="materialize customer_features"):
        lake.read("customer_features", strict=False)


def test_an_expression_is_written_as_its_rows_are(tmp_path) -> None:
    lake = Lake(str(tmp_path))
    days = [DAYS[n] for n in (2, 0, 2, 4)]
    rows = pa.table({"day": pa.array(days, pa.date32()), "customer_id": ["b", "x", "a", "y"]})
    counts = lake.write("from_rows", FIRST, LAST, rows, day_of="day", order_by=["customer_id"])
    source = lake.scan(CON, "from_rows").mutate(known=ibis.literal(True)).drop("known")
    again = lake.write("computed", FIRST, LAST, source, day_of="day", order_by=["customer_id"])
    assert list(counts.values()) == list(again.values()) == [1, 0, 2, 0, 1]
    assert lake.read("computed").to_pydict() == {"customer_id": ["x", "a", "b", "y"]}
    assert lake.read("from_rows").equals(lake.read("computed"))


def test_rows_in_many_chunks_are_cut_by_day(tmp_path) -> None:
    lake = Lake(str(tmp_path))
    rows = orders(*(midnight(FIRST) + n * DAY / 8 for n in range(40)))
    chunked = pa.concat_tables([rows.slice(n, 3) for n in range(0, 40, 3)])
    counts = lake.write("orders", FIRST, LAST, chunked, day_of="occurred_at")
    assert counts == dict.fromkeys(DAYS, 8)
    assert lake.read("orders").equals(rows)


@pytest.mark.parametrize("root", ["disk", "memory://"])
@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=6))
def test_where_a_part_ends_leaves_no_trace(tmp_path_factory, root: str, cuts: list[int]) -> None:
    base = tmp_path_factory.mktemp("lake") if root == "disk" else f"memory://{uuid.uuid4().hex}"
    lake = Lake(str(base))
    # 40 rows of 4 days, in groups of 3: parts end inside of groups, at their end, and are empty.
    rows = pa.table(
        {"x": range(40), "day": pa.array([DAYS[n % 4] for n in range(40)], pa.date32())}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("churn_assets.data.day_files.GROUP_ROWS", 3)
        whole = lake.write("whole", FIRST, LAST, rows, day_of="day", order_by=["x"])
        with lake.replacing("parts", FIRST, LAST, day_of="day", order_by=["x"]) as parts:
            for start, end in pairwise([0, *sorted(cuts), 40]):
                parts.append(rows.slice(start, end - start))
    assert parts.counts == whole
    assert list(whole.values()) == [10, 10, 10, 10, 0]
    for day in DAYS:
        path = lake.path("whole", day)
        assert lake.filesystem.cat_file(path) == lake.filesystem.cat_file(lake.path("parts", day))
        with lake.filesystem.open(path) as file:
            groups = pq.ParquetFile(file).metadata
        sizes = [groups.row_group(n).num_rows for n in range(groups.num_row_groups)]
        assert sizes == ([3, 3, 3, 1] if whole[day] else [0]), sizes


def test_parts_that_fail_replace_nothing(tmp_path) -> None:
    lake = filled(tmp_path)
    before = files(lake)

    def half_a_write() -> None:
        with lake.replacing("orders", FIRST, LAST, day_of="occurred_at") as parts:
            parts.append(orders(midnight(FIRST), amount=9))
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        half_a_write()
    assert files(lake) == before


def test_partitions_of_unknown_columns_are_not_written(tmp_path) -> None:
    lake = filled(tmp_path)
    with (
        pytest.raises(ValueError, match="nothing was appended"),
        lake.replacing("orders", FIRST, LAST, day_of="occurred_at"),
    ):
        pass


def test_a_file_beside_the_tables(tmp_path) -> None:
    lake = Lake(str(tmp_path))
    lake.put("notes", "a.json", b"{}")
    lake.put("notes", "t.parquet", pa.table({"x": [1]}))
    assert lake.get_bytes("notes", "a.json") == b"{}"
    assert lake.get_table("notes", "t.parquet").to_pydict() == {"x": [1]}
    assert sorted(os.listdir(tmp_path / "notes")) == ["a.json", "t.parquet"]


def test_a_lake_elsewhere_than_on_disk() -> None:
    lake = Lake("memory://some/lake")
    rows = orders(midnight(FIRST), midnight(LAST))
    lake.write("orders", FIRST, LAST, rows, day_of="occurred_at")
    assert lake.days("orders") == DAYS
    assert lake.read("orders").equals(rows)
    assert lake.row_counts("orders", FIRST, FIRST) == {FIRST: 1}
    assert not [path for path in lake.filesystem.find(lake.base) if ".tmp" in path]


VALUES = st.fixed_dictionaries(
    {
        "n": st.none() | st.integers(-3, 3),
        "x": st.none() | st.sampled_from((0.0, -0.0, 1.5, float("nan"))),
        "s": st.none() | st.sampled_from(("", "a", "ab", "é\0")),
        "b": st.none() | st.booleans(),
        "t": st.none() | st.sampled_from((midnight(FIRST), midnight(LAST))),
    }
)
SCHEMA = pa.schema(
    {
        "n": pa.int64(),
        "x": pa.float64(),
        "s": pa.string(),
        "b": pa.bool_(),
        "t": pa.timestamp("us", "UTC"),
    }
)


@given(st.lists(VALUES, max_size=6), st.randoms(use_true_random=False))
def test_a_hash_is_of_the_rows_not_of_how_they_are_kept(rows, random) -> None:
    table = pa.Table.from_pylist(rows, SCHEMA)
    shuffled = random.sample(rows, len(rows))
    other = pa.Table.from_pylist([{"n": 9}, *shuffled], SCHEMA).slice(1)
    other = other.select(random.sample(SCHEMA.names, 5))
    place = other.schema.get_field_index("s")
    other = other.set_column(place, "s", other["s"].dictionary_encode())
    cut = random.randint(0, len(rows))
    other = pa.concat_tables([other.slice(0, cut), other.slice(cut)])
    assert content_hash(other) == content_hash(table)


@given(st.lists(VALUES, min_size=1, max_size=4), VALUES, st.integers(0, 3))
def test_other_rows_hash_to_something_else(rows, value, place: int) -> None:
    def said(these) -> list[str]:
        return sorted(
            repr(sorted((k, v + 0.0 if isinstance(v, float) else v) for k, v in row.items()))
            for row in these
        )

    changed = list(rows)
    changed[place % len(rows)] = value
    same = content_hash(pa.Table.from_pylist(rows, SCHEMA)) == content_hash(
        pa.Table.from_pylist(changed, SCHEMA)
    )
    assert same == (said(rows) == said(changed))


def test_a_hash_knows_multiplicity_columns_and_types() -> None:
    table = pa.table({"n": [1, 2]})
    others = [
        pa.table({"n": [1, 2, 2]}),
        pa.table({"m": [1, 2]}),
        pa.table({"n": [1.0, 2.0]}),
        pa.table({"n": [1, 2], "m": pa.nulls(2)}),
        pa.table({"n": [1, None]}),
        table.slice(0, 0),
    ]
    assert len({content_hash(t) for t in (table, *others)}) == 7


def test_a_hash_knows_where_one_text_ends() -> None:
    one, other = pa.table({"s": ["a", "bc"]}), pa.table({"s": ["ab", "c"]})
    assert content_hash(one) != content_hash(other)


def test_a_partition_hashes_alike_whoever_wrote_it(tmp_path) -> None:
    lake = filled(tmp_path)
    before = lake.content_hashes("orders", DAYS)
    rows = lake.read("orders", FIRST, FIRST)
    upside_down = rows.take([1, 0])
    pq.write_table(upside_down, lake.path("orders", FIRST), compression="gzip", version="1.0")
    assert lake.content_hashes("orders", DAYS) == before
    assert lake.content_hash("orders", FIRST) == content_hash(rows)
    pq.write_table(rows.slice(1), lake.path("orders", FIRST))
    assert lake.content_hash("orders", FIRST) != before[FIRST]
