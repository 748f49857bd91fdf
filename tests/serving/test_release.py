"""A release proves to be what was released, or is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from serving_cases import NOON, Model, release_of, rewrite_manifest

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.contract.release import (
    GOLDEN,
    MANIFEST,
    MODEL,
    Golden,
    Release,
    ReleaseError,
    check_golden,
    read_release,
)
from churn_assets.errors import UserError
from churn_assets.lifecycle.release import reference_statistics


def test_a_release_reads_back_as_it_was_written(release: Release, model: Model) -> None:
    read = read_release(release.directory)
    assert read == release
    assert read.model == model.onnx
    assert read.manifest.feature_names == FEATURE_NAMES
    assert read.manifest.created_at == NOON
    assert read.manifest.challenger is None
    assert read.directory.name == read.manifest.release_id
    assert read.manifest.reference["avg_order_value"].count == len(model.x)


def test_the_same_release_made_later_is_the_same_release(model: Model, tmp_path: Path) -> None:
    first = release_of(model, tmp_path)
    again = release_of(model, tmp_path, created_at=NOON + timedelta(days=1))
    assert again == first
    other = release_of(model, tmp_path, version="8")
    assert other.manifest.release_id != first.manifest.release_id
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [first.manifest.release_id, other.manifest.release_id]
    )


def test_a_damaged_release_is_made_anew(model: Model, tmp_path: Path) -> None:
    first = release_of(model, tmp_path)
    (first.directory / MODEL).write_bytes(b"half")
    assert release_of(model, tmp_path) == first


def test_features_out_of_order_are_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="must come in the order"):
        release_of(model, tmp_path, features=tuple(reversed(FEATURE_NAMES)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["..", "/etc/passwd", "../x", "a/b", ".hidden", MANIFEST, ""])
def test_a_manifest_cannot_name_a_file_elsewhere(copy: Path, name: str) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    rewrite_manifest(copy, files=manifest["files"] | {name: "0" * 64})
    with pytest.raises(ReleaseError, match="which no file of a release is called"):
        read_release(copy)


def flip_a_byte(directory: Path) -> None:
    content = bytearray((directory / MODEL).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / MODEL).write_bytes(content)


def link_the_model(directory: Path) -> None:
    shutil.move(directory / MODEL, directory.parent / "elsewhere")
    (directory / MODEL).symlink_to(directory.parent / "elsewhere")


def widen_a_feature(directory: Path) -> None:
    features = json.loads((directory / MANIFEST).read_text())["features"]
    rewrite_manifest(directory, features=[features[0] | {"maximum": 9e9}, *features[1:]])


def rename_a_feature(directory: Path) -> None:
    features = json.loads((directory / MANIFEST).read_text())["features"]
    rewrite_manifest(directory, features=[features[0] | {"name": "shoe_size"}, *features[1:]])


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (flip_a_byte, "model.onnx was changed"),
    (lambda d: (d / GOLDEN).write_text("{}"), "golden.json was changed"),
    (lambda d: (d / MODEL).unlink(), "model.onnx is missing"),
    (lambda d: (d / MANIFEST).unlink(), "manifest.json is missing"),
    (shutil.rmtree, "there is no release directory"),
    (lambda d: (d / "model.pkl").write_bytes(b"x"), "'model.pkl' is not part of it"),
    (lambda d: (d / "sub").mkdir(), "'sub' is not part of it"),
    (link_the_model, "model.onnx is not a plain file"),
    (lambda d: (d / MANIFEST).write_text("{"), "is not a manifest"),
    (lambda d: (d / MANIFEST).write_bytes(b"\xff"), "is not a manifest"),
    (lambda d: rewrite_manifest(d, format=2), "has format 2"),
    (lambda d: rewrite_manifest(d, surprise=1), "is not a manifest"),
    (lambda d: rewrite_manifest(d, files={}), "has no digest of golden.json"),
    (lambda d: rewrite_manifest(d, features=[]), "it has no features"),
    (lambda d: rewrite_manifest(d, model_version="8"), "manifest.json was changed"),
    (lambda d: rewrite_manifest(d, risk={"high": 0.9, "medium": 0.1}), "manifest.json was changed"),
    (lambda d: rewrite_manifest(d, risk={"high": 0.1, "medium": 0.4}), "risk thresholds need"),
    (widen_a_feature, "defines total_orders_30d differently"),
    (rename_a_feature, "unknown feature 'shoe_size'"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=[reason for _, reason in DAMAGES])
def test_a_damaged_release_is_refused(
    copy: Path, damage: Callable[[Path], object], reason: str
) -> None:
    read_release(copy)
    damage(copy)
    with pytest.raises(ReleaseError, match=reason) as refused:
        read_release(copy)
    assert "\n" not in str(refused.value)


def test_a_file_that_cannot_be_read_is_refused(copy: Path, monkeypatch) -> None:
    def unreadable(path: Path) -> bytes:
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(Path, "read_bytes", unreadable)
    with pytest.raises(ReleaseError, match=r"cannot be read \(Permission denied\)"):
        read_release(copy)


@pytest.mark.parametrize(
    ("golden", "reason"),
    [
        (Golden((), ()), "has no rows"),
        (Golden(((1.0,) * 5,), ()), "another number of answers"),
        (Golden(((1.0,) * 4,), (0.5,)), "not 5 features wide"),
    ],
)
def test_golden_rows_must_fit(model: Model, tmp_path: Path, golden: Golden, reason: str) -> None:
    with pytest.raises(ReleaseError, match=reason):
        release_of(model, tmp_path, golden=(np.array(golden.rows), np.array(golden.probabilities)))


@pytest.mark.parametrize("answer", [0.5 + 2e-5, float("nan"), float("inf")])
def test_another_answer_to_a_golden_row_is_refused(answer: float) -> None:
    golden = Golden(((1.0,), (2.0,)), (0.5, 0.5))
    assert check_golden(lambda rows: np.full(len(rows), 0.5 + 5e-6), golden) < 1e-5
    with pytest.raises(ReleaseError, match="does not compute what it was released with"):
        check_golden(lambda rows: np.array([0.5, answer]), golden)
    with pytest.raises(ReleaseError, match="golden rows"):
        check_golden(lambda rows: np.array([0.5]), golden)


def test_reference_statistics_refuse_what_is_not_finite() -> None:
    with pytest.raises(UserError, match="avg_order_value"):
        reference_statistics({"avg_order_value": [1.0, float("nan")]}, ["avg_order_value"])
    with pytest.raises(UserError, match="avg_order_value"):
        reference_statistics({"avg_order_value": []}, ["avg_order_value"])
    figures = reference_statistics({"avg_order_value": np.arange(101)}, ["avg_order_value"])
    assert figures["avg_order_value"].quantiles == pytest.approx(range(0, 101, 5))
