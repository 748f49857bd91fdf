"""Feast's offline store on the lake: its DuckDB store, reading only the partitions it needs.

Feast's own DuckDB store reads a file source whole. Here a source is a table of the lake, named by
the source's name, wherever the lake is; what is computed from the rows is Feast's own code.

In a RepoConfig: `offline_store: {type: churn_assets.data.offline_store.LakeOfflineStore,
lake: ...}`.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection
from datetime import UTC, date, datetime
from typing import Any, cast

import ibis
import pandas as pd
from feast import FeatureView, RepoConfig
from feast.data_source import DataSource
from feast.infra.offline_stores import duckdb
from feast.infra.offline_stores.ibis import (
    get_historical_features_ibis,
    pull_latest_from_table_or_query_ibis,
)
from feast.infra.offline_stores.offline_store import RetrievalJob
from feast.infra.registry.base_registry import BaseRegistry
from ibis.expr.types import Table
from pydantic import Field, StrictStr

from churn_assets.data.lake import DAY, Lake
from churn_assets.data.windows import cutoff_of
from churn_assets.errors import UserError

SPINE_TIME = "event_timestamp"


class LakeOfflineStoreConfig(duckdb.DuckDBOfflineStoreConfig):
    """Where the lake is, and how fsspec gets there. spill: where DuckDB puts what is too large."""

    type: StrictStr = "churn_assets.data.offline_store.LakeOfflineStore"
    lake: str
    lake_options: dict[str, Any] = Field(default_factory=dict)
    spill: str | None = None


class LakeOfflineStore(duckdb.DuckDBOfflineStore):
    """Point-in-time joins over daily partitions; a row's timestamp is its partition's cutoff."""

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = False,
    ) -> RetrievalJob:
        """What was known of every entity at its moment: the newest row not older than the TTL."""
        if isinstance(entity_df, str):
            raise UserError("the spine is a table of customer_id and event_timestamp, not SQL")
        moments = sorted(pd.to_datetime(entity_df[SPINE_TIME].unique(), utc=True).to_pydatetime())
        ttls = {view.batch_source.name: view.ttl for view in feature_views if view.batch_source}

        def needed(table: str, cutoff: datetime) -> bool:
            after = bisect.bisect_left(moments, cutoff)
            ttl = ttls[table]
            return after < len(moments) and (not ttl or moments[after] - ttl <= cutoff)

        return get_historical_features_ibis(
            config=config,
            feature_views=feature_views,
            feature_refs=feature_refs,
            entity_df=entity_df,
            registry=registry,
            project=project,
            full_feature_names=full_feature_names,
            filter_by_created_timestamp=filter_by_created_timestamp,
            data_source_reader=_reader(config, needed, [ref.split(":")[1] for ref in feature_refs]),
            data_source_writer=_no_writer,
        )

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> RetrievalJob:
        """The newest row of every entity with a timestamp in [start_date, end_date]."""
        start, end = start_date.astimezone(UTC), end_date.astimezone(UTC)
        return pull_latest_from_table_or_query_ibis(
            config=config,
            data_source=data_source,
            join_key_columns=join_key_columns,
            feature_name_columns=feature_name_columns,
            timestamp_field=timestamp_field,
            created_timestamp_column=created_timestamp_column,
            start_date=start,
            end_date=end,
            data_source_reader=_reader(
                config, lambda _, cutoff: start <= cutoff <= end, feature_name_columns
            ),
            data_source_writer=_no_writer,
        )


def _reader(
    config: RepoConfig, needed: Callable[[str, datetime], bool], features: Collection[str]
) -> Callable[[DataSource, str], Table]:
    """How Feast reads a source: only the partitions whose cutoff is `needed`.

    Reading raises UserError when there is none, or one lacks one of `features`.
    """
    store = cast(LakeOfflineStoreConfig, config.offline_store)
    lake = Lake(store.lake, store.lake_options)
    con = ibis.duckdb.connect(**({"temp_directory": store.spill} if store.spill else {}))

    def read(source: DataSource, _: str) -> Table:
        present = lake.days(source.name)
        days = [day for day in present if needed(source.name, cutoff_of(day))]
        if not days:
            raise UserError(_nothing_there(source.name, present))
        for day in days:
            columns = lake.schema(source.name, day).names
            absent = [name for name in features if name not in columns]
            if absent:
                raise UserError(
                    f"{source.name} of {day} has no column {absent[0]}; materialize {source.name} "
                    f"again for {day}"
                )
        return lake.scan(con, source.name, days=days).drop(DAY)

    return read


def _nothing_there(table: str, present: Collection[date]) -> str:
    if not present:
        return f"there is no partition of {table} yet; materialize it first"
    return (
        f"no partition of {table} lies in the time asked for (there are {min(present)} to "
        f"{max(present)}); materialize the days it needs"
    )


def _no_writer(*_: Any) -> None:
    raise NotImplementedError("the lake is written by its assets, not by Feast")
