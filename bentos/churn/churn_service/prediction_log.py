"""Where answered predictions are kept before their answers leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeAlias, get_args

from churn_assets.contract.logged import (
    DURABILITY_VARIABLE,
    LOG_VARIABLE,
    OFF,
    WHEN_BROKEN_VARIABLE,
    Durability,
    LoggedPrediction,
    WhenBroken,
    encode_logged,
    is_postgres,
)
from churn_assets.contract.release import ReleaseError
from churn_assets.contract.request import Refusal
from churn_assets.contract.response import LogHealth
from churn_service.log_files import LogBroken, LogBusy, LogStore, SqliteLog, Waiting

# A store that takes longer than this to commit is as good as broken.
COMMIT_SECONDS = 2.0
_BUSY_SECONDS = 0.001
_RETRY_AFTER = 1
# So many commits of one request each, and requests come one by one; now and then looked at again.
_LONELY = 8
_LOOK_EVERY = 256

_Group: TypeAlias = list[tuple[list[bytes], asyncio.Future[None]]]


class PredictionLog(Protocol):
    """What the endpoint needs of a log."""

    async def keep(self, predictions: Sequence[LoggedPrediction]) -> None:
        """Return when `predictions` are durable. Raises Refusal when they cannot be kept."""

    async def health(self) -> LogHealth:
        """The log as it is now."""
        ...

    def close(self) -> None:
        """Let go of the store."""


class NotLogged:
    """Keeps nothing, but counts."""

    def __init__(self) -> None:
        self._unlogged = 0

    async def keep(self, predictions: Sequence[LoggedPrediction]) -> None:
        """Return at once."""
        self._unlogged += len(predictions)

    async def health(self) -> LogHealth:
        """See PredictionLog."""
        return LogHealth(store=OFF, usable=False, unlogged=self._unlogged)

    def close(self) -> None:
        """See PredictionLog."""


class DurableLog:
    """Every prediction is in `store` when `keep` returns; when_broken says what if it cannot be.

    A store that is `quick` is written from the event loop, others on a thread. Predictions made in
    the same turn of the loop, or while a commit is under way, share the next commit. Where they
    come one by one a quick store is written at once: that costs less than waking who waits.
    """

    def __init__(self, store: LogStore, when_broken: WhenBroken, *, quick: bool):
        self._store, self._when_broken = store, when_broken
        self._thread = None if quick else ThreadPoolExecutor(1, "prediction-log")
        self._arrived: _Group = []
        self._committing_since: float | None = None
        self._alone = 0
        self._unlogged = 0

    async def keep(self, predictions: Sequence[LoggedPrediction]) -> None:
        """See PredictionLog."""
        if not predictions:
            return
        records = [encode_logged(prediction) for prediction in predictions]
        try:
            if self._thread is not None:
                await self._write_with_others(records)
            elif self._alone % _LOOK_EVERY < _LONELY:
                await self._write_in_this_turn(records)
            else:
                self._alone += 1
                try:
                    self._store.write(records)
                except LogBusy:
                    await self._write_when_free(records)
        except LogBroken:
            if self._when_broken == "refuse":
                raise Refusal(
                    503,
                    "prediction_log",
                    "cannot be written, and no prediction leaves unlogged; /health says why",
                    _RETRY_AFTER,
                ) from None
            self._unlogged += len(records)

    async def health(self) -> LogHealth:
        """See PredictionLog. Opens a store again that has recovered."""
        rows, oldest, reason = None, None, None
        try:
            rows, oldest = await self._waiting()
        except LogBroken as error:
            reason = str(error)
        return LogHealth(
            store=self._store.place,
            usable=reason is None,
            durability=self._store.durability,
            when_broken=self._when_broken,
            rows_waiting=rows,
            oldest_waiting=oldest,
            unlogged=self._unlogged,
            reason=reason,
        )

    def close(self) -> None:
        """See PredictionLog."""
        if self._thread is not None:
            self._thread.shutdown()
        self._store.close()

    async def _write_in_this_turn(self, records: list[bytes]) -> None:
        """Commit with what others bring before the event loop has come to its end."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._arrived.append((records, done))
        if len(self._arrived) == 1:
            loop.call_soon(self._commit_this_turn)
        try:
            await done
        except LogBusy:
            await self._write_when_free(records)

    def _commit_this_turn(self) -> None:
        group, self._arrived = self._arrived, []
        self._alone = self._alone + 1 if len(group) == 1 else 0
        error: Exception | None = None
        try:
            self._store.write([record for part, _ in group for record in part])
        except Exception as raised:
            error = raised
        _settle(group, error)

    async def _write_when_free(self, records: list[bytes]) -> None:
        """Try again until nobody else is writing, without keeping the event loop."""
        try:
            async with asyncio.timeout(COMMIT_SECONDS):
                while True:
                    await asyncio.sleep(_BUSY_SECONDS)
                    try:
                        return self._store.write(records)
                    except LogBusy:
                        continue
        except TimeoutError:
            raise _held() from None

    async def _write_with_others(self, records: list[bytes]) -> None:
        loop = asyncio.get_running_loop()
        since = self._committing_since
        if since is not None and loop.time() - since > COMMIT_SECONDS:
            raise _slow()
        done: asyncio.Future[None] = loop.create_future()
        self._arrived.append((records, done))
        if since is None:
            self._committing_since = loop.time()
            # Not at once: requests of the same turn of the loop share the commit.
            loop.call_soon(self._commit)
        try:
            async with asyncio.timeout(COMMIT_SECONDS):
                await done
        except TimeoutError:
            raise _slow() from None

    def _commit(self) -> None:
        loop = asyncio.get_running_loop()
        group, self._arrived = self._arrived, []
        self._committing_since = loop.time()
        records = [record for part, _ in group for record in part]
        assert self._thread is not None, "only a log with a thread commits in groups"
        writing = loop.run_in_executor(self._thread, self._write_to_the_end, records)
        writing.add_done_callback(lambda written: self._committed(group, written))

    def _write_to_the_end(self, records: list[bytes]) -> None:
        """Write on the thread, where waiting holds up nobody. Raises LogBroken."""
        give_up = time.monotonic() + COMMIT_SECONDS
        while True:
            try:
                return self._store.write(records)
            except LogBusy:
                if time.monotonic() > give_up:
                    raise _held() from None
                time.sleep(_BUSY_SECONDS)

    def _committed(
        self,
        group: _Group,
        written: asyncio.Future[None],
    ) -> None:
        _settle(group, written.exception())
        if self._arrived:
            self._commit()
        else:
            self._committing_since = None

    async def _waiting(self) -> Waiting:
        if self._thread is None:
            return self._store.waiting()
        asked = asyncio.get_running_loop().run_in_executor(self._thread, self._store.waiting)
        try:
            async with asyncio.timeout(COMMIT_SECONDS):
                return await asked
        except TimeoutError:
            raise _slow() from None


