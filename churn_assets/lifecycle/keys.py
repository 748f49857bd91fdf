"""Making and revoking API keys: changes to the file that services read."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Generator
from datetime import datetime, timedelta
from pathlib import Path

import msgspec

from churn_assets.contract.keys import ApiKey, KeyFile, digest_of, new_key, read_keys
from churn_assets.errors import UserError


def add_key(
    path: Path, name: str, *, now: datetime, rate: float | None, days: int | None
) -> tuple[ApiKey, str]:
    """Make a key called `name`; returns what is kept of it, and the key itself, kept nowhere.

    `rate` is requests a second for one worker, `days` how long it is valid; None is without limit.
    Raises UserError.
    """
    key, identity = new_key()
    expires = None if days is None else now + timedelta(days=days)
    try:
        kept = msgspec.convert(
            {
                "id": identity,
                "name": name.strip(),
                "sha256": digest_of(key).hex(),
                "created_at": now,
                "expires_at": expires,
                "rate": rate,
            },
            ApiKey,
        )
    except msgspec.ValidationError as error:
        raise UserError(f"no key was made: {error}") from None
    with _changing(path) as change:
        change(lambda keys: [*keys, kept])
    return kept, key


def revoke_keys(path: Path, name: str) -> list[ApiKey]:
    """Remove the keys with this name, or the one with this id; returns them. Raises UserError."""
    if not path.exists():
        raise UserError(f"there is no {path}; `churn keys add` makes it")
    with _changing(path) as change:
        gone = [key for key in list_keys(path) if name in (key.name, key.id)]
        if not gone:
            raise UserError(f"there is no key {name} in {path}; `churn keys list` shows them")
        change(lambda keys: [key for key in keys if key not in gone])
    return gone


def list_keys(path: Path) -> list[ApiKey]:
    """The keys in the file at `path`, none without a file. Raises UserError for a broken one."""
    if not path.exists():
        return []
    try:
        return read_keys(path).keys
    except ValueError as error:
        raise UserError(f"{error}; put back a good one, or remove it and make new keys") from None


Change = Callable[[Callable[[list[ApiKey]], list[ApiKey]]], None]


@contextlib.contextmanager
def _changing(path: Path) -> Generator[Change]:
    """Hold the file against others who change it; what reads it sees the old one or the new one."""

    def change(edit: Callable[[list[ApiKey]], list[ApiKey]]) -> None:
        content = msgspec.json.format(msgspec.json.encode(KeyFile(edit(list_keys(path)))))
        written = path.with_name(f".{path.name}-{os.getpid()}")
        written.unlink(missing_ok=True)
        with open(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, path)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".{path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield change
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from None
