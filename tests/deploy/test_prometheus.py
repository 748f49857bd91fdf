"""The alert rules: valid, tested by promtool, and told in the runbook."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
RULES = [
    rule
    for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
    for rule in group["rules"]
]


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed; on Debian: apt-get install prometheus")
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("test", "rules", "rules_test.yml"),
        ("test", "rules", "rules_volume_test.yml"),
    ],
)
def test_promtool_accepts_them(promtool: str, arguments: tuple[str, ...]) -> None:
    done = subprocess.run([promtool, *arguments], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_rule_that_changed_fails_its_test(promtool: str, tmp_path: Path) -> None:
    for path in FOLDER.glob("*.yml"):
        shutil.copy(path, tmp_path)
    rules = (tmp_path / "rules.yml").read_text()
    (tmp_path / "rules.yml").write_text(rules.replace("> 0.01", "> 0.1"))
    done = subprocess.run(
        [promtool, "test", "rules", "rules_test.yml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "ChurnErrorRateHigh" in done.stdout + done.stderr


def exported() -> set[str]:
    """The names of the series that the service and the monitoring assets export."""
    from churn_assets.monitoring.exposition import HELP

    source = (ROOT / "bentos" / "churn" / "churn_service" / "metrics.py").read_text()
    of_service = set(re.findall(r'"(churn_\w+)",', source))
    made = {f"{name}{suffix}" for name in of_service for suffix in ("_total", "_bucket")}
    return of_service | made | set(HELP)


def test_rules_ask_only_for_what_is_exported() -> None:
    for rule in RULES:
        asked = set(re.findall(r"\bchurn_\w+", rule["expr"]))
        assert asked <= exported(), rule["alert"]


def test_every_rule_is_in_the_runbook() -> None:
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    for rule in RULES:
        assert rule["alert"] in headings
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("warning", "critical")


def dashboard() -> list[str]:
    """Every expression of the Grafana dashboard."""
    document = json.loads((ROOT / "deploy" / "grafana" / "churn.json").read_text())
    asked = [target["expr"] for panel in document["panels"] for target in panel["targets"]]
    return [*asked, *(one["expr"] for one in document["annotations"]["list"])]


def test_the_dashboard_asks_for_what_is_exported_in_valid_expressions(
    promtool: str, tmp_path: Path
) -> None:
    assert len(dashboard()) >= 12
    for expression in dashboard():
        assert set(re.findall(r"\bchurn_\w+", expression)) <= exported(), expression
    rules = [{"record": f"panel:{place}", "expr": e} for place, e in enumerate(dashboard())]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
