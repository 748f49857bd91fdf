"""The churn service: one release behind `POST /predict`, `POST /predict_batch`, `GET /health`.

The endpoint is a plain ASGI application in BentoML's `asgi_app` mount: BentoML keeps /livez,
/readyz, /healthz and /metrics, the process, its configuration and its packaging, while a
prediction passes neither a thread pool nor pydantic. Of the project this file imports the
contract and nothing else.

Requests by id alone are looked up in the online store CHURN_ONLINE_STORE names; whatever becomes of
the store, requests that bring their features never wait for it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bentoml
import msgspec
import numpy as np
from numpy.typing import NDArray

from churn_assets.contract.features import Feature
from churn_assets.contract.lookup import AgePolicy, Found, Lookup
from churn_assets.contract.online import is_redis, open_reader
from churn_assets.contract.release import Release, ReleaseError, check_golden, read_release
from churn_assets.contract.request import (
    MAX_BATCH_BYTES,
    MAX_BODY_BYTES,
    WHOLE_BODY,
    CustomerRequest,
    PredictionRequest,
    Refusal,
    RequestDecoder,
)
from churn_assets.contract.response import (
    BatchAnswer,
    ErrorAnswer,
    ErrorDetail,
    Health,
    OnlineHealth,
    Prediction,
    StoredPrediction,
    predict,
    predict_stored,
    refuse,
    refuse_row,
)

BAKED_RELEASE = Path(__file__).resolve().parent / "release"
RELEASE_VARIABLE = "CHURN_RELEASE_DIR"
ONLINE_VARIABLE = "CHURN_ONLINE_STORE"

# A body over the limit is read and dropped up to here, so that a client that writes all of it
# before it reads gets its answer instead of a reset connection.
DRAIN_BYTES = 16 * 1024 * 1024

NO_ONLINE_STORE = f"this service has no online store ({ONLINE_VARIABLE}) to take it from"

# A slow client hears 408 from here before it hears 504 from BentoML.
READ_SECONDS = 4
ANSWER_SECONDS = 5

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

logger = logging.getLogger("bentoml.churn")
_encode = msgspec.json.Encoder().encode


class OnnxModel:
    """The model of a release, on one thread: a row takes less time than a thread needs to wake."""

    def __init__(self, content: bytes, features: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ReleaseError(f"model.onnx cannot be loaded: {reason}") from error
        self._run = session.run
        self._input = session.get_inputs()[0].name
        self._outputs = [session.get_outputs()[-1].name]
        shape = session.get_inputs()[0].shape
        if len(shape) != 2 or shape[1] != features:
            raise ReleaseError(
                f"model.onnx takes input {shape}, the release has {features} features"
            )

    def probabilities(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """P(churn) of each row; `rows` is float32 of shape (n, features)."""
        answer = self._run(self._outputs, {self._input: rows})[0]
        if not isinstance(answer, np.ndarray) or answer.ndim != 2 or answer.shape[1] != 2:
            raise ReleaseError("model.onnx must end in class probabilities of shape (rows, 2)")
        return answer[:, 1]


# A customer, their features, and where those come from the online store, what it said of them.
BatchRow = tuple[str, Sequence[float], Found | None]


class Served:
    """A verified release with everything made from it: replaced as one, or not at all."""

    def __init__(self, release: Release):
        self.manifest = release.manifest
        self.decoder = RequestDecoder(release.manifest.features)
        self.model = OnnxModel(release.model, len(release.manifest.features))
        check_golden(self.model.probabilities, release.golden)

    def predict(self, request: PredictionRequest) -> Prediction:
        """The answer to one request with its features."""
        return self._predict(request.customer_id, self.decoder.row(request))

    def predict_stored(self, customer_id: str, found: Found) -> StoredPrediction:
        """The answer to one request by id."""
        row = np.array([found.values], dtype=np.float32)
        return predict_stored(self._predict(customer_id, row), found.cutoff, found.stale)

    def predict_rows(self, rows: Sequence[BatchRow]) -> list[Prediction | StoredPrediction]:
        """The answers to one or more rows, computed in one call."""
        features = np.array([values for _, values, _ in rows], dtype=np.float32)
        risk, version = self.manifest.risk, self.manifest.model_version
        answers: list[Prediction | StoredPrediction] = []
        for (customer_id, _, found), probability in zip(
            rows, self.model.probabilities(features).tolist(), strict=True
        ):
            answer = predict(customer_id, probability, version, risk)
            answers.append(predict_stored(answer, found.cutoff, found.stale) if found else answer)
        return answers

    def _predict(self, customer_id: str, row: NDArray[np.float32]) -> Prediction:
        probability = float(self.model.probabilities(row)[0])
        return predict(customer_id, probability, self.manifest.model_version, self.manifest.risk)

    def health(self, started_at: datetime, online: OnlineHealth | None) -> Health:
        """What is served here."""
        context, manifest = bentoml.server_context, self.manifest
        built = context.bento_version not in ("", "not available")
        return Health(
            status="healthy",
            model=manifest.model_name,
            version=manifest.model_version,
            release_id=manifest.release_id,
            bento=f"{context.bento_name}:{context.bento_version}" if built else None,
            features=manifest.feature_names,
            started_at=started_at,
            online_store=online,
        )


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


class Endpoint:
    """The ASGI application. `served` is set before the first request can arrive."""

    served: Served
    started_at: datetime
    online: OnlineStore | None

    def __init__(self) -> None:
        self._batches = ThreadPoolExecutor(1, "batch")

    def start(self, served: Served) -> None:
        """Serve `served` from now on, with the online store the environment names."""
        self.online = online_store(served.manifest.features)
        self.served, self.started_at = served, datetime.now(UTC)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request; nothing but JSON leaves here."""
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        status, answer, headers = 200, b"", []
        try:
            path, method = scope["path"], scope["method"]
            if path == "/predict":
                if method != "POST":
                    raise WrongMethod(path, "POST")
                served = self.served
                request = served.decoder.decode(await _read_body(scope, receive, MAX_BODY_BYTES))
                if isinstance(request, CustomerRequest):
                    answer = _encode(await self._predict_by_id(served, request))
                else:
                    answer = _encode(served.predict(request))
            elif path == "/predict_batch":
                if method != "POST":
                    raise WrongMethod(path, "POST")
                body = await _read_body(scope, receive, MAX_BATCH_BYTES)
                answer = await self._predict_batch(self.served, body)
            elif path == "/health":
                if method not in ("GET", "HEAD"):
                    raise WrongMethod(path, "GET, HEAD")
                online = await self.online.health() if self.online else None
                answer = _encode(self.served.health(self.started_at, online))
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

    async def _predict_by_id(self, served: Served, request: CustomerRequest) -> StoredPrediction:
        """The answer to a request by id alone. Raises Refusal."""
        if self.online is None:
            raise served.decoder.features_needed(NO_ONLINE_STORE)
        (found,) = await self.online.find([request.customer_id])
        if isinstance(found, Refusal):
            raise found
        return served.predict_stored(request.customer_id, found)

    async def _predict_batch(self, served: Served, body: bytes) -> bytes:
        """The encoded answer to a batch. Raises Refusal when none of its rows can be answered.

        What takes long runs beside the event loop, one batch after the other.
        """
        run = asyncio.get_running_loop().run_in_executor
        requests = await run(self._batches, served.decoder.decode_batch, body)
        ids = [r.customer_id for r in requests if isinstance(r, CustomerRequest)]
        found: list[Found | Refusal] = []
        if ids and self.online is None:
            found = [served.decoder.features_needed(NO_ONLINE_STORE)] * len(ids)
        elif ids and self.online is not None:
            try:
                found = await self.online.find(ids)
            except Refusal as refusal:
                if len(ids) == len(requests):
                    raise
                found = [refusal] * len(ids)
        return await run(self._batches, _answer_batch, served, requests, found)


