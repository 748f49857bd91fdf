"""The Kubernetes manifests: valid by Kubernetes' own schemas, and one referring to the other.

Gateway API and Envoy Gateway are not part of Kubernetes, and their schemas are not here: of those
manifests only what they refer to is checked.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from churn_assets.contract.holdout import Holdout
from churn_assets.errors import UserError
from churn_assets.home import PROJECT_ROOT
from churn_assets.lifecycle.kubernetes import image_of, read_manifests, render
from churn_assets.lifecycle.targets import KubernetesSettings
from churn_assets.settings import load_settings

K8S = PROJECT_ROOT / "deploy" / "k8s"
FOLDERS = (K8S, K8S / "canary", K8S / "gateway")
NEWEST, OLDEST = "1.37", "1.29"
FOREIGN = ("gateway.networking.k8s.io/", "gateway.envoyproxy.io/")
UID = 1034

Resource = dict[str, Any]


def resources(*folders: Path) -> dict[tuple[str, str], Resource]:
    found = [resource for folder in folders for resource in read_manifests(folder)]
    named = {(r["kind"], r["metadata"]["name"]): r for r in found}
    assert len(named) == len(found)
    return named


ALL = resources(*FOLDERS)
CORE = {key: r for key, r in ALL.items() if not r["apiVersion"].startswith(FOREIGN)}


def pod_of(name: str) -> Resource:
    return ALL["Deployment", name]["spec"]["template"]


def labels_of(name: str) -> dict[str, str]:
    return pod_of(name)["metadata"]["labels"]


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return bool(selector) and selector.items() <= labels.items()


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubernetes_would_take_them(version: str) -> None:
    assert {kind for kind, _ in CORE} == {
        "Deployment",
        "Service",
        "ServiceAccount",
        "HorizontalPodAutoscaler",
        "PodDisruptionBudget",
        "NetworkPolicy",
    }
    for resource in CORE.values():
        kubernetes_validate.validate(resource, version, strict=True)
    broken = copy.deepcopy(CORE["Deployment", "churn"])
    broken["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_kustomize_and_the_asset_apply_the_same_files(folder: Path) -> None:
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    assert listed == sorted(p.name for p in folder.glob("*.yaml") if p.stem != "kustomization")


@pytest.mark.parametrize("name", ["churn", "churn-canary"])
def test_a_pod_may_do_nothing_it_need_not(name: str) -> None:
    spec = pod_of(name)["spec"]
    (container,) = spec["containers"]
    assert spec["automountServiceAccountToken"] is False
    assert not ALL["ServiceAccount", spec["serviceAccountName"]]["automountServiceAccountToken"]
    assert (spec["securityContext"]["runAsNonRoot"], spec["securityContext"]["runAsUser"]) == (
        True,
        UID,
    )
    assert f"USER {UID}:{UID}\n" in (PROJECT_ROOT / "bentos/churn/Dockerfile").read_text()
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert "memory" in container["resources"]["limits"]
    (mounted,) = container["volumeMounts"]
    assert mounted["mountPath"] == "/tmp"
    assert next(v for v in spec["volumes"] if v["name"] == mounted["name"])["emptyDir"]


@pytest.mark.parametrize("name", ["churn", "churn-canary"])
def test_a_pod_is_asked_how_it_is_and_let_finish(name: str) -> None:
    spec = pod_of(name)["spec"]
    (container,) = spec["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert f"EXPOSE {ports['http']}\n" in (PROJECT_ROOT / "bentos/churn/Dockerfile").read_text()
    asked = {kind: container[f"{kind}Probe"]["httpGet"] for kind in PROBES}
    assert {kind: get["path"] for kind, get in asked.items()} == PROBES
    assert {get["port"] for get in asked.values()} <= ports.keys()
    (_, seconds) = container["lifecycle"]["preStop"]["exec"]["command"]
    assert int(seconds) < spec["terminationGracePeriodSeconds"]
    strategy = ALL["Deployment", name]["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxUnavailable": 0, "maxSurge": 1}
    # Kubernetes gives up before we stop asking, so that its reason is the one that is told.
    deadline = ALL["Deployment", name]["spec"]["progressDeadlineSeconds"]
    assert deadline < KubernetesSettings().timeout_s


PROBES = {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"}


def test_no_prediction_is_answered_without_a_store() -> None:
    (container,) = pod_of("churn")["spec"]["containers"]
    named = {v["name"]: v["valueFrom"] for v in container["env"] if "valueFrom" in v}
    assert not named["CHURN_PREDICTION_LOG"]["secretKeyRef"].get("optional")
    assert named["CHURN_ONLINE_STORE"]["secretKeyRef"]["optional"] is True
    # Secrets are made in the cluster, never here.
    assert not [kind for kind, _ in ALL if kind == "Secret"]


def test_selectors_find_their_pods_and_no_others() -> None:
    others = {"churn": "churn-canary", "churn-canary": "churn"}
    for name, other in others.items():
        mine = ALL["Deployment", name]["spec"]["selector"]["matchLabels"]
        service = ALL["Service", name]["spec"]
        spread = pod_of(name)["spec"]["topologySpreadConstraints"][0]["labelSelector"]
        for selector in (mine, service["selector"], spread["matchLabels"]):
            assert selects(selector, labels_of(name))
            assert not selects(selector, labels_of(other))
        (container,) = pod_of(name)["spec"]["containers"]
        assert [p["targetPort"] for p in service["ports"]] == [container["ports"][0]["name"]]
    budget = ALL["PodDisruptionBudget", "churn"]["spec"]["selector"]["matchLabels"]
    assert selects(budget, labels_of("churn"))
    policy = ALL["NetworkPolicy", "churn"]["spec"]
    assert all(selects(policy["podSelector"]["matchLabels"], labels_of(n)) for n in others)
    (container,) = pod_of("churn")["spec"]["containers"]
    assert policy["ingress"][0]["ports"][0]["port"] == container["ports"][0]["containerPort"]


def test_the_autoscaler_has_the_replicas() -> None:
    autoscaler = ALL["HorizontalPodAutoscaler", "churn"]["spec"]
    target = autoscaler["scaleTargetRef"]
    assert ALL[target["kind"], target["name"]]["apiVersion"] == target["apiVersion"]
    assert "replicas" not in ALL["Deployment", "churn"]["spec"]
    budget = ALL["PodDisruptionBudget", "churn"]["spec"]
    assert autoscaler["minReplicas"] > budget["maxUnavailable"]


def test_the_canary_is_the_same_but_for_its_name() -> None:
    canary = yaml.safe_dump(ALL["Deployment", "churn-canary"])
    renamed = yaml.safe_load(canary.replace("churn-canary", "churn"))
    assert renamed["spec"].pop("replicas") == 1
    assert renamed == ALL["Deployment", "churn"]


def test_the_gateway_leads_to_what_is_there() -> None:
    route, gateway = ALL["HTTPRoute", "churn"]["spec"], ALL["Gateway", "churn"]["spec"]
    listeners = {listener["name"]: listener for listener in gateway["listeners"]}
    for parent in route["parentRefs"]:
        assert ("Gateway", parent["name"]) in ALL
        assert listeners[parent["sectionName"]]["hostname"] in route["hostnames"]
    reached = {match["path"]["value"] for rule in route["rules"] for match in rule["matches"]}
    assert reached == {"/predict", "/predict_batch", "/health"}
    for rule in route["rules"]:
        for backend in rule["backendRefs"]:
            service = ALL["Service", backend["name"]]["spec"]
            assert backend["port"] in [port["port"] for port in service["ports"]]
    backends = [backend for rule in route["rules"] for backend in rule["backendRefs"]]
    shares = {b["name"]: b["weight"] for b in backends if "weight" in b}
    assert shares == {"churn": 100, "churn-canary": 0}
    for kind in ("SecurityPolicy", "BackendTrafficPolicy"):
        (target,) = ALL[kind, "churn"]["spec"]["targetRefs"]
        assert ALL[target["kind"], target["name"]]["apiVersion"].startswith(target["group"])


def test_the_image_is_put_into_the_deployment_alone() -> None:
    before = read_manifests(K8S)
    rendered = render(before, "churn", "registry.example/churn:v8@sha256:0123", {})
    changed = [(a, b) for a, b in zip(before, rendered, strict=True) if a != b]
    ((_, deployment),) = changed
    assert image_of(deployment, "churn") == "registry.example/churn:v8@sha256:0123"
    with pytest.raises(UserError, match="no Deployment other with a container other"):
        render(before, "other", "churn:v8", {})


def test_the_pods_hold_out_whom_the_settings_do() -> None:
    before = read_manifests(K8S)
    (plain,), (told,) = (
        [r for r in rendered if r["kind"] == "Deployment"]
        for rendered in (
            before,
            render(before, "churn", "churn:v8", Holdout(0.1, "second").environment()),
        )
    )
    (old,), (new,) = (r["spec"]["template"]["spec"]["containers"] for r in (plain, told))
    by_default = {v["name"]: v["value"] for v in old["env"] if "value" in v}
    assert by_default == load_settings().holdout.environment()
    assert {v["name"]: v["value"] for v in new["env"] if "value" in v} == {
        "CHURN_HOLDOUT_SHARE": "0.1",
        "CHURN_HOLDOUT_SALT": "second",
    }
    assert [v for v in old["env"] if "valueFrom" in v] == [
        v for v in new["env"] if "valueFrom" in v
    ]


def test_a_folder_without_manifests_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no manifests in"):
        read_manifests(tmp_path)
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"bad\.yaml is not YAML"):
        read_manifests(tmp_path)
