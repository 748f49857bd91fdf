"""Whether anything uses a home, for those who put another one in its place."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Generator
from pathlib import Path

from churn_assets.contract.logged import LOCK_SUFFIX, hold
from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.lifecycle.deployment import running_service


@contextlib.contextmanager
def unused(home: Home, prediction_log: Path | None) -> Generator[None]:
    """Keep `make run` and `make up` out of `home`, which is made if missing, while the block runs.

    prediction_log: the directory of the log, where it is one. Raises UserError when they, a
    service or a transition of the registry are using it.
    """
    try:
        home.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"CHURN_HOME {home.root} cannot be used ({error.strerror}); set CHURN_HOME to a folder "
            "you may write"
        ) from error
    with contextlib.ExitStack() as held:
        for command in ("up", "run"):
            held.enter_context(home.exclusive(command))
        if service := running_service(home):
            raise UserError(f"the service at {service.url} uses {home.root}; stop it first")
        for lock in sorted((prediction_log or home.prediction_log).glob(f"*{LOCK_SUFFIX}")):
            descriptor = hold(lock)
            if descriptor is None:
                raise UserError(f"a service writes its predictions to {lock.parent}; stop it first")
            os.close(descriptor)
        transition = held.enter_context((home.root / "mlflow.db.lock").open("a"))
        try:
            fcntl.flock(transition, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"a transition of the registry of {home.root} is going on; wait for its end"
            ) from None
        yield
