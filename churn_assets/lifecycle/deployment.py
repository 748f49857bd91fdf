"""Deploying the bento in Production to where the settings say: this home, an engine, a cluster.

Every target proves what it serves and leaves what served before in place when that fails.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil

from churn_assets.errors import UserError
from churn_assets.home import PROJECT_ROOT, Home
from churn_assets.lifecycle.bento import Bento, code_of
from churn_assets.lifecycle.container import Image, build_image, find_image, image_reference
from churn_assets.lifecycle.docker import deploy_container
from churn_assets.lifecycle.kubernetes import roll_out
from churn_assets.lifecycle.pointer import read_current
from churn_assets.lifecycle.records import BentoRecord, DeploymentRecord
from churn_assets.lifecycle.serving import ask_health
from churn_assets.lifecycle.targets import DeploymentSettings, ImageSettings

MANIFESTS = PROJECT_ROOT / "deploy" / "k8s"
SWAP_TIMEOUT_S = 90.0
LOCK_TIMEOUT_S = 1800.0
POLL_S = 0.2


class Running(msgspec.Struct, frozen=True):
    """The service of a home that runs now: where it answers, and the process that says so."""

    url: str
    pid: int
    started: float


def deploy(
    record: BentoRecord,
    home: Home,
    settings: DeploymentSettings,
    *,
    environment: Mapping[str, str] | None = None,
    swap_timeout_s: float = SWAP_TIMEOUT_S,
) -> DeploymentRecord:
    """Deploy a proven bento to the target of the settings, one deployment of a home at a time.

    environment: what containers and pods are told beside their own settings; the service of this
    home is told when it starts.
    A bento that is not in Production any more when its turn comes is left alone. Raises UserError
    with the reason when it does not come to serve; then what served before does, or the error says
    that nothing does.
    """
    bento = Bento(record.tag, Path(record.path))
    started = time.monotonic()
    with _alone(home):
        if newer := _superseded_by(record, home):
            return _record(record, settings, f"left alone: {newer} is in Production now", started)
        if settings.target == "local":
            said, previous = _deploy_here(record, home, swap_timeout_s, settings.local.url)
            return _record(record, settings, said, started, previous=previous)
        image = _image(bento, settings.image)
        if settings.target == "docker":
            own = {**(environment or {}), **settings.docker.environment}
            container = msgspec.structs.replace(settings.docker, environment=own)
            taken = deploy_container(bento, image, container)
            said = f"{taken.container} answers at {taken.url}/predict"
            return _record(
                record,
                settings,
                said if taken.changed else f"{said}, as before",
                started,
                image=image,
                previous=taken.previous,
                seconds_away=round(taken.seconds_away, 2),
            )
        cluster = settings.kubernetes
        folder = Path(cluster.manifests) if cluster.manifests else MANIFESTS
        rollout = roll_out(image.pinned, cluster, folder, environment)
        return _record(
            record,
            settings,
            f"rolled out to the Deployment {cluster.deployment} of {cluster.namespace}",
            started,
            image=image,
            previous=rollout.previous,
        )


@contextlib.contextmanager
def announced(home: Home, url: str) -> Generator[None]:
    """While the block runs, the home says that its service answers at `url`."""
    home.running_service.parent.mkdir(parents=True, exist_ok=True)
    process = psutil.Process()
    running = Running(url, process.pid, process.create_time())
    written = home.running_service.with_name(f".{home.running_service.name}-{os.getpid()}")
    written.write_bytes(msgspec.json.encode(running))
    os.replace(written, home.running_service)
    try:
        yield
    finally:
        if running_service(home) == running:
            home.running_service.unlink(missing_ok=True)


def running_service(home: Home) -> Running | None:
    """The service of this home that runs now, if one does: `make up`'s, or `churn serve`'s."""
    try:
        running = msgspec.json.decode(home.running_service.read_bytes(), type=Running)
        process = psutil.Process(running.pid)
        # Another process may have the number by now.
        return running if process.create_time() == running.started else None
    except (OSError, msgspec.DecodeError, psutil.Error):
        return None


def _deploy_here(
    record: BentoRecord, home: Home, timeout: float, url: str | None
) -> tuple[str, str | None]:
    """Wait until the service of this home, which follows the pointer, serves what is named there.

    url: where it answers, when it is not a process of this machine. Returns a sentence, and the
    release that was served before. Raises UserError with the reason when it is refused.
    """
    running = running_service(home)
    if url is None and running is None:
        return "no service of this home is running; `make up` starts one with it", None
    asked = url or (running.url if running else "")
    deadline = time.monotonic() + timeout
    previous, health = None, ask_health(asked)
    while not _serves(health, record):
        if health is not None:
            previous = previous or health.get("release_id")
            refused = health.get("release_refused") or {}
            if refused.get("release_id") == record.release_id:
                raise UserError(
                    f"the service at {asked} refuses {record.release_id}: "
                    f"{refused.get('reason')}; it goes on serving {previous}"
                )
        if url is None and running_service(home) != running:
            return "the service of this home stopped; it starts with this release", previous
        if newer := _superseded_by(record, home):
            return f"left alone: {newer} is in Production now", previous
        if time.monotonic() > deadline:
            served = "does not answer"
            if health is not None:
                served = f"still serves {health.get('release_id')} as {health.get('bento')}"
            raise UserError(
                f"after {timeout:.0f} s the service at {asked} {served}, not "
                f"{record.release_id} as {record.tag}; its log says why"
            )
        time.sleep(POLL_S)
        health = ask_health(asked)
    return f"{asked} answers from it", previous


def _serves(health: dict[str, Any] | None, record: BentoRecord) -> bool:
    """Whether a service answers from the release of `record`, with the code of its bento."""
    if health is None or health.get("release_id") != record.release_id:
        return False
    return code_of(health.get("bento") or "") == code_of(record.tag)


def _image(bento: Bento, settings: ImageSettings) -> Image:
    """The image of a bento: built here, or what was built elsewhere by that name."""
    if settings.build:
        return build_image(bento, settings)
    reference = image_reference(bento, settings)
    try:
        return find_image(reference)
    except UserError:
        # A cluster takes it from a registry; this machine need not have it, nor an engine.
        return Image(reference, id="", digest=None, size_bytes=0)


def _superseded_by(record: BentoRecord, home: Home) -> str | None:
    """The release the pointer names, when it is another than that of the record."""
    current = read_current(home.current)
    if current is None or current.release_id == record.release_id:
        return None
    return current.release_id


@contextlib.contextmanager
def _alone(home: Home, timeout: float = LOCK_TIMEOUT_S) -> Generator[None]:
    """One deployment of a home at a time; the lock goes with the process."""
    lock = home.current.with_name("deployment.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout
    with lock.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another deployment has held {lock} for {timeout:.0f} s; see what it does"
                    ) from None
                time.sleep(POLL_S)
        yield


def _record(
    record: BentoRecord,
    settings: DeploymentSettings,
    said: str,
    started: float,
    *,
    image: Image | None = None,
    previous: str | None = None,
    seconds_away: float | None = None,
) -> DeploymentRecord:
    return DeploymentRecord(
        target=settings.target,
        bento=record.tag,
        release_id=record.release_id,
        model_version=record.model_version,
        said=said,
        image=image.reference if image else None,
        digest=(image.digest or image.id or None) if image else None,
        previous=previous,
        seconds=round(time.monotonic() - started, 2),
        seconds_away=seconds_away,
    )
