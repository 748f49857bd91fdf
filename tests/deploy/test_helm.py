"""The product on Kubernetes: values of Dagster's chart, and manifests of ours beside it.

The chart itself is in no package, so it is not rendered here; docs/kubernetes.md has what was seen
of it. Its values are held against a schema of the keys we use (dagster_chart.yaml), and what they
put into a pod is put into one here. A run's Job is made by dagster-k8s itself, where it is
installed.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils

from churn_assets.home import PROJECT_ROOT, Home
from churn_assets.settings import load_settings

HELM = PROJECT_ROOT / "deploy" / "helm"
PLATFORM = HELM / "platform"
NEWEST, OLDEST = "1.37", "1.29"
UID = 1034
# What a pod of a namespace that enforces the Pod Security Standard `restricted` has to say.
POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": UID,
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}

Document = dict[str, Any]

VALUES: Document = yaml.safe_load((HELM / "dagster.yaml").read_text())
SCHEMA: Document = yaml.safe_load((Path(__file__).parent / "dagster_chart.yaml").read_text())
(CODE,) = VALUES["dagster-user-deployments"]["deployments"]
LAUNCHER: Document = VALUES["runLauncher"]["config"]["k8sRunLauncher"]


@pytest.fixture(autouse=True, scope="module")
def schemas_read_once() -> Generator[None]:
    """kubernetes-validate reads megabytes of definitions for each resource."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "schema_contents", functools.cache(utils.schema_contents))
        yield


def documents(folder: Path) -> list[Document]:
    paths = [p for p in sorted(folder.glob("*.yaml")) if p.stem != "kustomization"]
    return [d for p in paths for d in yaml.safe_load_all(p.read_text())]


FIRST_RUN: Document = yaml.safe_load((HELM / "first-run.yaml").read_text())
OURS = {(d["kind"], d["metadata"]["name"]): d for d in [*documents(PLATFORM), FIRST_RUN]}
ENVIRONMENT: dict[str, str] = OURS["ConfigMap", "churn-env"]["data"]


def chart_pod(values: Document) -> Document:
    """What the chart puts into a pod as it stands in the values of one of its parts."""
    probes = {
        name: {k: v for k, v in probe.items() if k != "enabled"}
        for name in ("startupProbe", "readinessProbe", "livenessProbe")
        if (probe := values.get(name))
    }
    for probe in probes.values():
        if "httpGet" not in probe:
            probe.setdefault("exec", {"command": ["dagster", "api", "grpc-health-check"]})
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "pod", "labels": values["labels"]},
        "spec": {
            "securityContext": values["podSecurityContext"],
            "volumes": values["volumes"],
            "containers": [
                {
                    "name": "dagster",
                    "image": "{repository}:{tag}".format(**values["image"]),
                    "imagePullPolicy": values["image"]["pullPolicy"],
                    "securityContext": values["securityContext"],
                    "resources": values["resources"],
                    "volumeMounts": values["volumeMounts"],
                    "envFrom": [{"configMapRef": c} for c in values.get("envConfigMaps", ())]
                    + [{"secretRef": s} for s in values.get("envSecrets", ())],
                    **probes,
                }
            ],
            "initContainers": [
                {
                    # The chart's, with the rights of the pod's own container.
                    "name": "init-user-deployment-churn-code",
                    "image": "{repository}:{tag}".format(**VALUES["busybox"]["image"]),
                    "command": ["sh", "-c", "until nslookup churn-code; do sleep 2; done"],
                    "securityContext": values["securityContext"],
                    "resources": values["initContainerResources"],
                }
            ]
            if "initContainerResources" in values
            else [],
        },
    }


