"""A worker that dies is started again soon, with the BentoML this is tested with."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import bentoml._internal.utils.circus as bentoml_circus
import pytest

from churn_assets.contract.release import Release


class Supervisor:
    """Stands for circus's, which would take the signals of this process."""

    def __init__(self, _watchers: list, **options: Any):
        self.check_delay = options["check_delay"]


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bentoml_circus, "Arbiter", Supervisor)


def seconds_between_looks() -> float:
    return bentoml_circus.create_standalone_arbiter([]).check_delay


def test_the_supervisor_of_the_service_looks_every_second(
    service: ModuleType, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert seconds_between_looks() == 10
    monkeypatch.setenv("CHURN_RELEASE_DIR", str(release.directory))
    monkeypatch.setenv("CHURN_PREDICTION_LOG", "off")
    monkeypatch.delenv("CHURN_API_KEYS", raising=False)
    service.Churn.inner.verify()
    assert seconds_between_looks() == 1


def test_another_bentoml_keeps_its_own_supervisor(service: ModuleType) -> None:
    for version in ("1.4.38", "1.5.0", "2.0"):
        assert not service.restart_soon(version)
    assert seconds_between_looks() == 10
    assert service.restart_soon("1.4.39rc1")
