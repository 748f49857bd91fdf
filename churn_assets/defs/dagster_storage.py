"""Dagster's storage, opened for a command: where it is elsewhere it may not be had."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager

from dagster import DagsterInstance

from churn_assets.errors import UserError
from churn_assets.home import PROJECT_ROOT, Home


def open_dagster(how: Callable[[], DagsterInstance]) -> DagsterInstance:
    """Dagster's instance, opened as `how` does.

    Raises UserError when its storage is elsewhere and cannot be had.
    """
    try:
        with quiet_retries():
            return how()
    except Exception as error:
        told = storage_error(error)
        if told is None:
            raise
        raise told from error


def storage_error(error: Exception) -> UserError | None:
    """What a person is told of an error of Dagster's storage.

    None where it is the project's own configuration, of which it is no matter of a person's.
    """
    configured = Home.from_environment().dagster_yaml
    if configured == PROJECT_ROOT / "dagster.yaml":
        return None
    return UserError(
        f"Dagster's storage cannot be had ({reason_of(error)}); check {configured}, what it "
        "reads from the environment, and its server"
    )


@contextmanager
def quiet_retries() -> Generator[None]:
    """Keep off the terminal what Dagster says each time it tries its database again."""

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Retrying failed database")

    root = logging.getLogger()
    root.addFilter(is_news)
    try:
        yield
    finally:
        root.removeFilter(is_news)


def reason_of(error: BaseException) -> str:
    """The line that says why, of errors that have others for their cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    unset = re.search(r'environment variable "(\w+)" which is not set', str(error))
    return f"{unset[1]} is not set" if unset else str(error).strip().partition("\n")[0]