CHART_PODS = {
    "webserver": chart_pod(VALUES["dagsterWebserver"]),
    "daemon": chart_pod(VALUES["dagsterDaemon"]),
    "code": chart_pod(CODE),
}
# Of every container of the platform but those of runs: the pod's specification and labels.
PODS: dict[str, tuple[Document, dict[str, str]]] = {
    name: (pod["spec"], pod["metadata"]["labels"]) for name, pod in CHART_PODS.items()
}
for kind, name in (
    ("Deployment", "mlflow"),
    ("Deployment", "reports"),
    ("Job", "churn-prepare"),
    ("Job", "churn-first-run"),
):
    template = OURS[kind, name]["spec"]["template"]
    PODS[name] = (template["spec"], template["metadata"]["labels"])


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubernetes_would_take_them(version: str) -> None:
    for resource in [*OURS.values(), *CHART_PODS.values()]:
        kubernetes_validate.validate(resource, version, strict=True)
    broken = copy.deepcopy(CHART_PODS["daemon"])
    broken["spec"]["containers"][0]["securityContext"]["runAsNoRoot"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def test_the_chart_has_these_keys() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(VALUES, SCHEMA)
    broken = copy.deepcopy(VALUES)
    broken["dagsterDaemon"]["runMonitorring"] = {}
    with pytest.raises(jsonschema.ValidationError, match="runMonitorring"):
        jsonschema.validate(broken, SCHEMA)


def test_kustomize_applies_every_file() -> None:
    listed = yaml.safe_load((PLATFORM / "kustomization.yaml").read_text())["resources"]
    assert listed == sorted(p.name for p in PLATFORM.glob("*.yaml") if p.stem != "kustomization")


@pytest.mark.parametrize("name", PODS)
def test_a_pod_may_do_nothing_it_need_not(name: str) -> None:
    spec, _ = PODS[name]
    (container,) = spec["containers"]
    assert spec["securityContext"].items() >= POD_SECURITY.items()
    for one in (container, *spec.get("initContainers", ())):
        assert one["securityContext"] == CONTAINER_SECURITY
        assert {"cpu", "memory"} <= one["resources"]["requests"].keys()
        assert "memory" in one["resources"]["limits"]
    assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in spec["volumes"]}


@pytest.mark.parametrize("name", ["webserver", "daemon", "code", "mlflow", "reports"])
def test_what_serves_is_asked_how_it_is(name: str) -> None:
    (container,) = PODS[name][0]["containers"]
    assert {"startupProbe", "livenessProbe"} <= container.keys()
    assert ("readinessProbe" in container) == (name != "daemon")
    for probe in ("startupProbe", "livenessProbe"):
        # A process that imports Dagster takes seconds to answer.
        least = 20 if "exec" in container[probe] else 5
        assert container[probe]["timeoutSeconds"] >= least


def test_the_project_is_one_image_with_the_user_it_has() -> None:
    dockerfile = (PROJECT_ROOT / "deploy" / "compose" / "Dockerfile").read_text()
    assert f"\nUSER {UID}:{UID}\n" in dockerfile
    images = {container["image"] for spec, _ in PODS.values() for container in spec["containers"]}
    assert images == {"churn-assets:0.1.0"}
    kinds = dict(re.findall(r"^ +(CHURN_[A-Z_]+|DAGSTER_[A-Z_]+)=(\S+)", dockerfile, re.MULTILINE))
    assert kinds["CHURN_HOME"] == ENVIRONMENT["CHURN_HOME"]
    assert kinds["CHURN_DAGSTER_STORAGE"] == ENVIRONMENT["CHURN_DAGSTER_STORAGE"]


def secrets_of_the_docs() -> dict[str, set[str]]:
    text = (PROJECT_ROOT / "docs" / "kubernetes.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (`[^|]+`) \|", text, re.MULTILINE)
    return {name: set(re.findall(r"`([^`]+)`", keys)) for name, keys in rows}


def references(node: Any, key: str) -> list[Any]:
    """Every value of `key` in a document."""
    if isinstance(node, dict):
        found = [node[key]] if key in node else []
        return found + [r for value in node.values() for r in references(value, key)]
    return [r for item in node for r in references(item, key)] if isinstance(node, list) else []


