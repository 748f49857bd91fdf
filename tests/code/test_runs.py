from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from churn_assets.errors import UserError
from churn_assets.runs import PodResources, RunSettings
from churn_assets.settings import load_settings

SHOP = "source: {kind: shop}\ncalendar: {start: 2024-01-01}\n"
BIG = PodResources(requests={"cpu": "2", "memory": "3Gi"}, limits={"memory": "6Gi"})
BIG_POD = {"requests": {"cpu": "2", "memory": "3Gi"}, "limits": {"memory": "6Gi"}}


def runs(tmp_path: Path, text: str) -> RunSettings:
    path = tmp_path / "churn.yaml"
    path.write_text(SHOP + text)
    return load_settings(path).runs


def test_a_run_is_one_process_by_default(tmp_path: Path) -> None:
    assert runs(tmp_path, "") == RunSettings("in_process", 2, {})
    pods = "{training: {requests: {cpu: '2', memory: 3Gi}, limits: {memory: 6Gi}}}"
    assert runs(tmp_path, f"runs: {{pods: {pods}}}").pods == {"training": BIG}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("{executor: celery}", "executor"),
        ("{max_concurrent: 0}", "runs.max_concurrent is 0; give 1 or more"),
        ("{pods: {training: {limits: {memory: 6 GB}}}}", "limits.memory is '6 GB'; give a"),
        ("{pods: {training: {requests: {cpu: 2 cores}}}}", "requests.cpu is '2 cores'; give a"),
        ("{pods: {training: {limits: {gpu: '1'}}}}", "limits has gpu; give cpu, memory"),
        ("{pods: {training: {limit: {memory: 6Gi}}}}", "limit"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, said: str, why: str) -> None:
    with pytest.raises(UserError, match=why.replace("(", "\\(")):
        runs(tmp_path, f"runs: {said}")


def test_a_job_carries_what_its_pod_is_to_have() -> None:
    from churn_assets.defs.execution import K8S_CONFIG, pod_tags

    mine = RunSettings(pods={"training": BIG})
    assert pod_tags("training", mine) == {K8S_CONFIG: {"container_config": {"resources": BIG_POD}}}
    assert pod_tags("drift", mine) == {}


def test_every_job_and_asset_can_be_named_and_nothing_else() -> None:
    from churn_assets import definitions
    from churn_assets.defs.execution import check_pods

    names = definitions.STEPS | {job.name for job in definitions.JOBS}
    job = definitions.defs.resolve_job_def("training")
    # A step is called like its asset: that is how the executor finds what a pod gets.
    assert {node.name for node in job.nodes} <= definitions.STEPS
    check_pods(names, RunSettings(pods={"training": BIG, "trained_model": BIG}))
    with pytest.raises(UserError, match=r"runs\.pods has trainde_model, which is neither a job"):
        check_pods(names, RunSettings(pods={"trainde_model": BIG}))


def test_the_executor_is_that_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    import dagster as dg

    from churn_assets.defs.execution import executor_for

    assert executor_for(RunSettings(), {"orders"}) is dg.in_process_executor
    assert executor_for(RunSettings("multiprocess", 3), {"orders"}).name == "multiprocess"
    monkeypatch.setitem(sys.modules, "dagster_k8s", None)
    with pytest.raises(UserError, match=r"needs the extra churn-assets\[platform\]"):
        executor_for(RunSettings("kubernetes"), {"orders"})


def test_a_step_is_a_pod_of_what_the_settings_say() -> None:
    pytest.importorskip(
        "dagster_k8s", reason="dagster-k8s is not installed; it is in the extra `platform`"
    )
    from churn_assets.defs.execution import executor_for

    mine = RunSettings("kubernetes", 3, {"training": BIG, "orders": BIG})
    given: Any = executor_for(mine, {"orders"}).apply_config_mapping({"config": {}})
    assert given.success, given.errors
    assert given.value["config"]["max_concurrent"] == 3
    steps = given.value["config"]["per_step_k8s_config"]
    # A job's own is on the run, not here.
    assert steps.keys() == {"orders"}
    assert steps["orders"]["container_config"] == {"resources": BIG_POD}
