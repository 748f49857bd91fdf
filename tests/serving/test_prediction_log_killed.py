"""SIGKILL under load, of workers and of whole services: nothing acknowledged is lost or doubled."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
from log_cases import Load, stored
from serving_cases import SERVICE, family, wait_until_gone

from churn_assets.contract.release import Release
from churn_assets.data.lake import Lake
from churn_assets.data.log_sources import LogFiles
from churn_assets.data.prediction_log import PREDICTION_LOG, all_trimmed, ingest
from churn_assets.lifecycle.serving import PredictionLog, serve

# For a soak, such as 100: each is a worker and a whole service killed, and a pass over the log.
ROUNDS = int(os.environ.get("CHURN_SOAK_KILLS") or 1)
REQUESTS = 150


class Services:
    """Services that share a machine and the directory of their log, each killed on its own."""

    def __init__(self, release: Release, directory: Path):
        self._release, self._log = release, PredictionLog(str(directory))
        self._running: dict[str, tuple[ExitStack, list[psutil.Process]]] = {}

    def start(self, name: str) -> str:
        before = {process.pid for process in family(os.getpid())}
        stack = ExitStack()
        url = stack.enter_context(serve(SERVICE, self._release.directory, log=self._log))
        started = [process for process in family(os.getpid()) if process.pid not in before]
        self._running[name] = (stack, started)
        return url

    def workers(self, name: str) -> list[psutil.Process]:
        boss = self._running[name][1][0]
        return [p for p in boss.children(recursive=True) if "bentoml" in " ".join(p.cmdline())]

    def kill_workers(self, name: str) -> None:
        workers = self.workers(name)
        assert workers
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
        assert wait_until_gone(workers) == []

    def kill(self, name: str) -> None:
        stack, started = self._running.pop(name)
        for process in [*started, *family(started[0].pid)]:
            if process.is_running():
                process.send_signal(signal.SIGKILL)
        stack.close()

    def close(self) -> None:
        for stack, _ in self._running.values():
            stack.close()


@contextmanager
def services(release: Release, directory: Path) -> Generator[Services]:
    running = Services(release, directory)
    try:
        yield running
    finally:
        running.close()


def test_nothing_acknowledged_is_lost_or_stored_twice(release: Release, tmp_path: Path):
    directory, lake = tmp_path / "log", Lake(str(tmp_path / "lake"))
    with services(release, directory) as running:
        targets = {name: running.start(name) for name in ("a", "b")}
        with Load(targets) as load:
            for _ in range(ROUNDS):
                load.wait_for(REQUESTS, "a")
                running.kill_workers("a")
                load.wait_for(REQUESTS, "b")
                running.kill("b")
                ingest(LogFiles(directory), lake)
                targets["b"] = running.start("b")
                load.wait_for(REQUESTS, "b")
                load.wait_for(REQUESTS, "a")
            running.kill("a")
            running.kill("b")
    log = [row.request_id for row in stored(directory)]
    assert log
    done = ingest(LogFiles(directory), lake)
    assert all_trimmed(done).passed
    assert [path.name for path in directory.iterdir()] == ["ingesting"]
    kept = Counter(lake.read(PREDICTION_LOG)["request_id"].to_pylist())
    assert len(load.acknowledged) >= 4 * REQUESTS * ROUNDS
    assert set(load.acknowledged) - set(kept) == set()
    assert [name for name, times in kept.items() if times > 1] == []
    # What was being answered when its service was killed may be there, too, and nothing else.
    assert len(kept) - len(load.acknowledged) <= 2 * 3 * (ROUNDS + 2)
