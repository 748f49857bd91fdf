"""API keys: what a key looks like, and the file that says which are valid.

A key is `churn_`, 8 hex digits that name it, `_` and 256 random bits. The file holds the sha256 of
each and never a key: what is random cannot be guessed from its hash, so no slow hash is needed, as
it is for passwords. The name is no secret; it finds the one hash to compare with.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec

KEYS_VARIABLE = "CHURN_API_KEYS"
FORMAT = 1

_MAX_FILE_BYTES = 4 * 1024 * 1024
_KEY = re.compile(r"churn_([0-9a-f]{8})_[A-Za-z0-9_-]{43}\Z")

Moment = Annotated[datetime, msgspec.Meta(tz=True)]


class ApiKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is kept of one key.

    sha256: of the whole key, in hex. rate: requests a second it may send to one worker process,
    None for any number; a batch counts as many as it has rows.
    """

    id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{8}$")]
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=80)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
    created_at: Moment
    expires_at: Moment | None = None
    rate: Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None = None


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys that are valid, until they expire."""

    keys: list[ApiKey]
    format: int = FORMAT


def new_key() -> tuple[str, str]:
    """A new key, and its id."""
    identity = secrets.token_hex(4)
    return f"churn_{identity}_{secrets.token_urlsafe(32)}", identity


def id_of(key: str) -> str | None:
    """Which key `key` says it is, None for what is no key."""
    match = _KEY.match(key)
    return match[1] if match else None


def digest_of(key: str) -> bytes:
    """The sha256 of a key, 32 bytes."""
    return hashlib.sha256(key.encode()).digest()


def read_keys(path: Path) -> KeyFile:
    """The keys in the file at `path`. Raises ValueError that says what is wrong with it."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    if len(content) > _MAX_FILE_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_FILE_BYTES} bytes")
    try:
        found = msgspec.json.decode(content, type=KeyFile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no file of API keys: {error}") from None
    if found.format != FORMAT:
        raise ValueError(f"{path} has format {found.format}, this code reads {FORMAT}")
    ids = [key.id for key in found.keys]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{path} has two keys of one id")
    return found
