"""The tools that watch what we depend on and what we commit, each seen to work."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from churn_assets.errors import UserError
from churn_assets.lifecycle.sbom import service_pins, with_hashes

ROOT = Path(__file__).resolve().parents[2]
LOCK = (ROOT / "requirements.lock").read_text()


def needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed; run `make env`")


def test_the_bill_of_the_service_lists_its_packages_with_their_hashes(tmp_path: Path) -> None:
    needs("cyclonedx_py")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    (tmp_path / "service.txt").write_text(with_hashes(service_pins(), LOCK))
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", "--of", "JSON", "service.txt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    bill = json.loads(done.stdout)
    version = SchemaVersion.from_version(bill["specVersion"])
    assert JsonStrictValidator(version).validate_str(done.stdout) is None
    listed = {f"{one['name']}=={one['version']}": one for one in bill["components"]}
    assert sorted(listed) == service_pins()
    for component in listed.values():
        assert component["purl"].startswith("pkg:pypi/")
        digests = {h["content"] for r in component["externalReferences"] for h in r["hashes"]}
        assert digests, component["name"]
        assert all(f"sha256:{digest}" in LOCK for digest in digests)


def test_what_is_not_locked_has_no_bill() -> None:
    assert {"bentoml", "onnxruntime"} <= {pin.partition("==")[0] for pin in service_pins()}
    with pytest.raises(UserError, match=r"has no numpy==0\.1"):
        with_hashes(["numpy==0.1"], LOCK)


@pytest.mark.parametrize("planted", [True, False])
def test_a_planted_secret_is_found(tmp_path: Path, planted: bool) -> None:
    needs("detect_secrets")
    # Put together here, or this file would be the one that is found.
    key = "AKIA" + "Z3QW7RT5YU2P4KLM" if planted else "${AWS_ACCESS_KEY_ID}"
    (tmp_path / "deploy.yaml").write_text(f"access: {key}\n")
    # The hook asks git about its baseline.
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    hook = "from detect_secrets.pre_commit_hook import main; import sys; sys.exit(main())"
    baseline = ["--no-verify", "--baseline", str(ROOT / ".secrets.baseline")]
    command = [sys.executable, "-c", hook, *baseline, "deploy.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == (1 if planted else 0), done.stdout + done.stderr
    assert ("AWS Access Key" in done.stdout) == planted


def test_the_workflow_runs_what_make_has() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/security.yml").read_text())
    (job,) = workflow["jobs"].values()
    asked = {step["run"].split()[1] for step in job["steps"] if "run" in step}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert asked == {"audit", "scan-secrets", "sbom"} <= targets
