"""The online store, as the service asks it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from churn_assets.contract.features import Feature
from churn_assets.contract.lookup import AgePolicy, Found, Lookup
from churn_assets.contract.online import is_redis, open_reader
from churn_assets.contract.release import ReleaseError
from churn_assets.contract.request import Refusal
from churn_assets.contract.response import OnlineHealth

ONLINE_VARIABLE = "CHURN_ONLINE_STORE"


class OnlineStore:
    """The online store, asked from the event loop.

    A file is read where the request is: it takes less time than a thread needs to wake. A server is
    asked from a thread, so that one that hangs holds up nobody but who waits for it.
    """

    def __init__(self, location: str, features: Sequence[Feature], policy: AgePolicy):
        self._lookup = Lookup(lambda: open_reader(location), features, policy)
        self._thread = ThreadPoolExecutor(1, "online-store") if is_redis(location) else None

    async def find(self, customer_ids: Sequence[str]) -> list[Found | Refusal]:
        """As Lookup.find."""
        return await self._call(self._lookup.find, customer_ids)

    async def health(self) -> OnlineHealth:
        """As Lookup.health."""
        return await self._call(self._lookup.health)

    async def _call(self, function: Callable[..., Any], *arguments: object) -> Any:
        if self._thread is None:
            return function(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def online_store(features: Sequence[Feature]) -> OnlineStore | None:
    """The store the environment names, or None. Raises ReleaseError for a setting that is wrong."""
    location = os.environ.get(ONLINE_VARIABLE)
    try:
        policy = AgePolicy.from_environment(os.environ)
        return OnlineStore(location, features, policy) if location else None
    except ValueError as error:
        raise ReleaseError(str(error)) from None
