from __future__ import annotations

import json
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from churn_assets.contract.features import FEATURES, features_for
from churn_assets.data.gate import (
    GatePolicy,
    judge_data,
    judge_null_ratios,
    judge_rows,
    judge_schema,
    schema_json,
    validate_file,
)
from churn_assets.data.schema import features_schema, read_schema, schema_as_json, table_schema
from churn_assets.data.tables import ORDERS, RAW_TABLES, TIMESTAMP
from churn_assets.errors import UserError

CUTOFF = datetime(2024, 3, 6, tzinfo=UTC)
POLICY = GatePolicy(min_rows=20, max_null_ratio=0.05)
SCHEMA = features_schema(FEATURES)


def features(rows: int = 20) -> pa.Table:
    return pa.table(
        {
            "customer_id": [f"c{n}" for n in range(rows)],
            "cutoff": pa.array([CUTOFF] * rows, TIMESTAMP),
            "total_orders_30d": pa.array(range(rows), pa.int64()),
            "avg_order_value": pa.array([20.5] * rows, pa.float64()),
            "days_since_last_order": pa.array([3] * rows, pa.int64()),
            "support_tickets_90d": pa.array([0] * rows, pa.int64()),
            "login_frequency_7d": pa.array([0.5] * rows, pa.float64()),
        }
    )


def replaced(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, values)


def with_nulls(rows: int, nulls: int) -> pa.Table:
    values = pa.array([None] * nulls + [1.0] * (rows - nulls))
    return replaced(features(rows), "avg_order_value", values)


def test_the_gate_passes_what_it_should():
    result = judge_data(features(), FEATURES, POLICY)
    assert result.passed
    assert result.figures["rows"] == 20
    assert result.figures["null_ratio avg_order_value"] == 0


def test_limits_are_inclusive():
    assert judge_rows(20, POLICY).passed
    assert not judge_rows(19, POLICY).passed
    assert judge_data(with_nulls(20, 1), FEATURES, POLICY).passed
    refused = judge_data(with_nulls(20, 2), FEATURES, POLICY)
    assert not refused.passed
    assert refused.reason == "nulls above 5.0%: avg_order_value 10.0%"


def test_the_default_limits():
    assert (GatePolicy().min_rows, GatePolicy().max_null_ratio) == (10_000, 0.05)
    refused = judge_data(features())
    assert refused.reason == "20 rows are fewer than the 10,000 asked for"


def test_nothing_is_not_enough():
    assert not judge_data(None, FEATURES, POLICY).passed
    assert not judge_data(features(0), FEATURES, GatePolicy(min_rows=1)).passed
    assert not judge_data(pa.table({}), FEATURES, GatePolicy(min_rows=1)).passed
    assert not judge_null_ratios({}, POLICY).passed
    assert not judge_null_ratios({"a": float("nan")}, POLICY).passed


def test_nan_counts_as_null():
    nan = replaced(features(), "avg_order_value", pa.array([float("nan")] * 2 + [1.0] * 18))
    assert "avg_order_value 10.0%" in judge_data(nan, FEATURES, POLICY).reason


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("total_orders_30d", pa.array([0.5] * 20), "total_orders_30d is double, not integer"),
        ("total_orders_30d", pa.array([-1] * 20), "total_orders_30d goes down to -1, below 0"),
        ("days_since_last_order", pa.array([366] * 20), "goes up to 366, above 365"),
        ("avg_order_value", pa.array([float("inf")] * 20), "goes up to inf"),
        ("customer_id", pa.array(range(20)), "customer_id is int64, not string"),
        ("customer_id", pa.array(["x" * 129] + ["y"] * 19), "customer_id has 129 bytes"),
        ("customer_id", pa.array(["x"] * 20), "19 rows repeat the key customer_id, cutoff"),
        ("customer_id", pa.array([None] + [str(n) for n in range(19)]), "is a key and null in 1"),
    ],
)
def test_the_schema_is_held(name, values, reason):
    result = judge_schema(replaced(features(), name, values), SCHEMA)
    assert not result.passed
    assert reason in result.reason


def test_a_missing_column_refuses_and_another_is_only_listed():
    assert judge_schema(features().drop_columns(["cutoff"]), SCHEMA).reason == "cutoff is missing"
    more = features().append_column("note", pa.array(["x"] * 20))
    result = judge_schema(more, SCHEMA)
    assert result.passed
    assert result.figures["other_columns"] == "note"


def test_the_feature_set_of_the_source_is_what_is_asked_for():
    three = features_for(["orders"])
    table = features().drop_columns(["support_tickets_90d", "login_frequency_7d"])
    assert judge_data(table, three, POLICY).passed
    assert not judge_data(table, FEATURES, POLICY).passed


