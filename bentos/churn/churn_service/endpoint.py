"""The ASGI application: `POST /predict`, `POST /predict_batch` and `GET /health` of a release."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import msgspec

from churn_assets.contract import openapi
from churn_assets.contract.clock import clock
from churn_assets.contract.logged import LoggedPrediction
from churn_assets.contract.lookup import Found
from churn_assets.contract.online import to_microseconds
from churn_assets.contract.request import (
    MAX_BATCH_BYTES,
    MAX_BODY_BYTES,
    CustomerRequest,
    PredictionRequest,
    Refusal,
)
from churn_assets.contract.response import (
    BatchAnswer,
    ErrorAnswer,
    ErrorDetail,
    LaneHealth,
    StoredPrediction,
    refuse,
    refuse_row,
)
from churn_service.access import CHALLENGE, Access, Caller, access
from churn_service.bodies import Message, Receive, Send, read_body
from churn_service.fast_lane import PATHS
from churn_service.follower import Follower
from churn_service.metrics import Metrics
from churn_service.online import ONLINE_VARIABLE, online_store
from churn_service.prediction_log import NotLogged, PredictionLog, prediction_log
from churn_service.served import BatchRow, Scored, Served
from churn_service.traffic import Limits, Traffic

NO_ONLINE_STORE = f"this service has no online store ({ONLINE_VARIABLE}) to take it from"

NOT_STARTED = Refusal(503, "server", "is starting: try again", retry_after=1)
_REQUEST_ID = re.compile(rb"[\x20-\x7e]{1,128}\Z")

# How old the figures of the prediction log in /metrics may be.
LOG_SECONDS = 2.0

logger = logging.getLogger("bentoml.churn")
_encode = msgspec.json.Encoder().encode


class Endpoint:
    """The ASGI application. Until `start` it answers 503.

    `follower` is who replaces what is served, where the service follows a pointer.
    """

    served: Served
    metrics: Metrics
    started_at: datetime
    access: Access | None

    def __init__(self, lane: LaneHealth, limits: Limits) -> None:
        self._lane, self._limits = lane, limits
        self.started = False
        self.follower: Follower | None = None
        self._batches = ThreadPoolExecutor(1, "batch")
        self._log: PredictionLog = NotLogged()
        self._looks_at_log: asyncio.Task[None] | None = None
        self._described: tuple[Served | None, bytes] = (None, b"")

    def start(self, served: Served) -> None:
        """Serve `served` from now on, with the online store and the log the environment names."""
        served.online = online_store(served.manifest.features)
        self.access = access(os.environ)
        self.metrics = Metrics(PATHS)
        self._traffic = Traffic(self._limits, self._show)
        self._log = prediction_log(os.environ)
        self._clock = clock(os.environ)
        self.served, self.started_at = served, datetime.now(UTC)
        self.metrics.serves(served.manifest, served.bento)
        self.started = True
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()
            self._traffic.watch()

    def _show(self, in_progress: int) -> None:
        """Bring the metrics that are no counts up to date."""
        self.metrics.in_progress.set(in_progress)
        if self._looks_at_log is None or self._looks_at_log.done():
            self._looks_at_log = asyncio.create_task(self._show_log())

    async def _show_log(self) -> None:
        try:
            self.metrics.log(await self._log.health())
        except Exception:
            logger.exception("the prediction log cannot be looked at")
        await asyncio.sleep(LOG_SECONDS)

    def replace(self, served: Served) -> None:
        """Serve `served` from the next request on; those being answered keep what they began with.

        To be called on the event loop.
        """
        if served.manifest.features == self.served.manifest.features:
            served.online = self.served.online
        else:
            served.online = online_store(served.manifest.features)
        self.served = served
        # Else it would keep what is replaced.
        self._described = (None, b"")
        self.metrics.serves(served.manifest, served.bento)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request; nothing but JSON leaves here."""
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        if not self.started:
            await _answer(send, *_refused(NOT_STARTED))
            return
        status, answer, headers = 200, b"", []
        arrived = time.perf_counter_ns()
        path, method = scope["path"], scope["method"]
        request_id = request_id_of(scope["headers"])
        traffic, task = self._traffic, asyncio.current_task()
        assert task is not None, "ASGI is spoken in tasks"
        try:
            if path == "/predict":
                if method != "POST":
                    raise WrongMethod(path, "POST")
                if self.access is not None:
                    self.access.admit(scope["headers"])
                traffic.read(task)
                body = await read_body(scope, receive, MAX_BODY_BYTES)
                traffic.admit(task)
                # Once: whatever this request passes on its way is of one release.
                served = self.served
                request = served.decoder.decode(body)
                if isinstance(request, CustomerRequest):
                    scored = await self._predict_by_id(served, request)
                else:
                    scored = served.predict(request)
                answer = _encode(scored.answer)
                await self._log.keep([_logged(served, request_id, scored, arrived, self._clock())])
                made = scored.answer
                self.metrics.probability(made.model_version, made.churn_probability)
            elif path == "/predict_batch":
                if method != "POST":
                    raise WrongMethod(path, "POST")
                caller = self.access.admit(scope["headers"]) if self.access else None
                traffic.read(task)
                body = await read_body(scope, receive, MAX_BATCH_BYTES)
                traffic.admit(task)
                answer = await self._predict_batch(self.served, body, request_id, caller, arrived)
            elif path == "/health":
                if method not in ("GET", "HEAD"):
                    raise WrongMethod(path, "GET, HEAD")
                served = self.served
                health = served.health(
                    self.started_at,
                    refused=self.follower.refused if self.follower else None,
                    online=await served.online.health() if served.online else None,
                    log=await self._log.health(),
                    lane=self._lane,
                    keys=self.access.health() if self.access else None,
                )
                answer = _encode(health)
            elif path == openapi.PATH:
                if method not in ("GET", "HEAD"):
                    raise WrongMethod(path, "GET, HEAD")
                answer = self._document(self.served)
            else:
                known = f"POST /predict, POST /predict_batch, GET /health and GET {openapi.PATH}"
                raise Refusal(404, "path", f"there are {known} here")
        except Refusal as refusal:
            status, answer, headers = _refused(refusal)
        except asyncio.CancelledError:
            given_up = traffic.given_up(task)
            if given_up is None:
                raise
            status, answer, headers = _refused(given_up)
        except Exception:
            # BentoML's timeout middleware waits for its whole timeout when an application raises
            # before it answers, so nothing may get past here.
            logger.exception("a prediction failed")
            detail = ErrorDetail("server", "the prediction failed; the service log says why")
            status, answer = 500, _encode(ErrorAnswer(detail))
        finally:
            traffic.leave(task)
        self.metrics.request(path, status, time.perf_counter_ns() - arrived)
        headers.append((b"x-request-id", request_id.encode()))
        await _answer(send, status, answer, headers)

    def _document(self, served: Served) -> bytes:
        by_id = served.online is not None
        made_of, document = self._described
        if made_of is not served:
            keys = self.access is not None
            document = _encode(openapi.openapi(served.manifest, by_id=by_id, keys=keys))
            self._described = (served, document)
        return document

    async def _predict_by_id(self, served: Served, request: CustomerRequest) -> Scored:
        """The answer to a request by id alone. Raises Refusal."""
        if served.online is None:
            raise served.decoder.features_needed(NO_ONLINE_STORE)
        (found,) = await served.online.find([request.customer_id])
        if isinstance(found, Refusal):
            raise found
        return served.predict_stored(request.customer_id, found)

    async def _predict_batch(
        self,
        served: Served,
        body: bytes,
        request_id: str,
        caller: Caller | None,
        arrived: int,
    ) -> bytes:
        """The encoded answer to a batch. Raises Refusal when none of its rows can be answered.

        What takes long runs beside the event loop, one batch after the other.
        """
        run = asyncio.get_running_loop().run_in_executor
        requests = await run(self._batches, served.decoder.decode_batch, body)
        if caller is not None:
            caller.spend_more(len(requests) - 1)
        ids = [r.customer_id for r in requests if isinstance(r, CustomerRequest)]
        found: list[Found | Refusal] = []
        if ids and served.online is None:
            found = [served.decoder.features_needed(NO_ONLINE_STORE)] * len(ids)
        elif ids and served.online is not None:
            try:
                found = await served.online.find(ids)
            except Refusal as refusal:
                if len(ids) == len(requests):
                    raise
                found = [refusal] * len(ids)
        rows = await run(self._batches, _score_batch, served, requests, found)
        at = self._clock()
        await self._log.keep(
            [
                _logged(served, f"{request_id}-{number}", row, arrived, at)
                for number, row in enumerate(rows)
                if isinstance(row, Scored)
            ]
        )
        for row in rows:
            if isinstance(row, Scored):
                made = row.answer
                self.metrics.probability(made.model_version, made.churn_probability)
        answers = [row.answer if isinstance(row, Scored) else refuse_row(row) for row in rows]
        return _encode(BatchAnswer(answers))


