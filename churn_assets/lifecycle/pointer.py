"""Which bento serves: one small file, replaced in one step, that the service follows."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import msgspec

from churn_assets.errors import UserError


class Current(msgspec.Struct, frozen=True):
    """What serves: the bento with its release, and the step of the history that put it there."""

    bento: str
    release_id: str
    model_version: str
    step: int
    at: datetime


def point_at(path: Path, current: Current) -> None:
    """Replace the pointer at `path`, in one step that outlives a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}-{os.getpid()}")
    with written.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(current)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(written, path)


def read_current(path: Path) -> Current | None:
    """What the pointer says; None when there is none. Raises UserError when it says nothing."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Current)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} does not say what serves ({error}); materialize churn_bento"
        ) from error
