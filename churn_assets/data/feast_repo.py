"""What Feast knows of the features, generated from the contract, and what is asked of it.

Entity `customer_id`, feature view `customer_features` over the lake's table of that name (a row is
stamped with its partition's cutoff), and one feature service for every feature set there was, which
a model's version names. Importing Feast takes seconds, so nothing here does before it is needed.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import io
import os
import random
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pyarrow as pa

from churn_assets.contract.features import Feature
from churn_assets.contract.online import (
    NAMESPACE,
    OnlineState,
    OnlineStoreError,
    RowCodec,
    feature_set_fingerprint,
    open_reader,
)
from churn_assets.data.checks import CheckResult
from churn_assets.data.lake import Lake
from churn_assets.data.online_rows import open_writer
from churn_assets.data.sources import shown
from churn_assets.data.tables import TIMESTAMP
from churn_assets.data.windows import cutoff_of
from churn_assets.errors import UserError

if TYPE_CHECKING:
    from feast import FeatureStore

PROJECT, VIEW = NAMESPACE.split(":")
ENTITY = "customer_id"
CUTOFF = "cutoff"
TTL = timedelta(days=1)

_SAMPLE = 200
_TYPES = {"int": "Int64", "float": "Float64"}


def feature_service_name(features: Sequence[Feature]) -> str:
    """The feature service of a feature set: another set, another service."""
    return f"churn_{feature_set_fingerprint(features)}"


def feast_objects(features: Sequence[Feature], lake: Lake) -> list[Any]:
    """Entity, feature view and feature service of `features`, as Feast's objects."""
    _import_feast()
    import feast
    from feast import types

    entity = feast.Entity(
        name=ENTITY,
        join_keys=[ENTITY],
        value_type=feast.ValueType.STRING,
        description="A customer of the source",
    )
    view = feast.FeatureView(
        name=VIEW,
        entities=[entity],
        ttl=TTL,
        online=True,
        schema=[
            feast.Field(name=ENTITY, dtype=types.String),
            *(
                feast.Field(
                    name=feature.name,
                    dtype=getattr(types, _TYPES[feature.dtype]),
                    description=f"{feature.meaning} ({feature.unit})",
                )
                for feature in features
            ),
        ],
        source=feast.FileSource(
            name=VIEW, path=f"{lake.root}/{VIEW}/*/*.parquet", timestamp_field=CUTOFF
        ),
        description="What is known of a customer at a cutoff",
        tags={"feature_set": feature_set_fingerprint(features)},
    )
    service = feast.FeatureService(
        name=feature_service_name(features),
        features=[view],
        description="The features of a model, as they were defined when it was trained",
        tags={"feature_set": feature_set_fingerprint(features)},
    )
    return [entity, view, service]


@dataclass(frozen=True)
class OnlineLoad:
    """What a materialization left online.

    rows: of the partition asked for. purged: rows removed for their age. state: of the store.
    same: whether it says what the lake says.
    """

    rows: int
    purged: int
    state: OnlineState
    location: str
    same: CheckResult


