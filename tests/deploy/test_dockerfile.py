"""What can be said of the container without an engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from churn_assets.errors import UserError
from churn_assets.home import PROJECT_ROOT
from churn_assets.lifecycle.bento import Bento
from churn_assets.lifecycle.container import build_image, image_reference, package_index
from churn_assets.lifecycle.targets import ImageSettings

DOCKERFILE = PROJECT_ROOT / "bentos" / "churn" / "Dockerfile"


def test_the_dockerfile_passes_hadolint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    command = [str(hadolint), "--no-color", "--failure-threshold", "style", str(DOCKERFILE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_build_is_told_the_index_of_this_machine() -> None:
    index, other = "https://user:secret@index.example/simple", "http://other.example/simple"
    assert package_index({}, {}) == {}
    assert package_index({"PIP_INDEX_URL": index}, {"index-url": other}) == {"PIP_INDEX_URL": index}
    assert package_index({"UV_DEFAULT_INDEX": index}, {}) == {"PIP_INDEX_URL": index}
    configured = {"index-url": index, "trusted-host": "index.example", "timeout": "5"}
    assert package_index({"HTTPS_PROXY": "http://proxy.example"}, configured) == {
        "PIP_INDEX_URL": index,
        "PIP_TRUSTED_HOST": "index.example",
        "HTTPS_PROXY": "http://proxy.example",
    }


def test_folders_of_this_machine_are_no_index_of_a_build() -> None:
    configured = {"index-url": "file:///wheels", "extra-index-url": "/wheels https://a.example"}
    assert package_index({}, configured) == {"PIP_EXTRA_INDEX_URL": "https://a.example"}


def test_an_image_is_called_as_its_bento() -> None:
    bento = Bento("churn:v7-0123-4567", Path("anywhere"))
    assert image_reference(bento, ImageSettings()) == "churn:v7-0123-4567"
    named = ImageSettings(repository="registry.example:5000/team/churn")
    assert image_reference(bento, named) == "registry.example:5000/team/churn:v7-0123-4567"
    for repository in ("churn:latest", "Team/churn", "team/", ""):
        with pytest.raises(ValueError, match=r"image\.repository"):
            ImageSettings(repository=repository)


def test_what_an_image_needs_and_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bento = Bento("churn:v7", tmp_path)
    with pytest.raises(UserError, match="churn:v7 has no Dockerfile; materialize churn_bento"):
        build_image(bento, ImageSettings())
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "Dockerfile").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no docker on the PATH; install it"):
        build_image(bento, ImageSettings())
