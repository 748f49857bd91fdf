"""Feast's online store and materialization as plug-ins: compact rows, written in batches.

Feast's own stores keep a row a feature and build protobufs for every value, which takes most of the
time of a load. `CompactOnlineStore` keeps a row a customer (contract/online.py), which Feast reads
and writes as any other store; `ArrowComputeEngine` hands it Arrow batches without the detour.

In a RepoConfig: `online_store: {type: churn_assets.data.online_store.CompactOnlineStore,
location: ...}`, `batch_engine: {type: churn_assets.data.online_store.ArrowComputeEngine}`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from feast import Entity, FeatureView, RepoConfig
from feast.infra.common.materialization_job import MaterializationJobStatus, MaterializationTask
from feast.infra.compute_engines.local.compute import LocalComputeEngine
from feast.infra.compute_engines.local.job import LocalMaterializationJob
from feast.infra.online_stores.online_store import OnlineStore
from feast.infra.registry.base_registry import BaseRegistry
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import FeastConfigBaseModel

from churn_assets.contract.features import features_named
from churn_assets.contract.online import (
    OnlineSchemaChanged,
    OnlineState,
    RowCodec,
    from_microseconds,
    open_reader,
    to_microseconds,
)
from churn_assets.data.online_rows import OnlineWriter, open_writer
from churn_assets.errors import UserError

FeastRow = tuple[EntityKey, dict[str, Value], datetime, datetime | None]

_MICROSECOND = timedelta(microseconds=1)
_VALUE_FIELDS = {"int": "int64_val", "float": "double_val"}


class CompactOnlineStoreConfig(FeastConfigBaseModel):
    """Where the rows are, and whether their source lives now.

    location: the path of a SQLite file, or a redis:// URL. live: data time is the wall clock; if
    not, it is the newest cutoff in the store.
    """

    type: Literal["churn_assets.data.online_store.CompactOnlineStore"] = (
        "churn_assets.data.online_store.CompactOnlineStore"
    )
    location: str
    live: bool = True


class ArrowComputeEngineConfig(FeastConfigBaseModel):
    """How many rows are encoded and written at a time."""

    type: Literal["churn_assets.data.online_store.ArrowComputeEngine"] = (
        "churn_assets.data.online_store.ArrowComputeEngine"
    )
    batch_rows: int = 50_000


def namespace_of(project: str, view: str) -> str:
    """Where the rows of a feature view are kept in a store that others may share."""
    return f"{project}:{view}"


class CompactOnlineStore(OnlineStore):
    """One compact row a customer, in SQLite or Redis.

    For feature views with one string entity and features of the contract. A row is not replaced by
    an older one.
    """

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[FeastRow],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Write rows Feast hands over one by one."""
        codec = codec_of(table)
        ids = [_customer_id(key) for key, *_ in data]
        cutoffs = np.array([to_microseconds(_utc(moment)) for _, _, moment, _ in data], np.int64)
        columns = {
            feature.name: np.array(
                [_number(values[feature.name], feature.dtype) for _, values, *_ in data]
            )
            for feature in codec.features
        }
        self._write(config, table, codec, ids, cutoffs, columns)
        with self._writer(config, table) as writer:
            if data and writer.state() is None:
                self._publish(config, writer, codec, from_microseconds(int(cutoffs.max())))
        if progress:
            progress(len(data))

    def write_arrow(
        self, config: RepoConfig, table: FeatureView, batch: pa.RecordBatch | pa.Table
    ) -> None:
        """Write the rows of an Arrow batch: entity, timestamp and features by their names."""
        codec = codec_of(table)
        source = table.batch_source
        assert source is not None, "a view that is materialized has a source"
        cutoffs = batch[source.timestamp_field].cast(pa.timestamp("us", "UTC")).cast(pa.int64())
        ids, *columns = (batch[name] for name in (_entity(table), *codec.names))
        for name, column in zip((_entity(table), *codec.names), (ids, *columns), strict=True):
            if column.null_count:
                raise UserError(
                    f"{table.name}.{name} has {column.null_count} nulls; nulls cannot be kept "
                    "online: materialize customer_features again"
                )
        self._write(
            config,
            table,
            codec,
            ids.to_pylist(),
            cutoffs.to_numpy(zero_copy_only=False),
            {
                name: column.to_numpy(zero_copy_only=False)
                for name, column in zip(codec.names, columns, strict=True)
            },
        )

    def publish(self, config: RepoConfig, table: FeatureView, newest: datetime) -> None:
        """Turn the readers to the rows of `table` as it is defined now."""
        with self._writer(config, table) as writer:
            self._publish(config, writer, codec_of(table), newest)

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[tuple[datetime | None, dict[str, Value] | None]]:
        """The rows of entities, with the timestamps they were stamped with, whatever their age."""
        codec = codec_of(table)
        reader = open_reader(config.online_store.location, namespace_of(config.project, table.name))
        try:
            held = reader.state().fingerprint
            if held != codec.fingerprint:
                raise OnlineSchemaChanged(f"it holds feature set {held}, not {codec.fingerprint}")
            rows = reader.read([_customer_id(key) for key in entity_keys])
        finally:
            reader.close()
        wanted = [
            (place, feature.name, _VALUE_FIELDS[feature.dtype])
            for place, feature in enumerate(codec.features)
            if requested_features is None or feature.name in requested_features
        ]
        return [
            (None, None)
            if row is None
            else (
                row.cutoff,
                {name: _value(field, row.values[place]) for place, name, field in wanted},
            )
            for row in rows
        ]

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Remove the rows of views that are gone; the others need nothing made beforehand."""
        for table in tables_to_keep:
            codec_of(table)
        self.teardown(config, tables_to_delete, entities_to_delete)

    def teardown(
        self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]
    ) -> None:
        """Remove the rows of `tables`."""
        for table in tables:
            with self._writer(config, table) as writer:
                writer.remove()

    @contextmanager
    def _writer(self, config: RepoConfig, table: FeatureView) -> Generator[OnlineWriter]:
        namespace = namespace_of(config.project, table.name)
        writer = open_writer(config.online_store.location, namespace)
        try:
            yield writer
        finally:
            writer.close()

    def _write(
        self,
        config: RepoConfig,
        table: FeatureView,
        codec: RowCodec,
        customer_ids: Sequence[str],
        cutoffs: np.ndarray,
        columns: dict[str, np.ndarray],
    ) -> None:
        if not customer_ids:
            return
        try:
            rows = codec.encode_rows(cutoffs, columns)
        except ValueError as error:
            raise UserError(f"{table.name}: {error}; materialize it offline again") from error
        with self._writer(config, table) as writer:
            writer.write(codec, customer_ids, rows, from_microseconds(int(cutoffs.max())))

    def _publish(
        self, config: RepoConfig, writer: OnlineWriter, codec: RowCodec, newest: datetime
    ) -> None:
        data_time = None if config.online_store.live else newest
        writer.publish(OnlineState(codec.names, codec.fingerprint, newest, data_time))


class ArrowComputeEngine(LocalComputeEngine):
    """Materializes in this process, from the offline store's Arrow table in batches.

    Only for online stores that take Arrow batches, as `CompactOnlineStore` does.
    """

    def __init__(self, *, batch_rows: int = 50_000, type: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._batch_rows = batch_rows

    def _materialize_one(
        self, registry: BaseRegistry, task: MaterializationTask, **kwargs: Any
    ) -> LocalMaterializationJob:
        view = task.feature_view
        source, store = view.batch_source, self.online_store
        assert source is not None, "a view that is materialized has a source"
        assert isinstance(store, CompactOnlineStore), "the engine is made for this store"
        start = task.start_time.astimezone(UTC)
        if start < task.end_time and start == view.most_recent_end_time:
            # An interval has both its ends, so this one's first moment was in the one before.
            start += _MICROSECOND
        job = self.offline_store.pull_latest_from_table_or_query(
            config=self.repo_config,
            data_source=source,
            join_key_columns=[_entity(view)],
            feature_name_columns=list(codec_of(view).names),
            timestamp_field=source.timestamp_field,
            created_timestamp_column=source.created_timestamp_column or None,
            start_date=start,
            end_date=task.end_time,
        )
        rows = job.to_arrow()
        for batch in rows.to_batches(max_chunksize=self._batch_rows):
            store.write_arrow(self.repo_config, view, batch)
        if rows.num_rows:
            newest = pc.max(rows[source.timestamp_field]).as_py()
            store.publish(self.repo_config, view, newest.astimezone(UTC))
        return LocalMaterializationJob(
            job_id=f"{view.name}-{start.isoformat()}-{task.end_time.isoformat()}",
            status=MaterializationJobStatus.SUCCEEDED,
        )


def codec_of(table: FeatureView) -> RowCodec:
    """The codec of a feature view's rows, in the contract's order of its features.

    Raises UserError for a feature that is not the contract's.
    """
    try:
        return RowCodec(features_named([field.name for field in table.features]))
    except KeyError as error:
        raise UserError(
            f"feature view {table.name} has an {error.args[0]}; define it in contract/features.py"
        ) from None


def _entity(table: FeatureView) -> str:
    (column,) = table.entity_columns
    return column.name


def _customer_id(key: EntityKey) -> str:
    (value,) = key.entity_values
    return value.string_val


def _number(value: Value, dtype: str) -> float:
    kind = value.WhichOneof("val")
    if kind is None:
        return float("nan")
    return getattr(value, kind)


def _value(field: str, number: float) -> Value:
    value = Value()
    setattr(value, field, number)
    return value


def _utc(moment: datetime) -> datetime:
    """Feast hands over naive timestamps in UTC."""
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
