"""The training set: features joined with their labels, and how to get exactly that set back.

A snapshot is named by the hash of what it says: `<lake>/training_sets/<hash>.parquet`, and beside
it `<hash>.json`, the manifest with every lake partition it was made of.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from churn_assets.contract.features import Feature
from churn_assets.data.checks import CheckResult
from churn_assets.data.contents import content_hash
from churn_assets.data.lake import DAY, Lake
from churn_assets.data.windows import Windows, label_partition
from churn_assets.errors import UserError

if TYPE_CHECKING:
    from ibis.backends import BaseBackend

FOLDER = "training_sets"
FEATURES_TABLE = "customer_features"
LABELS_TABLE = "churn_labels"
_HASH = re.compile(r"[0-9a-f]{64}")


class PartitionContent(msgspec.Struct, frozen=True):
    """One lake partition as it was: its rows, and the hash of what they said."""

    table: str
    day: date
    rows: int
    content_hash: str


class TrainingSetManifest(msgspec.Struct, frozen=True):
    """What a training set is and what it was made of."""

    data_hash: str
    rows: int
    features: tuple[str, ...]
    feature_days: tuple[date, ...]
    activity_days: int
    horizon_days: int
    partitions: tuple[PartitionContent, ...]
    feature_service: str | None = None


@dataclass(frozen=True)
class TrainingSet:
    """A training set: `table` has customer_id, cutoff, the features in model order, churned.

    `complete` says whether the join lost or doubled a row.
    """

    table: pa.Table
    manifest: TrainingSetManifest
    complete: CheckResult

    @property
    def data_hash(self) -> str:
        """The hash of the rows, in any order."""
        return self.manifest.data_hash


def assemble_training_set(
    lake: Lake,
    con: BaseBackend,
    feature_days: Sequence[date],
    windows: Windows,
    features: Sequence[Feature],
    *,
    retrieve: Callable[[pa.Table], pa.Table] | None = None,
    feature_service: str | None = None,
) -> TrainingSet:
    """The features of `feature_days` with their labels, sorted by cutoff and customer.

    `retrieve` appends the features to the labels (customer_id, cutoff, churned), as a feature store
    does, null where it has none; without it they are joined here. `feature_service` is noted.

    Raises UserError for a partition of features or labels that is missing, or that lacks one of
    `features`.
    """
    days = sorted(set(feature_days))
    if not days:
        raise UserError("no feature partitions to train on; materialize more history")
    label_days = [label_partition(day, windows.horizon_days) for day in days]
    names = [feature.name for feature in features]
    rows = lake.scan(con, FEATURES_TABLE, days=days)
    labels = lake.scan(con, LABELS_TABLE, days=label_days).drop(DAY)
    absent = [name for name in names if name not in rows.columns]
    if absent:
        raise UserError(
            f"customer_features of {days[0]} has no column {absent[0]}; "
            f"materialize customer_features again for {days[0]} to {days[-1]}"
        )
    columns = ["customer_id", "cutoff", *names, "churned"]
    if retrieve is None:
        joined = rows.drop(DAY).inner_join(labels, ["customer_id", "cutoff"])
        table = joined.select(columns).order_by("cutoff", "customer_id").to_pyarrow()
    else:
        retrieved = _found(retrieve(labels.to_pyarrow()), names)
        table = retrieved.select(columns).sort_by(
            [("cutoff", "ascending"), ("customer_id", "ascending")]
        )
    partitions = (
        *_partitions(lake, FEATURES_TABLE, days),
        *_partitions(lake, LABELS_TABLE, label_days),
    )
    manifest = TrainingSetManifest(
        data_hash=content_hash(table),
        rows=table.num_rows,
        features=tuple(names),
        feature_days=tuple(days),
        activity_days=windows.activity_days,
        horizon_days=windows.horizon_days,
        partitions=partitions,
        feature_service=feature_service,
    )
    return TrainingSet(table, manifest, no_row_lost(manifest))


def keep_rows(training_set: TrainingSet, kept: NDArray[np.bool_]) -> TrainingSet:
    """The set with only the rows of the mask `kept` [rows]."""
    return _with_table(training_set, training_set.table.filter(pa.array(kept)))


def replace_values(training_set: TrainingSet, values: Mapping[str, ArrayLike]) -> TrainingSet:
    """The set with other values of some features, [rows] each."""
    table = training_set.table
    for name, given in values.items():
        place = table.column_names.index(name)
        column = pa.array(given).cast(table.schema.field(name).type)
        table = table.set_column(place, table.schema.field(name), column)
    return _with_table(training_set, table)


def _with_table(training_set: TrainingSet, table: pa.Table) -> TrainingSet:
    manifest = msgspec.structs.replace(
        training_set.manifest, data_hash=content_hash(table), rows=table.num_rows
    )
    return replace(training_set, table=table, manifest=manifest)


def no_row_lost(manifest: TrainingSetManifest) -> CheckResult:
    """Whether features, labels and training set have the same number of rows."""
    rows = {
        table: sum(part.rows for part in manifest.partitions if part.table == table)
        for table in (FEATURES_TABLE, LABELS_TABLE)
    }
    figures: dict[str, float | int | str] = {"training_set": manifest.rows, **rows}
    passed = set(rows.values()) == {manifest.rows}
    counts = ", ".join(f"{count} of {name}" for name, count in rows.items())
    verdict = "all rows found their label" if passed else "rows were lost or doubled in the join"
    return CheckResult(passed, f"{verdict}: {manifest.rows} rows from {counts}", figures)


def store_training_set(lake: Lake, training_set: TrainingSet) -> str:
    """Keep a snapshot of the training set and its manifest; the path of the snapshot."""
    name = training_set.data_hash
    path = lake.put(FOLDER, f"{name}.parquet", training_set.table)
    manifest = msgspec.json.format(msgspec.json.encode(training_set.manifest))
    lake.put(FOLDER, f"{name}.json", manifest)
    return path


def read_manifest(lake: Lake, data_hash: str) -> TrainingSetManifest:
    """The manifest of a stored training set. Raises UserError when there is none."""
    if not _HASH.fullmatch(data_hash):
        raise UserError(f"{data_hash!r} is not a data hash; give the 64 hexadecimal digits")
    try:
        stored = lake.get_bytes(FOLDER, f"{data_hash}.json")
    except FileNotFoundError:
        raise _absent(data_hash) from None
    try:
        return msgspec.json.decode(stored, type=TrainingSetManifest)
    except msgspec.MsgspecError as error:
        raise UserError(
            f"the manifest of training set {data_hash} is damaged ({error}); "
            "restore the file from a backup"
        ) from error


def restore_training_set(lake: Lake, data_hash: str) -> pa.Table:
    """The training set with that hash, as it was trained on.

    Raises UserError when it is not there, is damaged, or no longer says what its hash says.
    """
    read_manifest(lake, data_hash)
    name = f"{data_hash}.parquet"
    try:
        table = lake.get_table(FOLDER, name)
    except FileNotFoundError:
        raise _absent(data_hash) from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"training set {data_hash} cannot be read ({error}); restore the file from a backup"
        ) from error
    found = content_hash(table)
    if found != data_hash:
        raise UserError(
            f"training set {data_hash} was changed: its content now hashes to {found}; "
            "restore the file from a backup"
        )
    return table


def changed_partitions(lake: Lake, manifest: TrainingSetManifest) -> tuple[PartitionContent, ...]:
    """The lake partitions of `manifest` that are gone or say something else now, as they were."""
    changed = []
    for table in dict.fromkeys(part.table for part in manifest.partitions):
        parts = [part for part in manifest.partitions if part.table == table]
        present = set(lake.days(table))
        now = lake.content_hashes(table, [part.day for part in parts if part.day in present])
        changed += [part for part in parts if now.get(part.day) != part.content_hash]
    return tuple(changed)


def _found(rows: pa.Table, names: Sequence[str]) -> pa.Table:
    """The rows of the spine the feature store knew anything of: the others are lost."""
    known = [pc.is_valid(rows[name]) for name in names]
    return rows.filter(functools.reduce(pc.or_, known))


def _partitions(lake: Lake, table: str, days: Sequence[date]) -> list[PartitionContent]:
    rows = lake.row_counts(table, days[0], days[-1])
    hashes = lake.content_hashes(table, days)
    return [PartitionContent(table, day, rows[day], hashes[day]) for day in days]


def _absent(data_hash: str) -> UserError:
    return UserError(
        f"there is no training set {data_hash} in the lake; "
        "see the data hash on the model's run, and that CHURN_HOME is the one it was trained in"
    )