def _settle(group: _Group, error: BaseException | None) -> None:
    """Tell all who wait for a commit how it ended."""
    for _, done in group:
        # One that gave up waiting is done already.
        if done.done():
            continue
        if error is None:
            done.set_result(None)
        elif isinstance(error, LogBusy | LogBroken):
            # Each its own, as an exception keeps the way it went.
            done.set_exception(type(error)(str(error)))
        else:
            done.set_exception(error)


def _held() -> LogBroken:
    return LogBroken("another process holds the file of the log")


def _slow() -> LogBroken:
    return LogBroken(f"the store has not answered for {COMMIT_SECONDS:g} s")


def prediction_log(environment: Mapping[str, str]) -> PredictionLog:
    """The log the environment names. Raises ReleaseError for a setting that is missing or wrong."""
    location = environment.get(LOG_VARIABLE, "")
    durability = _one_of(Durability, environment, DURABILITY_VARIABLE)
    when_broken = _one_of(WhenBroken, environment, WHEN_BROKEN_VARIABLE)
    if location == OFF:
        return NotLogged()
    if is_postgres(location):
        return DurableLog(_postgres(location), when_broken, quick=False)
    if not Path(location).is_absolute():
        given = f"is {location!r}" if location else "is not set"
        raise ReleaseError(
            f"{LOG_VARIABLE} {given}, and no prediction is answered that is not kept; set it to a "
            "directory that outlives the service (an absolute path), to a postgresql:// URL, or to "
            f"{OFF} to serve unlogged"
        )
    try:
        store = SqliteLog(Path(location), durability)
    except OSError as error:
        raise ReleaseError(
            f"{LOG_VARIABLE}: {location} cannot be made ({error.strerror}); give a directory that "
            "the service may write"
        ) from None
    return DurableLog(store, when_broken, quick=durability == "process")


def _postgres(url: str) -> LogStore:
    try:
        # Only where it is asked for: it takes a moment to import.
        from churn_service.log_postgres import PostgresLog

        return PostgresLog(url)
    except ImportError as error:
        raise ReleaseError(
            f"{LOG_VARIABLE} names a Postgres server, and psycopg is not installed here ({error}); "
            "install psycopg[binary]"
        ) from None


def _one_of(choices: Any, environment: Mapping[str, str], variable: str) -> Any:
    """The value of a variable, by default the first of a Literal's."""
    known = get_args(choices)
    value = environment.get(variable) or known[0]
    if value not in known:
        raise ReleaseError(f"{variable} is {value!r}; set it to {' or '.join(known)}")
    return value
