"""What somebody could put where the service looks: refused, and nothing of it is loaded."""

from __future__ import annotations

import logging
import os
import pickle
from contextlib import closing
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from online_cases import content, write
from onnx import ModelProto, TensorProto, helper
from serving_cases import NOON, Model, release_of

from churn_assets.contract.online import open_reader
from churn_assets.contract.pointer import Current, is_release_id, release_directory
from churn_assets.contract.release import MODEL, Release, ReleaseError, read_release
from churn_assets.lifecycle.pointer import point_at
from churn_assets.modeling.onnx_export import predict_onnx

FEATURES = 5


def graph(*, weights: str | None = None, domain: str = "", operator: str = "MatMul") -> bytes:
    """A model of five features, whose weights may lie in a file and whose operator may be any."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[FEATURES, 2])
    if weights is None:
        tensor.float_data.extend([0.1] * FEATURES * 2)
    else:
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", weights), ("length", str(FEATURES * 8))):
            tensor.external_data.add(key=key, value=value)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width])
        for name, width in (("features", FEATURES), ("probabilities", 2))
    ]
    node = helper.make_node(operator, ["features", "w"], ["probabilities"], domain=domain)
    made: ModelProto = helper.make_model(
        helper.make_graph([node], "g", ends[:1], ends[1:], [tensor]),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("theirs", 1)],
        ir_version=8,
    )
    return made.SerializeToString()


class Harm:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("harmed",))


FORGED = {
    "weights beside it": graph(weights="weights.bin"),
    "weights above it": graph(weights="../weights.bin"),
    "weights by their path": graph(weights="/etc/passwd"),
    "an operator of its own": graph(domain="theirs", operator="Harm"),
    "a pickle": pickle.dumps(Harm()),
    "half a model": graph()[:60],
    "nothing": b"",
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_model_with_every_digest_right_is_refused(
    service: ModuleType, model: Model, tmp_path: Path, monkeypatch, forged: str
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    for folder in (tmp_path, inner):
        np.full(FEATURES * 2, 0.1, dtype=np.float32).tofile(folder / "weights.bin")
    release = release_of(model, tmp_path / "releases", onnx=FORGED[forged])
    with pytest.raises(ReleaseError, match="cannot be loaded"):
        service.Served(read_release(release.directory))
    # What judges a model in the pipeline loads it no more than what serves it.
    with pytest.raises(Exception, match=r"ONNXRuntimeError|ModelProto"):
        predict_onnx(FORGED[forged], model.x[:1])
    assert not (inner / "harmed").exists()


def test_the_same_model_with_its_weights_inside_is_loaded(model: Model) -> None:
    assert predict_onnx(graph(), model.x[:1]).shape == (1,)


def test_a_model_that_fills_the_memory_is_not_read(copy: Path) -> None:
    os.truncate(copy / MODEL, 2 * 1024**3 + 1)
    with pytest.raises(ReleaseError, match="is larger than 2147483648 bytes"):
        read_release(copy)


@pytest.mark.parametrize(
    "name", ["..", ".", "", "../../etc", "/etc", "a/b", "a\\b", "a\n", "a\0", "x" * 101]
)
def test_no_id_of_a_release_leads_elsewhere(tmp_path: Path, name: str) -> None:
    assert not is_release_id(name)
    with pytest.raises(ReleaseError, match="is not the id of a release"):
        release_directory(tmp_path / "current.json", name)


def test_a_pointer_writes_no_lines_into_the_log(
    service: ModuleType, release: Release, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    follower = service.Follower(tmp_path / "current.json")
    follower.first(service.Served(read_release(release.directory)))
    line = "x\n2026-01-01 INFO everything is well\r\x1b[2K\u2028"
    point_at(tmp_path / "current.json", Current("churn:x", line, line, 1, NOON))
    with caplog.at_level(logging.WARNING):
        assert follower.look() is None
    assert "refused release x 2026-01-01" in caplog.text
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert str(follower.refused.release_id).isprintable()


def test_a_release_put_in_the_place_of_another_is_refused(
    service: ModuleType, model: Model, release: Release, tmp_path: Path
) -> None:
    other = release_of(model, tmp_path / "elsewhere", version="6")
    wanted = release.manifest.release_id
    (tmp_path / "releases").mkdir()
    (tmp_path / "releases" / wanted).symlink_to(other.directory)
    point_at(tmp_path / "current.json", Current("churn:x", wanted, "7", 1, NOON))
    follower = service.Follower(tmp_path / "current.json")
    assert follower.look() is None
    assert f"where {wanted} should be" in follower.refused.reason


@pytest.mark.parametrize(
    "attack",
    ["' OR '1'='1", "c-1' --", "c-1'; DROP TABLE row; --", "%", "c-_", "\\x00", "../../etc", "*"],
)
def test_an_id_is_never_sql(tmp_path: Path, attack: str) -> None:
    path = tmp_path / "online.db"
    state, rows = content()
    write(path, state, rows)
    with closing(open_reader(str(path))) as reader:
        known = list(rows)
        assert [row is None for row in reader.read([attack, known[0]])] == [True, False]
        assert all(row is not None for row in reader.read(known))
