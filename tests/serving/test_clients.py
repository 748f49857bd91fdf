"""Clients that are slow, greedy, idle or no clients at all: the others go on being answered."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import select
import socket
import time
from collections.abc import Generator
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil
import pytest
import uvicorn.config
from serving_cases import PATIENCE_S, SERVICE, VALID, family

from churn_assets.contract.release import Release, ReleaseError
from churn_assets.lifecycle.serving import ask, serve
from churn_service.connections import (
    MAX_HEAD_BYTES,
    allow_many_connections,
    guard_connections,
    head_seconds,
)

GOOD = json.dumps(VALID).encode()
HEAD = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
REQUEST = HEAD + b"content-length: %d\r\n\r\n%b" % (len(GOOD), GOOD)
MEGABYTE = 1_000_000


@dataclass
class Service:
    """A service that waits a second for a head, and its processes."""

    url: str
    processes: list[psutil.Process]

    def connect(self) -> socket.socket:
        return connect(self.url)

    def memory(self) -> int:
        return sum(process.memory_info().rss for process in self.processes)


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((str(parts.hostname), parts.port), PATIENCE_S)


@pytest.fixture(scope="module")
def service(release: Release) -> Generator[Service]:
    before = {process.pid for process in family(os.getpid())}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        with serve(SERVICE, release.directory, environment={"CHURN_HEAD_SECONDS": "1"}) as url:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            started = [each for each in family(os.getpid()) if each.pid not in before]
            yield Service(url, started)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def read_answer(connection: socket.socket) -> tuple[int, dict]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    content = response.read()
    return response.status, json.loads(content).get("error", {})


def drip(connection: socket.socket, drop: bytes, pause: float = 0.05) -> bytes:
    """Send `drop` again and again until there is an answer, or the end; returns what came."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(drop)
        if select.select([connection], [], [], pause)[0]:
            with contextlib.suppress(ConnectionResetError):
                return connection.recv(4096)
            return b""
    raise AssertionError("the service waits for ever")


def test_a_head_that_never_ends_is_a_timeout_of_the_client(service: Service) -> None:
    with service.connect() as connection:
        connection.sendall(HEAD)
        answer = drip(connection, b"x")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'{"error":{"field":"request","message":"must have a head that arrives' in answer
    # The same for the second request of a connection.
    with service.connect() as connection:
        connection.sendall(REQUEST)
        assert read_answer(connection)[0] == 200
        connection.sendall(HEAD)
        assert drip(connection, b"x").startswith(b"HTTP/1.1 408 ")


def test_a_connection_that_asks_for_nothing_is_closed(service: Service) -> None:
    with service.connect() as connection:
        assert connection.recv(100) == b""


def test_what_comes_after_an_early_answer_is_not_waited_for(service: Service) -> None:
    with service.connect() as connection:
        connection.sendall(b"PUT" + HEAD[4:] + b"content-length: 100000\r\n\r\n")
        assert read_answer(connection)[0] == 405
        assert drip(connection, b"x") == b""


def test_a_head_of_any_length_is_refused_and_not_kept(service: Service) -> None:
    before = service.memory()
    for start in (HEAD + b"x-much: ", b"GET /" + b"x" * 100, HEAD + b"x" * 100):
        for _ in range(4):
            with service.connect() as connection, contextlib.suppress(OSError):
                for _ in range(20):
                    connection.sendall(start + b"x" * MEGABYTE)
    with service.connect() as connection:
        connection.sendall(HEAD + b"x-much: " + b"x" * MAX_HEAD_BYTES)
        status, error = read_answer(connection)
    assert (status, error["field"]) == (431, "request")
    assert service.memory() - before < 20 * MEGABYTE
    with service.connect() as connection:
        connection.sendall(HEAD + b"x-much: " + b"x" * (MAX_HEAD_BYTES - 1000) + b"\r\n")
        connection.sendall(REQUEST.removeprefix(HEAD))
        assert read_answer(connection)[0] == 200


