"""Where a model comes from: its versions, and the exact training set of each."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from churn_assets.data.lake import Lake
from churn_assets.data.training_set import (
    PartitionContent,
    changed_partitions,
    read_manifest,
    restore_training_set,
)
from churn_assets.errors import UserError
from churn_assets.lifecycle.registry import get_version, read_registry

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
