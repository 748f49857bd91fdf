from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "churn_assets"
MIDDLE = {"data", "modeling", "lifecycle", "monitoring", "simulator", "drill"}
CONTRACT_MAY_IMPORT = {"msgspec", "numpy", "churn_assets"} | set(sys.stdlib_module_names)


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def modules(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def test_only_defs_and_definitions_import_dagster():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "defs" or path.name == "definitions.py":
            continue
        assert not {m for m in imports(path) if m.split(".")[0].startswith("dagster")}, path


@pytest.mark.parametrize("room", sorted(MIDDLE))
def test_middle_rooms_do_not_know_of_defs(room: str):
    paths = modules(room)
    assert paths
    for path in paths:
        assert not {m for m in imports(path) if m.startswith("churn_assets.defs")}, path
        assert "churn_assets.definitions" not in imports(path), path


def test_the_contract_imports_little():
    paths = modules("contract")
    assert paths
    for path in paths:
        for module in imports(path):
            assert module.split(".")[0] in CONTRACT_MAY_IMPORT, (path, module)
            if module.startswith("churn_assets"):
                assert module.startswith("churn_assets.contract"), (path, module)


def test_the_service_imports_the_contract_alone():
    for path in (ROOT / "bentos").rglob("*.py"):
        for module in imports(path):
            if module.startswith("churn_assets"):
                assert module.startswith("churn_assets.contract"), (path, module)


def test_no_module_needs_itself():
    def name(path: Path) -> str:
        parts = path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    paths = {name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    needs = {module: imports(path) & paths.keys() for module, path in paths.items()}
    done: set[str] = set()
    while ready := {module for module in paths.keys() - done if needs[module] <= done}:
        done |= ready
    assert done == paths.keys(), {m: needs[m] - done for m in paths.keys() - done}
