"""A release: the directory a service serves, and how it proves to be what was released.

    manifest.json   what it is, and the sha256 of every other file
    model.onnx      the model
    golden.json     held-out rows with the probability the model gave them

and, while another model is on trial beside it, the same two of that model:

    challenger.onnx, challenger-golden.json

`read_release` is the only way in. It refuses a directory with a byte, a file or a definition of a
feature that is not the released one; `check_golden` then refuses a model that computes otherwise
here than where it was judged.
"""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray

from churn_assets.contract.features import Feature, features_named
from churn_assets.contract.risk import RiskThresholds

FORMAT = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
GOLDEN = "golden.json"
CHALLENGER_MODEL = "challenger.onnx"
CHALLENGER_GOLDEN = "challenger-golden.json"
GOLDEN_TOLERANCE = 1e-5

# ONNX Runtime's setting of where weights outside of a model's own bytes are looked for, and a place
# that holds none: without it a model from memory may load any file below the working directory.
NO_OUTSIDE_WEIGHTS = ("session.model_external_initializers_file_folder_path", "/dev/null")

_MAX_TEXT_BYTES = 16 * 1024 * 1024
# A protobuf message, which a model is, cannot be larger.
_MAX_BYTES = 2 * 1024**3
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
_ID_CHARACTERS = re.compile(r"[^a-z0-9]+")

Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]


class ReleaseError(Exception):
    """A release that must not be served: one line that says which file or value is wrong."""


class ReleaseUnreadable(ReleaseError):
    """A release that is not there, or that the disk does not give: it may be there later."""


