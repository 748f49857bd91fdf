"""Requests the service must refuse, made at random from a seed, with what it must say of each."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from serving_cases import VALID

from churn_assets.contract.features import FEATURES

JSON_TYPE = ((b"content-type", b"application/json"),)
GOOD = json.dumps(VALID).encode()
KINDS = {feature.name: feature for feature in FEATURES}


@dataclass(frozen=True)
class Bad:
    """One request, the statuses it may get, and the fields it may be refused by (None: any)."""

    kind: str
    body: bytes
    statuses: tuple[int, ...]
    fields: frozenset[str] | None = None
    path: bytes = b"/predict"
    method: bytes = b"POST"
    headers: tuple[tuple[bytes, bytes], ...] = field(default=JSON_TYPE)
    chunked: bool = False

    def encoded(self) -> bytes:
        """The request as it is sent."""
        lines = [b"%b %b HTTP/1.1" % (self.method, self.path), b"host: churn"]
        lines += [b"%b: %b" % header for header in self.headers]
        if self.chunked:
            middle = len(self.body) // 2
            parts = [part for part in (self.body[:middle], self.body[middle:]) if part]
            content = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
            lines += [b"transfer-encoding: chunked", b"", content + b"0\r\n\r\n"]
        else:
            lines += [b"content-length: %d" % len(self.body), b"", self.body]
        return b"\r\n".join(lines)


def bad_requests(count: int, seed: int) -> Iterator[Bad]:
    """`count` of them, always the same ones for a seed."""
    chance = random.Random(seed)
    makers = [maker for maker, weight in _MAKERS for _ in range(weight)]
    for _ in range(count):
        yield chance.choice(makers)(chance)


def send_refused(url: str, requests: Iterator[Bad], connections: int = 8) -> list[Bad]:
    """Send them over a few kept connections, and see each refused as it must be; returns them."""
    parts, sent = urlsplit(url), []

    async def one_connection() -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            for bad in requests:
                writer.write(bad.encoded())
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                assert b"content-type: application/json\r\n" in head, (bad, head)
                length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
                said = json.loads(await reader.readexactly(length))["error"]
                status, name = int(head.split(b" ", 2)[1]), said["field"]
                assert status in bad.statuses, (bad, status, said)
                assert name, (bad, status, said)
                assert said["message"], (bad, status, said)
                assert bad.fields is None or name in bad.fields, (bad, status, said)
                sent.append(bad)
        finally:
            writer.close()
            await writer.wait_closed()

    async def all_connections() -> None:
        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(one_connection())

    asyncio.run(all_connections())
    return sent


def _text(chance: random.Random, longest: int = 20) -> str:
    planes = (string.printable, "\u00e4\u0107\u4e2d\u202e\u0000\ufeff\U0001f600", "`$.\\\"'{}[]")
    return "".join(
        chance.choice(chance.choice(planes)) for _ in range(chance.randrange(longest + 1))
    )


def _any_json(chance: random.Random, depth: int = 3) -> object:
    kind = chance.randrange(8 if depth else 6)
    if kind == 6:
        return [_any_json(chance, depth - 1) for _ in range(chance.randrange(4))]
    if kind == 7:
        return {_text(chance, 6): _any_json(chance, depth - 1) for _ in range(chance.randrange(4))}
    plain = (None, True, False, chance.randrange(-(2**70), 2**70), chance.gauss(0, 1e6))
    return plain[kind] if kind < 5 else _text(chance)


def _wrong_value(chance: random.Random, name: str) -> str:
    """The text of a value that is JSON and not one of feature `name`."""
    feature = KINDS[name]
    wrong: list[Callable[[], object]] = [
        lambda: None,
        lambda: chance.random() < 0.5,
        lambda: _text(chance),
        lambda: str(feature.minimum),
        lambda: [chance.randrange(9)],
        lambda: {"value": _any_json(chance, 1)},
        lambda: feature.minimum - chance.choice((1, 1e-9, 1e9, 1e300)),
        lambda: feature.maximum + chance.choice((1, 1e9, 1e300)),
        lambda: chance.choice((-1, 1)) * 10 ** chance.randrange(8, 300),
    ]
    if feature.dtype == "int":
        wrong += [lambda: float(chance.randrange(100)), lambda: chance.random() * 300]
    value = json.dumps(chance.choice(wrong)())
    numbers = (f"1e{chance.randrange(308, 10**9)}", "9" * chance.randrange(30, 5000), "-1e999")
    return chance.choice(numbers) if chance.random() < 0.15 else value


def _pairs(pairs: list[tuple[str, str]]) -> bytes:
    """An object of raw values, in this order, keys given twice and all."""
    return ("{" + ", ".join(f"{json.dumps(k)}: {v}" for k, v in pairs) + "}").encode()


def _valid_pairs(chance: random.Random) -> list[tuple[str, str]]:
    pairs = [(name, json.dumps(value)) for name, value in VALID.items()]
    chance.shuffle(pairs)
    return pairs


def _wrong_values(chance: random.Random) -> Bad:
    names = chance.sample(list(KINDS), chance.choice((1, 1, 1, 2, 3)))
    wrong = {name: _wrong_value(chance, name) for name in names}
    pairs = [(name, wrong.get(name, text)) for name, text in _valid_pairs(chance)]
    return Bad("wrong value", _pairs(pairs), (422,), frozenset(names))


def _given_twice(chance: random.Random) -> Bad:
    name = chance.choice(list(KINDS))
    pairs = [*_valid_pairs(chance), (name, _wrong_value(chance, name))]
    return Bad("given twice", _pairs(pairs), (422,), frozenset([name]))


def _wrong_customer(chance: random.Random) -> Bad:
    wrong = (None, 17, "", " \t\u3000", "x" * chance.randrange(129, 2000), ["c-1"], True, {})
    document = {**VALID, "customer_id": chance.choice(wrong)}
    if chance.random() < 0.3:
        document = {"customer_id": document["customer_id"]}
    return Bad("customer", json.dumps(document).encode(), (422,), frozenset(["customer_id"]))


def _missing(chance: random.Random) -> Bad:
    gone = chance.sample(list(VALID), chance.randrange(1, len(VALID) + 1))
    rest = {name: value for name, value in VALID.items() if name not in gone}
    return Bad("missing", json.dumps(rest).encode(), (422,), frozenset(gone))


def _unknown(chance: random.Random) -> Bad:
    near = chance.choice(list(VALID))
    odd = (near.upper(), f" {near}", f"{near}\u200b", near[:-1], "__proto__", "$ref", "")
    name = chance.choice((_text(chance, 30), chance.choice(odd), "k" * chance.randrange(9, 9000)))
    if name in VALID:
        name = "plan"
    pairs = _valid_pairs(chance)
    pairs.insert(chance.randrange(len(pairs) + 1), (name, json.dumps(_any_json(chance))))
    return Bad("unknown", _pairs(pairs), (422,), frozenset([name[:80] or '""']))


def _not_a_number(chance: random.Random) -> Bad:
    name = chance.choice(list(KINDS))
    text = chance.choice(("NaN", "Infinity", "-Infinity"))
    pairs = [(each, text if each == name else value) for each, value in _valid_pairs(chance)]
    return Bad("not a number", _pairs(pairs), (400,), frozenset([name]))


def _another_value(chance: random.Random) -> Bad:
    value = _any_json(chance)
    while isinstance(value, dict):
        value = _any_json(chance)
    return Bad("another value", json.dumps(value).encode(), (422,), frozenset(["body"]))


def _cut(chance: random.Random) -> Bad:
    return Bad("cut", GOOD[: chance.randrange(len(GOOD))], (400,), frozenset(["body"]))


def _noise(chance: random.Random) -> Bad:
    # What begins like this is no JSON, whatever follows.
    body = chance.choice((b"\xff", b"\x00", b"\xfe\xff", b"}", b"'")) + chance.randbytes(
        chance.randrange(300)
    )
    return Bad("noise", body, (400,), frozenset(["body"]))


def _spoilt(chance: random.Random) -> Bad:
    at = chance.randrange(len(GOOD) + 1)
    byte = chance.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\x01", b"\xf8"))
    # Which field it is in the reader may know or not, by where it stands.
    return Bad("spoilt", GOOD[:at] + byte + GOOD[at:], (400, 422))


def _deep(chance: random.Random) -> Bad:
    depth = chance.choice((5, 100, 1000, 5000))
    opening, closing = chance.choice((("[", "]"), ('{"a":', "}"), ('[{"rows":', "}]")))
    inner = opening * depth + ("1" + closing * depth if chance.random() < 0.5 else "")
    if chance.random() < 0.5:
        return Bad("deep", inner.encode(), (400, 422))
    pairs = [*_valid_pairs(chance), (chance.choice([*KINDS, "deep"]), inner)]
    return Bad("deep", _pairs(pairs), (400, 422))


def _batch(chance: random.Random) -> Bad:
    wrong: list[tuple[object, str]] = [
        ({"rows": []}, "rows"),
        ({}, "rows"),
        ({"rows": chance.choice((None, 1, "x", {}, VALID))}, "rows"),
        ({"rows": [VALID], "sort": _any_json(chance)}, "sort"),
        ({"Rows": [VALID]}, "Rows"),
        ([VALID], "body"),
        (chance.choice((None, 3, "rows")), "body"),
        ({"rows": [0] * 1001}, "rows"),
    ]
    document, name = chance.choice(wrong)
    body = json.dumps(document).encode()
    if chance.random() < 0.2:
        cut = body[: chance.randrange(len(body))]
        fields = frozenset([name, "body", "rows"])
        return Bad("batch", cut, (400, 422), fields, path=b"/predict_batch")
    return Bad("batch", body, (422,), frozenset([name]), path=b"/predict_batch")


def _content_type(chance: random.Random) -> Bad:
    types = (
        b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x",
        b"application/json; charset=utf-16", b"application/jsonp", b"application", b"*/*", b";",
        b"text/json, application/json", b"\xff\xfe", b"application/json\xff", b"",
        "".join(chance.choice(string.printable[:94]) for _ in range(30)).encode(),
    )  # fmt: skip
    wrong = ((b"content-type", chance.choice(types)),)
    if chance.random() < 0.2:
        encoding = chance.choice((b"gzip", b"br", b"deflate, gzip", b"\xff", b"x" * 2000))
        wrong = (*JSON_TYPE, (b"content-encoding", encoding))
    named = frozenset(["content-type", "content-encoding"])
    return Bad("content type", GOOD, (415,), named, headers=wrong)


def _odd_headers(chance: random.Random) -> Bad:
    """Headers that change nothing, around a body that is wrong or in a place that is not there."""
    names = (b"x-request-id", b"accept", b"cookie", b"authorization", b"x-forwarded-for",
             b"accept-encoding", b"traceparent", b"x", b"origin", b"range")  # fmt: skip
    odd = bytes(byte for byte in range(1, 256) if byte not in b"\r\n\x7f" and byte > 31)
    more = []
    for _ in range(chance.randrange(1, 6)):
        noise = bytes(chance.choices(odd, k=chance.randrange(200))).strip()
        more.append((chance.choice(names), chance.choice((noise, b"\xff\\", b"\\x", b"00-0"))))
    inner = chance.choice((_wrong_values, _elsewhere))(chance)
    return dataclasses.replace(inner, kind="odd headers", headers=(*JSON_TYPE, *more))


def _elsewhere(chance: random.Random) -> Bad:
    if chance.random() < 0.5:
        path = chance.choice((b"/predict", b"/predict_batch", b"/health", b"/openapi.json"))
        method = chance.choice((b"PUT", b"DELETE", b"PATCH", b"OPTIONS"))
        return Bad("method", GOOD, (405,), frozenset(["method"]), path, method)
    letters = string.ascii_letters + string.digits + "/._~%-"
    path = "".join(chance.choice(letters) for _ in range(chance.randrange(60))).replace("%", "%41")
    return Bad("path", GOOD, (404,), frozenset(["path"]), b"/v0/" + path.encode())


def _chunked(chance: random.Random) -> Bad:
    inner = chance.choice((_wrong_values, _missing, _cut, _noise))(chance)
    return dataclasses.replace(inner, kind="chunked", chunked=True)


_MAKERS: list[tuple[Callable[[random.Random], Bad], int]] = [
    (_wrong_values, 8),
    (_given_twice, 2),
    (_wrong_customer, 2),
    (_missing, 3),
    (_unknown, 4),
    (_not_a_number, 2),
    (_another_value, 2),
    (_cut, 2),
    (_noise, 2),
    (_spoilt, 3),
    (_deep, 1),
    (_batch, 3),
    (_content_type, 2),
    (_odd_headers, 2),
    (_elsewhere, 2),
    (_chunked, 2),
]