def test_what_is_referred_to_is_there_or_told_to_be_made() -> None:
    told, everything = secrets_of_the_docs(), [*OURS.values(), *CHART_PODS.values(), LAUNCHER]
    config_maps = {name: d["data"] for (kind, name), d in OURS.items() if kind == "ConfigMap"}
    follow = yaml.safe_load((HELM / "service" / "follow.yaml").read_text())
    for ref in references([*everything, follow], "configMapKeyRef"):
        assert ref["key"] in config_maps[ref["name"]]
    for ref in references([*everything, follow], "secretKeyRef"):
        assert ref["key"] in told[ref["name"]]
    whole = references(everything, "secretRef") + references(everything, "envSecrets")[0]
    assert {ref["name"] for ref in whole} == {"churn-secrets", "mlflow-server"}
    assert told["dagster-postgresql"] == {"postgresql-password"}
    assert VALUES["global"]["postgresqlSecretName"] == "dagster-postgresql"
    # None of them is in here.
    assert not [kind for kind, _ in OURS if kind == "Secret"]
    for ref in references([*everything, follow], "configMapRef") + LAUNCHER["envConfigMaps"]:
        assert ref["name"] in config_maps
    for ref in references([*everything, follow], "configMap"):
        assert ref["name"] in config_maps
    for ref in references([*everything, follow], "persistentVolumeClaim"):
        assert ("PersistentVolumeClaim", ref["claimName"]) in OURS
    for name in references(everything, "serviceAccountName"):
        assert OURS["ServiceAccount", name]["automountServiceAccountToken"] is False
    assert set(told) == {"churn-secrets", "mlflow-server", "dagster-postgresql"}


def test_the_settings_find_all_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "churn.yaml"
    file.write_text(OURS["ConfigMap", "churn-config"]["data"]["churn.yaml"])
    assert ENVIRONMENT["CHURN_CONFIG"] == "/etc/churn/churn.yaml"
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for name in secrets_of_the_docs()["churn-secrets"]:
        monkeypatch.setenv(name, f"of-{name}")
    settings = load_settings(file)
    assert settings.lake == "s3://churn/lake"
    assert settings.online_store.url == "redis://:of-REDIS_PASSWORD@redis:6379/0"
    assert "postgres:5432/churn" in str(settings.serving.prediction_log.store)
    assert "postgres:5432/churn" in str(settings.feast.registry)
    # The Service of deploy/k8s.
    assert settings.deployment.local.url == settings.serving_health.url == "http://churn"
    home = Home(Path(ENVIRONMENT["CHURN_HOME"]))
    wanted = home.environment()
    # dagster.yaml is a ConfigMap of the chart's, in a folder of its own.
    del wanted["DAGSTER_HOME"]
    assert ENVIRONMENT.items() >= wanted.items()
    spill = next(m for m in CODE["volumeMounts"] if m["name"] == "spill")
    assert spill["mountPath"] == str(home.root / "tmp")
    assert VALUES["dagsterWebserver"]["volumeMounts"][0]["mountPath"] == str(home.dagster)


