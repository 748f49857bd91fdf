"""What the tests of the prediction log share: reading it, and a client that keeps its answers."""

from __future__ import annotations

import http.client
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serving_cases import VALID

from churn_assets.contract.logged import FILE_SUFFIX, LoggedPrediction, decode_logged

JSON = {"content-type": "application/json"}


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
