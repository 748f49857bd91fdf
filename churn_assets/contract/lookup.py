"""Looking customers up in the online store: which rows may be predicted from, and which not.

Ages are counted in data time, which the store records: the built-in shop's days lie in the past,
and a source that has ended grows no older. Where the store records none the source is live, and
data time is the wall clock, so a store nobody refreshes goes stale by itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, cast, get_args

from churn_assets.contract.features import Feature
from churn_assets.contract.online import (
    OnlineReader,
    OnlineRow,
    OnlineRowDamaged,
    OnlineSchemaChanged,
    OnlineState,
    OnlineStoreDown,
    OnlineStoreError,
)
from churn_assets.contract.request import CUSTOMER_ID, Refusal
from churn_assets.contract.response import OnlineHealth

ONLINE_STORE = "online_store"
AGE_VARIABLE = "CHURN_MAX_AGE_HOURS"
STALE_VARIABLE = "CHURN_WHEN_STALE"

WhenStale = Literal["refuse", "flag"]

# Features live a day; the rest is what a daily batch needs between midnight and its refresh.
MAX_AGE = timedelta(hours=36)

# How far a cutoff may lie ahead of data time: the clocks of two machines differ by seconds.
CLOCK_TOLERANCE = timedelta(minutes=5)

# A store that failed is left alone for so long; who asks meanwhile is told at once.
RETRY_SECONDS = 1

# A store of another feature set waits for a refresh or for a release, not for a second.
REFRESH_SECONDS = 60

logger = logging.getLogger("bentoml.churn")


@dataclass(frozen=True)
class AgePolicy:
    """How old features may be, in data time, and what becomes of older ones.

    `refuse` answers 409; `flag` predicts from the last values there are and says so.
    """

    max_age: timedelta = MAX_AGE
    when_stale: WhenStale = "refuse"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> AgePolicy:
        """The policy the environment sets. Raises ValueError naming the variable."""
        hours = environment.get(AGE_VARIABLE) or str(MAX_AGE / timedelta(hours=1))
        when_stale = environment.get(STALE_VARIABLE) or "refuse"
        try:
            # Beyond a century timedelta has no room; NaN compares false.
            if not 0 < float(hours) <= 876_000:
                raise ValueError
        except ValueError:
            raise ValueError(f"{AGE_VARIABLE} is {hours!r}; give hours above 0") from None
        if when_stale not in get_args(WhenStale):
            raise ValueError(f"{STALE_VARIABLE} is {when_stale!r}; give refuse or flag")
        return cls(timedelta(hours=float(hours)), cast(WhenStale, when_stale))


@dataclass(frozen=True, slots=True)
class Found:
    """Features to predict from, in the model's order, and what they were stamped with."""

    values: Sequence[float]
    cutoff: datetime
    stale: bool


