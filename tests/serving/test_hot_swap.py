"""The service follows the pointer: it swaps between requests, and refuses what is bad."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import os
import shutil
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from online_cases import STORED, Caller, content, write
from serving_cases import (
    NOON,
    PATIENCE_S,
    SERVICE,
    VALID,
    Model,
    release_of,
    rewrite_manifest,
    train,
)

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.contract.pointer import release_directory
from churn_assets.contract.release import MODEL, Release, ReleaseError, read_release
from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.lifecycle.pointer import Current, point_at
from churn_assets.lifecycle.serving import serve, with_workers

BODY = json.dumps(VALID).encode()
SWAPS = 100
CONNECTIONS = 8
FAST = {"CHURN_FOLLOW_SECONDS": "0.01"}


@dataclass
class Following:
    """A folder of releases with a pointer, and the service that follows it."""

    folder: Path
    url: str = ""
    releases: dict[str, Release] = field(default_factory=dict)
    step: int = 0

    @property
    def pointer(self) -> Path:
        return self.folder / "current.json"

    def add(self, model: Model, version: str) -> None:
        self.releases[version] = release_of(model, self.folder / "releases", version)

    def point(self, version: str) -> None:
        """Point at the release of a version."""
        self.name(self.releases[version].manifest.release_id, version)

    def name(self, release_id: str, version: str = "1") -> None:
        """Point at a release by its id."""
        self.step += 1
        point_at(self.pointer, Current("churn:x", release_id, version, self.step, NOON))

    def served(self, version: str, number: int = 2) -> None:
        """Point at the release of a version and wait until every worker serves it."""
        self.point(version)
        with workers(self.url, number) as all_of_them:
            for worker in all_of_them:
                until(lambda w=worker: w.version() == version)


class Worker:
    """One kept connection, so one worker."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=20)

    def health(self) -> dict[str, Any]:
        self._connection.request("GET", "/health")
        return json.loads(self._connection.getresponse().read())

    def predict(self) -> dict[str, Any]:
        headers = {"content-type": "application/json"}
        self._connection.request("POST", "/predict", BODY, headers)
        return json.loads(self._connection.getresponse().read())

    def refused(self, reason: str) -> dict[str, Any] | None:
        """What is refused, once it is for this reason."""
        refused = self.health()["release_refused"]
        return refused if refused and reason in refused["reason"] else None

    def version(self) -> str:
        """The version served, once nothing is refused."""
        health = self.health()
        return "" if health["release_refused"] else health["version"]

    def close(self) -> None:
        self._connection.close()


@contextmanager
def workers(url: str, number: int) -> Generator[list[Worker]]:
    """A connection to each worker."""
    found: dict[int, Worker] = {}
    deadline = time.monotonic() + PATIENCE_S
    try:
        while len(found) < number:
            assert time.monotonic() < deadline, f"only {len(found)} of {number} workers answer"
            worker = Worker(url)
            if found.setdefault(worker.health()["worker"], worker) is not worker:
                worker.close()
        yield list(found.values())
    finally:
        for worker in found.values():
            worker.close()


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return value


class Load:
    """Clients that ask as fast as they are answered, each over one kept connection.

    `answers` counts what was answered: (status, model_version, probability). `lost` are the
    connections that ended without an answer.
    """

    def __init__(self, url: str, connections: int = CONNECTIONS):
        self.answers: Counter[tuple] = Counter()
        self.lost = 0
        self._parts, self._connections = urlsplit(url), connections
        self._stop = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()

    async def _run(self) -> None:
        await asyncio.gather(*(self._client() for _ in range(self._connections)))

    async def _client(self) -> None:
        head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        request = head + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
        while not self._stop:
            reader, writer = await asyncio.open_connection(self._parts.hostname, self._parts.port)
            try:
                while not self._stop:
                    writer.write(request)
                    head = await reader.readuntil(b"\r\n\r\n")
                    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                    answer = json.loads(await reader.readexactly(length))
                    said = (answer.get("model_version"), answer.get("churn_probability"))
                    self.answers[(int(head[9:12]), *said)] += 1
            except (OSError, EOFError):
                self.lost += 1
            finally:
                writer.close()


