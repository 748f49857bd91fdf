from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from churn_assets.errors import UserError
from churn_assets.monitoring.metric import Metric, append_metrics, read_metrics

AT = datetime(2025, 3, 1, tzinfo=UTC)


def metric(value: float, days: int, name: str = "accuracy") -> Metric:
    until = AT + timedelta(days=days)
    return Metric(name, "ok", value, 0.8, "fine", until, until, rows=10, release_id="r1")


def test_a_series_comes_back_and_the_last_of_a_window_counts(tmp_path: Path) -> None:
    path = tmp_path / "monitoring" / "metrics.jsonl"
    assert read_metrics(path) == []
    append_metrics(path, [metric(0.9, 0), metric(0.1, 0, "error_rate")])
    append_metrics(path, [metric(0.7, 1), metric(0.85, 0)])
    append_metrics(path, [])
    found = read_metrics(path)
    assert [(m.name, m.value) for m in found] == [
        ("error_rate", 0.1), ("accuracy", 0.7), ("accuracy", 0.85),
    ]  # fmt: skip
    assert read_metrics(path, since=AT + timedelta(days=1)) == [metric(0.7, 1)]


def test_a_line_cut_short_is_left_out_and_a_broken_one_is_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, [metric(0.9, 0), metric(0.8, 1)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert read_metrics(path) == [metric(0.9, 0)]
    append_metrics(path, [metric(0.7, 2)])
    assert read_metrics(path) == [metric(0.9, 0), metric(0.7, 2)]
    path.write_bytes(b"no metric\n" + whole)
    with pytest.raises(UserError, match=r"line 1 of .*cannot be read"):
        read_metrics(path)
