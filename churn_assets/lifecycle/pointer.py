"""Which bento serves: the writer of the pointer that services follow, and its reader here."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from churn_assets.contract.pointer import Current, decode_pointer
from churn_assets.contract.release import ReleaseError
from churn_assets.errors import UserError

__all__ = ["Current", "point_at", "read_current"]


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
        return decode_pointer(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ReleaseError) as error:
        raise UserError(
            f"{path} does not say what serves ({error}); materialize churn_bento"
        ) from error
