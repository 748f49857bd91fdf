"""Where a model comes from: its versions, the training set of each, and all that was made of it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pyarrow.parquet as pq

from churn_assets.contract.release import MANIFEST, Manifest
from churn_assets.data.lake import Lake
from churn_assets.data.training_set import (
    PartitionContent,
    changed_partitions,
    read_manifest,
    restore_training_set,
)
from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.lifecycle.history import Step
from churn_assets.lifecycle.ledger import Look, read_ledger
from churn_assets.lifecycle.model_card import PAGE
from churn_assets.lifecycle.registry import GATES_TAG, get_version, read_registry

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Restored:
    """A training set brought back: its hash was checked against its rows.

    changed: the lake partitions it was made of that say something else today.
    """

    data_hash: str
    rows: int
    changed: tuple[PartitionContent, ...]


@dataclass(frozen=True)
class VersionLine:
    """One registered version, for a list."""

    version: str
    stage: str
    family: str
    gates: str
    registered_at: datetime
    data_hash: str
    mlflow_run: str


@dataclass(frozen=True)
class Lineage:
    """From a training set to what serves, for one version.

    releases and bentos: ids and tags, oldest first. looks: every evaluation on a held-out window.
    history: the registry's steps that moved it. card: the page of its model card, if it has one.
    """

    name: str
    version: str
    stage: str
    family: str
    gates: str
    data_hash: str
    cutoffs: str
    dagster_run: str
    mlflow_run: str
    mlflow_status: str
    commit: str
    releases: tuple[str, ...]
    bentos: tuple[str, ...]
    looks: tuple[Look, ...]
    history: tuple[Step, ...]
    card: Path | None

    def lines(self) -> list[str]:
        """The lineage for a person, a step a line."""
        none = ("none",)
        return [
            f"data         {self.data_hash}",
            f"             {self.cutoffs}",
            f"dagster run  {self.dagster_run}",
            f"mlflow run   {self.mlflow_run}  {self.mlflow_status}, code {self.commit}",
            f"version      {self.name} {self.version}  {self.stage}, gates {self.gates}, "
            f"{self.family}",
            *(f"release      {release}" for release in self.releases or none),
            *(f"bento        {bento}" for bento in self.bentos or none),
            *(
                f"held out     {look.window.day}, looked at {look.at:%Y-%m-%d %H:%M} in Dagster "
                f"run {look.dagster_run}"
                for look in self.looks
            ),
            *(f"history      {step.line()}" for step in self.history),
            f"model card   {self.card or 'none'}",
        ]


def lineage_of(client: MlflowClient, name: str, version: str, home: Home) -> Lineage:
    """Everything known of where a version came from and of what was made of it.

    Raises UserError when there is no such version.
    """
    registry = read_registry(client, name)
    found = registry.version(version)
    run = client.get_run(str(found.run_id))
    params, tags = run.data.params, run.data.tags
    dirty = ", changed" if tags.get("git_dirty") == "true" else ""
    releases = _manifests(home.releases, f"*/{MANIFEST}", name, version)
    bentos = _manifests(home.bentoml, f"bentos/*/*/src/release/{MANIFEST}", name, version)
    page = home.model_card(version) / PAGE
    return Lineage(
        name=name,
        version=version,
        stage=found.stage,
        family=found.tags.get("family", "-"),
        gates=found.tags.get(GATES_TAG, "not judged"),
        data_hash=found.tags.get("data_hash", "-"),
        cutoffs=(
            f"trained on {params.get('data_train_cutoffs', '-').replace(',', ', ')}; calibrated on "
            f"{params.get('data_calibration_cutoff', '-')}; held out "
            f"{params.get('data_test_cutoff', '-')}"
        ),
        dagster_run=found.tags.get("dagster_run", "-"),
        mlflow_run=run.info.run_id,
        mlflow_status=run.info.status,
        commit=f"{tags.get('git_commit', 'unknown')}{dirty}",
        releases=tuple(manifest.release_id for _, manifest in releases),
        bentos=tuple(
            f"{path.parents[3].name}:{path.parents[2].name}  of release {manifest.release_id}"
            for path, manifest in bentos
        ),
        looks=tuple(
            look
            for look in read_ledger(home.ledger)
            if (look.model, look.version) == (name, version)
        ),
        history=tuple(
            step for step in registry.history if version in {move.version for move in step.moves}
        ),
        card=page if page.exists() else None,
    )


def _manifests(folder: Path, pattern: str, name: str, version: str) -> list[tuple[Path, Manifest]]:
    """The manifests in `folder` that have a version, in Production or on trial, oldest first."""
    found = []
    for path in folder.glob(pattern):
        with contextlib.suppress(msgspec.MsgspecError, OSError):
            manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
            other = manifest.challenger.model_version if manifest.challenger else None
            if manifest.model_name == name and version in (manifest.model_version, other):
                found.append((path, manifest))
    return sorted(found, key=lambda item: (item[1].created_at, item[0]))


def data_hash_of(client: MlflowClient, name: str, version: str) -> str:
    """The hash of the training set a registered version was made from.

    Raises UserError when there is no such version, or it does not say.
    """
    found = get_version(client, name, version).tags.get("data_hash")
    if not found:
        raise UserError(f"version {version} of {name} names no training set; use --hash")
    return found


def restore(lake: Lake, data_hash: str, out: Path | None = None) -> Restored:
    """Bring the training set with `data_hash` back, check it, and write it to `out` (parquet).

    Raises UserError when it is gone, was changed, or `out` cannot be written.
    """
    table = restore_training_set(lake, data_hash)
    if out is not None:
        try:
            pq.write_table(table, out)
        except OSError as error:
            raise UserError(f"{out} cannot be written ({error}); choose another --out") from error
    manifest = read_manifest(lake, data_hash)
    return Restored(data_hash, table.num_rows, changed_partitions(lake, manifest))


def versions(client: MlflowClient, name: str) -> list[VersionLine]:
    """Every registered version of `name`, newest first."""
    found = read_registry(client, name).versions.values()
    return [
        VersionLine(
            version=v.version,
            stage=v.stage,
            family=v.tags.get("family", "-"),
            gates=v.tags.get("gates", "-"),
            registered_at=v.registered_at,
            data_hash=v.tags.get("data_hash", "-"),
            mlflow_run=v.run_id or "-",
        )
        for v in sorted(found, key=lambda version: -int(version.version))
    ]
