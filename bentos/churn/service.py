"""The churn service: one release behind `POST /predict` and `GET /health`.

The endpoint is a plain ASGI application in BentoML's `asgi_app` mount: BentoML keeps /livez,
/readyz, /healthz and /metrics, the process, its configuration and its packaging, while a
prediction passes neither a thread pool nor pydantic. Of the project this file imports the
contract and nothing else.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bentoml
import msgspec
import numpy as np
from numpy.typing import NDArray

from churn_assets.contract.release import Release, ReleaseError, check_golden, read_release
from churn_assets.contract.request import MAX_BODY_BYTES, WHOLE_BODY, Refusal, RequestDecoder
from churn_assets.contract.response import (
    ErrorAnswer,
    ErrorDetail,
    Health,
    Prediction,
    predict,
    refuse,
)

BAKED_RELEASE = Path(__file__).resolve().parent / "release"
RELEASE_VARIABLE = "CHURN_RELEASE_DIR"

# A body over the limit is read and dropped up to here, so that a client that writes all of it
# before it reads gets its answer instead of a reset connection.
DRAIN_BYTES = 16 * 1024 * 1024

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


class Served:
    """A verified release with everything made from it: replaced as one, or not at all."""

    def __init__(self, release: Release):
        self.manifest = release.manifest
        self.decoder = RequestDecoder(release.manifest.features)
        self.model = OnnxModel(release.model, len(release.manifest.features))
        check_golden(self.model.probabilities, release.golden)

    def predict(self, body: bytes) -> Prediction:
        """Answer one request body. Raises Refusal."""
        request = self.decoder.decode(body)
        probability = float(self.model.probabilities(self.decoder.row(request))[0])
        manifest = self.manifest
        return predict(request.customer_id, probability, manifest.model_version, manifest.risk)

    def health(self, started_at: datetime) -> Health:
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


class Endpoint:
    """The ASGI application. `served` is set before the first request can arrive."""

    served: Served
    started_at: datetime

    def start(self, served: Served) -> None:
        """Serve `served` from now on."""
        self.served, self.started_at = served, datetime.now(UTC)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request; nothing but JSON leaves here."""
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        status, answer, close = 200, b"", False
        allow: str | None = None
        try:
            path, method = scope["path"], scope["method"]
            if path == "/predict":
                allow = "POST"
                if method != "POST":
                    raise _wrong_method(path, allow)
                answer = _encode(self.served.predict(await _read_body(scope, receive)))
            elif path == "/health":
                allow = "GET, HEAD"
                if method not in ("GET", "HEAD"):
                    raise _wrong_method(path, allow)
                answer = _encode(self.served.health(self.started_at))
            else:
                raise Refusal(404, "path", "there is POST /predict and GET /health here")
        except Refusal as refusal:
            status, answer, close = (
                refusal.status,
                _encode(refuse(refusal)),
                refusal.status in (408, 413),
            )
        except Exception:
            # BentoML's timeout middleware waits for its whole timeout when an application raises
            # before it answers, so nothing may get past here.
            logger.exception("a prediction failed")
            detail = ErrorDetail("server", "the prediction failed; the service log says why")
            status, answer = 500, _encode(ErrorAnswer(detail))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(answer)),
        ]
        if status == 405 and allow:
            headers.append((b"allow", allow.encode()))
        if close:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


def _wrong_method(path: str, allowed: str) -> Refusal:
    return Refusal(405, "method", f"{path} takes {allowed}")


async def _read_body(scope: Message, receive: Receive) -> bytes:
    """The body of a JSON request of at most MAX_BODY_BYTES. Raises Refusal."""
    length = _check_headers(scope["headers"])
    if length > DRAIN_BYTES:
        raise _too_large()
    try:
        async with asyncio.timeout(READ_SECONDS):
            return await _receive_all(receive)
    except TimeoutError:
        raise Refusal(408, WHOLE_BODY, f"must arrive within {READ_SECONDS} s") from None


async def _receive_all(receive: Receive) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            # Nobody reads this answer, but BentoML waits for one until its timeout is over.
            raise Refusal(400, WHOLE_BODY, "ended before it was complete")
        part = message.get("body", b"")
        size += len(part)
        if size <= MAX_BODY_BYTES:
            parts.append(part)
        elif size > DRAIN_BYTES:
            raise _too_large()
        if not message.get("more_body"):
            break
    if size > MAX_BODY_BYTES:
        raise _too_large()
    return b"".join(parts)


def _too_large() -> Refusal:
    return Refusal(413, WHOLE_BODY, f"must be at most {MAX_BODY_BYTES} bytes")


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
            Served(read_release(release_directory()))
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
