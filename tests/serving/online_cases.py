"""Online stores for the serving tests, and a Redis that can be killed."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import redis

from churn_assets.contract.features import FEATURES, Feature, features_named
from churn_assets.contract.online import OnlineState, RowCodec
from churn_assets.data.online_rows import open_writer
from churn_assets.lifecycle.serving import free_port

CUTOFF = datetime(2025, 3, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
PATIENCE_S = 30

# Customers of a store, each with the values of its features.
STORED: dict[str, dict[str, float]] = {
    f"c-{number}": {
        "total_orders_30d": number,
        "avg_order_value": 10.5 * number,
        "days_since_last_order": 80 - 4 * number,
        "support_tickets_90d": number % 3,
        "login_frequency_7d": number / 7,
    }
    for number in range(20)
}


def content(
    rows: Mapping[str, Mapping[str, float]] = STORED,
    cutoffs: Mapping[str, datetime] = {},
    *,
    newest: datetime = CUTOFF,
    data_time: datetime | None = CUTOFF,
    features: Sequence[Feature] = FEATURES,
) -> tuple[OnlineState, dict[str, bytes]]:
    """What a store says of itself, and its rows; `cutoffs` are those other than `newest`."""
    codec = RowCodec(features)
    encoded = {each: codec.encode(cutoffs.get(each, newest), row) for each, row in rows.items()}
    return OnlineState(codec.names, codec.fingerprint, newest, data_time), encoded


def write(location: Path | str, state: OnlineState, rows: Mapping[str, bytes]) -> None:
    """Put these rows in place of what the store at `location` holds."""
    with closing(open_writer(str(location))) as writer:
        writer.remove()
        codec = RowCodec(features_named(state.features))
        writer.write(codec, list(rows), list(rows.values()), state.newest_cutoff)
        writer.publish(state)


class RedisServer:
    """A Redis of this machine, in a folder of its own; `kill` and `start` as often as wanted."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        binary = shutil.which("redis-server")
        assert binary
        self.process = subprocess.Popen(
            [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder),
             "--save", "", "--appendonly", "no", "--daemonize", "no"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        with closing(redis.Redis(port=self.port)) as client:
            until(lambda: answers(client))

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(PATIENCE_S)
            self.process = None


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def until(ask: Callable[[], Any]) -> Any:
    """The first answer that is true. Fails when patience ends before."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if answer := ask():
            return answer
        time.sleep(0.05)
    raise AssertionError("it never came")


class Caller:
    """Calls an ASGI application in this process, as a server would."""

    def __init__(self, application: Any):
        self.application = application

    def __call__(
        self, path: str, body: bytes | dict | None = None
    ) -> tuple[int, dict, dict[str, str]]:
        """Status, decoded content and headers of the answer to a GET, or a POST of `body`."""
        return asyncio.run(self._call(path, body))

    async def _call(self, path: str, body: bytes | dict | None) -> tuple[int, dict, dict[str, str]]:
        sent: list[dict] = []
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def receive() -> dict:
            return {"type": "http.request", "body": raw, "more_body": False}

        async def send(message: dict) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "path": path,
            "method": "GET" if body is None else "POST",
            "headers": [(b"content-type", b"application/json")],
        }
        await self.application(scope, receive, send)
        start, end = sent
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return start["status"], json.loads(end["body"]), headers
