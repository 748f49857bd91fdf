"""Who may ask for predictions, and how often: API keys, where CHURN_API_KEYS names a file of them.

The file is read again when it changes, so keys come and go without a restart. Limits are those of
one worker process: each counts for itself.
"""

from __future__ import annotations

import hmac
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from churn_assets.contract.keys import KEYS_VARIABLE, ApiKey, digest_of, id_of, read_keys
from churn_assets.contract.release import ReleaseError
from churn_assets.contract.request import Refusal
from churn_assets.contract.response import AccessHealth

HEADER = "authorization"
CHALLENGE = b'Bearer realm="churn"'

LOOK_SECONDS = 1.0

logger = logging.getLogger("bentoml.churn")


class Caller:
    """A key in use: its hash, and the tokens its limit leaves it.

    It may save up what one second brings, and at least one request; a batch may overdraw, which the
    requests after it wait for.
    """

    def __init__(self, key: ApiKey, now: float):
        self.key = key
        self.digest = bytes.fromhex(key.sha256)
        self.expires = math.inf if key.expires_at is None else key.expires_at.timestamp()
        self._rate = key.rate
        self._full = max(1.0, key.rate or 1.0)
        self._tokens, self._at = self._full, now

    def spend(self, now: float) -> None:
        """One request, at `now` seconds of a monotonic clock. Raises Refusal, 429, without one."""
        if self._rate is None:
            return
        self._tokens = min(self._full, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1:
            wait = math.ceil((1 - self._tokens) / self._rate)
            message = f"may be used {self._rate:g} times a second; try again in {wait} s"
            raise Refusal(429, HEADER, message, wait)
        self._tokens -= 1

    def spend_more(self, requests: int) -> None:
        """What a request turned out to cost beyond one, there or not."""
        self._tokens -= max(0, requests)


class Access:
    """The keys of a file, followed. Raises ValueError when there is no good file to begin with."""

    def __init__(
        self,
        path: Path,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ):
        self._path = path
        self._monotonic, self._wall_clock = monotonic, wall_clock
        self._callers: dict[str, Caller] = {}
        self._reason: str | None = None
        self._seen: tuple[int, ...] | None = None
        if reason := self._follow(monotonic()):
            raise ValueError(reason)

    def admit(self, headers: Sequence[tuple[bytes, bytes]]) -> Caller:
        """Whose request this is. Raises Refusal: 401 without a valid key, 429 over its limit."""
        now = self._monotonic()
        if now >= self._look_at:
            self._follow(now)
        given = [value for name, value in headers if name == b"authorization"]
        if len(given) != 1:
            raise Refusal(401, HEADER, "is missing: send `Bearer` and an API key, once")
        scheme, _, key = given[0].decode("latin-1").partition(" ")
        key = key.strip()
        caller = self._callers.get(id_of(key) or "")
        # Compared whether there is such a key or not, so that both take the same time.
        expected = caller.digest if caller else bytes(32)
        matches = hmac.compare_digest(digest_of(key), expected) and scheme.lower() == "bearer"
        if caller is None or not matches or self._wall_clock() >= caller.expires:
            raise Refusal(401, HEADER, "must be `Bearer` and an API key that is valid here")
        caller.spend(now)
        return caller

    def health(self) -> AccessHealth:
        """How many keys there are, and what is wrong with the file."""
        now = self._monotonic()
        if now >= self._look_at:
            self._follow(now)
        wall = self._wall_clock()
        valid = sum(wall < caller.expires for caller in self._callers.values())
        return AccessHealth(keys=valid, reason=self._reason)

    def _follow(self, now: float) -> str | None:
        """Take over what the file says now; a broken one changes nothing. Returns what is wrong."""
        self._look_at = now + LOOK_SECONDS
        try:
            status = self._path.stat()
            seen = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
            if seen == self._seen:
                return None
            keys = read_keys(self._path).keys
        except (OSError, ValueError) as error:
            reason = str(error)
            if isinstance(error, OSError):
                reason = f"{self._path} cannot be read ({error.strerror})"
            if reason != self._reason:
                logger.error("API keys stay as they are: %s", reason)
            # Looked at again, changed or not: what hindered reading it may be gone.
            self._seen, self._reason = None, reason
            return reason
        before = self._callers
        self._callers = {
            key.id: before[key.id]
            if key.id in before and before[key.id].key == key
            else Caller(key, now)
            for key in keys
        }
        if before or self._reason:
            logger.info("API keys: %d are valid now", len(keys))
        self._seen, self._reason = seen, None
        return None


def access(environment: Mapping[str, str]) -> Access | None:
    """The keys the environment names, None where it names none. Raises ReleaseError."""
    path = environment.get(KEYS_VARIABLE)
    if not path:
        return None
    try:
        return Access(Path(os.path.expanduser(path)))
    except ValueError as error:
        raise ReleaseError(f"{KEYS_VARIABLE}: {error}; `churn keys add` makes one") from None