def test_ten_megabytes_are_refused_with_an_answer_and_not_kept(service: Service) -> None:
    ask(service.url, GOOD)
    before = service.memory()
    for path in (b"/predict", b"/predict_batch"):
        for _ in range(10):
            head = HEAD.replace(b"/predict", path) + b"content-length: %d\r\n\r\n"
            with service.connect() as connection:
                connection.sendall(head % (10 * MEGABYTE) + GOOD + b" " * 10 * MEGABYTE)
                status, error = read_answer(connection)
                assert (status, error["field"]) == (413, "body")
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(1) == b""
    assert service.memory() - before < 10 * MEGABYTE
    assert ask(service.url, GOOD).status == 200


GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
    b"GARBAGE\r\n\r\n",
    b"get /predict HTTP/1.1\r\n\r\n",
    b"POST /predict HTTP/9.9\r\n\r\n",
    b"POST /predict HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
    b"POST /predict HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n12345",
    b"POST /predict HTTP/1.1\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n12345",
    b"POST /predict HTTP/1.1\r\nhead er: x\r\n\r\n",
    b"POST /predict HTTP/1.1\r\ncontent-length: " + b"9" * 5000 + b"\r\n\r\n",
    b"POST /pr\xffedict HTTP/1.1\r\n\r\n",
    b"POST http://[ HTTP/1.1\r\n\r\n",
    b"\r\n\r\n\x00",
    bytes(range(255, 0, -1)),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda garbage: repr(garbage[:60]))
def test_what_is_not_http_is_refused(service: Service, garbage: bytes) -> None:
    with service.connect() as connection:
        connection.sendall(garbage)
        status, error = read_answer(connection)
        assert (status, error["field"]) == (400, "request")
        assert connection.recv(1) == b""


def test_garbage_after_a_good_request_does_not_cost_its_answer(service: Service) -> None:
    with service.connect() as connection:
        connection.sendall(REQUEST + b"GARBAGE\r\n\r\n")
        assert read_answer(connection)[0] == 200


def test_a_body_that_comes_in_drops_or_not_at_all_is_a_timeout_of_the_client(url: str) -> None:
    with connect(url) as none, connect(url) as drops:
        none.sendall(HEAD + b"content-length: 50\r\n\r\n{")
        drops.sendall(HEAD + b"content-length: 50000\r\n\r\n{")
        assert ask(url, GOOD).status == 200
        assert drip(drops, b" ").startswith(b"HTTP/1.1 408 ")
        status, error = read_answer(none)
    assert (status, error["field"]) == (408, "body")


def test_a_thousand_idle_connections_hold_up_nobody(url: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_many_connections()
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1500:
        pytest.skip("this system allows fewer than 1,500 open files; raise ulimit -Hn")
    with contextlib.ExitStack() as idle:
        idle.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        opened = [idle.enter_context(connect(url)) for _ in range(1000)]
        for connection in opened[::2]:
            connection.sendall(HEAD)
        for connection in opened[1::4]:
            connection.sendall(REQUEST)
        for connection in opened[1::4]:
            assert read_answer(connection)[0] == 200
        with connect(url) as busy:
            for _ in range(300):
                busy.sendall(REQUEST)
                assert read_answer(busy)[0] == 200


def test_the_service_may_have_as_many_connections_as_the_system_lets_it(service: Service) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = [process.rlimit(resource.RLIMIT_NOFILE)[0] for process in service.processes]
    assert max(soft) == min(hard, 65_536)


def test_another_uvicorn_keeps_its_own_protocol(caplog: pytest.LogCaptureFixture) -> None:
    before = dict(uvicorn.config.HTTP_PROTOCOLS)
    assert guard_connections({}, "0.55.1") is False
    assert guard_connections({}, "0.9") is False
    assert before == uvicorn.config.HTTP_PROTOCOLS
    assert "use a proxy" in caplog.text


@pytest.mark.parametrize("given", ["0", "-1", "nan", "soon", "3601"])
def test_a_time_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(ReleaseError, match="CHURN_HEAD_SECONDS must be seconds"):
        head_seconds({"CHURN_HEAD_SECONDS": given})