def test_the_instance_is_that_of_the_project() -> None:
    project = yaml.safe_load((PROJECT_ROOT / "dagster.yaml").read_text())
    daemon = VALUES["dagsterDaemon"]
    queue = daemon["runCoordinator"]["config"]["customRunCoordinator"]["config"]
    expected = project["concurrency"]["runs"] | project["run_queue"]
    assert queue.items() >= expected.items()
    # One more than may run at once would never be healthy: then no run can be evicted.
    budget = OURS["PodDisruptionBudget", "churn-runs"]["spec"]
    assert budget["minAvailable"] == queue["max_concurrent_runs"]
    assert daemon["runRetries"]["maxRetries"] == project["run_retries"]["max_retries"]
    assert VALUES["pythonLogs"]["pythonLogLevel"] == project["python_logs"]["python_log_level"]
    compose = yaml.safe_load((PROJECT_ROOT / "deploy" / "compose" / "dagster.yaml").read_text())
    theirs, ours = compose["storage"]["postgres"]["postgres_db"], VALUES["postgresql"]
    assert (ours["postgresqlScheme"], ours["postgresqlDatabase"], ours["postgresqlUsername"]) == (
        theirs["scheme"],
        theirs["db_name"],
        theirs["username"],
    )
    # What `churn` in a pod finds, which reads the file above.
    assert ENVIRONMENT["CHURN_POSTGRES_HOST"] == ours["postgresqlHost"]
    for what in ("schedule", "sensor"):
        days = VALUES["retention"][what]["purgeAfterDays"]
        assert days == project["retention"][what]["purge_after_days"]
        threads = daemon[f"{what}s"]
        assert {"use_threads": threads["useThreads"], "num_workers": threads["numWorkers"]} == (
            project[f"{what}s"]
        )


def test_dagster_takes_what_the_chart_hands_it() -> None:
    from dagster import QueuedRunCoordinator
    from dagster._config import process_config
    from dagster._core.instance.config import dagster_instance_config_schema
    from dagster._core.storage.compute_log_manager import ComputeLogManager
    from dagster._serdes import ConfigurableClassData

    custom = VALUES["computeLogManager"]["config"]["customComputeLogManager"]
    queue = VALUES["dagsterDaemon"]["runCoordinator"]["config"]["customRunCoordinator"]
    instance = {
        **VALUES["additionalInstanceConfig"], "compute_logs": custom, "run_coordinator": queue,
    }  # fmt: skip
    taken = process_config(dagster_instance_config_schema(), instance)
    assert taken.success, taken.errors
    coordinator = ConfigurableClassData(
        queue["module"], queue["class"], yaml.safe_dump(queue["config"])
    ).rehydrate(as_type=QueuedRunCoordinator)
    read = coordinator.get_run_queue_config()._asdict()
    queued = {k: v for k, v in queue["config"].items() if not k.startswith("dequeue_")}
    assert read.items() >= queued.items()
    kept = ConfigurableClassData(
        custom["module"], custom["class"], yaml.safe_dump(custom["config"])
    )
    assert isinstance(kept.rehydrate(as_type=ComputeLogManager), ComputeLogManager)


def test_the_code_location_has_the_name_everyone_asks_for() -> None:
    from churn_assets.defs.remote import LOCATION

    (server,) = VALUES["dagsterWebserver"]["workspace"]["servers"]
    assert server == {"host": CODE["name"], "port": CODE["port"], "name": LOCATION}
    arguments = CODE["dagsterApiGrpcArgs"]
    assert arguments[arguments.index("--location-name") + 1] == LOCATION