def _answer_batch(
    served: Served,
    requests: Sequence[PredictionRequest | CustomerRequest | Refusal],
    found: Sequence[Found | Refusal],
) -> bytes:
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
    answers = [next(predicted) if error is None else refuse_row(error) for error in errors]
    return _encode(BatchAnswer(answers))


class WrongMethod(Refusal):
    """A path asked by a method it does not take."""

    def __init__(self, path: str, allowed: str):
        super().__init__(405, "method", f"{path} takes {allowed}")
        self.allowed = allowed


async def _read_body(scope: Message, receive: Receive, limit: int) -> bytes:
    """The body of a JSON request of at most `limit` bytes. Raises Refusal."""
    length = _check_headers(scope["headers"])
    if length > DRAIN_BYTES:
        raise _too_large(limit)
    try:
        async with asyncio.timeout(READ_SECONDS):
            return await _receive_all(receive, limit)
    except TimeoutError:
        raise Refusal(408, WHOLE_BODY, f"must arrive within {READ_SECONDS} s") from None


async def _receive_all(receive: Receive, limit: int) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            # Nobody reads this answer, but BentoML waits for one until its timeout is over.
            raise Refusal(400, WHOLE_BODY, "ended before it was complete")
        part = message.get("body", b"")
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > DRAIN_BYTES:
            raise _too_large(limit)
        if not message.get("more_body"):
            break
    if size > limit:
        raise _too_large(limit)
    return b"".join(parts)


