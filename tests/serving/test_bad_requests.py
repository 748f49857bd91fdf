"""Ten thousand requests that are wrong: each is refused with a reason, and the service goes on."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit

from bad_requests import GOOD, Bad, bad_requests

COUNT = 10_000
CONNECTIONS = 8


async def answers(url: str, requests: Iterator[Bad]) -> list[tuple[Bad, int, bytes]]:
    """What each was answered, over a few kept connections."""
    parts, answered = urlsplit(url), []

    async def one_connection() -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        for bad in requests:
            writer.write(bad.encoded())
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
            content = await reader.readexactly(length)
            assert b"content-type: application/json\r\n" in head, (bad, head)
            answered.append((bad, int(head.split(b" ", 2)[1]), content))
        writer.close()
        await writer.wait_closed()

    async with asyncio.timeout(120):
        await asyncio.gather(*(one_connection() for _ in range(CONNECTIONS)))
    return answered


def test_ten_thousand_bad_requests_are_refused_each_with_its_field(url: str) -> None:
    answered = asyncio.run(answers(url, bad_requests(COUNT, seed=5)))
    assert len(answered) == COUNT
    for bad, status, content in answered:
        said = json.loads(content)["error"]
        assert status in bad.statuses, (bad, status, content)
        assert said["field"], (bad, content)
        assert said["message"], (bad, content)
        assert bad.fields is None or said["field"] in bad.fields, (bad, content)
    assert min(Counter(bad.kind for bad, _, _ in answered).values()) > 100
    good = asyncio.run(answers(url, iter([Bad("good", GOOD, (200,))])))
    assert good[0][1] == 200
