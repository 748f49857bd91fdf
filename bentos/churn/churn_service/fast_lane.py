"""The fast lane: the service's own paths before BentoML's middleware.

BentoML's metrics, tracing and timeout middleware take four fifths of the time of a prediction, and
its mounts offer no way around them. It hands what `Service.to_asgi` returns to uvicorn; the service
class made here returns an application that takes its own paths itself and gives every other one,
and the lifespan, to BentoML's. The endpoint has metrics, a timeout and a limit of its own.

`service_class` of `bentoml.service` and `Service.to_asgi` are public names without a page in
BentoML's documentation, so they are counted on for the versions in HOLDS_FOR alone. With any other
version, or with CHURN_FAST_LANE=off, requests come through BentoML's documented ASGI mount, slower
and the same to the byte.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import bentoml

from churn_assets.contract import openapi
from churn_assets.contract.release import ReleaseError
from churn_assets.contract.response import LaneHealth
from churn_service.bodies import Message, Receive, Send
from churn_service.connections import guard_connections

FAST_LANE_VARIABLE = "CHURN_FAST_LANE"
PATHS = frozenset({"/predict", "/predict_batch", "/health", openapi.PATH})

# From the first version, which is tested, up to the second, which is not.
HOLDS_FOR = ((1, 4, 39), (1, 5))

Application = Callable[[Message, Receive, Send], Awaitable[None]]


def choose_lane(environment: Mapping[str, str], version: str | None = None) -> LaneHealth:
    """Whether the fast lane is taken with BentoML `version` (the installed one), and if not, why.

    Raises ReleaseError for a setting that is neither on nor off.
    """
    wanted = environment.get(FAST_LANE_VARIABLE, "on")
    if wanted == "off":
        return LaneHealth(fast=False, reason=f"{FAST_LANE_VARIABLE} is off")
    if wanted != "on":
        raise ReleaseError(f"{FAST_LANE_VARIABLE} must be on or off, it is {wanted!r}")
    version = version or bentoml.__version__
    first, end = HOLDS_FOR
    if not first <= _numbers(version) < end or not _can_be_entered():
        span = f"{'.'.join(map(str, first))} up to {'.'.join(map(str, end))}"
        return LaneHealth(fast=False, reason=f"holds for BentoML {span}, {version} is installed")
    return LaneHealth(fast=True, reason=None)


def service_options(lane: LaneHealth, endpoint: Application) -> dict[str, Any]:
    """What `bentoml.service` has to be told for `endpoint` to be served on `lane`."""
    if not lane.fast:
        return {}

    class FastLaneService(bentoml.Service):
        """A service whose application has the fast lane before BentoML's own."""

        def to_asgi(self, is_main: bool = True) -> Application:
            guard_connections(os.environ)
            return FastLane(endpoint, super().to_asgi(is_main=is_main))

    return {"service_class": FastLaneService}


class FastLane:
    """The ASGI application that parts requests by their path."""

    def __init__(self, endpoint: Application, bento: Application):
        self._endpoint = endpoint
        self._bento = bento

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan."""
        if scope["type"] == "http" and scope["path"] in PATHS:
            await self._endpoint(scope, receive, send)
        else:
            await self._bento(scope, receive, send)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _can_be_entered() -> bool:
    takes_class = "service_class" in inspect.signature(bentoml.service).parameters
    return takes_class and callable(getattr(bentoml.Service, "to_asgi", None))
