"""The ASGI application: `POST /predict`, `POST /predict_batch` and `GET /health` of a release."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import msgspec

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
    StoredPrediction,
    refuse,
    refuse_row,
)
from churn_service.bodies import Message, Receive, Send, read_body
from churn_service.follower import Follower
from churn_service.online import ONLINE_VARIABLE, online_store
from churn_service.prediction_log import NotLogged, PredictionLog
from churn_service.served import BatchRow, Scored, Served

NO_ONLINE_STORE = f"this service has no online store ({ONLINE_VARIABLE}) to take it from"

logger = logging.getLogger("bentoml.churn")
_encode = msgspec.json.Encoder().encode


class Endpoint:
    """The ASGI application. `served` is set before the first request can arrive.

    `follower` is who replaces it, where the service follows a pointer.
    """

    served: Served
    started_at: datetime

    def __init__(self) -> None:
        self.follower: Follower | None = None
        self._batches = ThreadPoolExecutor(1, "batch")
        self._log: PredictionLog = NotLogged()

    def start(self, served: Served) -> None:
        """Serve `served` from now on, with the online store the environment names."""
        served.online = online_store(served.manifest.features)
        self.served, self.started_at = served, datetime.now(UTC)

    def replace(self, served: Served) -> None:
        """Serve `served` from the next request on; those being answered keep what they began with.

        To be called on the event loop.
        """
        if served.manifest.features == self.served.manifest.features:
            served.online = self.served.online
        else:
            served.online = online_store(served.manifest.features)
        self.served = served

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request; nothing but JSON leaves here."""
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        status, answer, headers = 200, b"", []
        arrived = time.perf_counter_ns()
        try:
            path, method = scope["path"], scope["method"]
            if path == "/predict":
                if method != "POST":
                    raise WrongMethod(path, "POST")
                body = await read_body(scope, receive, MAX_BODY_BYTES)
                # Once: whatever this request passes on its way is of one release.
                served = self.served
                request = served.decoder.decode(body)
                if isinstance(request, CustomerRequest):
                    scored = await self._predict_by_id(served, request)
                else:
                    scored = served.predict(request)
                answer = _encode(scored.answer)
                await self._log.keep([_logged(served, _request_id(), scored, arrived)])
            elif path == "/predict_batch":
                if method != "POST":
                    raise WrongMethod(path, "POST")
                body = await read_body(scope, receive, MAX_BATCH_BYTES)
                answer = await self._predict_batch(self.served, body, arrived)
            elif path == "/health":
                if method not in ("GET", "HEAD"):
                    raise WrongMethod(path, "GET, HEAD")
                served = self.served
                online = await served.online.health() if served.online else None
                refused = self.follower.refused if self.follower else None
                answer = _encode(served.health(self.started_at, online, refused))
            else:
                known = "POST /predict, POST /predict_batch and GET /health"
                raise Refusal(404, "path", f"there are {known} here")
        except Refusal as refusal:
            status, answer = refusal.status, _encode(refuse(refusal))
            if status in (408, 413):
                headers.append((b"connection", b"close"))
            if refusal.retry_after is not None:
                headers.append((b"retry-after", b"%d" % refusal.retry_after))
            if isinstance(refusal, WrongMethod):
                headers.append((b"allow", refusal.allowed.encode()))
        except Exception:
            # BentoML's timeout middleware waits for its whole timeout when an application raises
            # before it answers, so nothing may get past here.
            logger.exception("a prediction failed")
            detail = ErrorDetail("server", "the prediction failed; the service log says why")
            status, answer = 500, _encode(ErrorAnswer(detail))
        headers += [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(answer)),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _predict_by_id(self, served: Served, request: CustomerRequest) -> Scored:
        """The answer to a request by id alone. Raises Refusal."""
        if served.online is None:
            raise served.decoder.features_needed(NO_ONLINE_STORE)
        (found,) = await served.online.find([request.customer_id])
        if isinstance(found, Refusal):
            raise found
        return served.predict_stored(request.customer_id, found)

    async def _predict_batch(self, served: Served, body: bytes, arrived: int) -> bytes:
        """The encoded answer to a batch. Raises Refusal when none of its rows can be answered.

        What takes long runs beside the event loop, one batch after the other.
        """
        run = asyncio.get_running_loop().run_in_executor
        requests = await run(self._batches, served.decoder.decode_batch, body)
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
        batch = _request_id()
        await self._log.keep(
            [
                _logged(served, f"{batch}-{number}", row, arrived)
                for number, row in enumerate(rows)
                if isinstance(row, Scored)
            ]
        )
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


def _request_id() -> str:
    return uuid.uuid4().hex


def _logged(served: Served, request_id: str, scored: Scored, arrived: int) -> LoggedPrediction:
    answer = scored.answer
    stored = answer if isinstance(answer, StoredPrediction) else None
    return LoggedPrediction(
        request_id=request_id,
        at=time.time_ns() // 1000,
        customer_id=answer.customer_id,
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
    )


class WrongMethod(Refusal):
    """A path asked by a method it does not take."""

    def __init__(self, path: str, allowed: str):
        super().__init__(405, "method", f"{path} takes {allowed}")
        self.allowed = allowed