class Challenger(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A second model on trial and the share of customers it answers.

    trial: its id, which customers are assigned by. shadow: whether both models score every request.
    features: what it takes, in its column order; requests bring the release's features, so these
    are some or all of them. release_id: the release it was judged with. file, golden: as `model`
    and `golden` of the release.
    """

    trial: str
    model_version: str
    release_id: str
    share: Share
    shadow: bool
    features: tuple[str, ...]
    file: str = CHALLENGER_MODEL
    golden: str = CHALLENGER_GOLDEN


class ReferenceStatistics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One feature over the rows the model was trained on.

    `quantiles` are values at equally spaced levels from 0 to 1, both included.
    """

    count: int
    mean: float
    std: float
    minimum: float
    maximum: float
    quantiles: tuple[float, ...]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a release is and where it comes from. `files` maps file names to their sha256."""

    format: int = FORMAT
    release_id: str
    model_name: str
    model_version: str
    challenger: Challenger | None = None
    risk: RiskThresholds
    features: tuple[Feature, ...]
    reference: dict[str, ReferenceStatistics]
    files: dict[str, str]
    mlflow_run: str
    dagster_run: str
    data_hash: str
    created_at: datetime

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The features in the model's column order."""
        return tuple(feature.name for feature in self.features)


class Golden(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`rows` of features in the model's column order, each with its expected probability."""

    rows: tuple[tuple[float, ...], ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Contender:
    """The model of a challenger, as `Release` has that of the champion."""

    golden: Golden
    model: bytes


@dataclass(frozen=True)
class Release:
    """A verified release; `model` are the very bytes that were verified.

    challenger: the other model's, where the manifest has one.
    """

    directory: Path
    manifest: Manifest
    golden: Golden
    model: bytes
    challenger: Contender | None = None


def release_id_of(manifest: Manifest) -> str:
    """The id of a release, by its content: the version, then 12 hex digits of a sha256.

    When it was made does not count, so the same release made twice has the same id.
    """
    content = msgspec.structs.replace(manifest, release_id="", created_at=datetime.min)
    # Through JSON once, so that a bound written 0 and read back as 0.0 is the same bound.
    read_back = msgspec.json.decode(msgspec.json.encode(content), type=Manifest)
    digest = hashlib.sha256(msgspec.json.encode(read_back, order="sorted")).hexdigest()
    version = _ID_CHARACTERS.sub("-", manifest.model_version.lower()).strip("-") or "x"
    return f"v{version[:24]}-{digest[:12]}"


def encode_manifest(manifest: Manifest) -> bytes:
    """`manifest.json` as it is written."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def read_release(directory: Path) -> Release:
    """Read and verify the release in `directory`.

    Raises ReleaseError for an unknown, foreign or changed file, for a manifest that is not one, and
    for a feature this code defines differently; ReleaseUnreadable for what is not there.
    """
    manifest = _read_manifest(directory)
    _check_features(directory, manifest.features)
    files = _read_files(directory, manifest)
    if release_id_of(manifest) != manifest.release_id:
        _refuse(directory, f"{MANIFEST} was changed: its content is not release_id's")
    golden = _golden(directory, GOLDEN, files[GOLDEN], len(manifest.features))
    contender = None
    if other := manifest.challenger:
        _check_challenger(directory, manifest, other)
        width = len(other.features)
        contender = Contender(
            _golden(directory, other.golden, files[other.golden], width), files[other.file]
        )
    return Release(directory, manifest, golden, files[MODEL], contender)


def check_golden(
    score: Callable[[NDArray[np.float32]], NDArray[np.floating]],
    golden: Golden,
    tolerance: float = GOLDEN_TOLERANCE,
    *,
    model: str = MODEL,
) -> float:
    """Score the golden rows; returns the largest difference from what is expected.

    `score` maps float32 of shape (n, features) to n probabilities. Raises ReleaseError above
    `tolerance`, which calls it `model`.
    """
    answers = np.asarray(score(np.asarray(golden.rows, dtype=np.float32)), dtype=np.float64)
    expected = np.asarray(golden.probabilities, dtype=np.float64)
    if answers.shape != expected.shape:
        raise ReleaseError(f"{model} answers {answers.shape} for {expected.shape} golden rows")
    difference = float(np.max(np.abs(answers - expected)))
    # Written so that a NaN, which compares false, is refused as well.
    if not difference <= tolerance:
        raise ReleaseError(
            f"{model} does not compute what it was released with: a golden prediction differs "
            f"by {difference:.2g}, {tolerance:.0e} is allowed"
        )
    return difference


def _refuse(directory: Path, reason: str) -> NoReturn:
    raise ReleaseError(f"release {directory}: {reason}")


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    if not directory.is_dir():
        raise ReleaseUnreadable(f"there is no release directory {directory}")
    if not path.exists():
        raise ReleaseUnreadable(f"release {directory}: {MANIFEST} is missing")
    try:
        manifest = msgspec.json.decode(_read_plain_file(directory, MANIFEST), type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        _refuse(directory, f"{MANIFEST} is not a manifest: {error}")
    if manifest.format != FORMAT:
        _refuse(directory, f"{MANIFEST} has format {manifest.format}, this code reads {FORMAT}")
    return manifest


def _read_files(directory: Path, manifest: Manifest) -> dict[str, bytes]:
    """Every file the manifest names, verified; the manifest's names are not trusted."""
    for name in manifest.files:
        if not _FILE_NAME.match(name) or name == MANIFEST:
            _refuse(directory, f"{MANIFEST} names {name!r}, which no file of a release is called")
    needed, other = {MODEL, GOLDEN}, manifest.challenger
    if other:
        needed |= {other.file, other.golden}
        if len(needed) != 4:
            _refuse(directory, "its challenger has no files of its own")
    present = {entry.name for entry in directory.iterdir()} - {MANIFEST}
    if unlisted := sorted(needed - manifest.files.keys()):
        _refuse(directory, f"{MANIFEST} has no digest of {unlisted[0]}")
    if missing := sorted(manifest.files.keys() - present):
        raise ReleaseUnreadable(f"release {directory}: {missing[0]} is missing")
    if unknown := sorted(present - manifest.files.keys()):
        _refuse(directory, f"{unknown[0]!r} is not part of it")
    contents = {}
    for name, digest in manifest.files.items():
        content = _read_plain_file(directory, name)
        if hashlib.sha256(content).hexdigest() != digest:
            _refuse(directory, f"{name} was changed: its sha256 is not the manifest's")
        contents[name] = content
    return contents


def _read_plain_file(directory: Path, name: str) -> bytes:
    path = directory / name
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            _refuse(directory, f"{name} is not a plain file")
        limit = _MAX_TEXT_BYTES if name.endswith(".json") else _MAX_BYTES
        if status.st_size > limit:
            _refuse(directory, f"{name} is larger than {limit} bytes")
        return path.read_bytes()
    except OSError as error:
        raise ReleaseUnreadable(
            f"release {directory}: {name} cannot be read ({error.strerror})"
        ) from None


def _check_features(directory: Path, features: Sequence[Feature]) -> None:
    try:
        known = features_named([feature.name for feature in features])
    except KeyError as error:
        _refuse(directory, str(error.args[0]))
    if not features:
        _refuse(directory, "it has no features")
    if [f.name for f in known] != [f.name for f in features]:
        _refuse(directory, "its features are not in the order the model sees them")
    for ours, theirs in zip(known, features, strict=True):
        # A better sentence about a feature does not make it another feature.
        if msgspec.structs.replace(theirs, meaning=ours.meaning) != ours:
            _refuse(directory, f"it defines {theirs.name} differently from this service")


def _check_challenger(directory: Path, manifest: Manifest, challenger: Challenger) -> None:
    if challenger.model_version == manifest.model_version:
        _refuse(directory, f"version {manifest.model_version} is on trial against itself")
    if not challenger.trial:
        _refuse(directory, "its trial has no id")
    wanted = set(challenger.features)
    if not wanted:
        _refuse(directory, "its challenger has no features")
    if foreign := [name for name in challenger.features if name not in manifest.feature_names]:
        _refuse(directory, f"its challenger needs {foreign[0]}, which requests do not bring")
    if [name for name in manifest.feature_names if name in wanted] != list(challenger.features):
        _refuse(directory, "its challenger's features are not in the order the model sees them")


def _golden(directory: Path, name: str, content: bytes, width: int) -> Golden:
    try:
        golden = msgspec.json.decode(content, type=Golden)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ReleaseError(
            f"release {directory}: {name} is not what it should be: {error}"
        ) from None
    if not golden.rows:
        _refuse(directory, f"{name} has no rows")
    if len(golden.rows) != len(golden.probabilities):
        _refuse(directory, f"{name} has {len(golden.rows)} rows and another number of answers")
    if any(len(row) != width for row in golden.rows):
        _refuse(directory, f"{name} has a row that is not {width} features wide")
    return golden