@pytest.fixture(scope="module")
def backwards() -> Model:
    return train(FEATURE_NAMES, seed=5, backwards=True)


@pytest.fixture(scope="module")
def following(
    model: Model, backwards: Model, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Following]:
    """Two workers with version 1 baked in that follow a pointer."""
    made = Following(tmp_path_factory.mktemp("following"))
    made.add(model, "1")
    made.add(backwards, "2")
    made.point("1")
    with serve(
        SERVICE,
        made.releases["1"].directory,
        environment=FAST | with_workers(2) | {"CHURN_FOLLOW": str(made.pointer)},
    ) as made.url:
        yield made


@pytest.fixture(scope="module")
def known(following: Following) -> dict[str, float]:
    """What each version answers to BODY."""
    answers = {}
    for version in ("2", "1"):
        following.served(version)
        with workers(following.url, 1) as (worker,):
            answers[version] = worker.predict()["churn_probability"]
    assert abs(answers["1"] - answers["2"]) > 0.3
    return answers


def test_no_request_is_lost_and_no_answer_is_of_two_releases(
    following: Following, known: dict[str, float]
) -> None:
    began = time.monotonic()
    with workers(following.url, 2) as both, Load(following.url) as load:
        for swap in range(SWAPS):
            version = "21"[swap % 2]
            following.point(version)
            for worker in both:
                until(lambda w=worker, v=version: w.version() == v)
    seconds = time.monotonic() - began
    print(f"{SWAPS} swaps in {seconds:.1f} s, {load.answers.total()} answers")
    assert load.lost == 0
    assert load.answers.keys() == {(200, version, known[version]) for version in "12"}


@dataclass(frozen=True)
class Parts:
    """What a test makes a bad release of: a folder with good ones, and a model."""

    at: Following
    model: Model

    def copy(self, name: str, of: str = "2") -> Path:
        directory = self.at.folder / "releases" / name
        shutil.rmtree(directory, ignore_errors=True)
        return Path(shutil.copytree(self.at.releases[of].directory, directory))


@pytest.fixture
def parts(following: Following, model: Model) -> Parts:
    return Parts(following, model)


def damaged(parts: Parts) -> tuple[str | None, str]:
    (parts.copy("damaged") / MODEL).write_bytes(b"half")
    parts.at.name("damaged")
    return "damaged", "release damaged: model.onnx was changed"


def wrong_golden(parts: Parts) -> tuple[str | None, str]:
    x = parts.model.x[:40]
    golden = (x, 1 - parts.model.predict(x))
    made = release_of(parts.model, parts.at.folder / "releases", "3", golden=golden)
    parts.at.name(made.manifest.release_id, "3")
    return made.manifest.release_id, "does not compute what it was released with"


def unknown_feature(parts: Parts) -> tuple[str | None, str]:
    directory = parts.copy("unknown")
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["features"][0]["name"] = "shoe_size"
    rewrite_manifest(directory, features=manifest["features"])
    parts.at.name("unknown")
    return "unknown", "unknown feature 'shoe_size'"


def unknown_format(parts: Parts) -> tuple[str | None, str]:
    rewrite_manifest(parts.copy("later"), format=2)
    parts.at.name("later")
    return "later", "manifest.json has format 2, this code reads 1"


def missing(parts: Parts) -> tuple[str | None, str]:
    parts.at.name("v9-missing")
    return "v9-missing", "there is no release directory"


def another_release(parts: Parts) -> tuple[str | None, str]:
    parts.copy("v9-another")
    parts.at.name("v9-another")
    return "v9-another", "where v9-another should be"


def another_version(parts: Parts) -> tuple[str | None, str]:
    release_id = parts.at.releases["2"].manifest.release_id
    parts.at.name(release_id, "9")
    return release_id, "calls it version 9, it has version 2"


def outside(parts: Parts) -> tuple[str | None, str]:
    shutil.copytree(parts.at.releases["2"].directory, parts.at.folder / "outside")
    parts.at.name("../outside", "2")
    return "../outside", "'../outside' is not the id of a release"


def garbage(parts: Parts) -> tuple[str | None, str]:
    parts.at.pointer.write_bytes(os.urandom(300))
    return None, "does not say what serves"


