"""The way past BentoML's middleware: the same answers, and what the middleware gave is kept."""

from __future__ import annotations

import asyncio
import gc
import http.client
import importlib.util
import json
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import bentoml
import psutil
import pytest
from bad_requests import bad_requests, send_refused
from prometheus_client.parser import text_string_to_metric_families
from serving_cases import BAD_BODIES, PATIENCE_S, SERVICE, VALID, Model, release_of

from churn_assets.contract.logged import LoggedPrediction
from churn_assets.contract.release import Release, ReleaseError, read_release
from churn_assets.contract.response import LaneHealth, LogHealth
from churn_assets.lifecycle.serving import serve, with_workers
from churn_service.bodies import Message
from churn_service.endpoint import Endpoint
from churn_service.fast_lane import PATHS, FastLane, choose_lane
from churn_service.metrics import Metrics
from churn_service.prediction_log import NotLogged
from churn_service.served import Served
from churn_service.traffic import Limits

GOOD = json.dumps(VALID).encode()
JSON = {"content-type": "application/json"}
FAST = LaneHealth(fast=True, reason=None)

Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture(scope="module")
def slow_url(release: Release) -> Generator[str]:
    """The service without the fast lane."""
    with serve(SERVICE, release.directory, environment={"CHURN_FAST_LANE": "off"}) as base_url:
        yield base_url


def send(
    url: str, body: bytes, method: str = "POST", path: str = "/predict", headers: dict = JSON
) -> Answer:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=20)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


REQUESTS: list[tuple[bytes, str, str, dict[str, str]]] = [
    (GOOD, "POST", "/predict", JSON),
    (GOOD, "POST", "/predict?x=1", JSON),
    (GOOD, "POST", "/%70redict", JSON),
    *((body, "POST", "/predict", JSON) for body, _, _ in BAD_BODIES),
    (b'{"customer_id": "c-1"}', "POST", "/predict", JSON),
    (GOOD, "POST", "/predict", {}),
    (GOOD, "POST", "/predict", JSON | {"content-encoding": "gzip"}),
    (b" " * 100_000, "POST", "/predict", JSON),
    (b"", "GET", "/predict", {}),
    (GOOD, "PUT", "/predict", JSON),
    (b"", "HEAD", "/predict", {}),
    (b"", "OPTIONS", "/predict", {}),
    (b'{"rows": [%b, {}, %b]}' % (GOOD, GOOD), "POST", "/predict_batch", JSON),
    (b'{"rows": []}', "POST", "/predict_batch", JSON),
    (b" " * 2_000_000, "POST", "/predict_batch", JSON),
    (b"", "GET", "/predict_batch", {}),
    (b"", "POST", "/health", {}),
    (GOOD, "POST", "/predict/", JSON),
    (GOOD, "POST", "//predict", JSON),
    (b"", "GET", "/nothing", {}),
    (b"", "GET", "/", {}),
    (b"", "POST", "/livez", {}),
    (b"", "GET", "/livez", {}),
    (b"", "GET", "/readyz", {}),
    (b"", "GET", "/healthz", {}),
]


