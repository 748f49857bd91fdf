"""What has to be so where the service runs in a container of its image."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from churn_assets.contract.logged import LOG_VARIABLE, OFF, is_postgres
from churn_assets.contract.release import ReleaseError

# The image sets it, as BentoML's own images do.
CONTAINER_VARIABLE = "BENTOML_CONTAINERIZED"


def check_log_outlives_container(
    environment: Mapping[str, str],
    device: Callable[[Path], int] = lambda path: os.stat(path).st_dev,
) -> None:
    """Refuse a prediction log that would go with the container: one in its own file system.

    `device` gives the file system a path is on. Raises ReleaseError.
    """
    location = environment.get(LOG_VARIABLE, "")
    if environment.get(CONTAINER_VARIABLE) != "true" or location in ("", OFF):
        return
    if is_postgres(location):
        return
    # The directory itself may not have been made yet.
    there = next(path for path in (Path(location), *Path(location).parents) if path.exists())
    if device(there) == device(Path("/")):
        raise ReleaseError(
            f"{LOG_VARIABLE}: {location} is part of the container and goes with it; mount a volume "
            f"there, or set it to a postgresql:// URL, or to {OFF} to serve unlogged"
        )