class Lookup:
    """Reads the online store for a model with `features`. Not to be shared between threads.

    `open_reader` is called again after a failure; it and what it opens raise OnlineStoreError.
    """

    def __init__(
        self,
        open_reader: Callable[[], OnlineReader],
        features: Sequence[Feature],
        policy: AgePolicy,
        *,
        wall_clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ):
        self._open = open_reader
        self._features = features
        self._wanted = tuple(feature.name for feature in features)
        self._in_order = list(range(len(features)))
        self._policy = policy
        self._wall_clock = wall_clock
        self._monotonic = monotonic
        self._reader: OnlineReader | None = None
        self._down_until = -1.0
        self._down = ""

    def find(self, customer_ids: Sequence[str]) -> list[Found | Refusal]:
        """What there is of each customer, in order, from one call to the store.

        A customer is refused with 404 (unknown), 409 (stale, or ahead of data time) or 503 (the row
        is damaged). Raises Refusal, 503 with `retry_after`, when the store cannot be read or holds
        another feature set.
        """
        try:
            reader = self._open_reader()
            try:
                state, rows = reader.look_up(customer_ids)
            except OnlineSchemaChanged:
                # Since it was last asked, most likely: so ask again.
                reader.state()
                state, rows = reader.look_up(customer_ids)
            except OnlineRowDamaged:
                # One of them is; the others need not suffer for it.
                state = reader.state()
                rows = [_read_alone(reader, customer_id) for customer_id in customer_ids]
            columns = self._columns(state)
        except OnlineStoreDown as error:
            raise self._fail(error) from None
        except OnlineStoreError as error:
            self._note_that_it_answers()
            raise _unusable(error) from None
        self._note_that_it_answers()
        now = state.data_time or self._wall_clock()
        return [self._judge(row, columns, now) for row in rows]

    def health(self) -> OnlineHealth:
        """The state of the store, asked now unless it has just failed."""
        state, reason = None, None
        try:
            state = self._open_reader().state()
            self._note_that_it_answers()
            self._columns(state)
            reason = self._age_reason(state.newest_cutoff, state.data_time or self._wall_clock())
        except OnlineStoreDown as error:
            self._fail(error)
            reason = self._down
        except OnlineStoreError as error:
            self._note_that_it_answers()
            reason = str(error)
        except Refusal:
            reason = self._down
        return OnlineHealth(
            reachable=not self._down,
            usable=reason is None,
            newest_cutoff=state.newest_cutoff if state else None,
            data_time=(state.data_time or self._wall_clock()) if state else None,
            features=state.features if state else None,
            max_age_hours=self._policy.max_age / timedelta(hours=1),
            when_stale=self._policy.when_stale,
            reason=reason,
        )

    def _open_reader(self) -> OnlineReader:
        """Raises OnlineStoreError, and Refusal while a store that failed is left alone."""
        if self._monotonic() < self._down_until:
            raise _unavailable()
        if self._reader is None:
            self._reader = self._open()
        return self._reader

    def _columns(self, state: OnlineState) -> list[int]:
        """Where in the rows of a store the model's features are.

        Raises OnlineSchemaChanged when one of them is not.
        """
        if state.features == self._wanted:
            return self._in_order
        if missing := [name for name in self._wanted if name not in state.features]:
            raise OnlineSchemaChanged(
                f"it holds {', '.join(state.features)}, this release needs {', '.join(missing)} too"
            )
        return [state.features.index(name) for name in self._wanted]

    def _note_that_it_answers(self) -> None:
        if self._down:
            logger.warning("the online store can be read again")
            self._down = ""

    def _fail(self, error: OnlineStoreDown) -> Refusal:
        """Leave the store alone for a while."""
        if not self._down:
            logger.warning("the online store cannot be read: %s", error)
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
        self._down = str(error) or type(error).__name__
        self._down_until = self._monotonic() + RETRY_SECONDS
        return _unavailable()

    def _judge(
        self, row: OnlineRow | Refusal | None, columns: Sequence[int], now: datetime
    ) -> Found | Refusal:
        if isinstance(row, Refusal):
            return row
        if row is None:
            return Refusal(404, CUSTOMER_ID, "is not in the online store")
        reason = self._age_reason(row.cutoff, now)
        if reason and (row.cutoff > now or self._policy.when_stale == "refuse"):
            return Refusal(409, CUSTOMER_ID, reason)
        values = [row.values[column] for column in columns]
        for feature, value in zip(self._features, values, strict=True):
            # Written so that a NaN is refused as well.
            if not feature.minimum <= value <= feature.maximum:
                message = f"holds {value} as {feature.name} of this customer; refresh its features"
                return Refusal(503, ONLINE_STORE, message, REFRESH_SECONDS)
        return Found(values, row.cutoff, reason is not None)

    def _age_reason(self, cutoff: datetime, now: datetime) -> str | None:
        """Why features of `cutoff` are not those of `now`, if so."""
        if cutoff > now + CLOCK_TOLERANCE:
            ahead = (cutoff - now) / timedelta(hours=1)
            return (
                f"has features of {_moment(cutoff)}, {ahead:.1f} h ahead of data time "
                f"({_moment(now)}); check the clocks of this machine and of the one that wrote them"
            )
        if now - cutoff > self._policy.max_age:
            age, limit = (
                span / timedelta(hours=1) for span in (now - cutoff, self._policy.max_age)
            )
            return (
                f"has features of {_moment(cutoff)}, {age:.1f} h before data time ({_moment(now)}) "
                f"where {limit:g} h are allowed; refresh the online features or send every feature"
            )
        return None


def _read_alone(reader: OnlineReader, customer_id: str) -> OnlineRow | Refusal | None:
    try:
        return reader.read([customer_id])[0]
    except OnlineRowDamaged as error:
        return _unusable(error)


def _unavailable() -> Refusal:
    # Why is in the log and in /health: it names hosts a caller need not know.
    message = "cannot be read at the moment; try again, or send every feature"
    return Refusal(503, ONLINE_STORE, message, RETRY_SECONDS)


def _unusable(error: OnlineStoreError) -> Refusal:
    message = f"cannot be used for this release: {error}; or send every feature"
    return Refusal(503, ONLINE_STORE, message, REFRESH_SECONDS)


def _moment(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
