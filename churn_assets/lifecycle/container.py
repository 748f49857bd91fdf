"""The container of a bento: its image, built by this machine's engine with the bento's Dockerfile.

The engine is reached by its command, `docker`, as the environment has it configured (DOCKER_HOST).
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from churn_assets.errors import UserError
from churn_assets.lifecycle.bento import DOCKERFILE, Bento
from churn_assets.lifecycle.targets import ImageSettings

ENGINE = "docker"
BUILD_TIMEOUT_S = 1800
PUSH_TIMEOUT_S = 900
ASK_TIMEOUT_S = 60

_INDEX = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST")
_PROXY = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


@dataclass(frozen=True)
class Image:
    """A built image.

    reference: repository:tag. id: the engine's own sha256. digest: `sha256:...` in the registry,
    None until it was pushed.
    """

    reference: str
    id: str
    digest: str | None
    size_bytes: int

    @property
    def pinned(self) -> str:
        """The reference no later push can change, where there is one."""
        return f"{self.reference}@{self.digest}" if self.digest else self.reference


def image_reference(bento: Bento, settings: ImageSettings) -> str:
    """The name of the image of a bento."""
    return f"{settings.repository}:{bento.tag.partition(':')[2]}"


def build_image(bento: Bento, settings: ImageSettings) -> Image:
    """Build the image of a bento, and push it when the settings say so.

    Layers that are there are not built again. Raises UserError when there is no engine, the base
    image cannot be had, or the build or the push fails.
    """
    if not (bento.path / "src" / DOCKERFILE).is_file():
        raise UserError(f"{bento.tag} has no {DOCKERFILE}; materialize churn_bento again")
    require_engine()
    reference = image_reference(bento, settings)
    arguments = package_index(os.environ, _pip_configuration())
    command = ["build", "--file", f"src/{DOCKERFILE}", "--tag", reference]
    command += ["--build-arg", f"BASE_IMAGE={settings.base}", "--label", f"churn.bento={bento.tag}"]
    if settings.network:
        command += ["--network", settings.network]
    # The engine takes the value from the environment: a command line is for everyone to read.
    for name in arguments:
        command += ["--build-arg", name]
    done = engine(
        *command, ".", cwd=str(bento.path), environment=arguments, timeout=BUILD_TIMEOUT_S
    )
    if done.returncode:
        if engine("image", "inspect", settings.base).returncode:
            raise UserError(
                f"the base image {settings.base} is neither on this machine nor can the engine "
                f"pull it; bring it there or set deployment.image.base ({last_line(done)})"
            )
        raise UserError(f"building the image {reference} failed: {last_line(done)}")
    if settings.push:
        done = engine("push", "--quiet", reference, timeout=PUSH_TIMEOUT_S)
        if done.returncode:
            raise UserError(
                f"pushing {reference} failed: {last_line(done)}; log in to its registry"
            )
    return find_image(reference)


def find_image(reference: str) -> Image:
    """The image of that name on this machine. Raises UserError when there is none."""
    done = engine("image", "inspect", reference)
    if done.returncode:
        raise UserError(f"there is no image {reference} on this machine; `make image` builds it")
    (told,) = msgspec.json.decode(done.stdout)
    repository = reference.rpartition(":")[0]
    pushed = [known.split("@") for known in told.get("RepoDigests") or ()]
    return Image(
        reference=reference,
        id=told["Id"],
        digest=next((digest for name, digest in pushed if name == repository), None),
        size_bytes=told["Size"],
    )


def require_engine() -> None:
    """Raise UserError when no container engine answers."""
    done = engine("version", "--format", "{{.Server.Version}}")
    if done.returncode:
        raise UserError(
            f"no container engine answers ({last_line(done)}); start Docker, or set DOCKER_HOST to "
            "one that runs"
        )


def package_index(environment: Mapping[str, str], configured: Mapping[str, str]) -> dict[str, str]:
    """What a build has to be told of this machine's package index and proxies, as build arguments.

    pip's own variables first, then uv's, then `configured`, the options of pip's files. An index
    that is a folder of this machine is left out: a build does not see it.
    """
    uv_index = environment.get("UV_DEFAULT_INDEX") or environment.get("UV_INDEX_URL")
    found = {
        "PIP_INDEX_URL": uv_index or configured.get("index-url"),
        "PIP_EXTRA_INDEX_URL": configured.get("extra-index-url"),
        "PIP_TRUSTED_HOST": configured.get("trusted-host"),
    }
    found |= {name: environment[name] for name in (*_INDEX, *_PROXY) if environment.get(name)}
    told = {}
    for name, value in found.items():
        words = (value or "").split()
        if name.endswith("_INDEX_URL"):
            words = [word for word in words if word.partition(":")[0] in ("http", "https")]
        if words:
            told[name] = " ".join(words)
    return told


def engine(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    cwd: str | None = None,
    timeout: float = ASK_TIMEOUT_S,
) -> subprocess.CompletedProcess[str]:
    """Run one command of the engine. Raises UserError when there is none, or it takes too long."""
    return run_tool([ENGINE, *arguments], environment=environment, cwd=cwd, timeout=timeout)


def run_tool(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    cwd: str | None = None,
    given: str | None = None,
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    """Run a command and keep what it says; `given` is what it reads.

    Raises UserError when it is not installed, or takes longer than `timeout` seconds.
    """
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            errors="replace",
            input=given or "",
            timeout=timeout,
        )
    except FileNotFoundError:
        raise UserError(f"there is no {command[0]} on the PATH; install it") from None
    except subprocess.TimeoutExpired:
        words = " ".join(command[:3])
        raise UserError(f"`{words}` took more than {timeout:.0f} s; try again") from None


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The last thing a command complained of."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {done.returncode}"


def _pip_configuration() -> dict[str, str]:
    """The options of pip's configuration files, by their names."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    done = run_tool(command, timeout=ASK_TIMEOUT_S)
    options = {}
    # Without pip, or with a file it cannot read, there is nothing to tell.
    for line in done.stdout.splitlines() if not done.returncode else ():
        name, equals, value = line.partition("=")
        if equals and name.partition(".")[0] in ("global", "install"):
            options[name.partition(".")[2]] = str(ast.literal_eval(value))
    return options
