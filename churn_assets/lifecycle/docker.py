"""The service on this machine's container engine: one container in the place of another.

A new image is first started on a port of its own, with nothing kept of what it answers, and asked
for a prediction whose answer is known. Only then does it take the place. The old container is
stopped, but kept until the new one serves: what does not start is removed, and the old one started
again.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import secrets
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from churn_assets.contract.release import Release, read_release
from churn_assets.errors import UserError
from churn_assets.lifecycle.bento import Bento
from churn_assets.lifecycle.container import Image, engine, last_line, require_engine, run_tool
from churn_assets.lifecycle.serving import ask_golden, ask_health, free_port
from churn_assets.lifecycle.targets import DockerSettings

LOG_VARIABLE = "CHURN_PREDICTION_LOG"
UNLOGGED = "off"
SWITCH_TIMEOUT_S = 60
POLL_S = 0.1
# A free port may be somebody else's a second later.
TRIES = 3

_OF = "churn.deployment"
_BENTO = "churn.bento"
_URL = "churn.url"
_PORT_INSIDE = 3000


class PortTaken(UserError):
    """Somebody else had the port by the time a container wanted it."""


@dataclass(frozen=True)
class Container:
    """A container of the deployment, running or stopped.

    url: where it answers. configuration: what it was started from; the same is not started again.
    """

    id: str
    name: str
    bento: str
    url: str
    running: bool
    configuration: str


@dataclass(frozen=True)
class Taken:
    """A container in place. previous: the bento served before. seconds_away: that nobody answered.

    changed: False when it was there already.
    """

    container: str
    url: str
    previous: str | None
    seconds_away: float
    changed: bool


def deploy_container(bento: Bento, image: Image, settings: DockerSettings) -> Taken:
    """Serve `bento` from its `image` in the place of what serves now.

    Raises UserError with the reason when it does not start or answers wrong; then what served
    before serves again. Hold a lock while calling it.
    """
    require_engine()
    release = read_release(bento.path / "src" / "release")
    known = containers(settings.name)
    # What an interrupted deployment left running and unproven does not answer as this one.
    live = next((c for c in known if c.running and _served(c.url) == c.bento), None)
    previous = live.bento if live else None
    started_from = _configuration(image, settings)
    if live and (live.bento, live.configuration) == (bento.tag, started_from):
        return Taken(live.name, live.url, previous, 0.0, changed=False)
    _try_out(bento, image, release, settings)
    if settings.switch and live:
        return _beside(bento, image, settings, known, previous)
    return _in_place(bento, image, settings, known, previous)


def containers(name: str) -> list[Container]:
    """The containers of the deployment called `name`, newest first."""
    listed = engine("ps", "--all", "--quiet", "--no-trunc", "--filter", f"label={_OF}={name}")
    ids = listed.stdout.split()
    if listed.returncode or not ids:
        return []
    told = [_inspect(known) for known in ids]
    found = sorted((t for t in told if t), key=lambda t: t["Created"], reverse=True)
    return [
        Container(
            id=t["Id"],
            name=t["Name"].lstrip("/"),
            bento=t["Config"]["Labels"][_BENTO],
            url=t["Config"]["Labels"][_URL],
            running=t["State"]["Running"],
            configuration=t["Config"]["Labels"]["churn.configuration"],
        )
        for t in found
    ]


def _try_out(bento: Bento, image: Image, release: Release, settings: DockerSettings) -> None:
    """Start the image apart and ask it for a golden prediction. Raises UserError."""
    for attempt in range(1, TRIES + 1):
        with contextlib.ExitStack() as at_the_end:
            try:
                name, url = _start(bento, image, settings, free_port(), trial=True)
                at_the_end.callback(_remove, name)
                _wait_until_ready(name, url, settings.start_timeout_s, bento)
            except PortTaken:
                if attempt == TRIES:
                    raise
                continue
            fits, reason = ask_golden(url, release)
            if not fits:
                raise UserError(f"the container of {bento.tag} {reason}")
            return


def _beside(
    bento: Bento,
    image: Image,
    settings: DockerSettings,
    known: list[Container],
    previous: str | None,
) -> Taken:
    """Start on a port of its own, turn the proxy, and only then stop the old one."""
    name, url = _start(bento, image, settings, free_port())
    try:
        _wait_until_ready(name, url, settings.start_timeout_s, bento)
        done = run_tool([*settings.switch, url], timeout=SWITCH_TIMEOUT_S)
        if done.returncode:
            raise UserError(f"{settings.switch[0]} did not turn the proxy: {last_line(done)}")
    except BaseException:
        _remove(name)
        raise
    for old in known:
        _stop(old.name, settings)
        _remove(old.name)
    return Taken(name, url, previous, 0.0, changed=True)


def _in_place(
    bento: Bento,
    image: Image,
    settings: DockerSettings,
    known: list[Container],
    previous: str | None,
) -> Taken:
    """Stop the old one, start on its port, and go back when that fails."""
    away = time.monotonic()
    for old in known:
        if old.running:
            _stop(old.name, settings)
    name = None
    try:
        name, url = _start(bento, image, settings, settings.port)
        _wait_until_ready(name, url, settings.start_timeout_s, bento)
    except BaseException as error:
        if name is not None:
            _remove(name)
        said = _go_back(known, previous, settings)
        if isinstance(error, UserError):
            raise UserError(f"{error}; {said}") from error
        raise
    seconds = time.monotonic() - away
    for old in known:
        _remove(old.name)
    return Taken(name, url, previous, seconds if previous else 0.0, changed=True)


def _go_back(known: list[Container], previous: str | None, settings: DockerSettings) -> str:
    """Start again what served before; a sentence that says what serves now."""
    for old in sorted(known, key=lambda container: container.bento != previous):
        with contextlib.suppress(UserError):
            if not engine("start", old.name).returncode:
                _wait_until_ready(old.name, old.url, settings.start_timeout_s)
                return f"{old.bento} serves again"
            engine("stop", old.name)
    return "nothing serves now" if known else "nothing served before"


def _start(
    bento: Bento, image: Image, settings: DockerSettings, port: int, *, trial: bool = False
) -> tuple[str, str]:
    """Start a container on `port`; its name and URL. A trial keeps nothing and has no volume."""
    name = f"{settings.name}-{'trial-' if trial else ''}{secrets.token_hex(4)}"
    url = f"http://{settings.host}:{port}"
    environment = {LOG_VARIABLE: UNLOGGED} if trial else _environment(settings)
    command = ["run", "--detach", "--name", name, "--read-only", "--tmpfs", "/tmp"]
    command += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    command += ["--memory", settings.memory, "--pids-limit", "256"]
    command += ["--label", f"{_BENTO}={bento.tag}", "--label", f"{_URL}={url}"]
    if settings.network == "host":
        environment = {**environment, "BENTOML_HOST": settings.host, "BENTOML_PORT": str(port)}
        command += ["--network", "host"]
    else:
        command += ["--publish", f"{settings.host}:{port}:{_PORT_INSIDE}"]
        command += ["--network", settings.network] if settings.network else []
    if not trial:
        command += ["--label", f"{_OF}={settings.name}", "--restart", "unless-stopped"]
        command += ["--label", f"churn.configuration={_configuration(image, settings)}"]
        command += [word for volume in settings.volumes for word in ("--volume", volume)]
    # The values go through the environment: a command line is for everyone to read.
    command += [word for variable in environment for word in ("--env", variable)]
    done = engine(*command, image.id, environment=environment)
    if done.returncode:
        _remove(name)
        raise _kind(done.stderr)(
            f"the container of {bento.tag} cannot be started: {last_line(done)}"
        )
    return name, url


def _environment(settings: DockerSettings) -> dict[str, str]:
    return {LOG_VARIABLE: "/data", **settings.environment}


def _configuration(image: Image, settings: DockerSettings) -> str:
    """What a container is started from, as a digest that does not give the settings away."""
    content = msgspec.json.encode((image.id, settings), order="deterministic")
    return hashlib.sha256(content).hexdigest()[:16]


def _wait_until_ready(name: str, url: str, timeout: float, bento: Bento | None = None) -> None:
    """Wait for /readyz, then for `bento` in /health. Raises UserError with what the log says."""
    deadline = time.monotonic() + timeout
    while not _is_ready(url):
        state = (_inspect(name) or {}).get("State", {})
        if not state.get("Running") or state.get("Restarting"):
            said = _last_words(name)
            raise _kind(said)(f"the container {name} stopped: {said}")
        if time.monotonic() > deadline:
            raise UserError(
                f"the container {name} was not ready within {timeout:.0f} s: {_last_words(name)}"
            )
        time.sleep(POLL_S)
    if bento is not None and (served := _served(url)) != bento.tag:
        raise UserError(f"{url} answers as {served}, not as {bento.tag}; who else listens there?")


def _kind(said: str) -> type[UserError]:
    """The error for what an engine or a container said."""
    taken = ("address already in use", "port is already allocated")
    return PortTaken if any(words in said.lower() for words in taken) else UserError


def _is_ready(url: str) -> bool:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _served(url: str) -> str | None:
    """The bento that answers at `url`, None when nothing or something else does."""
    health = ask_health(url)
    return health.get("bento") if health else None


def _inspect(name: str) -> dict[str, Any] | None:
    done = engine("container", "inspect", name)
    return None if done.returncode else msgspec.json.decode(done.stdout)[0]


def _last_words(name: str) -> str:
    done = engine("logs", "--tail", "20", name)
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if "Error:" in line]
    return " | ".join(errors[-1:] or lines[-3:]) or "it left no log"


def _stop(name: str, settings: DockerSettings) -> None:
    """Let it finish what it has begun, for as long as the settings give it."""
    seconds = settings.stop_timeout_s
    engine("stop", "-t", str(seconds), name, timeout=seconds + 30)


def _remove(name: str) -> None:
    with contextlib.suppress(UserError):
        engine("rm", "--force", name)
