"""Following the pointer to the current release, and swapping to it between requests.

Every worker follows by itself. A thread reads the pointer again and again by its content, so no
clock and no timestamp has a say; it verifies what the pointer names beside what serves, and hands
the event loop a release that is ready to answer. What cannot be served is refused and told, and
what serves goes on serving.

What was last verified is noted beside the pointer, where the folder can be written: a worker that
starts while the pointer is bad goes on with that instead of with the release baked in, which may
be the very one that was rolled back.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from churn_assets.contract.pointer import (
    MAX_POINTER_BYTES,
    Current,
    decode_pointer,
    release_directory,
)
from churn_assets.contract.release import ReleaseError, ReleaseUnreadable, read_release
from churn_assets.contract.response import RefusedRelease
from churn_service.served import Served

FOLLOW_VARIABLE = "CHURN_FOLLOW"
SECONDS_VARIABLE = "CHURN_FOLLOW_SECONDS"

# How often the pointer is read: 20 us of one core each time.
POLL_SECONDS = 0.2

# A release the disk did not give is tried again so often; a bad one not before the pointer changes.
RETRY_SECONDS = 10.0

_STOP_SECONDS = 5.0

_LONGEST_REASON = 500

logger = logging.getLogger("bentoml.churn")


class Follower:
    """Follows the pointer file at `path`; `refused` is what it names and is not served.

    `monotonic` counts the seconds until a release is tried again.
    """

    refused: RefusedRelease | None

    def __init__(
        self,
        path: Path,
        poll_seconds: float = POLL_SECONDS,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ):
        self.refused = None
        self._path = path
        self._verified = path.with_name(f".{path.name}.verified")
        self._poll_seconds = poll_seconds
        self._monotonic = monotonic
        self._serving = ""
        self._seen: bytes | None = None
        self._looked = False
        self._retry_at = math.inf
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Follower | None:
        """The follower the environment asks for, or None. Raises ReleaseError for a bad setting."""
        path = environment.get(FOLLOW_VARIABLE)
        seconds = environment.get(SECONDS_VARIABLE) or str(POLL_SECONDS)
        if not path:
            return None
        # A worker runs in the folder of its bento, where a relative path would be another file.
        if not Path(path).is_absolute():
            raise ReleaseError(f"{FOLLOW_VARIABLE} is {path!r}; give the absolute path of a file")
        try:
            if not 0 < float(seconds) <= 3600:
                raise ValueError
        except ValueError:
            raise ReleaseError(
                f"{SECONDS_VARIABLE} is {seconds!r}; give seconds above 0, at most 3600"
            ) from None
        return cls(Path(path), float(seconds))

    def first(self, baked: Served) -> Served:
        """What to start with: what the pointer names, else what was verified last, else `baked`."""
        self._serving = baked.manifest.release_id
        named = self.look()
        if named is None and self.refused is not None:
            named = self._verified_last()
        served = named or baked
        if self.refused is not None:
            logger.warning("%s is served instead", served.manifest.release_id)
        return served

    def start(self, replace: Callable[[Served], None]) -> None:
        """Follow from now on, on a thread; `replace` is called on the running event loop."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(
            target=self._follow, args=(loop, replace), name="follower", daemon=True
        )
        self._thread.start()
        # A model that is being loaded while the interpreter goes takes it down with it.
        atexit.register(self.stop)

    def stop(self) -> None:
        """Look no more; returns when nothing is being verified."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)
        atexit.unregister(self.stop)

    def look(self) -> Served | None:
        """What is to be served from now on, verified; None when nothing is to change."""
        content, unreadable = self._read()
        if self._looked and content == self._seen and self._monotonic() < self._retry_at:
            return None
        changed = not self._looked or content != self._seen
        self._looked, self._seen, self._retry_at = True, content, math.inf
        named: Current | None = None
        try:
            if content is None:
                raise ReleaseUnreadable(f"{self._path.name} cannot be read ({unreadable})")
            named = self._decode(content)
            if named.release_id == self._serving:
                self._accept(content)
                return None
            served = self._verify(named)
        except ReleaseUnreadable as error:
            self._retry_at = self._monotonic() + RETRY_SECONDS
            self._refuse(named, str(error), changed)
        except ReleaseError as error:
            self._refuse(named, str(error), changed)
        except Exception as error:
            # Whatever it is, the next good release is still to be served.
            logger.exception("a release could not be verified")
            self._retry_at = self._monotonic() + RETRY_SECONDS
            self._refuse(named, f"{type(error).__name__}: {error}", changed)
        else:
            self._accept(content)
            self._serving = named.release_id
            return served
        return None

    def _follow(self, loop: asyncio.AbstractEventLoop, replace: Callable[[Served], None]) -> None:
        while not self._stopped.wait(self._poll_seconds):
            served = self.look()
            if served is None:
                continue
            release_id = served.manifest.release_id
            try:
                loop.call_soon_threadsafe(replace, served)
            except RuntimeError:
                return
            # Nothing here may keep a release that has been replaced.
            del served
            logger.info("%s is served from now on", release_id)

    def _read(self) -> tuple[bytes | None, str]:
        """The content of the pointer; without one, why there is none."""
        try:
            with self._path.open("rb") as file:
                return file.read(MAX_POINTER_BYTES + 1), ""
        except OSError as error:
            return None, error.strerror or str(error)

    def _decode(self, content: bytes) -> Current:
        try:
            return decode_pointer(content)
        except ReleaseError as error:
            raise ReleaseError(f"{self._path.name} does not say what serves: {error}") from None

    def _verify(self, named: Current) -> Served:
        """The release `named`, ready to answer. Raises ReleaseError."""
        directory = release_directory(self._path, named.release_id)
        try:
            served = Served(read_release(directory))
        except ReleaseError as error:
            # /health answers anybody: the folders of this machine are not for everybody.
            reason = str(error).replace(str(directory), directory.name)
            raise type(error)(reason) from None
        manifest = served.manifest
        if manifest.release_id != named.release_id:
            raise ReleaseError(f"there is {manifest.release_id} where {named.release_id} should be")
        if manifest.model_version != named.model_version:
            raise ReleaseError(
                f"{self._path.name} calls it version {named.model_version}, it has version "
                f"{manifest.model_version}"
            )
        return served

    def _refuse(self, named: Current | None, reason: str, changed: bool) -> None:
        release_id = _one_line(named.release_id, 100) if named else None
        reason = _one_line(reason, _LONGEST_REASON)
        if changed or self.refused is None or self.refused.reason != reason:
            logger.warning(
                "refused release %s: %s; %s goes on serving",
                release_id,
                reason,
                self._serving,
            )
            self.refused = RefusedRelease(release_id, reason, datetime.now(UTC))

    def _accept(self, content: bytes) -> None:
        if self.refused is not None:
            logger.info("the release the pointer names is served again")
        self.refused = None
        with contextlib.suppress(OSError):
            if not self._verified.exists() or self._verified.read_bytes() != content:
                written = self._verified.with_name(f"{self._verified.name}-{os.getpid()}")
                written.write_bytes(content)
                os.replace(written, self._verified)

    def _verified_last(self) -> Served | None:
        """What a worker had verified before this one started, if it still proves to be that."""
        try:
            named = decode_pointer(self._verified.read_bytes())
            if named.release_id == self._serving:
                return None
            served = self._verify(named)
        except (OSError, ReleaseError):
            return None
        self._serving = named.release_id
        return served


def _one_line(text: str, longest: int) -> str:
    """`text` from a pointer or a manifest, so that it cannot pass for lines of the log."""
    return "".join(c if c.isprintable() else " " for c in text[:longest])
