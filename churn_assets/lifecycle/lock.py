"""One caller at a time changes a registry.

Where the registry's database is at hand, the lock goes with the process that holds it, however that
process ends: a lock on a file beside SQLite's, an advisory lock of PostgreSQL's. An MLflow server
has neither, so there the lock is a lease (see `_lease`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from churn_assets.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

POLL_S = 0.05
LEASE_S = 120.0

Check = Callable[[], None]


@contextlib.contextmanager
def registry_lock(
    client: MlflowClient, name: str, *, wait_s: float, lease_s: float = LEASE_S
) -> Generator[Check]:
    """Hold the lock of registered model `name` while the block runs.

    Yields a function to call before each write: it raises UserError once the lock is lost. Raises
    UserError when another caller holds it for longer than `wait_s` seconds.
    """
    uri = client.tracking_uri
    scheme = uri.partition(":")[0]
    if scheme == "sqlite":
        held = _file(uri, name, wait_s)
    elif scheme.startswith("postgres"):
        held = _advisory(uri, name, wait_s)
    else:
        held = _lease(client, name, wait_s, lease_s)
    with held as check:
        yield check


def _try_until(take: Callable[[], bool], name: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while not take():
        if time.monotonic() > deadline:
            raise UserError(
                f"another transition of {name} is going on and nothing was changed; see what came "
                "of it with `churn history`, then try again"
            )
        time.sleep(POLL_S)


@contextlib.contextmanager
def _file(uri: str, name: str, wait_s: float) -> Generator[Check]:
    """A database in a file is on this machine, so a lock of its kernel is enough."""
    from sqlalchemy.engine import make_url

    with open(f"{make_url(uri).database}.lock", "a", encoding="utf-8") as file:

        def take() -> bool:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        _try_until(take, name, wait_s)
        yield lambda: None


@contextlib.contextmanager
def _advisory(uri: str, name: str, wait_s: float) -> Generator[Check]:
    """PostgreSQL frees the lock when the connection ends."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool

    ask = text("SELECT pg_try_advisory_lock(hashtextextended(:name, 0))")
    try:
        connection = create_engine(uri, poolclass=NullPool).connect()
    except SQLAlchemyError as error:
        raise UserError(
            f"the registry's database cannot be reached ({type(error).__name__}) and nothing was "
            "changed; start it and try again"
        ) from error

    def check() -> None:
        try:
            connection.execute(text("SELECT 1"))
        except SQLAlchemyError as error:
            raise _lost(name) from error

    with connection.execution_options(isolation_level="AUTOCOMMIT"):
        _try_until(lambda: bool(connection.scalar(ask, {"name": f"churn {name}"})), name, wait_s)
        yield check


@contextlib.contextmanager
def _lease(client: MlflowClient, name: str, wait_s: float, lease_s: float) -> Generator[Check]:
    """A lease of `lease_s` seconds, held as a registered model of its own.

    A server gives no lock and no compare-and-set, but creates a registered model of a name only
    once. Leases are numbered: who finds the newest given back or run out creates the next. What a
    killed holder left runs out by itself. Its limits: the callers' clocks must agree to a fraction
    of the lease, and a single write that takes longer than what is left of it is not fenced.
    """
    from mlflow.exceptions import MlflowException

    holder = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    prefix = f"{name}.lock."
    mine: list[str] = []
    until: list[float] = []

    def leases() -> list[RegisteredModel]:
        found = client.search_registered_models(f"name LIKE '{prefix}%'")
        return sorted(found, key=lambda lease: lease.name)

    def take() -> bool:
        known = leases()
        if known and not _is_over(known[-1]):
            return False
        number = int(known[-1].name.removeprefix(prefix)) + 1 if known else 1
        made, expires = f"{prefix}{number:09d}", time.time() + lease_s
        try:
            client.create_registered_model(made, {"holder": holder, "expires": repr(expires)})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return False
        if leases()[-1].name != made:
            # Slow: the lease after this one has been there, so this number was free again.
            client.delete_registered_model(made)
            return False
        mine.append(made)
        until.append(expires)
        for lease in known:
            with contextlib.suppress(MlflowException):
                client.delete_registered_model(lease.name)
        return True

    def check() -> None:
        if time.time() > until[-1]:
            raise _lost(name)

    _try_until(take, name, wait_s)
    try:
        yield check
    finally:
        with contextlib.suppress(MlflowException):
            client.set_registered_model_tag(mine[-1], "expires", "0")


def _is_over(lease: RegisteredModel) -> bool:
    try:
        return float(lease.tags.get("expires", "0")) < time.time()
    except ValueError:
        return True


def _lost(name: str) -> UserError:
    return UserError(
        f"the registry took too long: this transition of {name} lost its lock and stopped; "
        "the next one finishes it"
    )
