"""Whoever may write MLflow's artifacts does not run code where a model is read."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skops.io
import yaml
from mlflow import MlflowClient
from onnx import load_model_from_string
from registry_cases import NOW
from serving_cases import Model, release_of, train
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import FunctionTransformer

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.contract.release import MANIFEST, MODEL
from churn_assets.errors import UserError
from churn_assets.lifecycle.registry import Version
from churn_assets.lifecycle.release import (
    MODEL_DIGEST_TAG,
    RELEASE_DIGEST_TAG,
    RELEASE_TAG,
    _sha256,
    fetch_release,
)
from churn_assets.lifecycle.tracking import SKLEARN_FILE, load_onnx, load_sklearn

X, Y = np.arange(8.0)[:, None], np.arange(8) % 2


class Harm:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("harmed",))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model as MLflow lays it out, in a folder that is also where harm would show."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    skops.io.dump(LogisticRegression().fit(X, Y), folder / SKLEARN_FILE)
    flavor = {"pickled_model": SKLEARN_FILE, "serialization_format": "skops"}
    (folder / "MLmodel").write_text(yaml.safe_dump({"flavors": {"sklearn": flavor}}))
    return folder


def load(folder: Path, family: str = "logistic_regression") -> Any:
    record: Any = SimpleNamespace(
        sklearn_uri=str(folder), onnx_uri=str(folder), mlflow_run="r", family=family
    )
    return load_sklearn(record, f"sqlite:///{folder.parent}/mlflow.db")


def become_a_pickle(folder: Path) -> None:
    flavor = {"pickled_model": "model.pkl", "serialization_format": "cloudpickle"}
    (folder / "MLmodel").write_text(yaml.safe_dump({"flavors": {"sklearn": flavor}}))
    (folder / "model.pkl").write_bytes(pickle.dumps(Harm()))
    (folder / SKLEARN_FILE).unlink()


def trust_whatever_is_asked(folder: Path) -> None:
    skops.io.dump(FunctionTransformer(os.mkdir), folder / SKLEARN_FILE)
    flavor = {"pickled_model": SKLEARN_FILE, "serialization_format": "skops"}
    flavor["skops_trusted_types"] = ["posix.mkdir"]
    (folder / "MLmodel").write_text(yaml.safe_dump({"flavors": {"sklearn": flavor}}))


def hold_a_tree(folder: Path) -> None:
    skops.io.dump(RandomForestClassifier(2).fit(X, Y), folder / SKLEARN_FILE)


def unpack_without_end(folder: Path) -> None:
    with zipfile.ZipFile(folder / SKLEARN_FILE, "a", zipfile.ZIP_DEFLATED) as members:
        members.writestr("more.npy", b"\0" * (8 << 20))


POISONS: list[tuple[Callable[[Path], object], str]] = [
    (become_a_pickle, "MLflow has no model.skops"),
    (lambda f: (f / SKLEARN_FILE).write_bytes(pickle.dumps(Harm())), "is damaged"),
    (trust_whatever_is_asked, "holds posix.mkdir"),
    (hold_a_tree, "holds sklearn.tree._tree.Tree"),
    (unpack_without_end, "unpacks to"),
    (lambda f: os.truncate(f / SKLEARN_FILE, 300), "is damaged"),
]


@pytest.mark.parametrize(("poison", "says"), POISONS, ids=range(len(POISONS)))
def test_a_poisoned_estimator_is_refused(
    folder: Path, poison: Callable[[Path], object], says: str
) -> None:
    assert load(folder).predict_proba(X).shape == (8, 2)
    poison(folder)
    with pytest.raises(UserError, match=says):
        load(folder)
    assert not Path("harmed").exists()


def test_a_type_is_trusted_for_its_family_alone(folder: Path) -> None:
    hold_a_tree(folder)
    assert load(folder, "random_forest").predict_proba(X).shape == (8, 2)


def test_code_beside_a_model_is_not_imported(folder: Path) -> None:
    (folder / "code").mkdir()
    (folder / "code" / "numpy_too.py").write_text("")
    document = yaml.safe_load((folder / "MLmodel").read_text())
    document["flavors"]["sklearn"]["code"] = "code"
    (folder / "MLmodel").write_text(yaml.safe_dump(document))
    load(folder)
    with pytest.raises(ModuleNotFoundError):
        __import__("numpy_too")


def test_what_is_no_onnx_is_a_sentence(folder: Path) -> None:
    record: Any = SimpleNamespace(onnx_uri=str(folder), mlflow_run="r")
    with pytest.raises(UserError, match=r"MLflow has no model\.onnx"):
        load_onnx(record, f"sqlite:///{folder.parent}/mlflow.db")
    (folder / MODEL).write_bytes(pickle.dumps(Harm()))
    with pytest.raises(UserError, match="the model of run r is damaged"):
        load_onnx(record, f"sqlite:///{folder.parent}/mlflow.db")
    assert not Path("harmed").exists()


@pytest.fixture(scope="module")
def small() -> Model:
    return train(FEATURE_NAMES, seed=1)


@pytest.mark.parametrize("name", ["..", ".", "../../etc", "a b", "v7-of-another"])
def test_a_release_fetched_by_a_forged_tag_moves_nothing(
    client: MlflowClient, model: Any, small: Model, tmp_path: Path, name: str
) -> None:
    release = release_of(small, tmp_path / "made")
    logged = tmp_path / "logged"
    logged.mkdir()
    onnx = load_model_from_string(small.onnx).SerializeToString()
    (logged / MODEL).write_bytes(onnx)
    client.log_artifacts(model.run_id, str(release.directory), "release/v7-of-another")
    tags = {
        RELEASE_TAG: name,
        RELEASE_DIGEST_TAG: _sha256((release.directory / MANIFEST).read_bytes()),
        MODEL_DIGEST_TAG: _sha256(onnx),
    }
    version = Version("7", "Staging", tags, NOW, model.run_id, str(logged))
    home = tmp_path / "home" / "serving"
    home.mkdir(parents=True)
    (home / "current.json").write_text("kept")
    with pytest.raises(UserError, match=r"has no release in the registry|is another one"):
        fetch_release(client, version, home / "releases")
    assert (home / "current.json").read_text() == "kept"
