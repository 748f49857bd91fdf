"""The churn service, as BentoML runs it.

The endpoint is a plain ASGI application in BentoML's `asgi_app` mount: BentoML keeps /livez,
/readyz, /healthz and /metrics, the process, its configuration and its packaging, while a
prediction passes neither a thread pool nor pydantic. Of the project this file and churn_service
import the contract and nothing else.

Requests by id alone are looked up in the online store CHURN_ONLINE_STORE names; whatever becomes of
the store, requests that bring their features never wait for it.

Where CHURN_FOLLOW names a pointer file, the release it names is served in place of the baked one.
"""

from __future__ import annotations

import gc
import logging
import math
import os
from pathlib import Path

import bentoml

from churn_assets.contract.release import ReleaseError, read_release
from churn_service.access import access
from churn_service.connections import allow_many_connections, head_seconds
from churn_service.container import check_log_outlives_container
from churn_service.endpoint import Endpoint
from churn_service.fast_lane import choose_lane, service_options
from churn_service.follower import Follower
from churn_service.online import online_store
from churn_service.prediction_log import prediction_log
from churn_service.restarts import restart_soon
from churn_service.served import Served
from churn_service.tracing import ignore_trace_headers
from churn_service.traffic import Limits

BAKED_RELEASE = Path(__file__).resolve().parent / "release"
RELEASE_VARIABLE = "CHURN_RELEASE_DIR"

logger = logging.getLogger("bentoml.churn")


def release_directory() -> Path:
    """The release baked into the bento, or else the one CHURN_RELEASE_DIR names.

    Raises ReleaseError when there is neither.
    """
    if BAKED_RELEASE.is_dir():
        return BAKED_RELEASE
    if named := os.environ.get(RELEASE_VARIABLE):
        return Path(named)
    raise ReleaseError(
        f"there is no release to serve; serve a built bento or set {RELEASE_VARIABLE} to a release"
    )


def _refused_start(error: ReleaseError) -> bentoml.exceptions.BentoMLException:
    return bentoml.exceptions.BentoMLException(f"refused to start: {error}")


try:
    lane, limits = choose_lane(os.environ), Limits.from_environment(os.environ)
except ReleaseError as error:
    raise _refused_start(error) from None

endpoint = Endpoint(lane, limits)


@bentoml.asgi_app(endpoint, path="/", name="churn")
@bentoml.service(
    name="churn",
    workers=1,
    # The endpoint keeps its own timeout: this one is for an endpoint that does not.
    traffic={"timeout": math.ceil(limits.timeout) + 1},
    logging={"access": {"enabled": False}},
    image=bentoml.images.Image(
        base_image="python:3.11-slim",
        distro="none",
        python_version="3.11",
        lock_python_packages=False,
    ),
    envs=[{"name": "BENTOML_DO_NOT_TRACK", "value": "True"}],
    **service_options(lane, endpoint),
)
class Churn:
    """Churn probability of one customer, from the release this service was built with."""

    @bentoml.on_deployment
    def verify() -> None:
        """Refuse a bad release before any worker exists: a worker that fails is only restarted."""
        try:
            online_store(Served(read_release(release_directory())).manifest.features)
            Follower.from_environment(os.environ)
            access(os.environ)
            head_seconds(os.environ)
            check_log_outlives_container(os.environ)
            prediction_log(os.environ).close()
        except ReleaseError as error:
            raise _refused_start(error) from None
        restart_soon()

    def __init__(self) -> None:
        try:
            if not lane.fast:
                logger.warning("requests take BentoML's ASGI mount: %s", lane.reason)
            served = Served(read_release(release_directory()))
            follower = endpoint.follower = Follower.from_environment(os.environ)
            endpoint.start(follower.first(served) if follower else served)
        except ReleaseError as error:
            raise _refused_start(error) from None
        ignore_trace_headers()
        allow_many_connections()
        # uvicorn writes lines for its access log as long as anybody might listen to them.
        logging.getLogger("uvicorn.access").propagate = False
        # BentoML's timeout middleware holds a dozen objects a request until the timeout is over,
        # none of them garbage. Full collections over them stopped the service for 80 to 180 ms.
        gc.freeze()
        # A release that is replaced goes by its reference count, frozen or not.
        gc.set_threshold(700, 10, 1000)
        if follower:
            follower.start(endpoint.replace)

    async def __is_ready__(self) -> bool:
        return endpoint.started
