"""The settings of where releases are deployed to: this machine, its container engine, a cluster."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Literal

import msgspec

Target = Literal["local", "docker", "kubernetes"]


class LocalSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the service of this home answers, when it is not a process of this machine.

    url: such as http://service:3000, of another container that follows the pointer of this home.
    """

    url: str | None = None

    def __post_init__(self) -> None:
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"deployment.local.url is {self.url!r}; give http://host:port")


class ImageSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the container of a bento is built; its tag is the bento's.

    repository: its name, with the registry where it is pushed to one. base: what it is made from, a
    Debian with Python 3.11. network: of the build, `host` for an engine without a bridge. push: to
    the registry, which a cluster takes it from. build: false where something else has built it.
    """

    repository: str = "churn"
    base: str = "python:3.11-slim"
    network: str | None = None
    push: bool = False
    build: bool = True

    def __post_init__(self) -> None:
        name = self.repository.rpartition("/")[2]
        if not name or ":" in name or "@" in name or self.repository != self.repository.lower():
            raise ValueError(
                f"deployment.image.repository is {self.repository!r}; give a name in lower case "
                "and without a tag, such as host/team/churn"
            )


class DockerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the service runs on this machine's container engine.

    name: of the container. port: where it answers on `host`. network: `host` for an engine without
    a bridge. memory: its limit. volumes: `name:/path`, the prediction log's among them.
    environment: the settings of the service, ${NAME} is that environment variable; the prediction
    log is /data where they do not say otherwise. switch: a command that turns a proxy to the URL
    given it as its last argument; then the new container answers on a port of its own beside the
    old one, and nobody waits while the port changes hands.
    """

    name: str = "churn"
    host: str = "127.0.0.1"
    port: int = 3003
    network: str | None = None
    memory: str = "1g"
    volumes: tuple[str, ...] = ("churn-predictions:/data",)
    environment: dict[str, str] = {}
    switch: tuple[str, ...] = ()
    start_timeout_s: float = 60
    stop_timeout_s: int = 30

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ValueError(f"deployment.docker.port is {self.port}; give one up to 65535")
        for volume in self.volumes:
            if not PurePosixPath(volume.partition(":")[2]).is_absolute():
                raise ValueError(
                    f"deployment.docker.volumes has {volume!r}; give each as name:/path"
                )


class KubernetesSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which cluster the service runs on.

    context: of kubectl's configuration; without it, the current one. deployment: the Deployment
    whose container of the same name gets the image. manifests: the folder of what is applied; by
    default this project's. timeout_s: until a rollout has to be over.
    """

    namespace: str = "churn"
    context: str | None = None
    deployment: str = "churn"
    manifests: str | None = None
    timeout_s: int = 300

    def __post_init__(self) -> None:
        if self.timeout_s < 1:
            raise ValueError(f"deployment.kubernetes.timeout_s is {self.timeout_s}; give seconds")


class DeploymentSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where what is in Production is deployed to, and how. See churn_assets/config/shop.yaml."""

    target: Target = "local"
    local: LocalSettings = LocalSettings()
    image: ImageSettings = ImageSettings()
    docker: DockerSettings = DockerSettings()
    kubernetes: KubernetesSettings = KubernetesSettings()