@dataclass(frozen=True)
class FeatureRepo:
    """The feature store of one home.

    registry: a path, or an SQLAlchemy URL. online: the path of a SQLite file, or a redis:// URL.
    live: the source's data time is the wall clock. retention: rows of customers whose newest cutoff
    lies further back than this from the store's newest are removed.
    """

    lake: Lake
    features: tuple[Feature, ...]
    registry: str = field(repr=False)
    online: str = field(repr=False)
    live: bool = True
    spill: str | None = None
    retention: timedelta = timedelta(days=30)

    @property
    def service(self) -> str:
        """The name of this feature set's feature service."""
        return feature_service_name(self.features)

    def config(self) -> dict[str, Any]:
        """What Feast's RepoConfig is made of."""
        registry = {"registry_type": "file", "path": self.registry}
        if "://" in self.registry:
            scheme, _, rest = self.registry.partition("://")
            driver = "postgresql+psycopg" if scheme in ("postgres", "postgresql") else scheme
            registry = {"registry_type": "sql", "path": f"{driver}://{rest}"}
        plug_ins = "churn_assets.data"
        return {
            "project": PROJECT,
            "provider": "local",
            "entity_key_serialization_version": 3,
            "registry": registry,
            "offline_store": {
                "type": f"{plug_ins}.offline_store.LakeOfflineStore",
                "lake": self.lake.root,
                "lake_options": self.lake.storage_options,
                "spill": self.spill,
            },
            "online_store": {
                "type": f"{plug_ins}.online_store.CompactOnlineStore",
                "location": self.online,
                "live": self.live,
            },
            "batch_engine": {"type": f"{plug_ins}.online_store.ArrowComputeEngine"},
        }

    @cached_property
    def store(self) -> FeatureStore:
        """Feast, with the definitions of this feature set applied to the registry.

        Raises UserError when the registry cannot be used.
        """
        _import_feast()
        from feast import FeatureStore, RepoConfig

        try:
            with self._locked(), _quiet():
                store = FeatureStore(config=RepoConfig(**self.config()))
                store.apply(feast_objects(self.features, self.lake))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"Feast's registry {shown(self.registry)} cannot be used "
                f"({_first_line(error, self.registry)}); check feast.registry"
            ) from error
        return store

    def training_rows(self, spine: pa.Table) -> pa.Table:
        """The features of every (customer_id, cutoff) of `spine`, as of that cutoff.

        One row for every row of the spine, in its order: its columns, then the features, null where
        Feast knows none. Raises UserError when the spine names a row twice, or Feast returns other
        rows than it was asked for.
        """
        _import_feast()
        from churn_assets.data.offline_store import SPINE_TIME

        names = [feature.name for feature in self.features]
        asked = spine.select([ENTITY, CUTOFF])
        if asked.group_by([ENTITY, CUTOFF]).aggregate([]).num_rows != spine.num_rows:
            raise UserError("a customer and cutoff is twice in the spine; correct its labels")
        entities = asked.rename_columns([ENTITY, SPINE_TIME]).to_pandas()
        with _quiet():
            job = self.store.get_historical_features(
                entities, self.store.get_feature_service(self.service)
            )
            found = job.to_arrow()
        found = found.set_column(
            found.schema.get_field_index(SPINE_TIME), CUTOFF, found[SPINE_TIME].cast(TIMESTAMP)
        )
        place = pa.array(range(spine.num_rows), pa.int64())
        rows = spine.append_column("_place", place).join(
            found.select([ENTITY, CUTOFF, *names]), [ENTITY, CUTOFF], join_type="left outer"
        )
        if not found.num_rows == rows.num_rows == spine.num_rows:
            raise UserError(
                f"Feast returned {found.num_rows} rows for a spine of {spine.num_rows}; "
                "materialize customer_features and churn_labels again"
            )
        return rows.sort_by("_place").select([*spine.column_names, *names])

    def materialize(self, day: date, data_time: datetime | None = None) -> OnlineLoad:
        """Bring the online store up to partition `day` of the features.

        Incrementally, from the newest partition that is online; a store that holds none of this
        feature set starts with `day`, and a partition that is online is written again. `data_time`
        is when the source is, where that is not the wall clock. Rows beyond the retention are then
        removed.

        Raises UserError when the partition is missing or the store cannot be written.
        """
        end = cutoff_of(day)
        if self.lake.missing(VIEW, day, day):
            raise UserError(
                f"there is no partition {day} of {VIEW}; materialize {VIEW} for {day} first"
            )
        newest, store = self.newest_online(), self.store
        with self._locked(), _quiet():
            store.refresh_registry()
            reached = store.get_feature_view(VIEW).most_recent_end_time
            if newest is None or newest >= end:
                store.materialize(end, end, [VIEW])
            elif newest == reached:
                store.materialize_incremental(end, [VIEW])
            else:
                # The registry or the store is not the one of the last time.
                store.materialize(newest, end, [VIEW])
        state, purged = self._publish(end, data_time)
        rows = self.lake.row_counts(VIEW, day, day)[day]
        return OnlineLoad(rows, purged, state, shown(self.online), self.compare(day))

    def newest_online(self) -> datetime | None:
        """The newest cutoff in the online store, if it holds this feature set.

        Raises UserError when the store cannot be used.
        """
        writer = open_writer(self.online)
        try:
            state = writer.state()
        finally:
            writer.close()
        mine = feature_set_fingerprint(self.features)
        return state.newest_cutoff if state is not None and state.fingerprint == mine else None

    def compare(self, day: date, sample: int = _SAMPLE) -> CheckResult:
        """Whether a sample of the customers of `day` reads online as it is in the lake.

        A customer with a newer row online is not compared, nor is a `day` beyond the retention.
        """
        codec = RowCodec(self.features)
        rows = self.lake.read(VIEW, day, day)
        chosen = sorted(
            random.Random(str(day)).sample(range(rows.num_rows), min(sample, rows.num_rows))
        )
        rows = rows.take(pa.array(chosen, pa.int64()))
        try:
            reader = open_reader(self.online)
            try:
                oldest = reader.state().newest_cutoff - self.retention
                found = reader.read(rows[ENTITY].to_pylist())
            finally:
                reader.close()
        except OnlineStoreError as error:
            return CheckResult(False, f"the online store cannot be read ({error})", {})
        cutoff = cutoff_of(day)
        if cutoff < oldest:
            reason = f"{day} lies beyond the {self.retention.days} days that rows are kept online"
            return CheckResult(True, reason, {"compared": 0, "differing": 0})
        differing = [
            row[ENTITY]
            for row, online in zip(rows.to_pylist(), found, strict=True)
            if online is None
            or online.cutoff < cutoff
            or (
                online.cutoff == cutoff
                and online.values != tuple(row[name] for name in codec.names)
            )
        ]
        newer = sum(1 for online in found if online is not None and online.cutoff > cutoff)
        figures: dict[str, float | int | str] = {
            "compared": rows.num_rows - newer,
            "differing": len(differing),
        }
        verdict = f"{rows.num_rows - newer} rows of {day} read back online"
        if differing:
            return CheckResult(
                False, f"{verdict}, {len(differing)} differ (first {differing[0]})", figures
            )
        return CheckResult(True, f"{verdict} as they are in the lake", figures)

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        """Hold the registry: Feast writes the file in place, and the last writer wins."""
        if "://" in self.registry:
            yield
            return
        Path(self.registry).parent.mkdir(parents=True, exist_ok=True)
        with Path(f"{self.registry}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _publish(self, newest: datetime, data_time: datetime | None) -> tuple[OnlineState, int]:
        codec = RowCodec(self.features)
        now = None if self.live else max(newest, data_time or newest)
        writer = open_writer(self.online)
        try:
            writer.publish(OnlineState(codec.names, codec.fingerprint, newest, now))
            state = writer.state()
            assert state is not None, "it was published"
            return state, writer.purge(state.newest_cutoff - self.retention)
        finally:
            writer.close()


def _import_feast() -> None:
    """Import Feast without what it does to the process besides.

    Its modules change the warning filters, and turn prometheus_client's metrics into files in a
    temporary folder, which the environment then hands to every child process. They also have
    typeguard rewrite the source of their classes at every import, as `python -O` would not: that is
    three quarters of the time an import takes, and what is handed to Feast is checked here.
    """
    importlib.import_module("prometheus_client")
    variables = ("PROMETHEUS_MULTIPROCESS_DIR", "PROMETHEUS_MULTIPROC_DIR")
    before = {name: os.environ.get(name) for name in variables}
    with warnings.catch_warnings(), mock.patch("typeguard.typechecked", _as_it_is):
        os.environ.update({name: value or os.devnull for name, value in before.items()})
        try:
            importlib.import_module("feast.metrics")
            importlib.import_module("feast")
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]


def _as_it_is(target: Any = None, **_: Any) -> Any:
    return _as_it_is if target is None else target


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Feast prints its progress."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _first_line(error: Exception, url: str) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0].replace(url, shown(url))
