"""The tools that watch what we depend on and what we commit, each seen to work."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from churn_assets.contract.bill import bill_of, installed_pins
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


@pytest.mark.parametrize("pins", [service_pins(), ["a-b==1.0+cpu"], []])
def test_the_bill_of_an_image_is_what_cyclonedx_says_it_has_to_be(pins: list[str]) -> None:
    needs("cyclonedx")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    bill = bill_of("churn", pins)
    version = SchemaVersion.from_version(json.loads(bill)["specVersion"])
    assert JsonStrictValidator(version).validate_str(bill) is None
    assert bill_of("churn", pins[::-1]) == bill
    listed = json.loads(bill)["components"]
    assert [f"{one['name']}=={one['version']}" for one in listed] == pins
    # What a scanner reads is one package and one version, whatever characters it has.
    assert all(one["purl"].count("@") == 1 and "+" not in one["purl"] for one in listed)


def test_an_image_is_built_with_the_bill_of_what_pip_installed_in_it() -> None:
    dockerfile = (ROOT / "bentos/churn/Dockerfile").read_text()
    command = re.search(r"(/app/.venv/bin/python) (-B -m \S+ churn) \\\s+> (\S+) ", dockerfile)
    assert command is not None
    assert f"\nLABEL churn.sbom={command[3]}\n" in dockerfile
    arguments = [sys.executable, *command[2].split()]
    said = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == bill_of("churn", installed_pins())
    # All the service needs is here, by the names the lock has for it.
    listed = {f"{one['name']}=={one['version']}" for one in json.loads(said)["components"]}
    assert set(service_pins()) <= listed


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


@pytest.mark.parametrize(
    "where", ["nowhere", "removed", "merged", "on a branch", "a known example"]
)
def test_a_secret_that_was_removed_is_found_in_the_history(tmp_path: Path, where: str) -> None:
    needs("detect_secrets")

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=ada", "-c", "user.email=ada@example.com")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def commit(text: str) -> None:
        (tmp_path / "deploy.yaml").write_text(text)
        git("add", "deploy.yaml")
        git("commit", "--quiet", "--message", "x")

    key = "AKIA" + "Z3QW7RT5YU2P4KLM"
    git("init", "--quiet", "--initial-branch=main")
    baseline = json.loads((ROOT / ".secrets.baseline").read_text())
    if where == "a known example":
        digest = hashlib.sha1(key.encode(), usedforsecurity=False).hexdigest()
        baseline["results"] = {"docs/a.md": [{"type": "x", "hashed_secret": digest}]}
    (tmp_path / ".secrets.baseline").write_text(json.dumps(baseline))
    commit("access: ${KEY}\n")
    if where in ("removed", "a known example"):
        # Begun as a diff begins the name of a file, which it is not.
        commit(f"access: ${{KEY}}\n++ access: {key}\n")
    elif where == "on a branch":
        git("checkout", "--quiet", "-b", "other")
        commit(f"access: {key}\n")
        git("checkout", "--quiet", "main")
    elif where == "merged":
        git("checkout", "--quiet", "-b", "other")
        (tmp_path / "b.txt").write_text("b\n")
        git("add", "b.txt")
        git("commit", "--quiet", "--message", "b")
        git("checkout", "--quiet", "main")
        git("merge", "--no-ff", "--no-commit", "other")
        # In neither parent: put in by hand while merging.
        commit(f"access: {key}\n")
    commit("access: ${NEW_KEY}\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci/secrets_in_history.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    found = where in ("removed", "merged", "on a branch")
    assert done.returncode == (1 if found else 0), done.stdout + done.stderr
    assert ("AWS Access Key in the history: commit " in done.stdout) == found
    assert ("deploy.yaml" in done.stdout) == found
    assert key not in done.stdout


def test_the_workflow_runs_what_make_has() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/security.yml").read_text())
    (job,) = workflow["jobs"].values()
    asked = {step["run"].split()[1] for step in job["steps"] if "run" in step}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert asked == {"audit", "scan-secrets", "sbom"} <= targets
