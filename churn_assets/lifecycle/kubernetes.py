"""The service on a Kubernetes cluster, through `kubectl`: apply, wait for the rollout, or undo it.

The cluster replaces its pods one by one and keeps those that serve until new ones are ready. A
rollout that does not get there is undone to the revision before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml

from churn_assets.errors import UserError
from churn_assets.lifecycle.container import last_line, run_tool
from churn_assets.lifecycle.targets import KubernetesSettings

KUBECTL = "kubectl"
CALL_TIMEOUT_S = 60
# kubectl gives up by itself; this is for one that hangs.
GRACE_S = 30

_REVISION = "deployment.kubernetes.io/revision"


@dataclass(frozen=True)
class Rollout:
    """A rollout that is over. previous: the image before, None when there was none."""

    image: str
    previous: str | None


def roll_out(
    image: str,
    settings: KubernetesSettings,
    manifests: Path,
    environment: Mapping[str, str] | None = None,
) -> Rollout:
    """Apply the manifests with `image` and wait until every pod runs it and is ready.

    Raises UserError with the reason when it does not come to that; then the revision before is
    back, or the error says that it is not.
    """
    name = settings.deployment
    resources = render(read_manifests(manifests), name, image, environment or {})
    before = _deployment(settings)
    previous = image_of(before, name) if before else None
    applied = "\n---\n".join(yaml.safe_dump(resource) for resource in resources)
    _kubectl(settings, "apply", "--filename", "-", given=applied)
    try:
        _wait(settings)
    except UserError as error:
        reason = _why_pods_wait(settings) or str(error)
        said = f"{image} was not rolled out: {reason}"
        if before is None:
            raise UserError(f"{said}; nothing served before") from error
        raise UserError(f"{said}; {_undo(settings, before, previous)}") from error
    return Rollout(image, previous)


def read_manifests(folder: Path) -> list[dict[str, Any]]:
    """The resources of the YAML files in `folder`, those of kustomize left out.

    Raises UserError when there are none or a file is not YAML.
    """
    resources = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        resources += [d for d in documents if d and "kustomize" not in d.get("apiVersion", "")]
    if not resources:
        raise UserError(f"there are no manifests in {folder}; set deployment.kubernetes.manifests")
    return resources


def render(
    resources: list[dict[str, Any]],
    name: str,
    image: str,
    environment: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The resources with `image` in the container `name` of the Deployment `name`.

    Variables of `environment` take the place of the container's own.

    Raises UserError when they have no such container.
    """
    rendered: list[dict[str, Any]] = msgspec.json.decode(msgspec.json.encode(resources))
    found = [
        container
        for resource in rendered
        if resource["kind"] == "Deployment" and resource["metadata"]["name"] == name
        for container in resource["spec"]["template"]["spec"]["containers"]
        if container["name"] == name
    ]
    if len(found) != 1:
        raise UserError(
            f"the manifests have no Deployment {name} with a container {name}; set "
            "deployment.kubernetes.deployment or mend them"
        )
    found[0]["image"] = image
    kept = [v for v in found[0].get("env", ()) if v["name"] not in environment]
    told = [{"name": variable, "value": value} for variable, value in environment.items()]
    if kept or told:
        found[0]["env"] = kept + told
    return rendered


def image_of(deployment: dict[str, Any], name: str) -> str | None:
    """The image of the container `name` of a Deployment."""
    containers = deployment["spec"]["template"]["spec"]["containers"]
    return next((c["image"] for c in containers if c["name"] == name), None)


def _deployment(settings: KubernetesSettings) -> dict[str, Any] | None:
    told = _kubectl(
        settings,
        *("get", "deployment", settings.deployment),
        *("--ignore-not-found", "--output", "json"),
    )
    return msgspec.json.decode(told) if told.strip() else None


def _wait(settings: KubernetesSettings) -> None:
    seconds = settings.timeout_s
    _kubectl(
        settings,
        *("rollout", "status", f"deployment/{settings.deployment}", f"--timeout={seconds}s"),
        timeout=seconds + GRACE_S,
    )


def _undo(settings: KubernetesSettings, before: dict[str, Any], previous: str | None) -> str:
    """Go back to the revision `before` was; a sentence that says what came of it.

    To that one by its number: where the template did not change, there is nothing to undo, and the
    revision before is an older one.
    """
    revision = before["metadata"].get("annotations", {}).get(_REVISION)
    to = [f"--to-revision={revision}"] if revision else []
    try:
        _kubectl(settings, "rollout", "undo", f"deployment/{settings.deployment}", *to)
        _wait(settings)
    except UserError as error:
        return f"and it could not be undone ({error}); look at it with kubectl"
    return f"undone, {previous} serves"


def _why_pods_wait(settings: KubernetesSettings) -> str | None:
    """What the newest pods say they wait for, if anything."""
    with contextlib.suppress(UserError, msgspec.DecodeError, KeyError):
        selector = f"app.kubernetes.io/name={settings.deployment}"
        told = _kubectl(settings, "get", "pods", "--selector", selector, "--output", "json")
        pods = msgspec.json.decode(told)["items"]
        reasons = {
            f"{waiting['reason']}: {waiting.get('message', 'no message')}"
            for pod in pods
            for status in pod.get("status", {}).get("containerStatuses", ())
            if (waiting := status.get("state", {}).get("waiting")) and "reason" in waiting
        }
        return "; ".join(sorted(reasons)) or None
    return None


def _kubectl(
    settings: KubernetesSettings,
    *arguments: str,
    given: str | None = None,
    timeout: float = CALL_TIMEOUT_S,
) -> str:
    """What kubectl answers. Raises UserError with its complaint."""
    where = ["--namespace", settings.namespace]
    if settings.context:
        where += ["--context", settings.context]
    done = run_tool([KUBECTL, *where, *arguments], given=given, timeout=timeout)
    if done.returncode:
        raise UserError(f"`kubectl {' '.join(arguments[:2])}` failed: {last_line(done)}")
    return done.stdout
