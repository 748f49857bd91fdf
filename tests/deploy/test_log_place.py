"""A prediction log in a container must not go with the container."""

from __future__ import annotations

from pathlib import Path

import pytest

from churn_assets.contract.release import ReleaseError
from churn_service.container import check_log_outlives_container

INSIDE = {"BENTOML_CONTAINERIZED": "true"}
VOLUME = Path("/data")


def device(path: Path) -> int:
    return 2 if VOLUME in (path, *path.parents) else 1


@pytest.mark.parametrize("location", ["/home/log", "/", "/database"])
def test_a_log_in_the_containers_own_files_is_refused(location: str) -> None:
    with pytest.raises(ReleaseError, match=f"{location} is part of the container and goes with it"):
        check_log_outlives_container(INSIDE | {"CHURN_PREDICTION_LOG": location}, device)


@pytest.mark.parametrize("location", ["off", "", "postgresql://user@host/db", "/dev/shm/log"])
def test_others_are_not(location: str) -> None:
    def elsewhere(path: Path) -> int:
        return 1 if path == Path("/") else 2

    check_log_outlives_container(INSIDE | {"CHURN_PREDICTION_LOG": location}, elsewhere)
    # Without a container, any directory will do.
    check_log_outlives_container({"CHURN_PREDICTION_LOG": "/home/log"}, device)