def half_written(parts: Parts) -> tuple[str | None, str]:
    parts.at.pointer.write_bytes(parts.at.pointer.read_bytes()[:60])
    return None, "does not say what serves"


def not_a_pointer(parts: Parts) -> tuple[str | None, str]:
    parts.at.pointer.write_bytes(b"null")
    return None, "does not say what serves"


def endless(parts: Parts) -> tuple[str | None, str]:
    parts.at.pointer.write_bytes(b" " * 10_000_000)
    return None, "more than 65536 bytes"


def deleted(parts: Parts) -> tuple[str | None, str]:
    parts.at.pointer.unlink()
    return None, "current.json cannot be read (No such file"


def a_folder(parts: Parts) -> tuple[str | None, str]:
    parts.at.pointer.unlink()
    parts.at.pointer.mkdir()
    return None, "current.json cannot be read (Is a directory"


BAD = [damaged, wrong_golden, unknown_feature, unknown_format, missing, another_release,
       another_version, outside, garbage, half_written, not_a_pointer, endless, deleted,
       a_folder]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.__name__)
def test_what_is_bad_is_refused_and_told_while_the_old_one_serves(
    following: Following, known: dict[str, float], parts: Parts, bad
) -> None:
    following.served("1")
    with workers(following.url, 2) as both, Load(following.url, 2) as load:
        release_id, reason = bad(parts)
        try:
            for worker in both:
                refused = until(lambda w=worker: w.refused(reason))
                assert refused["release_id"] == release_id
                assert str(following.folder) not in refused["reason"]
                assert refused["since"].endswith("Z")
                assert worker.predict()["model_version"] == "1"
        finally:
            with suppress(OSError):
                following.pointer.rmdir()
        # What is good is served again, be it what serves or another one.
        following.served("1")
        following.served("2")
    assert load.lost == 0
    assert load.answers.keys() == {(200, version, known[version]) for version in "12"}


def killed(worker: Worker) -> int:
    """Kill the process behind a connection; returns its id."""
    number = worker.health()["worker"]
    os.kill(number, signal.SIGKILL)
    return number


def test_a_killed_worker_comes_back_with_what_the_pointer_names(
    following: Following, known: dict[str, float]
) -> None:
    following.served("2")
    with workers(following.url, 2) as (one, other), Load(following.url) as load:
        gone = killed(one)
        until(lambda: other.version() == "2" and not psutil.pid_exists(gone))
    # Only what the killed one was being asked is lost.
    assert load.lost <= CONNECTIONS
    assert load.answers.keys() == {(200, "2", known["2"])}
    with workers(following.url, 2) as both:
        assert gone not in {worker.health()["worker"] for worker in both}
        assert [worker.predict()["model_version"] for worker in both] == ["2", "2"]


def test_a_worker_that_starts_with_a_bad_pointer_serves_what_was_verified_last(
    following: Following, known: dict[str, float]
) -> None:
    following.served("2")
    following.pointer.write_text("{")
    with workers(following.url, 2) as both, Load(following.url, 2) as load:
        gone = killed(both[0])
        until(lambda: not psutil.pid_exists(gone))
        with workers(following.url, 2) as now:
            for worker in now:
                health = worker.health()
                assert (health["version"], health["release_refused"]["release_id"]) == ("2", None)
    assert load.answers.keys() == {(200, "2", known["2"])}
    following.served("1")


def test_two_services_of_one_machine_follow_their_own_and_a_killed_one_starts_where_it_was(
    following: Following, known: dict[str, float], model: Model, backwards: Model, tmp_path: Path
) -> None:
    following.served("1")
    second = Following(tmp_path)
    second.add(model, "1")
    second.add(backwards, "2")
    baked = second.releases["1"].directory
    settings = FAST | {"CHURN_FOLLOW": str(second.pointer)}
    with Load(following.url, 2) as load:
        # Without a pointer there is what is baked in, and the reason.
        with serve(SERVICE, baked, environment=settings) as second.url:
            with workers(second.url, 1) as (worker,):
                health = worker.health()
                assert health["version"] == "1"
                assert "cannot be read" in health["release_refused"]["reason"]
            second.served("2", 1)
            with workers(second.url, 1) as (worker,):
                service = psutil.Process(worker.health()["worker"]).parent()
            assert service
            for process in [service, *service.children(recursive=True)]:
                process.kill()
        with (
            serve(SERVICE, baked, environment=settings) as second.url,
            workers(second.url, 1) as (worker,),
        ):
            assert worker.predict()["churn_probability"] == known["2"]
    assert load.lost == 0
    assert load.answers.keys() == {(200, "1", known["1"])}