def _score_batch(
    served: Served,
    requests: Sequence[PredictionRequest | CustomerRequest | Refusal],
    found: Sequence[Found | Refusal],
) -> list[Scored | Refusal]:
    """`found` has what the online store gave for each CustomerRequest, in their order."""
    looked_up = iter(found)
    rows: list[BatchRow] = []
    errors: list[Refusal | None] = []
    for request in requests:
        if isinstance(request, CustomerRequest):
            stored = next(looked_up)
            if isinstance(stored, Refusal):
                errors.append(stored)
                continue
            rows.append((request.customer_id, stored.values, stored))
        elif isinstance(request, Refusal):
            errors.append(request)
            continue
        else:
            rows.append((request.customer_id, msgspec.structs.astuple(request)[1:], None))
        errors.append(None)
    predicted = iter(served.predict_rows(rows) if rows else ())
    return [next(predicted) if error is None else error for error in errors]


async def _answer(
    send: Send, status: int, answer: bytes, headers: list[tuple[bytes, bytes]]
) -> None:
    headers += [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(answer)),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


def _refused(refusal: Refusal) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
    headers = []
    if refusal.status in (408, 413):
        headers.append((b"connection", b"close"))
    if refusal.status == 401:
        headers.append((b"www-authenticate", CHALLENGE))
    if refusal.retry_after is not None:
        headers.append((b"retry-after", b"%d" % refusal.retry_after))
    if isinstance(refusal, WrongMethod):
        headers.append((b"allow", refusal.allowed.encode()))
    return refusal.status, _encode(refuse(refusal)), headers


