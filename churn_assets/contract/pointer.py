"""The pointer to the current release: one small file, replaced in one step, that services follow.

A home keeps it as `serving/current.json`, beside `serving/releases/<release_id>/`.
"""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import msgspec

from churn_assets.contract.release import ReleaseError

RELEASES = "releases"

# Larger than any pointer; what is larger is not read to its end.
MAX_POINTER_BYTES = 64 * 1024

_RELEASE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")


class Current(msgspec.Struct, frozen=True):
    """What serves: the bento with its release, and the step of the history that put it there."""

    bento: str
    release_id: str
    model_version: str
    step: int
    at: datetime


def decode_pointer(content: bytes) -> Current:
    """What a pointer file of this content says. Raises ReleaseError when it says nothing."""
    if len(content) > MAX_POINTER_BYTES:
        raise ReleaseError(f"it has more than {MAX_POINTER_BYTES} bytes")
    try:
        return msgspec.json.decode(content, type=Current)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ReleaseError(str(error)) from None


def is_release_id(text: str) -> bool:
    """Whether `text` can be the id of a release: a plain name, that leads to no other folder."""
    return _RELEASE_ID.match(text) is not None


def release_directory(pointer: Path, release_id: str) -> Path:
    """Where the release is that the pointer file at `pointer` names.

    Raises ReleaseError for an id that is not one: it never leads out of the folder of releases.
    """
    if not is_release_id(release_id):
        raise ReleaseError(f"{release_id[:100]!r} is not the id of a release")
    return pointer.parent / RELEASES / release_id
