"""Prometheus' rules and Grafana's dashboard: they parse, hold, and ask for what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from churn_assets.definitions import defs
from churn_assets.home import PROJECT_ROOT
from churn_assets.monitoring.exposition import HELP, VERDICT, exposition
from churn_assets.monitoring.metric import Metric
from churn_assets.monitoring.serving_health import ServingHealthPolicy
from churn_assets.up import REPORTS, SERVICE
from churn_service.fast_lane import PATHS
from churn_service.metrics import Metrics

PROMETHEUS = PROJECT_ROOT / "deploy" / "prometheus"
GRAFANA = PROJECT_ROOT / "deploy" / "grafana"
RUNBOOK = PROJECT_ROOT / "docs" / "runbook.md"
SIX = ("p95_latency_ms", "error_rate", "volume_ratio", "ks/", "prediction_shift", "accuracy")

RULES = [
    rule
    for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
TESTS = sorted(PROMETHEUS.glob("*_test.yml"))
DASHBOARD = json.loads((GRAFANA / "churn.json").read_text())
PANELS = DASHBOARD["panels"]
VERDICT_LABELS = {"name", "verdict"}
WORDS = {"and", "or", "unless", "by", "on", "offset"}


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("there is no promtool; on Debian: apt-get install prometheus")
    return subprocess.run(
        [found, *map(str, arguments)], cwd=PROMETHEUS, capture_output=True, text=True, check=False
    )


def dashboard_queries() -> list[str]:
    targets = [target["expr"] for panel in PANELS for target in panel.get("targets", [])]
    return targets + [note["expr"] for note in DASHBOARD["annotations"]["list"]]


def exported() -> dict[str, set[str]]:
    """The labels of every sample name there is, as Prometheus has them after a scrape."""
    scraped = {"job", "instance"}
    names = {"up": scraped, "ALERTS": {"alertname", "alertstate"}}
    names |= {name: {"job"} for name in RECORDED} | {"churn:predictions:weeks_before": {"job"}}
    for collector in vars(Metrics(PATHS)).values():
        if not isinstance(collector, Counter | Gauge | Histogram):
            continue
        (described,) = collector.describe()
        labels = scraped | set(collector._labelnames)
        if isinstance(collector, Counter):
            names[f"{described.name}_total"] = labels
        elif isinstance(collector, Histogram):
            names[f"{described.name}_bucket"] = labels | {"le"}
            names |= {f"{described.name}_{part}": labels for part in ("sum", "count")}
        else:
            names[described.name] = labels
    return names | {name: scraped | {"name"} for name in HELP} | {VERDICT: scraped | VERDICT_LABELS}


def unknown(query: str, names: dict[str, set[str]]) -> list[str]:
    """What a query asks for that nobody exports: names, and labels of a name."""
    found = []
    for name, matchers in re.findall(r"([A-Za-z_:][\w:]*)\{([^}]*)\}", query):
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', '""', matchers)):
            if label not in names.get(name, {label}):
                found.append(f"{name}{{{label}}}")
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]', " ", query)
    bare = re.sub(r"\b(?:by|on)\s*\([^)]*\)", " ", bare)
    for name, call in re.findall(r"(?<![\w:.])([A-Za-z_:][\w:]*)\s*(\()?", bare):
        if not call and name not in WORDS | names.keys():
            found.append(name)
    return found


def test_the_configuration_is_valid():
    done = promtool("check", "config", "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(RULES)} rules found" in done.stdout


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_the_rules_do_what_their_tests_say(path: Path):
    done = promtool("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_rule_that_changed_fails_its_test(tmp_path: Path):
    for path in PROMETHEUS.glob("*.yml"):
        shutil.copy(path, tmp_path)
    rules = (tmp_path / "rules.yml").read_text()
    (tmp_path / "rules.yml").write_text(rules.replace("> 0.01", "> 0.1"))
    done = promtool("test", "rules", tmp_path / "rules_test.yml")
    assert done.returncode != 0
    assert "ChurnErrorRateHigh" in done.stdout + done.stderr


def test_every_alert_is_seen_to_fire():
    fired = {
        case["alertname"]
        for path in TESTS
        for test in yaml.safe_load(path.read_text())["tests"]
        for case in test.get("alert_rule_test", [])
        if case["exp_alerts"]
    }
    assert fired == set(ALERTS)


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_says_what_to_do(alert: str):
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert {"summary", "description", "runbook_url"} == set(rule["annotations"])
    assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{alert.lower()}"
    assert f"### {alert}" in RUNBOOK.read_text(encoding="utf-8").splitlines()


def test_every_check_is_in_the_runbook():
    """By its name; the gates of a version by that of their asset."""
    told = set(re.findall(r"`([\w.]+)`", RUNBOOK.read_text(encoding="utf-8")))
    for key in defs.resolve_asset_graph().asset_check_keys:
        asset = key.asset_key.path[-1]
        gate = asset == "evaluation_report" and asset in told
        assert gate or {key.name, f"{asset}.{key.name}"} & told, f"{asset}.{key.name}"


def test_the_six_metrics_have_the_limits_of_the_settings():
    policy = ServingHealthPolicy()
    for alert, limit in (
        ("ChurnLatencyHigh", f"> {policy.max_p95_latency_ms / 1000:g}"),
        ("ChurnErrorRateHigh", f"> {policy.max_error_rate:g}"),
        ("ChurnVolumeLow", f"< {policy.min_volume_ratio:g}"),
        ("ChurnVolumeLow", f">= {policy.min_baseline_rows}"),
    ):
        assert re.search(rf"{limit}(\s|$)", ALERTS[alert]["expr"]), alert
    judged = " ".join(ALERTS[name]["expr"] for name in ALERTS if "Low" in name or "Shift" in name)
    assert '"accuracy"' in judged
    assert '"prediction_shift"' in judged
    assert "ks/.+" in ALERTS["ChurnFeatureDrift"]["expr"]


@pytest.mark.parametrize("query", [*(r["expr"] for r in RULES), *dashboard_queries()])
def test_a_query_asks_for_what_is_exported(query: str):
    assert unknown(query, exported()) == []


def test_a_name_or_a_label_that_nobody_exports_is_found():
    names = exported()
    assert unknown('rate(churn_request_total{endpoint="/predict"}[5m])', names) == [
        "churn_request_total"
    ]
    assert unknown('sum by (path) (churn_requests_total{path="/predict"})', names) == [
        "churn_requests_total{path}"
    ]
    assert "churn_metric_alert" in unknown('churn_metric_alert{name="accuracy"} == 1', names)


def test_the_page_of_metrics_has_the_labels_that_the_rules_ask_for():
    at = datetime(2026, 3, 1, tzinfo=UTC)
    page = exposition([Metric("ks/x", "alert", 0.2, 0.15, "0.2 is above 0.15", at, at)])
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert set(families) == set(HELP)
    samples = {
        sample.labels["verdict"]: sample.value
        for sample in families[VERDICT].samples
        if set(sample.labels) == VERDICT_LABELS
    }
    assert samples == {"ok": 0, "alert": 1, "insufficient": 0}


def test_what_make_up_runs_is_scraped():
    jobs = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in jobs}
    assert targets == {
        "churn-service": [f"127.0.0.1:{SERVICE.default_port}"],
        "churn-monitoring": [f"127.0.0.1:{REPORTS.default_port}"],
    }


def test_the_queries_of_the_dashboard_parse(tmp_path: Path):
    given = {"$__rate_interval": "5m", "$job": ".*"}
    queries = dashboard_queries()
    for variable, value in given.items():
        queries = [query.replace(variable, value) for query in queries]
    assert not [query for query in queries if "$" in query]
    rules = [{"record": f"query:{n}", "expr": query} for n, query in enumerate(queries)]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = promtool("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(queries)} rules found" in done.stdout


def test_the_dashboard_shows_each_of_the_six():
    queries = " ".join(dashboard_queries())
    for name in SIX:
        assert re.search(rf'churn_metric\{{name=~?"{re.escape(name)}', queries), name
        assert re.search(rf'churn_metric_limit\{{name=~?"{re.escape(name)}', queries), name


def test_the_dashboard_is_laid_out_without_overlaps():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for one, other in combinations([panel["gridPos"] for panel in PANELS], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in PANELS)


def test_the_provisioned_source_is_the_one_the_dashboard_asks():
    provisioning = GRAFANA / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert set(_uids(DASHBOARD)) == {source["uid"]}
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "churn.yml").read_text())[
        "providers"
    ]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"


def _uids(value: Any) -> list[str]:
    """The data sources that anything in a dashboard names."""
    if isinstance(value, list):
        return [uid for item in value for uid in _uids(item)]
    if not isinstance(value, dict):
        return []
    here = [value["datasource"]["uid"]] if isinstance(value.get("datasource"), dict) else []
    return here + [uid for item in value.values() for uid in _uids(item)]