def selects(selector: Document, labels: dict[str, str]) -> bool:
    named = selector.get("matchLabels", {}).items() <= labels.items()
    among = all(labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", ()))
    return named and among


RUN_LABELS: dict[str, str] = LAUNCHER["labels"]
SERVICE_LABELS = {"app.kubernetes.io/name": "churn", "app.kubernetes.io/part-of": "churn"}
POLICIES = [d["spec"] for (kind, _), d in OURS.items() if kind == "NetworkPolicy"]
BY_NAME = {name: labels for name, (_, labels) in PODS.items()} | {
    "run": RUN_LABELS,
    "service": SERVICE_LABELS,
}


def may(of: str, to: str, port: int) -> bool:
    """Whether policies let pods `of` out to those `to`, and let these be asked, at `port`."""

    def opens(rule: Document, peers: str, other: dict[str, str]) -> bool:
        named = peers not in rule or any(
            "podSelector" in peer
            and "namespaceSelector" not in peer
            and selects(peer["podSelector"], other)
            for peer in rule[peers]
        )
        return named and port in [p["port"] for p in rule["ports"]]

    out = any(
        selects(policy["podSelector"], BY_NAME[of])
        and any(opens(rule, "to", BY_NAME[to]) for rule in policy.get("egress", ()))
        for policy in POLICIES
    )
    into = any(
        selects(policy["podSelector"], BY_NAME[to])
        and any(opens(rule, "from", BY_NAME[of]) for rule in policy.get("ingress", ()))
        for policy in POLICIES
    )
    return out and into


def test_who_may_ask_whom() -> None:
    ports = {"webserver": 3000, "code": 4000, "mlflow": 5000, "service": 3000, "reports": 3002}
    pairs = {(of, to) for of in BY_NAME for to, port in ports.items() if may(of, to, port)}
    assert pairs == {
        ("webserver", "code"),
        ("daemon", "code"),
        ("code", "mlflow"),
        ("run", "mlflow"),
        ("code", "service"),
        ("run", "service"),
        # It is a run.
        ("churn-first-run", "mlflow"),
        ("churn-first-run", "service"),
    }
    (closed,) = [p for p in POLICIES if p["podSelector"] == {} and len(p["policyTypes"]) == 2]
    assert not closed.get("ingress")
    assert not closed.get("egress")
    assert VALUES["dagsterWebserver"]["service"]["type"] == "ClusterIP"


def test_a_migration_reaches_its_database_and_nothing_else() -> None:
    # The chart's Job `migrate.enabled`, of a release named dagster.
    labels = {"batch.kubernetes.io/job-name": "dagster-dagster-webserver-instance-migrate"}
    rules = [r for p in POLICIES if selects(p["podSelector"], labels) for r in p.get("egress", ())]
    assert {port["port"] for rule in rules for port in rule["ports"]} == {53, 5432}


def test_the_service_follows_the_home() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl, which has kustomize in it")
    done = subprocess.run(
        ["kubectl", "kustomize", str(HELM / "service")], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    made = {d["kind"]: d for d in yaml.safe_load_all(done.stdout)}
    assert {"Deployment", "Service", "HorizontalPodAutoscaler", "NetworkPolicy"} <= made.keys()
    for resource in made.values():
        kubernetes_validate.validate(resource, NEWEST, strict=True)
    spec = made["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["command"][:2] == ["churn", "serve"]
    assert container["command"][-1] == str(container["ports"][0]["containerPort"])
    assert container["securityContext"] == CONTAINER_SECURITY
    # Of the secrets only what it needs, and the home to read.
    assert {v["name"] for v in container["env"]} == {"CHURN_DB_PASSWORD", "REDIS_PASSWORD"}
    assert [e for e in container["envFrom"] if "secretRef" in e] == []
    home = next(m for m in container["volumeMounts"] if m["name"] == "home")
    assert home["readOnly"] is True
    rendered = subprocess.run(
        ["kubectl", "kustomize", str(PLATFORM)], capture_output=True, text=True
    )
    assert not rendered.returncode, rendered.stderr
    theirs = list(yaml.safe_load_all(rendered.stdout))
    assert len(theirs) == len(OURS) - 1
    assert {d["metadata"].get("namespace", "churn") for d in theirs} == {"churn"}


KUBECONFIG = {
    "apiVersion": "v1",
    "kind": "Config",
    "current-context": "nowhere",
    "contexts": [{"name": "nowhere", "context": {"cluster": "nowhere", "user": "nobody"}}],
    "clusters": [{"name": "nowhere", "cluster": {"server": "http://127.0.0.1:1"}}],
    "users": [{"name": "nobody", "user": {}}],
}


def job_of(tags: dict[str, str], kubeconfig: Path) -> Document:
    """The Job dagster-k8s makes of a run with `tags`, told what the chart tells it."""
    pytest.importorskip(
        "dagster_k8s", reason="dagster-k8s is not installed; it is in the extra `platform`"
    )
    from dagster import DagsterRun
    from dagster._config import process_config
    from dagster_k8s import K8sRunLauncher
    from dagster_k8s.container_context import K8sContainerContext
    from dagster_k8s.job import construct_dagster_k8s_job
    from kubernetes import client

    kubeconfig.write_text(yaml.safe_dump(KUBECONFIG))
    raw = LAUNCHER["runK8sConfig"]
    told = {
        # The chart's own.
        "service_account_name": "dagster",
        "instance_config_map": "dagster-instance",
        "postgres_password_secret": VALUES["global"]["postgresqlSecretName"],
        "dagster_home": "/opt/dagster/dagster_home",
        "job_namespace": "churn",
        "load_incluster_config": False,
        "kubeconfig_file": str(kubeconfig),
        # Ours.
        "fail_pod_on_run_failure": LAUNCHER["failPodOnRunFailure"],
        "image_pull_policy": LAUNCHER["imagePullPolicy"],
        "env_config_maps": [c["name"] for c in LAUNCHER["envConfigMaps"]],
        "env_secrets": [s["name"] for s in LAUNCHER["envSecrets"]],
        "labels": LAUNCHER["labels"],
        "volumes": LAUNCHER["volumes"],
        "volume_mounts": LAUNCHER["volumeMounts"],
        "security_context": LAUNCHER["securityContext"],
        "resources": LAUNCHER["resources"],
        "run_k8s_config": {
            "pod_spec_config": raw["podSpecConfig"],
            "pod_template_spec_metadata": raw["podTemplateSpecMetadata"],
            "job_spec_config": raw["jobSpecConfig"],
        },
    }
    taken = process_config(K8sRunLauncher.config_type(), told)
    assert taken.success, taken.errors
    launcher = K8sRunLauncher.from_config_value(None, taken.value)
    context = K8sContainerContext.create_for_run(
        DagsterRun(job_name="training", tags=tags), launcher, include_run_tags=True
    )
    job = construct_dagster_k8s_job(
        job_config=context.get_k8s_job_config("churn-assets:0.1.0", launcher),
        args=["dagster", "api", "execute_run"],
        job_name="dagster-run-1",
        user_defined_k8s_config=context.run_k8s_config,
    )
    return client.ApiClient().sanitize_for_serialization(job)


def test_a_run_is_a_pod_of_what_the_settings_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from churn_assets.defs.execution import K8S_CONFIG, pod_tags

    for name in secrets_of_the_docs()["churn-secrets"] | ENVIRONMENT.keys():
        monkeypatch.setenv(name, ENVIRONMENT.get(name, "secret"))
    file = tmp_path / "churn.yaml"
    file.write_text(OURS["ConfigMap", "churn-config"]["data"]["churn.yaml"])
    runs = load_settings(file).runs
    tag = {K8S_CONFIG: json.dumps(pod_tags("training", runs)[K8S_CONFIG])}
    named, other = (job_of(tags, tmp_path / "kubeconfig") for tags in (tag, {}))
    for job in (named, other):
        for version in (OLDEST, NEWEST):
            kubernetes_validate.validate(job, version, strict=True)
        spec = job["spec"]["template"]["spec"]
        assert spec["securityContext"].items() >= POD_SECURITY.items()
        assert spec["containers"][0]["securityContext"] == CONTAINER_SECURITY
        assert (spec["serviceAccountName"], spec["automountServiceAccountToken"]) == (
            "churn-run",
            False,
        )
        assert ("ServiceAccount", spec["serviceAccountName"]) in OURS
        labels = job["spec"]["template"]["metadata"]["labels"]
        assert labels.items() >= RUN_LABELS.items()
    of_training, of_others = (
        job["spec"]["template"]["spec"]["containers"][0]["resources"] for job in (named, other)
    )
    assert of_training == {
        "requests": {"cpu": "2", "memory": "4Gi"},
        "limits": {"memory": "8Gi"},
    }
    assert of_others == LAUNCHER["resources"]
