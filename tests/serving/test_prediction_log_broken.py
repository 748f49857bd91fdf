"""A prediction log that breaks: the service says so, refuses or counts, and comes back."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from log_cases import Client, answered, stored
from online_cases import until
from serving_cases import PATIENCE_S, SERVICE, VALID

from churn_assets.contract.release import Release
from churn_assets.contract.request import Refusal
from churn_assets.contract.response import LogHealth
from churn_assets.lifecycle.serving import PredictionLog, serve
from churn_service import log_files
from churn_service import prediction_log as module
from churn_service.log_files import LogStore, Waiting
from churn_service.prediction_log import DurableLog

DISK_BYTES = 2 * 1024 * 1024


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = shutil.which("mount")
    asked = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(mounted)]
    if mount is None or subprocess.run([mount, *asked], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root and the right to mount; run this as root")
    yield mounted
    subprocess.run(["umount", "-l", str(mounted)], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
    return filler


def test_a_full_disk_refuses_predictions_until_there_is_room(release: Release, disk: Path):
    log = disk / "log"
    with serve(SERVICE, release.directory, log=PredictionLog(str(log))) as url:
        client = Client(url)
        acknowledged, refused = [], None
        for number in range(200):
            if number == 50:
                filler = fill(disk)
            status, answer, headers = client.ask(headers={"x-request-id": str(number)})
            if status != 200:
                refused = status, answer["error"]["field"], headers["retry-after"]
                break
            acknowledged.append(str(number))
        assert len(acknowledged) >= 50
        assert refused == (503, "prediction_log", "1")
        batch = client.ask({"rows": [VALID, VALID]}, "/predict_batch")
        assert (batch[0], batch[1]["error"]["field"]) == (503, "prediction_log")
        health = client.health()
        assert health["status"] == "degraded"
        assert health["prediction_log"]["usable"] is False
        assert "full" in health["prediction_log"]["reason"]
        filler.unlink()
        until(lambda: client.health()["status"] == "healthy")
        assert client.ask(headers={"x-request-id": "after"})[0] == 200
        client.close()
        assert [row.request_id for row in stored(log)].count("after") == 1
        kept = [row.request_id for row in stored(log)]
    assert sorted(kept) == sorted([*acknowledged, "after"])


class Kept:
    """A log in this process, and what it acknowledged."""

    def __init__(self, log: DurableLog, directory: Path):
        self.log, self.directory = log, directory
        self.acknowledged: list[str] = []
        self.refused_with: tuple[int, int | None] | None = None
        # One event loop for all of it, as in a service.
        self.loop = asyncio.Runner()

    def keep(self, name: str, rows: int = 1) -> bool:
        """Whether predictions of that name could be answered."""
        try:
            self.loop.run(self.log.keep([answered(name)] * rows))
        except Refusal as refusal:
            self.refused_with = refusal.status, refusal.retry_after
            return False
        self.acknowledged.append(name)
        return True

    def health(self) -> LogHealth:
        return self.loop.run(self.log.health())

    def stored(self) -> list[str]:
        return sorted(row.request_id for row in stored(self.directory))


@pytest.fixture(params=["process", "power"])
def kept(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Kept]]:
    monkeypatch.setattr(log_files, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(log_files, "LOOK_SECONDS", 0)
    made: list[Kept] = []

    def make(when_broken: str = "refuse", directory: Path | None = None) -> Kept:
        place = directory or tmp_path / "log"
        settings = {
            "CHURN_PREDICTION_LOG": str(place),
            "CHURN_LOG_DURABILITY": request.param,
            "CHURN_LOG_WHEN_BROKEN": when_broken,
        }
        log = module.prediction_log(settings)
        assert isinstance(log, DurableLog)
        made.append(Kept(log, place))
        return made[-1]

    yield make
    for kept in made:
        kept.log.close()
        kept.loop.close()


def the_directory_goes(log: Kept) -> Callable[[], object]:
    moved = log.directory.with_name("moved")
    log.directory.rename(moved)
    return lambda: moved.rename(log.directory)


def the_directory_is_a_file(log: Kept) -> Callable[[], object]:
    moved = log.directory.with_name("moved")
    log.directory.rename(moved)
    log.directory.write_text("")

    def mend() -> None:
        log.directory.unlink()
        moved.rename(log.directory)

    return mend


@pytest.mark.parametrize("breaks", [the_directory_goes, the_directory_is_a_file])
def test_a_log_that_breaks_refuses_and_comes_back(kept: Callable[..., Kept], breaks):
    log = kept()
    assert log.keep("before")
    mend = breaks(log)
    assert not log.keep("during")
    assert not log.keep("still")
    assert log.refused_with == (503, 1)
    health = log.health()
    assert not health.usable
    assert health.reason
    mend()
    until(lambda: log.keep("after"))
    health = log.health()
    assert health.usable
    assert (health.unlogged, health.reason) == (0, None)
    assert log.stored() == sorted(log.acknowledged) == ["after", "before"]


def test_a_log_that_breaks_may_serve_unlogged_and_count(kept: Callable[..., Kept]):
    log = kept("serve")
    assert log.keep("before")
    mend = the_directory_goes(log)
    for name in ("one", "two"):
        assert log.keep(name)
    health = log.health()
    assert (health.usable, health.unlogged) == (False, 2)
    assert health.reason
    mend()
    until(lambda: log.keep("after") and log.health().usable)
    assert log.health().unlogged == len(log.acknowledged) - len(log.stored())
    assert {"before", "after"} <= set(log.stored())


def test_a_file_removed_under_the_worker_takes_no_further_rows(kept: Callable[..., Kept]):
    log = kept()
    assert log.keep("lost with the file")
    for path in log.directory.iterdir():
        path.unlink()
    # What is written to a removed file is gone with it, so this is refused, not acknowledged.
    assert not log.keep("refused")
    until(lambda: log.keep("after"))
    assert log.stored() == ["after"]


def test_a_disk_that_is_read_only_for_a_while(kept: Callable[..., Kept], disk: Path):
    log = kept(directory=disk / "log")
    assert log.keep("before")
    # No disk can be made read-only while a file is open for writing.
    log.log._store.close()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert not log.keep("during")
    assert not log.health().usable
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    until(lambda: log.keep("after"))
    assert log.stored() == ["after", "before"]


def test_a_log_that_is_broken_leaves_no_file_of_each_attempt(
    kept: Callable[..., Kept], disk: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(log_files, "RETRY_SECONDS", 0)
    log = kept(directory=disk / "log")
    assert log.health().usable
    fill(disk)
    for number in range(20):
        assert not log.keep(str(number), rows=100)
    assert not list(log.directory.iterdir())


def test_who_holds_the_file_for_a_moment_breaks_nothing(kept: Callable[..., Kept]):
    log = kept()
    assert log.keep("before")
    (path,) = log.directory.glob("*.sqlite")

    async def keep_while_held() -> float:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            asked = asyncio.create_task(log.log.keep([answered("waited")]))
            ticks = 0
            while ticks < 20:
                # The event loop goes on.
                await asyncio.sleep(0.005)
                ticks += 1
            assert not asked.done()
            other.execute("COMMIT")
        await asked
        return ticks

    assert log.loop.run(keep_while_held()) == 20
    assert log.stored() == ["before", "waited"]


def test_who_holds_the_file_for_long_is_a_broken_log(
    kept: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0.1)
    log = kept()
    assert log.keep("before")
    (path,) = log.directory.glob("*.sqlite")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert not log.keep("refused")
    until(lambda: log.keep("after"))
    assert "after" in log.stored()


class Slow(LogStore):
    """A store that takes its time."""

    place, durability = "slow", "power"

    def __init__(self) -> None:
        self.groups: list[list[bytes]] = []
        self.seconds = 0.0

    def write(self, records) -> None:
        self.groups.append(list(records))
        time.sleep(self.seconds)

    def waiting(self) -> Waiting:
        return Waiting(0, None)

    def close(self) -> None: ...


def test_what_arrives_during_a_commit_is_in_the_next_one():
    store = Slow()
    store.seconds = 0.05
    log = DurableLog(store, "refuse", quick=False)

    async def together() -> None:
        first = [log.keep([answered(str(number))]) for number in range(3)]
        tasks = [asyncio.create_task(keep) for keep in first]
        await asyncio.sleep(0.01)
        later = [asyncio.create_task(log.keep([answered(str(n)), answered("x")])) for n in range(4)]
        given_up = later.pop(0)
        await asyncio.sleep(0)
        given_up.cancel()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*tasks, *later)

    asyncio.run(together())
    log.close()
    assert [len(group) for group in store.groups] == [3, 8]


def test_requests_of_one_turn_of_the_loop_share_a_commit():
    store = Slow()
    log = DurableLog(store, "refuse", quick=True)

    async def ask(at_once: int, times: int) -> list[int]:
        """The sizes of the commits."""
        store.groups.clear()
        for _ in range(times):
            await asyncio.gather(*(log.keep([answered("x")]) for _ in range(at_once)))
        return [len(group) for group in store.groups]

    async def both() -> None:
        assert await ask(4, 20) == [4] * 20
        one_by_one = await ask(1, 300)
        assert one_by_one == [1] * 300
        # It has turned to commits of one each, and finds out when that is no longer so.
        sizes = await ask(4, 200)
        assert sum(sizes) == 800
        assert sizes[0] == 1
        assert sizes[-50:] == [4] * 50

    asyncio.run(both())


def test_a_store_that_hangs_is_waited_for_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0.1)
    store = Slow()
    store.seconds = 0.5
    log = DurableLog(store, "refuse", quick=False)

    async def hang_and_come_back() -> None:
        for _ in range(2):
            with pytest.raises(Refusal, match="prediction_log"):
                await log.keep([answered("hangs")])
            # Long enough that whatever asks now is not waited for.
            await asyncio.sleep(0.05)
        assert "has not answered" in ((await log.health()).reason or "")
        assert len(store.groups) == 1
        store.seconds = 0
        while True:
            try:
                return await log.keep([answered("back")])
            except Refusal:
                await asyncio.sleep(0.01)

    asyncio.run(hang_and_come_back())
    log.close()
    # The second was refused at once: nobody queues behind a commit that hangs.
    assert len(store.groups) == 2
