"""Connections that ask for nothing: their time, their size, their number.

uvicorn waits for ever for the end of a request's head, and takes one of any length; it sets no
limit before the first request, nor to what still comes after an early answer. The protocol made
here does, and what is not HTTP it answers as the endpoint answers what it refuses.

The name uvicorn finds its protocol under, and what of it is counted on here, are without a page in
its documentation, so this holds for the versions in HOLDS_FOR. With any other one, without
httptools, or with CHURN_FAST_LANE=off uvicorn's own protocol is used: keep a proxy with limits of
its own in front of it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import resource
from collections.abc import Mapping

import msgspec
import uvicorn
import uvicorn.config

from churn_assets.contract.release import ReleaseError
from churn_assets.contract.request import Refusal
from churn_assets.contract.response import refuse

try:
    from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
except ImportError:
    HttpToolsProtocol = None

# From the first version, which is tested, up to the second, which is not.
HOLDS_FOR = ((0, 54), (0, 55))

HEAD_SECONDS_VARIABLE = "CHURN_HEAD_SECONDS"
HEAD_SECONDS = 10.0
MAX_HEAD_BYTES = 64 * 1024

# More than a worker can keep busy; some systems know no highest number.
OPEN_FILES = 65_536

logger = logging.getLogger("bentoml.churn")


def head_seconds(environment: Mapping[str, str]) -> float:
    """For how long a connection may go without a whole request. Raises ReleaseError."""
    given = environment.get(HEAD_SECONDS_VARIABLE) or str(HEAD_SECONDS)
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise ReleaseError(
            f"{HEAD_SECONDS_VARIABLE} must be seconds above 0 up to 3600, it is {given!r}"
        )
    return seconds


def guard_connections(environment: Mapping[str, str], version: str = uvicorn.__version__) -> bool:
    """Have uvicorn use the protocol made here, where it holds; to be called before it starts.

    Raises ReleaseError for a setting that is none.
    """
    seconds = head_seconds(environment)
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if HttpToolsProtocol is None or not HOLDS_FOR[0] <= numbers < HOLDS_FOR[1]:
        logger.warning("uvicorn %s sets no limits to slow clients: use a proxy that does", version)
        return False
    GuardedProtocol.head_seconds = seconds
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:GuardedProtocol"
    return True


def allow_many_connections() -> None:
    """Raise this process's limit of open files, each connection being one, as far as it goes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


if HttpToolsProtocol is not None:

    class GuardedProtocol(HttpToolsProtocol):
        """uvicorn's protocol, which a client cannot keep waiting before or after its request."""

        head_seconds = HEAD_SECONDS
        _timer: asyncio.TimerHandle | None = None
        _head_bytes = 0

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            """A client is here: its first request is awaited as the end of one is."""
            super().connection_made(transport)  # ty: ignore[invalid-argument-type]
            self._timer = self.loop.call_later(self.head_seconds, self._too_slow)

        def connection_lost(self, exc: Exception | None) -> None:
            """The client has gone."""
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """A part of a request, most often a whole one."""
            super().data_received(data)
            cycle = self.cycle
            if cycle is None or cycle.scope is not self.scope:
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD_BYTES:
                    message = f"must have a head of at most {MAX_HEAD_BYTES} bytes"
                    self._hang_up(Refusal(431, "request", message))
                    return
            elif not (cycle.more_body and cycle.response_complete):
                # All is here, or the endpoint reads the body, within limits of its own.
                if self._timer is not None:
                    self._stop_timer()
                return
            if self._timer is None:
                self._timer = self.loop.call_later(self.head_seconds, self._too_slow)

        def send_400_response(self, msg: str) -> None:
            """Answer what is not HTTP, and hang up."""
            self._hang_up(Refusal(400, "request", "must be HTTP/1.1"))

        def _too_slow(self) -> None:
            self._timer = None
            refusal = None
            if self._head_bytes:
                message = f"must have a head that arrives within {self.head_seconds:g} s"
                refusal = Refusal(408, "request", message)
            self._hang_up(refusal)

        def _hang_up(self, refusal: Refusal | None) -> None:
            """Close the connection, with this answer; after an earlier request got its own."""
            self._stop_timer()
            if self.transport.is_closing():
                return
            if self.cycle is not None and not self.cycle.response_complete:
                self.cycle.keep_alive = False
                return
            if refusal is not None:
                answer = msgspec.json.encode(refuse(refusal))
                head = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(answer)
                end = b"connection: close\r\n\r\n"
                self.transport.write(STATUS_LINE[refusal.status] + head + end + answer)
            self.transport.close()

        def _stop_timer(self) -> None:
            self._head_bytes = 0
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
