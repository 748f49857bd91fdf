"""Clients that ask the service for predictions and remember which it acknowledged."""

from __future__ import annotations

import http.client
import json
import threading
import time
import uuid
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Self
from urllib.parse import urlsplit

TIMEOUT_S = 20.0
JSON = {"content-type": "application/json"}


class Clients:
    """So many clients at `url`, each asking `a_second` times a second while the block runs.

    `body` gives what is asked, for the number of the request. `acknowledged` has the names of the
    requests whose whole answer arrived with status 200; `answered_at` when they did, by the
    monotonic clock; `refused` counts other answers by status.
    """

    def __init__(
        self, url: str, body: Callable[[int], dict[str, Any]], clients: int = 3, a_second: float = 8
    ) -> None:
        parts = urlsplit(url)
        self._place = str(parts.hostname), parts.port
        self._body, self._pause = body, 1 / a_second
        self._ended = threading.Event()
        self.acknowledged: list[str] = []
        self.answered_at: list[float] = []
        self.refused: dict[int, int] = {}
        # What one session leaves in the lake is told apart from what the next one asks.
        self._name = uuid.uuid4().hex[:8]
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def answered_since(self, moment: float) -> bool:
        """Whether a request was acknowledged after `moment`."""
        return bool(self.answered_at) and self.answered_at[-1] > moment

    def longest_silence(self, since: float, until: float) -> float:
        """The longest time without an acknowledged answer between two moments, in seconds."""
        inside = [at for at in self.answered_at if since <= at <= until]
        moments = sorted([since, *inside, until])
        return max(b - a for a, b in pairwise(moments))

    def _ask(self, client: int) -> None:
        connection, number = None, 0
        while not self._ended.wait(self._pause):
            number += 1
            name = f"{self._name}-{client}-{number}"
            try:
                if connection is None:
                    connection = http.client.HTTPConnection(*self._place, timeout=TIMEOUT_S)
                content = json.dumps(self._body(number)).encode()
                connection.request("POST", "/predict", content, JSON | {"x-request-id": name})
                response = connection.getresponse()
                response.read()
            except (OSError, http.client.HTTPException):
                if connection is not None:
                    connection.close()
                connection = None
                continue
            if response.status == 200:
                self.acknowledged.append(name)
                self.answered_at.append(time.monotonic())
            else:
                self.refused[response.status] = self.refused.get(response.status, 0) + 1
        if connection is not None:
            connection.close()
