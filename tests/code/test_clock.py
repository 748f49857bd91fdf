from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import pytest

from churn_assets.contract.clock import CLOCK_VARIABLE, clock, now, set_clock
from churn_assets.defs.resources import Project
from churn_assets.errors import UserError
from churn_assets.home import Home

MOMENT = datetime(2025, 3, 1, 12, 30, 0, 250_000, tzinfo=UTC)


def test_without_a_file_it_is_the_clock_of_the_machine() -> None:
    before = time.time_ns() // 1000
    assert before <= clock({})() <= time.time_ns() // 1000


def test_a_file_turns_it(tmp_path: Path) -> None:
    path = tmp_path / "clock"
    environ = {CLOCK_VARIABLE: str(path)}
    set_clock(path, MOMENT)
    tell = clock(environ)
    assert (tell(), now(environ)) == (round(MOMENT.timestamp() * 1e6), MOMENT)
    set_clock(path, MOMENT + timedelta(days=1))
    assert now(environ) == MOMENT + timedelta(days=1)
    assert tell() == round((MOMENT + timedelta(days=1)).timestamp() * 1e6)


@pytest.mark.parametrize("text", ["", "soon", "2025-03-01T12:30:00"])
def test_a_file_without_a_time_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "clock"
    path.write_text(text)
    with mock.patch.dict(os.environ, {CLOCK_VARIABLE: str(path)}):
        with pytest.raises(ValueError, match="CHURN_CLOCK"):
            clock(os.environ)()
        with pytest.raises(UserError, match="CHURN_CLOCK"):
            Project.of(Home(tmp_path)).now()