_first_half = os.urandom(8).hex()
_numbers = itertools.count()


def request_id_of(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """The caller's x-request-id where it is 1 to 128 printable ASCII characters, else a new one.

    A new one is a name no other request has: 32 hex digits, half of them this process's.
    """
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.match(value):
            return value.decode()
    return f"{_first_half}{next(_numbers):016x}"


def _logged(
    served: Served, request_id: str, scored: Scored, arrived: int, at: int
) -> LoggedPrediction:
    answer = scored.answer
    stored = answer if isinstance(answer, StoredPrediction) else None
    return LoggedPrediction(
        request_id=request_id,
        at=at,
        customer_id=answer.customer_id,
        features=served.features,
        values=scored.values,
        probability=answer.churn_probability,
        champion=scored.champion,
        challenger=scored.challenger,
        arm=scored.arm,
        model_version=answer.model_version,
        release_id=served.manifest.release_id,
        bento=served.bento,
        cutoff=to_microseconds(stored.cutoff) if stored else None,
        stale=stored.stale if stored else None,
        latency_us=(time.perf_counter_ns() - arrived) // 1000,
        holdout=answer.holdout,
    )


class WrongMethod(Refusal):
    """A path asked by a method it does not take."""

    def __init__(self, path: str, allowed: str):
        super().__init__(405, "method", f"{path} takes {allowed}")
        self.allowed = allowed
