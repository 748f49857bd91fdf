from __future__ import annotations

from datetime import timedelta

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from brute_force import DAY, FIRST, Event, raw_table

from churn_assets.contract.features import FEATURES, features_for
from churn_assets.data.contents import content_hash
from churn_assets.data.features import customer_features, scan_look_back
from churn_assets.data.labels import churn_labels, scan_label_inputs
from churn_assets.data.lake import Lake
from churn_assets.data.training_set import (
    assemble_training_set,
    changed_partitions,
    keep_rows,
    read_manifest,
    replace_values,
    restore_training_set,
    store_training_set,
)
from churn_assets.data.windows import Windows, cutoff_of, label_partition, midnight
from churn_assets.errors import UserError

WINDOWS = Windows(activity_days=10, horizon_days=5)
START = FIRST - timedelta(days=100)
LAST = FIRST + timedelta(days=20)
TABLES = ("orders", "support_tickets", "logins")
CHOSEN = [FIRST + timedelta(days=n) for n in (7, 0, 14)]
CON = ibis.duckdb.connect()

# Ibis asks DuckDB for a table's schema by a name that DuckDB renamed.
pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")


def happened(every: int) -> list[Event]:
    """Customer n has an event every (n + 1) * `every` days."""
    return [
        Event(f"c{n}", midnight(START) + day * DAY + n * DAY / 24, None, 100 + 7 * day)
        for n in range(8)
        for day in range(0, (LAST - START).days + 1, (n + 1) * every)
    ]


def materialize(lake: Lake, first, last) -> None:
    tables = scan_look_back(lake, CON, TABLES, first, last, WINDOWS, data_start=START)
    rows = customer_features(tables, first, last, WINDOWS)
    lake.write("customer_features", first, last, rows, day_of="day", order_by=["customer_id"])


def materialize_labels(lake: Lake, first, last) -> None:
    orders, features = scan_label_inputs(lake, CON, first, last, WINDOWS)
    rows = churn_labels(orders, features, first, last, WINDOWS)
    lake.write("churn_labels", first, last, rows, day_of="day", order_by=["customer_id"])


@pytest.fixture
def lake(tmp_path) -> Lake:
    lake = Lake(str(tmp_path))
    for every, table in enumerate(TABLES, start=1):
        rows = raw_table(table, happened(every))
        lake.write(table, START, LAST, rows, day_of="occurred_at")
    materialize(lake, FIRST, LAST)
    materialize_labels(lake, label_partition(FIRST, 5), LAST)
    return lake


def assemble(lake: Lake, features=FEATURES):
    return assemble_training_set(lake, CON, CHOSEN, WINDOWS, features)


def test_features_meet_the_labels_of_their_cutoff(lake: Lake) -> None:
    training_set = assemble(lake)
    table = training_set.table
    names = [feature.name for feature in FEATURES]
    assert table.column_names == ["customer_id", "cutoff", *names, "churned"]
    assert set(table["cutoff"].to_pylist()) == {cutoff_of(day) for day in CHOSEN}
    assert table.equals(table.sort_by([("cutoff", "ascending"), ("customer_id", "ascending")]))
    assert len(set(table["churned"].to_pylist())) == 2
    for day in CHOSEN:
        of_day = table.filter(ds.field("cutoff") == pa.scalar(cutoff_of(day)))
        assert of_day.select(["customer_id", "cutoff", *names]).equals(
            lake.read("customer_features", day, day)
        )
        labels = lake.read("churn_labels", *[label_partition(day, 5)] * 2)
        assert of_day["churned"].equals(labels["churned"])


def test_the_manifest_names_the_exact_partitions(lake: Lake) -> None:
    manifest = assemble(lake).manifest
    days = sorted(CHOSEN)
    assert [(p.table, p.day) for p in manifest.partitions] == [
        *(("customer_features", day) for day in days),
        *(("churn_labels", label_partition(day, 5)) for day in days),
    ]
    for part in manifest.partitions:
        assert part.content_hash == lake.content_hash(part.table, part.day)
        assert part.rows == lake.row_counts(part.table)[part.day] > 0
    assert (manifest.activity_days, manifest.horizon_days) == (10, 5)
    assert manifest.feature_days == tuple(days)


def test_no_row_is_lost(lake: Lake) -> None:
    training_set = assemble(lake)
    assert training_set.complete.passed
    assert training_set.complete.figures["churn_labels"] == training_set.table.num_rows


def test_a_row_without_its_label_is_told(lake: Lake) -> None:
    label_day = label_partition(CHOSEN[0], 5)
    labels = lake.read("churn_labels", label_day, label_day)
    days = pa.array([label_day] * (labels.num_rows - 1), pa.date32())
    lake.write(
        "churn_labels",
        label_day,
        label_day,
        labels.slice(1).append_column("day", days),
        day_of="day",
    )
    result = assemble(lake).complete
    assert not result.passed
    assert "rows were lost" in result.reason
    assert result.figures["training_set"] == result.figures["customer_features"] - 1


def test_the_hash_is_that_of_the_content(lake: Lake) -> None:
    training_set = assemble(lake)
    again = assemble_training_set(lake, CON, CHOSEN[::-1], WINDOWS, FEATURES)
    assert again.data_hash == training_set.data_hash == content_hash(training_set.table)
    fewer = assemble_training_set(lake, CON, CHOSEN[1:], WINDOWS, FEATURES)
    assert fewer.data_hash != training_set.data_hash
    assert assemble(lake, features_for(["orders"])).data_hash != training_set.data_hash