def test_a_null_the_schema_allows_is_not_counted():
    orders = pa.table(
        {
            "order_id": [str(n) for n in range(20)],
            "customer_id": ["c"] * 20,
            "occurred_at": pa.array([CUTOFF] * 20, TIMESTAMP),
            "ingested_at": pa.nulls(20, TIMESTAMP),
            "amount_minor": [5] * 20,
        }
    )
    result = judge_data(orders, policy=POLICY, schema=table_schema(ORDERS))
    assert result.passed
    assert result.figures["null_ratio ingested_at"] == 1


@pytest.mark.parametrize(
    "limits", [{"min_rows": 0}, {"max_null_ratio": 1.0}, {"max_null_ratio": float("nan")}]
)
def test_limits_that_let_anything_pass_are_refused(limits):
    with pytest.raises(UserError, match=r"data_gate\."):
        GatePolicy(**limits)


@pytest.mark.parametrize("name", [*RAW_TABLES, "customer_features", "training_set"])
def test_schemas_go_to_json_and_back(tmp_path, name):
    text = schema_json(name)
    (tmp_path / "schema.json").write_text(text)
    schema = read_schema(tmp_path / "schema.json")
    assert schema_as_json(schema) == text
    document = json.loads(text)
    assert document["primaryKey"] == list(schema.primary_key)
    assert all(field["description"] for field in document["fields"])


def test_the_json_is_a_table_schema():
    document = json.loads(schema_json("customer_features"))
    assert document["fields"][2] == {
        "name": "total_orders_30d",
        "type": "integer",
        "description": "Orders placed in the 30 days before the cutoff (orders)",
        "constraints": {"required": True, "minimum": 0, "maximum": 10_000},
    }
    with pytest.raises(UserError, match="there is no table order; choose one of customers"):
        schema_json("order")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not a table schema"),
        ("{}", "missing required field `fields`"),
        ('{"fields": []}', "length >= 1"),
        ('{"fields": [{"name": "a", "type": "text"}]}', "Invalid enum value 'text'"),
        ('{"fields": [{"name": "a", "type": "string"}], "primaryKey": ["b"]}', "primaryKey b"),
        (
            '{"fields": [{"name": "a", "type": "string"}, {"name": "a", "type": "date"}]}',
            "names the field a twice",
        ),
    ],
)
def test_a_broken_schema_is_refused(tmp_path, text, complaint):
    (tmp_path / "schema.json").write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_schema(tmp_path / "schema.json")


@pytest.fixture
def files(tmp_path):
    table = features()
    pq.write_table(table, tmp_path / "f.parquet")
    pacsv.write_csv(table, tmp_path / "f.csv")
    (tmp_path / "schema.json").write_text(schema_json("customer_features"))
    return tmp_path


@pytest.mark.parametrize("name", ["f.parquet", "f.csv"])
def test_a_file_is_judged_by_itself(files, name):
    path = files / name
    assert validate_file(path, 20, 0.05, files / "schema.json").passed
    assert validate_file(path, 20, 0.05).passed
    assert not validate_file(path, 21, 0.05, files / "schema.json").passed
    assert not validate_file(path).passed


def test_text_of_another_type_does_not_pass(files):
    text = (files / "f.csv").read_text().splitlines()
    text[2] = text[2].replace(",20.5,", ",twenty,").replace(",1,", ",1.5,", 1)
    (files / "g.csv").write_text("\n".join(text) + "\n")
    result = validate_file(files / "g.csv", 20, 0.05, files / "schema.json")
    assert not result.passed
    assert 'avg_order_value has 1 values that are not number, such as "twenty"' in result.reason
    assert 'total_orders_30d has 1 values that are not integer, such as "1.5"' in result.reason


def test_corrupt_lines_do_not_pass(files):
    with (files / "f.csv").open("a") as file:
        file.write("half,a\n")
    result = validate_file(files / "f.csv", 20, 0.05)
    assert not result.passed
    assert "1 corrupt lines, the first is line 22" in result.reason


def test_files_without_anything_to_judge(files):
    with pytest.raises(UserError, match="there is no file"):
        validate_file(files / "none.parquet")
    with pytest.raises(UserError, match="cannot be read"):
        validate_file(files / "f.csv", 1, 0.05, files / "none.json")
    (files / "empty.csv").write_text("")
    (files / "header.csv").write_text("a,b\n")
    for name in ("empty.csv", "header.csv"):
        result = validate_file(files / name, 1)
        assert not result.passed
        assert "0 rows" in result.reason