# From here on in this process.


@pytest.fixture
def at(following: Following, tmp_path: Path) -> Following:
    """A copy nobody serves."""
    shutil.copytree(following.folder / "releases", tmp_path / "own" / "releases")
    return Following(tmp_path / "own", releases=following.releases)


def test_a_relative_pointer_and_a_wrong_interval_are_named(
    service: ModuleType, release: Release
) -> None:
    assert service.Follower.from_environment({"CHURN_FOLLOW": ""}) is None
    with pytest.raises(ReleaseError, match=r"CHURN_FOLLOW is 'current\.json'; give the abs"):
        service.Follower.from_environment({"CHURN_FOLLOW": "current.json"})
    for wrong in ("0", "nan", "soon"):
        settings = {"CHURN_FOLLOW": "/x", "CHURN_FOLLOW_SECONDS": wrong}
        with pytest.raises(ReleaseError, match=f"CHURN_FOLLOW_SECONDS is '{wrong}'"):
            service.Follower.from_environment(settings)
    with (
        pytest.raises(UserError, match="refused to start: CHURN_FOLLOW is 'x'"),
        serve(SERVICE, release.directory, environment={"CHURN_FOLLOW": "x"}),
    ):
        pass


def test_the_home_keeps_its_releases_where_the_pointer_leads(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert release_directory(home.current, "v1-0123456789ab") == home.releases / "v1-0123456789ab"
    for wrong in ("", ".", "..", "../x", "a/b", "/x", "a\0", "-x", ".x", "v1\n", "x" * 101):
        with pytest.raises(ReleaseError, match="is not the id of a release"):
            release_directory(home.current, wrong)


def test_no_clock_has_a_say_in_what_is_new(service: ModuleType, at: Following) -> None:
    baked = service.Served(read_release(at.releases["1"].directory))
    follower = service.Follower(at.pointer)
    at.point("1")
    assert follower.first(baked) is baked
    assert follower.look() is None
    for number, moment in enumerate([0, 2**32, 1, 1, 1]):
        # The same file, as large as before, and last changed long ago, in the future or just then.
        version = "21"[number % 2]
        old = at.releases["12"[number % 2]].manifest.release_id.encode()
        new = at.releases[version].manifest.release_id.encode()
        said = at.pointer.read_bytes().replace(old, new)
        at.pointer.write_bytes(said.replace(b'"%s"' % b"12"[number % 2 : number % 2 + 1],
                                            b'"%s"' % version.encode()))  # fmt: skip
        os.utime(at.pointer, (moment, moment))
        swapped = follower.look()
        assert swapped.manifest.model_version == version
        assert follower.look() is None


def test_a_bad_release_is_not_tried_again_and_one_that_is_not_there_now_and_then(
    service: ModuleType, at: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    import churn_service.follower as module

    tried: list[Path] = []

    def read(directory: Path) -> Release:
        tried.append(directory)
        return read_release(directory)

    monkeypatch.setattr(module, "read_release", read)
    clock = [0.0]
    follower = service.Follower(at.pointer, monotonic=lambda: clock[0])
    at.point("1")
    follower.first(service.Served(read_release(at.releases["1"].directory)))
    content = at.folder / "releases" / at.releases["2"].directory.name / MODEL
    good = content.read_bytes()
    content.write_bytes(b"half")
    at.point("2")
    for clock[0] in range(100):
        assert follower.look() is None
    assert len(tried) == 1
    assert "was changed" in follower.refused.reason
    # The same release is tried again when the pointer is written anew.
    content.write_bytes(good)
    assert follower.look() is None
    at.point("2")
    assert follower.look().manifest.model_version == "2"
    assert follower.refused is None

    tried.clear()
    moved = content.parent.rename(at.folder / "moved")
    at.point("1")
    assert follower.look().manifest.model_version == "1"
    at.point("2")
    for clock[0] in range(100, 125):
        assert follower.look() is None
    since = follower.refused.since
    assert len(tried) == 1 + 3
    moved.rename(content.parent)
    for clock[0] in range(125, 131):
        assert follower.refused.since == since
        if served := follower.look():
            break
    assert served.manifest.model_version == "2"
    assert follower.refused is None


def test_what_goes_wrong_in_any_other_way_is_refused_too(
    service: ModuleType, at: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    import churn_service.follower as module

    follower = service.Follower(at.pointer)
    at.point("1")
    follower.first(service.Served(read_release(at.releases["1"].directory)))

    def fail(_: Path) -> Release:
        raise MemoryError("no more")

    monkeypatch.setattr(module, "read_release", fail)
    at.point("2")
    assert follower.look() is None
    assert follower.refused.reason == "MemoryError: no more"


def test_nothing_verified_last_leaves_what_is_baked_in(service: ModuleType, at: Following) -> None:
    baked = service.Served(read_release(at.releases["1"].directory))
    at.pointer.write_text("{")
    verified = at.folder / ".current.json.verified"
    for told in (None, b"{", b"\xff", at.releases["1"].manifest.release_id.encode()):
        if told is not None:
            verified.write_bytes(told)
        follower = service.Follower(at.pointer)
        assert follower.first(baked) is baked
        assert "does not say what serves" in follower.refused.reason


def started(service: ModuleType, follower: Any, at: Following) -> Any:
    """An endpoint of this process with version 1 baked in."""
    with mock.patch.dict(os.environ, {"CHURN_PREDICTION_LOG": "off"}):
        endpoint = service.Endpoint(service.lane, service.limits)
        endpoint.follower = follower
        endpoint.start(follower.first(service.Served(read_release(at.releases["1"].directory))))
    return endpoint


def test_a_replaced_release_is_gone_once_its_last_request_is_answered(
    service: ModuleType, at: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CHURN_ONLINE_STORE", raising=False)
    at.point("1")
    follower = service.Follower(at.pointer, 0.001)
    endpoint = started(service, follower, at)

    async def swap(version: str) -> None:
        in_use = endpoint.served
        old = weakref.ref(in_use), weakref.ref(in_use.model._session)
        at.point(version)
        deadline = time.monotonic() + PATIENCE_S
        while endpoint.served is in_use and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        assert endpoint.served.manifest.model_version == version
        assert old[0]() is in_use
        del in_use
        # The thread is still writing down what it has done.
        while any(held() is not None for held in old) and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        assert [held() for held in old] == [None, None]

    async def swaps() -> None:
        follower.start(endpoint.replace)
        for version in "2121":
            await swap(version)

    # By its references alone: the service hardly ever collects garbage.
    gc.disable()
    try:
        asyncio.run(swaps())
    finally:
        gc.enable()
        follower.stop()


def test_a_release_of_other_features_brings_its_request_and_its_look_up(
    service: ModuleType,
    at: Following,
    model_of_three: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path / "online.db", *content())
    monkeypatch.setenv("CHURN_ONLINE_STORE", str(tmp_path / "online.db"))
    at.add(model_of_three, "3")
    at.point("1")
    follower = service.Follower(at.pointer)
    endpoint = started(service, follower, at)
    call = Caller(endpoint)
    customer, stored = next(iter(STORED.items()))
    first = call("/predict", {"customer_id": customer})
    assert first[:1] == (200,)
    for version, names in (("3", model_of_three.features), ("1", FEATURE_NAMES)):
        at.point(version)
        endpoint.replace(follower.look())
        by_id = call("/predict", {"customer_id": customer})
        assert (by_id[0], by_id[1]["model_version"]) == (200, version)
        body = {"customer_id": customer} | {name: stored[name] for name in names}
        assert call("/predict", body)[1]["churn_probability"] == by_id[1]["churn_probability"]
        assert tuple(call("/health")[1]["features"]) == names
    assert by_id[:2] == first[:2]
    row = np.array([[stored[name] for name in model_of_three.features]], dtype=np.float32)
    at.point("3")
    endpoint.replace(follower.look())
    assert call("/predict", {"customer_id": customer})[1]["churn_probability"] == pytest.approx(
        float(model_of_three.predict(row)[0]), abs=6e-5
    )
