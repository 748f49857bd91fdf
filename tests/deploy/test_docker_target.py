"""The target `docker`, on a real engine: one container in the place of another, and back."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Generator
from pathlib import Path

import msgspec
import pytest
from engine_cases import TOLD_TO_THE_BUILD, docker, quiet_port
from serving_cases import VALID, Model, release_of

from churn_assets.contract.release import read_release
from churn_assets.errors import UserError
from churn_assets.home import PROJECT_ROOT, Home
from churn_assets.lifecycle.bento import Bento, build_bento
from churn_assets.lifecycle.container import Image, build_image
from churn_assets.lifecycle.deployment import deploy
from churn_assets.lifecycle.docker import containers, deploy_container
from churn_assets.lifecycle.pointer import Current, point_at
from churn_assets.lifecycle.records import BentoRecord
from churn_assets.lifecycle.serving import ask, ask_health
from churn_assets.lifecycle.targets import DeploymentSettings, DockerSettings, ImageSettings

pytestmark = pytest.mark.image

REFUSED = {"CHURN_ONLINE_STORE": "/data/online.db", "CHURN_MAX_AGE_HOURS": "x"}


@pytest.fixture(scope="module")
def next_bento(model: Model, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Bento:
    release = release_of(model, tmp_path_factory.mktemp("releases"), version="8")
    return build_bento(release.directory, store, project_root=PROJECT_ROOT)


@pytest.fixture(scope="module")
def next_image(next_bento: Bento, image: Image, image_settings: ImageSettings) -> Generator[Image]:
    """Another release: after the first image, its packages are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_TRUSTED_HOST", TOLD_TO_THE_BUILD)
        built = build_image(next_bento, image_settings)
    yield built
    docker("rmi", "--force", built.reference, check=False)


@pytest.fixture
def settings(name: str, network: str | None) -> DockerSettings:
    volumes = (f"{name}:/data",)
    return DockerSettings(name=name, port=quiet_port(), network=network, volumes=volumes)


def served_at(url: str) -> str | None:
    health = ask_health(url)
    return health["bento"] if health else None


def test_one_release_takes_the_place_of_another(
    bento: Bento, image: Image, next_bento: Bento, next_image: Image, settings: DockerSettings
) -> None:
    first = deploy_container(bento, image, settings)
    url = f"http://127.0.0.1:{settings.port}"
    assert (first.previous, first.changed, first.url) == (None, True, url)
    assert served_at(url) == bento.tag
    assert docker("exec", first.container, "sh", "-c", "touch /data/mine && echo ok") == "ok\n"

    again = deploy_container(bento, image, settings)
    assert (again.container, again.changed) == (first.container, False)

    second = deploy_container(next_bento, next_image, settings)
    print(f"nobody answered for {second.seconds_away:.1f} s")
    assert (second.previous, second.changed) == (bento.tag, True)
    assert served_at(url) == next_bento.tag
    assert [c.name for c in containers(settings.name)] == [second.container]
    assert docker("exec", second.container, "ls", "/data") != ""
    assert docker("ps", "--all", "--quiet", "--filter", "name=trial") == ""
    assert 0 < second.seconds_away < 30


def test_the_target_builds_starts_and_tells(
    bento: Bento,
    image: Image,
    image_settings: ImageSettings,
    settings: DockerSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PIP_TRUSTED_HOST", TOLD_TO_THE_BUILD)
    home, release = Home(tmp_path), read_release(bento.path / "src" / "release").manifest
    point_at(home.current, Current(bento.tag, release.release_id, "7", 1, release.created_at))
    record = BentoRecord(bento.tag, str(bento.path), "7", release.release_id, {}, {}, 1.0)
    wanted = DeploymentSettings(target="docker", image=image_settings, docker=settings)
    done = deploy(record, home, wanted)
    assert (done.target, done.bento, done.previous) == ("docker", bento.tag, None)
    # The same image, layer for layer.
    assert (done.image, done.digest) == (image.reference, image.id)
    assert done.said.endswith(f"answers at http://127.0.0.1:{settings.port}/predict")
    assert deploy(record, home, wanted).said == f"{done.said}, as before"


def test_what_does_not_start_is_undone(
    bento: Bento, image: Image, next_bento: Bento, next_image: Image, settings: DockerSettings
) -> None:
    deploy_container(bento, image, settings)
    (before,) = containers(settings.name)
    # Another's image proves nothing of this bento: it is seen apart, and nothing is touched.
    with pytest.raises(UserError, match=f"answers as {bento.tag}, not as {next_bento.tag}"):
        deploy_container(next_bento, image, settings)
    assert containers(settings.name) == [before]
    # A setting the service refuses is only seen in place.
    bad = msgspec.structs.replace(settings, environment=REFUSED)
    with pytest.raises(UserError, match=rf"stopped: .*; {bento.tag} serves again"):
        deploy_container(next_bento, next_image, bad)
    assert containers(settings.name) == [before]
    assert served_at(before.url) == bento.tag
    assert ask(before.url, VALID).status == 200


def test_an_interrupted_deployment_is_made_good_by_the_next(
    bento: Bento, image: Image, next_bento: Bento, next_image: Image, settings: DockerSettings
) -> None:
    deploy_container(bento, image, settings)
    (before,) = containers(settings.name)
    docker("stop", before.name)
    done = deploy_container(next_bento, next_image, settings)
    assert done.previous is None
    assert served_at(done.url) == next_bento.tag
    assert [c.name for c in containers(settings.name)] == [done.container]


def test_behind_a_proxy_nobody_waits(
    bento: Bento,
    image: Image,
    next_bento: Bento,
    next_image: Image,
    settings: DockerSettings,
    tmp_path: Path,
) -> None:
    # What stands for the proxy: a file with the URL that clients go to.
    turned_to, command = tmp_path / "url", tmp_path / "turn"
    replace = f"printf %s $1 > {turned_to}.new && mv {turned_to}.new {turned_to}"
    command.write_text(f"#!/bin/sh\n{replace}\n")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    settings = msgspec.structs.replace(settings, switch=(str(command),))
    first = deploy_container(bento, image, settings)
    turned_to.write_text(first.url)
    failed, versions, stop = [], [], threading.Event()

    def client() -> None:
        while not stop.is_set():
            try:
                answer = ask(turned_to.read_text(), VALID)
                versions.append(answer.json()["model_version"])
            except UserError as error:
                failed.append(str(error))
            time.sleep(0.01)

    thread = threading.Thread(target=client)
    thread.start()
    try:
        second = deploy_container(next_bento, next_image, settings)
    finally:
        stop.set()
        thread.join()
    assert turned_to.read_text() == second.url != first.url
    assert (failed, second.seconds_away, second.previous) == ([], 0, bento.tag)
    assert list(dict.fromkeys(versions)) == ["7", "8"]
    assert [c.name for c in containers(settings.name)] == [second.container]

    broken = msgspec.structs.replace(settings, switch=("false",))
    with pytest.raises(UserError, match="false did not turn the proxy"):
        deploy_container(bento, image, broken)
    assert [c.name for c in containers(settings.name)] == [second.container]
    assert served_at(second.url) == next_bento.tag
