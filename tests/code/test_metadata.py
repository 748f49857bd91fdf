from __future__ import annotations

import pyarrow as pa

from churn_assets.defs.metadata import SAMPLE_ROWS, sample


def table(rows: int) -> pa.Table:
    return pa.table({"number": pa.array(range(rows), pa.int64())})


def test_a_sample_spans_the_table():
    picked = [record.data["number"] for record in sample(table(100)).records]
    assert picked == [0, 20, 40, 60, 80]
    assert len(sample(table(104)).records) == SAMPLE_ROWS


def test_a_day_without_rows_has_an_empty_sample():
    assert sample(table(0)).records == []
    assert [column.name for column in sample(table(0)).schema.columns] == ["number"]