@pytest.fixture(autouse=True)
def unlogged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Endpoints in this process keep no log."""
    monkeypatch.setenv("CHURN_PREDICTION_LOG", "off")


def test_both_lanes_answer_the_same_bytes(url: str, slow_url: str) -> None:
    statuses = Counter()
    for request in REQUESTS:
        one, other = (send(base, *request) for base in (url, slow_url))
        for answer in (one, other):
            answer[1].pop("date")
            answer[1].pop("x-request-id", None)
        assert one == other, request
        statuses[one[0]] += 1
    assert statuses[200] >= 7
    assert {400, 404, 405, 413, 415, 422} <= set(statuses)


def test_bad_requests_are_refused_without_the_fast_lane_too(slow_url: str) -> None:
    assert len(send_refused(slow_url, bad_requests(500, seed=6))) == 500


def test_each_lane_says_which_it_is(url: str, slow_url: str) -> None:
    fast, slow = (json.loads(send(base, b"", "GET", "/health")[2]) for base in (url, slow_url))
    assert fast.pop("lane") == {"fast": True, "reason": None}
    assert slow.pop("lane") == {"fast": False, "reason": "CHURN_FAST_LANE is off"}
    for own in ("started_at", "worker", "prediction_log"):
        assert fast.pop(own) != slow.pop(own)
    assert fast == slow


def counted(url: str) -> Counter[tuple[str, ...]]:
    """The samples of our own metrics: (name, label values...) and value."""
    status, _, text = send(url, b"", "GET", "/metrics", {})
    assert status == 200
    return Counter(
        {
            (sample.name, *(sample.labels[key] for key in sorted(sample.labels))): sample.value
            for family in text_string_to_metric_families(text.decode())
            for sample in family.samples
            if family.name.startswith("churn_")
        }
    )


@pytest.mark.parametrize("lane", ["url", "slow_url"])
def test_metrics_count_exactly_what_was_sent(
    lane: str, request: pytest.FixtureRequest, release: Release
) -> None:
    url = request.getfixturevalue(lane)
    send(url, GOOD)
    before = counted(url)
    for _ in range(7):
        probability = json.loads(send(url, GOOD)[2])["churn_probability"]
    for _ in range(3):
        send(url, b"{}")
    send(url, b"", "GET", "/health", {})
    send(url, b'{"rows": [%b, {}, %b]}' % (GOOD, GOOD), "POST", "/predict_batch")
    send(url, b"", "GET", "/no-such-path", {})
    send(url, b"", "GET", "/nor-this", {})
    send(url, b"", "GET", "/livez", {})
    after = counted(url)
    requests = {
        key[1:]: value - before[key]
        for key, value in after.items()
        if key[0] == "churn_requests_total" and value != before[key]
    }
    assert requests == {
        ("/predict", "200"): 7,
        ("/predict", "422"): 3,
        ("/health", "200"): 1,
        ("/predict_batch", "200"): 1,
        ("other", "404"): 2,
    }

    def more(*key: str) -> float:
        return after[key] - before[key]

    assert more("churn_request_seconds_count", "/predict") == 10
    assert more("churn_request_seconds_bucket", "/predict", "+Inf") == 10
    assert 0 < more("churn_request_seconds_sum", "/predict") < 10
    assert more("churn_probability_count", "7") == 9
    assert more("churn_probability_sum", "7") == pytest.approx(9 * probability)
    above = f"{int(probability * 20 + 1) / 20}"
    below = f"{int(probability * 20) / 20}"
    assert (more("churn_probability_bucket", above, "7"),) == (9,)
    assert (more("churn_probability_bucket", below, "7"),) == (0,)
    assert after[serving(release)] == 1
    assert after["churn_requests_in_progress",] == 0
    assert after["churn_unlogged_predictions_total",] == 0


def test_metrics_tell_of_the_prediction_log(url: str) -> None:
    send(url, GOOD)
    health = json.loads(send(url, b"", "GET", "/health")[2])
    for _ in range(PATIENCE_S * 10):
        shown = counted(url)
        if shown["churn_prediction_log_rows_waiting",] == health["prediction_log"]["rows_waiting"]:
            break
        time.sleep(0.1)
    assert shown["churn_prediction_log_rows_waiting",] > 0
    assert shown["churn_prediction_log_rows_waiting",] == health["prediction_log"]["rows_waiting"]
    oldest = datetime.fromisoformat(health["prediction_log"]["oldest_waiting"])
    age = (datetime.now(UTC) - oldest).total_seconds()
    assert shown["churn_prediction_log_lag_seconds",] == pytest.approx(age, abs=PATIENCE_S)
    assert shown["churn_prediction_log_usable",] == 1


def test_metrics_are_those_of_all_workers_alive(release: Release) -> None:
    before = {process.pid for process in psutil.Process().children()}
    with serve(SERVICE, release.directory, environment=with_workers(2)) as url:
        (boss,) = [p for p in psutil.Process().children() if p.pid not in before]
        until(lambda: counted(url)[serving(release)] == 2)
        with ExitStack() as stack:
            clients = [stack.enter_context(client(url)) for _ in range(20)]
            for each in clients:
                each.request("POST", "/predict", GOOD, JSON)
            assert [each.getresponse().status for each in clients] == [200] * 20
        predictions = ("churn_requests_total", "/predict", "200")
        assert [counted(url)[predictions] for _ in range(10)] == [20] * 10
        before_kill = boss.children()
        next(p for p in before_kill if WORKER in " ".join(p.cmdline())).kill()
        until(lambda: set(boss.children()) - set(before_kill))
        (new,) = set(boss.children()) - set(before_kill)
        until(lambda: any("gauge_live" in Path(file.path).name for file in new.open_files()))
        until(lambda: counted(url)[serving(release)] == 2)
        assert counted(url)[predictions] == 20


WORKER = "_bentoml_impl.worker.service"


def serving(release: Release) -> tuple[str, ...]:
    return "churn_release_info", "", "7", release.manifest.release_id


@contextmanager
def client(url: str) -> Generator[http.client.HTTPConnection]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=20)
    yield connection
    connection.close()


def until(happens: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_unlogged_predictions_are_counted_once() -> None:
    metrics = Metrics(PATHS)
    for unlogged in (3, 3, 5):
        metrics.log(LogHealth(store="off", usable=False, unlogged=unlogged))
    assert next(iter(metrics._unlogged.collect())).samples[0].value == 5


async def speak(
    app: Callable[..., Awaitable[None]], body: bytes = GOOD, path: str = "/predict",
    method: str = "POST", parts: Sequence[bytes] | None = None,
) -> Answer:  # fmt: skip
    """One request in ASGI; the last of `parts` does not come when they are given."""
    messages = [{"type": "http.request", "body": body}]
    if parts is not None:
        messages = [{"type": "http.request", "body": p, "more_body": True} for p in parts]
    sent: list[Message] = []

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        return await asyncio.get_running_loop().create_future()

    async def answer(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http", "path": path, "method": method, "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    await app(scope, receive, answer)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message["body"] for message in sent[1:])


class HeldLog(NotLogged):
    """Keeps a prediction when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.may = asyncio.Event()

    async def keep(self, predictions: Sequence[LoggedPrediction]) -> None:
        await self.may.wait()


