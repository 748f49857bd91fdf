"""How many requests a worker answers at once, and for how long it tries.

BentoML's middleware for this takes a task, a future and a timer a request. Here a request is one
entry of a dictionary, and one timer looks after them all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from time import monotonic
from typing import Any

from churn_assets.contract.release import ReleaseError
from churn_assets.contract.request import WHOLE_BODY, Refusal

MAX_CONCURRENCY_VARIABLE = "CHURN_MAX_CONCURRENCY"
TIMEOUT_VARIABLE = "CHURN_TIMEOUT_SECONDS"

# A slow client hears 408 from here before it could hear 504.
READ_SECONDS = 4
RETRY_SECONDS = 1
LOOK_SECONDS = 0.25


@dataclass(frozen=True)
class Limits:
    """Requests answered at once by one worker, and seconds until one of them is given up."""

    max_concurrency: int = 512
    timeout: float = 5.0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Limits:
        """The limits the environment sets. Raises ReleaseError for one that is none."""
        concurrency = environment.get(MAX_CONCURRENCY_VARIABLE, str(cls.max_concurrency))
        if not concurrency.isdecimal() or int(concurrency) < 1:
            raise ReleaseError(
                f"{MAX_CONCURRENCY_VARIABLE} must be a whole number above 0, it is {concurrency!r}"
            )
        timeout = environment.get(TIMEOUT_VARIABLE, str(cls.timeout))
        try:
            seconds = float(timeout)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds <= 3600:
            raise ReleaseError(
                f"{TIMEOUT_VARIABLE} must be seconds above 0 up to 3600, it is {timeout!r}"
            )
        return cls(int(concurrency), seconds)


class Traffic:
    """The requests of one worker that are being read, and those being answered.

    A task that takes longer than it may is cancelled where it waits: it then asks `given_up` for
    the refusal to answer with. All of it is called from the event loop.
    """

    def __init__(self, limits: Limits, show: Callable[[int], object]):
        """`show` is told every LOOK_SECONDS how many requests are being answered."""
        self._limits = limits
        self._show = show
        self._every = min(LOOK_SECONDS, limits.timeout / 4)
        # In the order they came, so the first is the oldest.
        self._reading: dict[asyncio.Task[Any], float] = {}
        self._answering: dict[asyncio.Task[Any], float] = {}
        self._given_up: dict[asyncio.Task[Any], Refusal] = {}
        self._looks: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """Begin to look after the requests; the first of them does so otherwise."""
        if self._looks is None:
            self._look()

    def read(self, task: asyncio.Task[Any]) -> None:
        """`task` begins to read a body."""
        if self._looks is None:
            self._look()
        self._reading[task] = monotonic()

    def admit(self, task: asyncio.Task[Any]) -> None:
        """`task` has read its body and begins to answer. Raises Refusal when too many do."""
        self._reading.pop(task, None)
        if len(self._answering) >= self._limits.max_concurrency:
            message = "answers as many requests as it may at once: try again"
            raise Refusal(429, "server", message, RETRY_SECONDS)
        self._answering[task] = monotonic()

    def leave(self, task: asyncio.Task[Any]) -> None:
        """`task` is done, one way or another."""
        self._reading.pop(task, None)
        self._answering.pop(task, None)

    def given_up(self, task: asyncio.Task[Any]) -> Refusal | None:
        """Why `task` was cancelled, where that was done here; it is not cancelled any more."""
        refusal = self._given_up.pop(task, None)
        if refusal is not None:
            task.uncancel()
        return refusal

    def _look(self) -> None:
        """Give up what takes too long, and come back."""
        now = monotonic()
        unread = Refusal(408, WHOLE_BODY, f"must arrive within {READ_SECONDS:g} s")
        self._give_up(self._reading, now - READ_SECONDS, unread)
        seconds = self._limits.timeout
        late = Refusal(504, "server", f"could not answer within {seconds:g} s")
        self._give_up(self._answering, now - seconds, late)
        self._show(len(self._answering))
        self._looks = asyncio.get_running_loop().call_later(self._every, self._look)

    def _give_up(self, tasks: dict[asyncio.Task[Any], float], before: float, why: Refusal) -> None:
        late = [task for task, began in takewhile(lambda one: one[1] < before, tasks.items())]
        for task in late:
            del tasks[task]
            self._given_up[task] = why
            task.cancel()
