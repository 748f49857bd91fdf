"""kill -9 under `churn up`: of the process of a run, and of the code server during one."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from pathlib import Path

import dagster as dg
import psutil
import pytest
import yaml
from command import Run
from dagster import DagsterRunStatus
from dagster._core.events import EngineEventData

from churn_assets.defs.launch import LAUNCHED_BY, close_lost_runs
from churn_assets.home import Home
from churn_assets.lifecycle.relocation import relocate
from tests.chaos.invariants import Invariants
from tests.chaos.shop import Shop

REASON = {"churn/reason": "a test"}
PATIENCE_S = 240


@pytest.fixture
def shop(own_tables_run: Run, tmp_path: Path) -> Generator[Shop]:
    folder = tmp_path / "shop"
    shutil.copytree(own_tables_run.home.parent, folder)
    relocate(Home(folder / "home"), own_tables_run.home)
    shop = Shop(folder, yaml.safe_load((folder / "own.yaml").read_text()))
    try:
        shop.start()
        yield shop
    finally:
        shop.stop()
        for process in shop.left():
            process.kill()


def test_a_killed_run_is_tried_again_and_one_of_a_killed_code_server_goes_on(shop: Shop) -> None:
    run = shop.launch("training", REASON)
    shop.wait_until_in(run, "trained_model")
    shop.run_worker(run).kill()
    shop.wait_for(lambda: len(shop.tries(run)) == 2, "it is tried again", PATIENCE_S)
    killed, again = (one.run_id for one in shop.tries(run))
    assert shop.status(killed) is DagsterRunStatus.FAILURE
    shop.wait_until_in(again, "trained_model")
    code, worker = shop.part("code"), shop.run_worker(again)
    code.kill()
    shop.wait_for(lambda: _other(shop, code), "a code server", PATIENCE_S)
    shop.wait_for(lambda: not shop.ailments(), "all is well", PATIENCE_S)
    assert shop.run_worker(again) == worker
    assert [r.status.value for r in shop.tries(run)] == ["FAILURE", "SUCCESS"]
    invariants = Invariants(shop)
    shop.wait_for(lambda: not invariants.decisions(), "decisions are carried out", PATIENCE_S)
    found = {name: look() for name, look in invariants.stored().items()}
    assert found == {name: [] for name in found}


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


def _other(shop: Shop, process: psutil.Process) -> bool:
    return any(p != process for p in shop.parts("code"))