def _too_large(limit: int) -> Refusal:
    return Refusal(413, WHOLE_BODY, f"must be at most {limit} bytes")


def _check_headers(headers: list[tuple[bytes, bytes]]) -> int:
    """Refuse what is not plain JSON in UTF-8; returns the declared length, 0 without one."""
    content_type, length = b"", 0
    for name, value in headers:
        if name == b"content-type":
            content_type = value
        elif name == b"content-length":
            length = int(value) if value.isdigit() else 0
        elif name == b"content-encoding" and value.strip().lower() != b"identity":
            raise Refusal(415, "content-encoding", "must be identity: send the JSON uncompressed")
    if content_type == b"application/json":
        return length
    media_type, _, parameters = content_type.lower().partition(b";")
    charset = parameters.replace(b" ", b"").replace(b'"', b"")
    if media_type.strip() != b"application/json":
        raise Refusal(415, "content-type", "must be application/json")
    if charset not in (b"", b"charset=utf-8", b"charset=utf8"):
        raise Refusal(415, "content-type", "must be application/json in UTF-8")
    return length


def _refused_start(error: ReleaseError) -> bentoml.exceptions.BentoMLException:
    return bentoml.exceptions.BentoMLException(f"refused to start: {error}")


endpoint = Endpoint()


@bentoml.asgi_app(endpoint, path="/", name="churn")
@bentoml.service(
    name="churn",
    workers=1,
    traffic={"timeout": ANSWER_SECONDS},
    logging={"access": {"enabled": False}},
    image=bentoml.images.Image(
        base_image="python:3.11-slim",
        distro="none",
        python_version="3.11",
        lock_python_packages=False,
    ),
    envs=[{"name": "BENTOML_DO_NOT_TRACK", "value": "True"}],
)
class Churn:
    """Churn probability of one customer, from the release this service was built with."""

    @bentoml.on_deployment
    def verify() -> None:
        """Refuse a bad release before any worker exists: a worker that fails is only restarted."""
        try:
            online_store(Served(read_release(release_directory())).manifest.features)
        except ReleaseError as error:
            raise _refused_start(error) from None

    def __init__(self) -> None:
        try:
            endpoint.start(Served(read_release(release_directory())))
        except ReleaseError as error:
            raise _refused_start(error) from None
        # BentoML's timeout middleware holds a dozen objects a request until the timeout is over,
        # none of them garbage. Full collections over them stopped the service for 80 to 180 ms.
        gc.freeze()
        gc.set_threshold(700, 10, 1000)
