"""A container engine to build and run with, or a skip that says what is missing."""

from __future__ import annotations

import re
import secrets
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from engine_cases import BASE, TOLD_TO_THE_BUILD, docker
from kubectl_player import PLAYER, Kubectl
from serving_cases import Model, release_of, train

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.home import PROJECT_ROOT
from churn_assets.lifecycle.bento import Bento, build_bento
from churn_assets.lifecycle.container import Image, build_image
from churn_assets.lifecycle.targets import ImageSettings


@pytest.fixture(scope="session")
def network() -> str | None:
    """`host` for an engine without a bridge."""
    missing = "there is no container engine: `docker info` does not answer"
    try:
        if subprocess.run(["docker", "info"], capture_output=True).returncode:
            pytest.skip(missing)
    except FileNotFoundError:
        pytest.skip(missing)
    if subprocess.run(["docker", "image", "inspect", BASE], capture_output=True).returncode:
        pytest.skip(f"the engine has no base image: `docker pull {BASE}`")
    bridges = docker("network", "ls", "--quiet", "--filter", "driver=bridge")
    return None if bridges.strip() else "host"


@pytest.fixture(scope="session")
def image_settings(network: str | None) -> ImageSettings:
    return ImageSettings(repository="churn-test", base=BASE, network=network)


@pytest.fixture(scope="session")
def model() -> Model:
    return train(FEATURE_NAMES, seed=1)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "bentoml"


@pytest.fixture(scope="session")
def bento(model: Model, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Bento:
    release = release_of(model, tmp_path_factory.mktemp("releases"))
    return build_bento(release.directory, store, project_root=PROJECT_ROOT)


@pytest.fixture(scope="session")
def image(bento: Bento, image_settings: ImageSettings) -> Generator[Image]:
    """The image of a small release, built as `make image` builds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_TRUSTED_HOST", TOLD_TO_THE_BUILD)
        image = build_image(bento, image_settings)
    yield image
    docker("rmi", "--force", image.reference, check=False)


@pytest.fixture
def name() -> Generator[str]:
    """The name of a container, or the beginning of several; none is left."""
    name = f"churn-test-{secrets.token_hex(4)}"
    yield name
    for left in re.findall(r"\S+", docker("ps", "-aq", "--filter", f"name={name}")):
        docker("rm", "--force", left)
    docker("volume", "rm", "--force", name, check=False)


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubectl:
    player = tmp_path / "kubectl"
    player.write_text(PLAYER.format(python=sys.executable))
    player.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return Kubectl(tmp_path)
