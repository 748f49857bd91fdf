from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
from serving_cases import SERVICE, THREE, Model, release_of, train

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.contract.keys import KEYS_VARIABLE
from churn_assets.contract.release import Release
from churn_assets.lifecycle.serving import serve


@pytest.fixture(scope="session")
def model() -> Model:
    return train(FEATURE_NAMES, seed=1)


@pytest.fixture(scope="session")
def model_of_three() -> Model:
    return train(THREE, seed=2)


@pytest.fixture(scope="session")
def release(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return release_of(model, tmp_path_factory.mktemp("releases"))


@pytest.fixture(scope="session")
def release_of_three(model_of_three: Model, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return release_of(model_of_three, tmp_path_factory.mktemp("releases"), version="3-features")


@pytest.fixture
def copy(release: Release, tmp_path: Path) -> Path:
    """A release directory a test may damage."""
    return Path(shutil.copytree(release.directory, tmp_path / "copy"))


@pytest.fixture(scope="session")
def url(release: Release) -> Generator[str]:
    """The service, run from its source; keys are those of another one, in production."""
    with ExitStack() as stack:
        with mock.patch.dict(os.environ, {KEYS_VARIABLE: "none.json"}):
            base_url = stack.enter_context(serve(SERVICE, release.directory))
        yield base_url


@pytest.fixture(scope="session")
def service() -> ModuleType:
    """The service's module, in this process."""
    spec = importlib.util.spec_from_file_location("churn_bento", SERVICE / "service.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        # BentoML's own imports use a name its path matcher has deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        spec.loader.exec_module(module)
    return module
