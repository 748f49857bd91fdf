"""The target `kubernetes`: what is asked of kubectl, in which order, and what its answers lead to.

No cluster is here: a script in kubectl's place notes the calls and plays the answers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from kubectl_player import (
    APPLIED,
    NO_PODS,
    NOTHING_THERE,
    ROLLED_OUT,
    STUCK,
    UNDONE,
    Kubectl,
    there,
)

from churn_assets.errors import UserError
from churn_assets.lifecycle import kubernetes
from churn_assets.lifecycle.deployment import MANIFESTS
from churn_assets.lifecycle.kubernetes import Rollout, roll_out
from churn_assets.lifecycle.targets import KubernetesSettings

OLD, NEW = "churn:v1-a", "churn:v2-b"
SETTINGS = KubernetesSettings(namespace="shop", context="there", timeout_s=300)

WHERE = ["--namespace", "shop", "--context", "there"]


def test_manifests_are_applied_with_the_image_and_waited_for(kubectl: Kubectl) -> None:
    kubectl.plays(there(OLD), APPLIED, ROLLED_OUT)
    assert roll_out(NEW, SETTINGS, MANIFESTS) == Rollout(NEW, OLD)
    assert kubectl.calls == [
        [*WHERE, "get", "deployment", "churn", "--ignore-not-found", "--output", "json"],
        [*WHERE, "apply", "--filename", "-"],
        [*WHERE, "rollout", "status", "deployment/churn", "--timeout=300s"],
    ]
    applied = list(yaml.safe_load_all(kubectl.given("apply")))
    kinds = sorted(resource["kind"] for resource in applied)
    assert kinds == sorted(["Deployment", "Service", "ServiceAccount", *OTHERS])
    (deployment,) = [resource for resource in applied if resource["kind"] == "Deployment"]
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == NEW


OTHERS = ["HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"]


def test_the_first_rollout_has_nothing_before_it(kubectl: Kubectl) -> None:
    kubectl.plays(NOTHING_THERE, APPLIED, ROLLED_OUT)
    assert roll_out(NEW, SETTINGS, MANIFESTS) == Rollout(NEW, None)
    kubectl.plays(NOTHING_THERE, APPLIED, STUCK, NO_PODS)
    with pytest.raises(UserError, match=f"{NEW} was not rolled out: .*; nothing served before"):
        roll_out(NEW, SETTINGS, MANIFESTS)
    assert not [argv for argv in kubectl.calls if "undo" in argv]


def test_what_does_not_come_up_is_undone_to_the_revision_before(kubectl: Kubectl) -> None:
    waiting = {"reason": "ImagePullBackOff", "message": f'Back-off pulling image "{NEW}"'}
    pods = [
        {"status": {"containerStatuses": [{"state": {"waiting": waiting}}]}},
        {"status": {"containerStatuses": [{"state": {"running": {}}}]}},
        {"status": {}},
    ]
    told = {"to": ["pods"], "out": json.dumps({"items": pods})}
    kubectl.plays(there(OLD, "7"), APPLIED, STUCK, told, UNDONE, ROLLED_OUT)
    with pytest.raises(UserError) as failed:
        roll_out(NEW, SETTINGS, MANIFESTS)
    assert str(failed.value) == (
        f'{NEW} was not rolled out: ImagePullBackOff: Back-off pulling image "{NEW}"; '
        f"undone, {OLD} serves"
    )
    assert kubectl.calls[3:] == [
        [*WHERE, "get", "pods", "--selector", SELECTOR, "--output", "json"],
        [*WHERE, "rollout", "undo", "deployment/churn", "--to-revision=7"],
        [*WHERE, "rollout", "status", "deployment/churn", "--timeout=300s"],
    ]


SELECTOR = "app.kubernetes.io/name=churn"


def test_a_rollout_that_cannot_be_undone_is_said(kubectl: Kubectl) -> None:
    gone = {"to": ["undo"], "err": "error: unable to find specified revision 3\n", "code": 1}
    kubectl.plays(there(OLD), APPLIED, STUCK, NO_PODS, gone)
    with pytest.raises(UserError) as failed:
        roll_out(NEW, SETTINGS, MANIFESTS)
    for said in ("exceeded its progress deadline", "could not be undone", "revision 3"):
        assert said in str(failed.value)


def test_what_the_cluster_refuses_changes_nothing(kubectl: Kubectl) -> None:
    refused = 'Error from server (Forbidden): deployments.apps "churn" is forbidden\n'
    kubectl.plays(there(OLD), {"to": ["apply"], "err": refused, "code": 1})
    with pytest.raises(UserError, match=r"`kubectl apply --filename` failed: .*is forbidden"):
        roll_out(NEW, SETTINGS, MANIFESTS)
    assert not [argv for argv in kubectl.calls if "rollout" in argv]


def test_a_kubectl_that_hangs_is_given_up(
    kubectl: Kubectl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "GRACE_S", 0.5)
    hanging = STUCK | {"seconds": 60}
    kubectl.plays(there(OLD), APPLIED, hanging, NO_PODS, UNDONE, ROLLED_OUT)
    settings = KubernetesSettings(timeout_s=1)
    with pytest.raises(UserError, match=r"took more than 2 s.*; undone, churn:v1-a serves"):
        roll_out(NEW, settings, MANIFESTS)


def test_without_kubectl_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no kubectl on the PATH; install it"):
        roll_out(NEW, SETTINGS, MANIFESTS)