def test_materializing_a_partition_again_changes_nothing(lake: Lake) -> None:
    before = assemble(lake)
    materialize(lake, CHOSEN[0], CHOSEN[0])
    materialize(lake, FIRST, LAST)
    materialize_labels(lake, label_partition(CHOSEN[0], 5), LAST)
    assert assemble(lake).manifest == before.manifest
    assert changed_partitions(lake, before.manifest) == ()


def test_a_stored_training_set_comes_back_as_it_was(lake: Lake) -> None:
    training_set = assemble(lake)
    store_training_set(lake, training_set)
    late = Event("c0", midnight(CHOSEN[0]), None, 1)
    orders = raw_table("orders", [*happened(1), late])
    lake.write("orders", START, LAST, orders, day_of="occurred_at")
    materialize(lake, FIRST, LAST)
    assert assemble(lake).data_hash != training_set.data_hash
    assert restore_training_set(lake, training_set.data_hash).equals(training_set.table)
    manifest = read_manifest(lake, training_set.data_hash)
    assert manifest == training_set.manifest
    assert [(p.table, p.day) for p in changed_partitions(lake, manifest)] == [
        ("customer_features", day) for day in sorted(CHOSEN)[1:]
    ]


def test_a_partition_that_is_gone_has_changed(lake: Lake) -> None:
    manifest = assemble(lake).manifest
    lake.filesystem.rm(lake.path("customer_features", CHOSEN[1]))
    changed = changed_partitions(lake, manifest)
    assert [(part.table, part.day) for part in changed] == [("customer_features", CHOSEN[1])]


def test_a_training_set_that_is_not_there(lake: Lake) -> None:
    with pytest.raises(UserError, match="there is no training set"):
        restore_training_set(lake, "0" * 64)
    with pytest.raises(UserError, match="is not a data hash"):
        restore_training_set(lake, "../../customer_features")
    training_set = assemble(lake)
    path = store_training_set(lake, training_set)
    lake.filesystem.rm(path)
    with pytest.raises(UserError, match="there is no training set"):
        restore_training_set(lake, training_set.data_hash)


def test_a_training_set_that_was_changed_is_refused(lake: Lake) -> None:
    training_set = assemble(lake)
    path = store_training_set(lake, training_set)
    table = training_set.table
    turned = pa.array([not churned for churned in table["churned"].to_pylist()])
    pq.write_table(table.set_column(table.num_columns - 1, "churned", turned), path)
    with pytest.raises(UserError, match="was changed"):
        restore_training_set(lake, training_set.data_hash)
    with open(path, "wb") as file:
        file.write(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="cannot be read"):
        restore_training_set(lake, training_set.data_hash)
    lake.put("training_sets", f"{training_set.data_hash}.json", b"{")
    with pytest.raises(UserError, match=r"manifest .* is damaged"):
        restore_training_set(lake, training_set.data_hash)


def test_what_is_missing_is_named(lake: Lake) -> None:
    with pytest.raises(UserError, match="materialize churn_labels"):
        assemble_training_set(lake, CON, [LAST], WINDOWS, FEATURES)
    with pytest.raises(UserError, match="materialize customer_features"):
        assemble_training_set(lake, CON, [FIRST - DAY], WINDOWS, FEATURES)
    with pytest.raises(UserError, match="no feature partitions"):
        assemble_training_set(lake, CON, [], WINDOWS, FEATURES)
    for day in CHOSEN:
        rows = lake.read("customer_features", day, day).drop_columns("login_frequency_7d")
        rows = rows.append_column("day", pa.array([day] * rows.num_rows, pa.date32()))
        lake.write("customer_features", day, day, rows, day_of="day")
    with pytest.raises(UserError, match="no column login_frequency_7d"):
        assemble(lake)


def test_a_set_with_some_of_its_rows_says_so_itself(lake: Lake) -> None:
    whole = assemble(lake)
    kept = np.arange(whole.table.num_rows) % 3 == 0
    some = keep_rows(whole, kept)
    assert some.table.equals(whole.table.take(pa.array(np.flatnonzero(kept))))
    assert some.manifest.rows == kept.sum() < whole.manifest.rows
    assert some.manifest.data_hash == content_hash(some.table) != whole.manifest.data_hash
    assert whole.manifest.rows == whole.table.num_rows


def test_a_set_with_other_values_keeps_its_types_and_every_other_column(lake: Lake) -> None:
    whole = assemble(lake)
    values = np.arange(whole.table.num_rows, dtype=np.float64)
    other = replace_values(whole, {"support_tickets_90d": values})
    assert other.table.schema == whole.table.schema
    assert other.table["support_tickets_90d"].to_pylist() == values.astype(int).tolist()
    rest = [name for name in whole.table.column_names if name != "support_tickets_90d"]
    assert other.table.select(rest).equals(whole.table.select(rest))
    assert other.manifest.data_hash == content_hash(other.table) != whole.manifest.data_hash
    with pytest.raises(ValueError, match="no_such_feature"):
        replace_values(whole, {"no_such_feature": values})