def started(release: Release, **limits: Any) -> tuple[Endpoint, HeldLog]:
    endpoint, log = Endpoint(FAST, Limits(**limits)), HeldLog()
    endpoint.start(Served(release))
    endpoint._log = log
    return endpoint, log


def test_more_requests_than_the_limit_hear_429_and_then_no_more(release: Release) -> None:
    async def check() -> None:
        endpoint, log = started(release, max_concurrency=3)
        first = [asyncio.create_task(speak(endpoint)) for _ in range(3)]
        # Neither one that is still being read nor one that is refused takes a place.
        reading = asyncio.create_task(speak(endpoint, parts=[GOOD[:9]]))
        await asyncio.sleep(0)
        for path in ("/predict", "/predict_batch"):
            status, headers, body = await speak(endpoint, path=path)
            assert (status, headers["retry-after"]) == (429, "1")
            assert json.loads(body)["error"]["field"] == "server"
        assert (await speak(endpoint, path="/health", method="GET"))[0] == 200
        log.may.set()
        assert [(await task)[0] for task in first] == [200] * 3
        for _ in range(10):
            assert (await speak(endpoint))[0] == 200
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    asyncio.run(check())


def test_what_takes_too_long_is_504_and_what_does_not_come_408(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("churn_service.traffic.READ_SECONDS", 0.05)

    async def check() -> None:
        endpoint, log = started(release, max_concurrency=1, timeout=0.1)
        async with asyncio.timeout(PATIENCE_S):
            late, unread = await asyncio.gather(speak(endpoint), speak(endpoint, parts=[b"{"]))
            assert (late[0], unread[0]) == (504, 408)
            assert json.loads(late[2])["error"]["message"] == "could not answer within 0.1 s"
            assert unread[1]["connection"] == "close"
            log.may.set()
            assert (await speak(endpoint))[0] == 200

    asyncio.run(check())


def test_a_request_the_server_cancels_is_not_answered(release: Release) -> None:
    async def check() -> None:
        endpoint, _ = started(release)
        task = asyncio.create_task(speak(endpoint))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not endpoint._traffic._answering

    asyncio.run(check())


def load_service() -> ModuleType:
    spec = importlib.util.spec_from_file_location("churn_bento_again", SERVICE / "service.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quiet_gc() -> Generator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.mark.usefixtures("service", "quiet_gc")
def test_not_ready_before_the_release_is_loaded(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHURN_RELEASE_DIR", str(release.directory))
    module = load_service()
    app = module.Churn.to_asgi()
    assert isinstance(app, FastLane)

    async def check() -> None:
        assert (await speak(app))[0] == 503
        events: asyncio.Queue[Message] = asyncio.Queue()
        done: asyncio.Queue[Message] = asyncio.Queue()
        life = asyncio.create_task(app({"type": "lifespan", "state": {}}, events.get, done.put))
        await events.put({"type": "lifespan.startup"})
        assert (await done.get())["type"] == "lifespan.startup.complete"
        assert (await speak(app, b"", "/readyz", "GET"))[0] == 200
        assert (await speak(app))[0] == 200
        module.endpoint.started = False
        assert (await speak(app, b"", "/readyz", "GET"))[0] == 503
        await events.put({"type": "lifespan.shutdown"})
        assert (await done.get())["type"] == "lifespan.shutdown.complete"
        await life

    asyncio.run(check())


# Each needs a BentoML that is imported, which warns.
@pytest.mark.usefixtures("service")
@pytest.mark.parametrize(
    ("version", "fast"),
    [
        ("1.4.39", True),
        ("1.4.40", True),
        ("1.4.100rc1", True),
        ("1.4.38", False),
        ("1.5.0", False),
        ("1.5.0a1", False),
        ("2.0", False),
    ],
)
def test_the_fast_lane_is_taken_with_the_versions_it_holds_for(version: str, fast: bool) -> None:
    lane = choose_lane({}, version)
    assert lane.fast is fast
    assert lane.reason == (
        None if fast else f"holds for BentoML 1.4.39 up to 1.5, {version} is installed"
    )
    assert not choose_lane({"CHURN_FAST_LANE": "off"}, version).fast


@pytest.mark.usefixtures("service")
def test_the_installed_bentoml_is_one_it_holds_for() -> None:
    assert choose_lane({}) == FAST


@pytest.mark.usefixtures("service")
def test_a_bentoml_without_the_way_in_has_no_fast_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bentoml, "service", lambda inner=None, **config: None)
    assert not choose_lane({}).fast


@pytest.mark.usefixtures("service", "quiet_gc")
def test_another_bentoml_is_served_by_its_mount_with_a_warning(
    release: Release, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CHURN_RELEASE_DIR", str(release.directory))
    monkeypatch.setattr(bentoml, "__version__", "1.5.0")
    module = load_service()
    assert type(module.Churn) is bentoml.Service
    assert not isinstance(module.Churn.to_asgi(), FastLane)
    monkeypatch.setattr(logging.getLogger("bentoml"), "propagate", True)
    with caplog.at_level(logging.WARNING, "bentoml.churn"):
        module.Churn.inner()
    assert "holds for BentoML 1.4.39 up to 1.5, 1.5.0 is installed" in caplog.text
    health = json.loads(asyncio.run(speak(module.endpoint, b"", "/health", "GET"))[2])
    assert health["lane"]["fast"] is False


@pytest.mark.parametrize(
    "environment",
    [
        {"CHURN_FAST_LANE": "maybe"},
        {"CHURN_MAX_CONCURRENCY": "0"},
        {"CHURN_MAX_CONCURRENCY": "many"},
        {"CHURN_TIMEOUT_SECONDS": "0"},
        {"CHURN_TIMEOUT_SECONDS": "nan"},
        {"CHURN_TIMEOUT_SECONDS": "soon"},
    ],
)
@pytest.mark.usefixtures("service")
def test_a_wrong_setting_is_refused_and_named(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
        with pytest.raises(bentoml.exceptions.BentoMLException, match=f"refused to start: {name}"):
            load_service()


def test_sigterm_finishes_what_is_in_flight(release: Release) -> None:
    before = {process.pid for process in psutil.Process().children()}
    with serve(SERVICE, release.directory) as url:
        (boss,) = [p for p in psutil.Process().children() if p.pid not in before]
        address = (urlsplit(url).hostname, urlsplit(url).port)
        head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += b"content-length: %d\r\n\r\n" % len(GOOD)
        with (
            socket.create_connection(address, PATIENCE_S) as busy,
            socket.create_connection(address, PATIENCE_S) as idle,
        ):
            busy.sendall(head + GOOD[:5])
            # By this answer the worker has begun with the request before it.
            idle.sendall(head + GOOD)
            assert idle.recv(9).startswith(b"HTTP/1.1 ")
            boss.terminate()
            # A worker that is to stop closes idle connections first.
            while idle.recv(1000):
                pass
            busy.sendall(GOOD[5:])
            answer = busy.makefile("rb").read()
        boss.wait(PATIENCE_S)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in answer
    assert b"churn_probability" in answer


def test_the_gauges_of_killed_workers_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    nobody = 2**22 + 1  # above the kernel's highest
    for name in (f"gauge_livesum_{nobody}.db", f"counter_{nobody}.db",
                 f"gauge_livesum_{os.getpid()}.db"):  # fmt: skip
        (tmp_path / name).touch()
    Metrics(PATHS)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"counter_{nobody}.db", f"gauge_livesum_{os.getpid()}.db",
    }  # fmt: skip


def test_a_new_release_takes_the_place_of_the_old_in_the_metrics(
    model: Model, release: Release, tmp_path: Path
) -> None:
    other = read_release(release_of(model, tmp_path, "8").directory)
    metrics = Metrics(PATHS)
    metrics.serves(release.manifest, "churn:a")
    metrics.serves(other.manifest, None)
    shown = {
        (sample.labels["release_id"], sample.labels["bento"]): sample.value
        for family in metrics._releases.collect()
        for sample in family.samples
    }
    assert shown == {
        (release.manifest.release_id, "churn:a"): 0,
        (other.manifest.release_id, ""): 1,
    }


def test_limits_are_read() -> None:
    environment = {"CHURN_MAX_CONCURRENCY": "7", "CHURN_TIMEOUT_SECONDS": "2.5"}
    assert Limits.from_environment(environment) == Limits(7, 2.5)
    with pytest.raises(ReleaseError, match="CHURN_TIMEOUT_SECONDS must be seconds"):
        Limits.from_environment({"CHURN_TIMEOUT_SECONDS": "-1"})
