from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

import msgspec
import pytest

from churn_assets.errors import UserError
from churn_assets.lifecycle.ledger import Look, Window, read_ledger, record_look

WINDOW = Window(date(2025, 6, 1), 30, 90)


def look(version: str, rows: str = "r1", window: Window = WINDOW) -> Look:
    return Look(window, rows, "d1", "churn", version, "m", "g", datetime(2025, 8, 1, tzinfo=UTC))


def test_a_second_look_is_no_secret(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger" / "held_out.jsonl"
    assert read_ledger(ledger) == []
    first = record_look(ledger, look("1"))
    assert (first.number, first.same_rows, first.versions) == (1, 0, ())
    assert "for the first time" in first.sentence
    second = record_look(ledger, look("2"))
    assert (second.number, second.same_rows, second.versions) == (2, 1, ("1",))
    changed = record_look(ledger, look("3", rows="r2"))
    assert (changed.number, changed.same_rows, changed.versions) == (3, 0, ("1", "2"))
    assert "3rd time (before: version 1, 2)" in changed.sentence
    assert [seen.version for seen in read_ledger(ledger)] == ["1", "2", "3"]


def test_another_window_is_fresh(tmp_path: Path) -> None:
    ledger = tmp_path / "held_out.jsonl"
    record_look(ledger, look("1"))
    for other in (
        msgspec.structs.replace(WINDOW, day=date(2025, 6, 2)),
        msgspec.structs.replace(WINDOW, horizon_days=60),
    ):
        assert record_look(ledger, look("2", window=other)).number == 1


def test_the_ledger_is_only_appended_to(tmp_path: Path) -> None:
    ledger = tmp_path / "held_out.jsonl"
    record_look(ledger, look("1"))
    before = ledger.read_bytes()
    record_look(ledger, look("2"))
    assert ledger.read_bytes().startswith(before)


def test_a_ledger_that_cannot_be_read_forgets_nothing_in_silence(tmp_path: Path) -> None:
    ledger = tmp_path / "held_out.jsonl"
    record_look(ledger, look("1"))
    with ledger.open("a") as file:
        file.write('{"window": \n')
    before = ledger.read_bytes()
    with pytest.raises(UserError, match=r"line 2 of .* cannot be read"):
        record_look(ledger, look("2"))
    assert ledger.read_bytes() == before
