"""What the tests of the prediction log share: reading it, and a client that keeps its answers."""

from __future__ import annotations

import http.client
import json
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from serving_cases import VALID

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.contract.logged import FILE_SUFFIX, LoggedPrediction, decode_logged

JSON = {"content-type": "application/json"}


def answered(name: str) -> LoggedPrediction:
    return LoggedPrediction(
        request_id=name,
        at=time.time_ns() // 1000,
        customer_id="c-1",
        features=FEATURE_NAMES,
        values=(1, 2.5, 3, 4, 5.5),
        probability=0.5,
        champion=0.5,
        challenger=None,
        arm="champion",
        model_version="7",
        release_id="v7",
        bento=None,
        cutoff=None,
        stale=None,
        latency_us=100,
    )


def stored(directory: Path) -> list[LoggedPrediction]:
    """Every row of every file of a log, the oldest of each file first."""
    rows = []
    for path in sorted(directory.glob(f"*{FILE_SUFFIX}")):
        with closing(sqlite3.connect(path)) as connection:
            found = connection.execute("SELECT record FROM prediction ORDER BY number")
            rows += [decode_logged(record) for (record,) in found]
    return rows


class Client:
    """One kept connection to a service."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=20)

    def ask(
        self, body: Any = VALID, path: str = "/predict", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any], http.client.HTTPMessage]:
        """Status, decoded answer and headers of one POST."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._connection.request("POST", path, content, JSON | (headers or {}))
        response = self._connection.getresponse()
        return response.status, json.loads(response.read()), response.headers

    def health(self) -> dict[str, Any]:
        """The decoded answer of GET /health."""
        self._connection.request("GET", "/health")
        return json.loads(self._connection.getresponse().read())

    def close(self) -> None:
        self._connection.close()


class Load:
    """Clients that ask without a pause, each request by a name of its own.

    `acknowledged` has the names of those whose whole answer arrived. `targets` maps the name of
    a service to its URL; a service that is not there is asked again a little later.
    """

    def __init__(self, targets: dict[str, str], clients: int = 3):
        self.targets, self.acknowledged = targets, []
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(name, number))
            for name in targets
            for number in range(clients)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, more: int, service: str) -> None:
        """Wait until `service` has answered so many more requests."""
        enough = self.count(service) + more
        deadline = time.monotonic() + 60
        while self.count(service) < enough:
            assert time.monotonic() < deadline, f"{service} has not answered for a minute"
            time.sleep(0.01)

    def count(self, service: str) -> int:
        return sum(name.startswith(service) for name in self.acknowledged)

    def _ask(self, service: str, number: int) -> None:
        client, asked = None, 0
        while not self._ended.is_set():
            asked += 1
            name = f"{service}-{number}-{asked}"
            try:
                client = client or Client(self.targets[service])
                status, _, headers = client.ask(headers={"x-request-id": name})
                assert (status, headers["x-request-id"]) == (200, name)
                self.acknowledged.append(name)
            except (OSError, http.client.HTTPException):
                if client:
                    client.close()
                client = None
                time.sleep(0.02)
        if client:
            client.close()
