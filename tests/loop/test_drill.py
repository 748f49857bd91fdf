"""The short drill: the three worst cases, through the jobs and sensors of definitions.py."""

from __future__ import annotations

import json
from typing import Any

import pytest
from command import churn

pytestmark = [pytest.mark.drill, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def drilled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    home = tmp_path_factory.mktemp("drill")
    done = churn(home, None, "drill", "--short", timeout=2700)
    path = home / "drill" / "report.json"
    assert path.exists(), done
    report = json.loads(path.read_text())
    logs = {log.parent.name: log.read_text()[-3000:] for log in home.glob("drill/*/drill.log")}
    assert len(report["scenarios"]) == 3, (done, logs)
    return {one["name"]: one for one in report["scenarios"]}


def whats(case: dict[str, Any]) -> list[str]:
    return [event["what"] for event in case["events"]]


def test_nobody_had_to_do_anything_and_nothing_failed(drilled: dict[str, dict[str, Any]]) -> None:
    for case in drilled.values():
        assert (case["human_steps"], case["failed_runs"]) == (0, 0), case["events"]
        assert case["harmful"], case["harm"]
        assert case["detected"]
        assert case["false_retrains"] == case["false_rollbacks"] == 0


def test_a_bad_model_is_taken_back(drilled: dict[str, dict[str, Any]]) -> None:
    case = drilled["bad_model"]
    assert case["rollbacks"] == 1
    assert case["days_to_detect"] <= 2
    assert [w for w in whats(case) if w.endswith("Production")] == [
        "version 1 Production", "version 2 Production", "version 1 Production",
    ]  # fmt: skip


def test_a_shift_is_learned(drilled: dict[str, dict[str, Any]]) -> None:
    case = drilled["sudden_shift"]
    assert any(w.startswith(("retrain:drift", "retrain:concept_drift")) for w in whats(case))
    assert len({w for w in whats(case) if w.endswith("Production")}) > 1
    assert case["rollbacks"] == 0
    assert case["auc_lost"] < case["auc_lost_doing_nothing"]
    last = case["days"][-1]
    assert last["served"] > last["nothing"] + 0.02


def test_nothing_is_learned_from_a_broken_feed(drilled: dict[str, dict[str, Any]]) -> None:
    case = drilled["login_tracking_broken"]
    found = whats(case)
    assert "fall_back" in found
    assert "feed/logins" in found
    assert "restore" in found
    assert found.index("fall_back") < found.index("suppress") < found.index("restore")
    assert not any(w.startswith("retrain:") for w in found)
    in_production = [w for w in found if w.endswith("Production")]
    assert in_production[0] == in_production[-1] == "version 1 Production"
    assert len(in_production) == 3
