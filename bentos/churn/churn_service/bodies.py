"""The body of a request, read from ASGI within a limit of size."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from churn_assets.contract.request import WHOLE_BODY, Refusal

# A body over the limit is read and dropped up to here, so that a client that writes all of it
# before it reads gets its answer instead of a reset connection.
DRAIN_BYTES = 16 * 1024 * 1024

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


async def read_body(scope: Message, receive: Receive, limit: int) -> bytes:
    """The body of a JSON request of at most `limit` bytes. Raises Refusal."""
    length = _check_headers(scope["headers"])
    if length > DRAIN_BYTES:
        raise _too_large(limit)
    return await _receive_all(receive, limit)


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
