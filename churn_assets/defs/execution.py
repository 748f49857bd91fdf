"""How a run is executed, by `runs` in the settings; what a cluster is told of it stands in tags."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg

from churn_assets.defs.partitions import SETTINGS
from churn_assets.errors import UserError
from churn_assets.runs import PodResources, RunSettings

if TYPE_CHECKING:
    from dagster._core.definitions.unresolved_asset_job_definition import (
        UnresolvedAssetJobDefinition,
    )

# Where dagster-k8s looks for what a run's or a step's pod is to have.
K8S_CONFIG = "dagster-k8s/config"


def pod_tags(job: str, runs: RunSettings = SETTINGS.runs) -> dict[str, Any]:
    """The tag that says which resources the pod of a run of `job` gets; none where nothing does."""
    pod = runs.pods.get(job)
    return {K8S_CONFIG: _pod(pod)} if pod else {}


def asset_job(name: str, *, tags: Mapping[str, Any], **rest: Any) -> UnresolvedAssetJobDefinition:
    """`dagster.define_asset_job` of a job whose pods have the resources of the settings."""
    return dg.define_asset_job(name, tags={**tags, **pod_tags(name)}, **rest)


def check_pods(names: Collection[str], runs: RunSettings = SETTINGS.runs) -> None:
    """Raise UserError when `runs.pods` has what is not in `names`, those of jobs and assets."""
    unknown = sorted(runs.pods.keys() - set(names))
    if unknown:
        raise UserError(
            f"runs.pods has {', '.join(unknown)}, which is neither a job nor an asset; there are "
            f"{', '.join(sorted(names))}"
        )


def executor_for(runs: RunSettings, steps: Collection[str]) -> dg.ExecutorDefinition:
    """The executor of every job. `steps`: the names of assets, which are those of their steps.

    Raises UserError when it needs a package that is not installed.
    """
    if runs.executor == "in_process":
        return dg.in_process_executor
    if runs.executor == "multiprocess":
        return dg.multiprocess_executor.configured({"max_concurrent": runs.max_concurrent})
    try:
        from dagster_k8s import k8s_job_executor
    except ModuleNotFoundError:
        raise UserError(
            "runs.executor is kubernetes, which needs the extra churn-assets[platform]; install "
            "it, or set runs.executor to in_process"
        ) from None
    of_steps = {name: _pod(pod) for name, pod in runs.pods.items() if name in steps}
    return k8s_job_executor.configured(
        {"max_concurrent": runs.max_concurrent, "per_step_k8s_config": of_steps}
    )


def _pod(pod: PodResources) -> dict[str, Any]:
    return {"container_config": {"resources": pod.container()}}
