"""Runs whose process is gone, after the code server that watched it has died."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest
from dagster import DagsterRunStatus
from dagster._core.events import EngineEventData

from churn_assets.defs.launch import LAUNCHED_BY, close_lost_runs


def test_only_runs_that_nobody_executes_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        monkeypatch.setattr(dg.DagsterInstance, "get", lambda: instance)
        executing = {"alive": 11, "dead": 12, "ending": 13, "waiting": None, "by_command": 14}
        for name, pid in executing.items():
            tags = {LAUNCHED_BY: "churn rollback"} if name == "by_command" else {}
            run = dg.DagsterRun("job", run_id=name, status=DagsterRunStatus.STARTED, tags=tags)
            instance.add_run(run)
            if pid is not None:
                instance.report_engine_event("begun", run, EngineEventData.in_process(pid))

        def alive() -> set[int]:
            """Between the two looks at the runs one comes to its end."""
            instance.delete_run("ending")
            ended = dg.DagsterRun("job", run_id="ending", status=DagsterRunStatus.SUCCESS)
            instance.add_run(ended)
            return {11}

        assert close_lost_runs(alive) == ["dead"]
        assert close_lost_runs(alive) == []
        closed = {run.run_id: run.status.value for run in instance.get_runs()}
    assert closed.pop("dead") == "FAILURE"
    assert closed.pop("ending") == "SUCCESS"
    assert set(closed.values()) == {"STARTED"}
