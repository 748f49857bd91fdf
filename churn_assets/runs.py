"""The settings of how Dagster executes a run: in a process, in several, or in pods of a cluster."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

Executor = Literal["in_process", "multiprocess", "kubernetes"]

# Kubernetes' quantities, as far as cores and bytes need them.
_CPU = re.compile(r"\d+m|\d+(\.\d{1,3})?")
_BYTES = re.compile(r"\d+([kMGTP]i?)?")
_QUANTITIES = {"cpu": _CPU, "memory": _BYTES, "ephemeral-storage": _BYTES}


class PodResources(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a pod asks a cluster for, and what it may not exceed.

    Quantities are Kubernetes': cpu in cores (`"2"`) or thousandths (`500m`), memory and
    ephemeral-storage in bytes (`4Gi`).
    """

    requests: dict[str, str] = {}
    limits: dict[str, str] = {}

    def __post_init__(self) -> None:
        for kind, quantities in (("requests", self.requests), ("limits", self.limits)):
            for name, quantity in quantities.items():
                form = _QUANTITIES.get(name)
                if form is None:
                    raise ValueError(f"{kind} has {name}; give {', '.join(_QUANTITIES)}")
                if not form.fullmatch(quantity):
                    raise ValueError(
                        f'{kind}.{name} is {quantity!r}; give a quantity such as "2" cores or 4Gi'
                    )

    def container(self) -> dict[str, dict[str, str]]:
        """What a container of a pod calls it; without what is not said."""
        said = {"requests": dict(self.requests), "limits": dict(self.limits)}
        return {kind: quantities for kind, quantities in said.items() if quantities}


class RunSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the steps of a run are executed, and what pods of a cluster they get.

    executor: `in_process`, one after the other in the process of the run; `multiprocess`, each in a
    process of its own; `kubernetes`, each in a pod of its own. max_concurrent: steps of a run at
    once; of the last two. pods: by the name of a job, of the pod of its runs, where runs are pods;
    by that of an asset, of the pod of its step, with the executor `kubernetes`.
    """

    executor: Executor = "in_process"
    max_concurrent: int = 2
    pods: dict[str, PodResources] = {}

    def __post_init__(self) -> None:
        if self.max_concurrent < 1:
            raise ValueError(f"runs.max_concurrent is {self.max_concurrent}; give 1 or more steps")
