"""What the assets work with: home, lake, source, MLflow, and the records between stages."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import dagster as dg
import msgspec
import numpy as np
from numpy.typing import NDArray

from churn_assets.contract import clock
from churn_assets.contract.features import Feature, features_for
from churn_assets.contract.logged import OFF
from churn_assets.data.engines import open_duckdb, open_engine
from churn_assets.data.feast_repo import FeatureRepo
from churn_assets.data.lake import Lake, open_lake
from churn_assets.data.log_sources import LogSource, open_log_source
from churn_assets.data.sources import OfferedShop, ShopSourceConfig, Source, open_source
from churn_assets.data.windows import (
    cutoff_of,
    labelled_partition,
    midnight,
    partition_of,
    partition_of_cutoff,
)
from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.lifecycle.comparison import Comparison
from churn_assets.lifecycle.experiments import EXPERIMENT, ensure_experiment
from churn_assets.lifecycle.model_card import About
from churn_assets.lifecycle.registry import Registry
from churn_assets.monitoring.exposition import write_exposition
from churn_assets.monitoring.feeds import Fault, contaminated, find_faults
from churn_assets.monitoring.metric import Metric, append_metrics, read_metrics
from churn_assets.settings import Settings
from churn_assets.up import MLFLOW, REPORTS

# How far back faults of the feeds are looked for: longer than any training set reaches.
FAULTS_DAYS = 500

if TYPE_CHECKING:
    from ibis.backends import BaseBackend
    from mlflow import MlflowClient

    from churn_assets.modeling.held_out import Oracle


@dataclass(frozen=True)
class Project:
    """The project as an asset sees it: settings, home, lake, source and the two clocks."""

    home: Home
    settings: Settings

    @classmethod
    def of(cls, home: Home) -> Project:
        """The project of `home`, with the settings of this code location."""
        from churn_assets.defs.partitions import SETTINGS

        return cls(home, SETTINGS)

    @cached_property
    def lake(self) -> Lake:
        """The partitioned tables: in this home, or where the settings say."""
        return open_lake(self.settings.lake or str(self.home.lake), self.settings.lake_endpoint_url)

    @property
    def online_location(self) -> str:
        """The path of the SQLite file, or the URL, of the online store."""
        return self.settings.online_store.url or str(self.home.online_store)

    @cached_property
    def feature_repo(self) -> FeatureRepo:
        """The feature store of this home. Feast is imported when it is first asked."""
        return FeatureRepo(
            self.lake,
            self.features,
            registry=self.settings.feast.registry or str(self.home.feast_registry),
            online=self.online_location,
            live=self.settings.is_live,
            spill=str(self._spill),
            retention=timedelta(days=self.settings.online_store.retention_days),
        )

    @property
    def log_source(self) -> LogSource:
        """Where services keep what they answer until the lake has it."""
        location = self.settings.serving.prediction_log.location(self.home.prediction_log)
        # A service told to serve unlogged may have kept something before.
        return open_log_source(str(self.home.prediction_log) if location == OFF else location)

    @cached_property
    def source(self) -> Source:
        """Where the raw events come from."""
        return open_source(self.settings.source, self.settings.calendar.start, lake=self.lake)

    def oracle(self) -> Oracle | None:
        """The true probabilities of churn, where the source is a simulator that knows them."""
        source = self.settings.source
        if not isinstance(source, ShopSourceConfig):
            return None
        return OfferedShop(source, self.settings.calendar.start, self.lake).churn_probability

    def tenure_days(self, customers: Sequence[str], cutoff: datetime) -> NDArray[np.float64]:
        """Days from the first appearance of each customer to `cutoff`; NaN where it is unknown."""
        last = partition_of_cutoff(cutoff)
        first = self.settings.calendar.start
        seen = self.lake.read("customers", first, last, columns=["customer_id", "occurred_at"])
        appeared = seen.to_pandas().groupby("customer_id")["occurred_at"].min()
        days = (cutoff - appeared.reindex(list(customers))) / timedelta(days=1)
        return np.floor(days.to_numpy(dtype=np.float64))

    @property
    def features(self) -> tuple[Feature, ...]:
        """The features this source has, in the order the model sees them."""
        return features_for(self.settings.raw_tables)

    def now(self) -> datetime:
        """Operational time. Raises UserError when CHURN_CLOCK names a file without one."""
        try:
            return clock.now(os.environ)
        except ValueError as error:
            raise UserError(str(error)) from error

    def data_time(self) -> date:
        """The newest day for which every raw table of the source is there.

        Raises UserError when nothing has been materialized yet.
        """
        newest = []
        for table in self.settings.raw_tables:
            days = self.lake.days(table)
            if not days:
                raise UserError(f"there is no partition of {table} yet; materialize the raw assets")
            newest.append(days[-1])
        return min(newest)

    def behind(self) -> timedelta:
        """By how much data time is behind the clock, in whole days, as of now.

        Nothing for a live source; the days of another are not those of the clock.
        """
        if self.settings.is_live:
            return timedelta()
        return midnight(partition_of(self.now())) - cutoff_of(self.data_time())

    def add_metrics(self, metrics: Sequence[Metric]) -> None:
        """Append to the series of this home, and write it anew for Prometheus."""
        append_metrics(self.home.metrics, metrics)
        write_exposition(read_metrics(self.home.metrics), self.home.metrics_page)

    def labelled_days(self) -> list[date]:
        """The feature days whose labels have matured, oldest first."""
        horizon = self.settings.windows.horizon_days
        with_features = set(self.lake.days("customer_features"))
        matured = (labelled_partition(day, horizon) for day in self.lake.days("churn_labels"))
        return [day for day in matured if day in with_features]

    def feed_counts(self) -> dict[str, dict[date, int]]:
        """The events of each raw feed by day, as far back as faults are looked for."""
        tables = [table for table in self.settings.raw_tables if table != "customers"]
        newest = self.data_time()
        first = newest - timedelta(days=FAULTS_DAYS)
        return {table: self.lake.row_counts(table, first, newest) for table in tables}

    def faults(self) -> dict[str, tuple[Fault, ...]]:
        """The faults of each raw feed, as its daily counts tell of them."""
        return {
            table: find_faults(table, counts, self.settings.feeds)
            for table, counts in self.feed_counts().items()
        }

    def sound_days(self, days: Sequence[date], *, without: Sequence[str] = ()) -> list[date]:
        """Those of the feature `days` whose features, but those `without`, see no fault of a feed.

        Of orders no fault is left out here: a shop that closes for a holiday has none either, and
        what it did then is what churn is made of.
        """
        faults = [
            fault
            for table, found in self.faults().items()
            for fault in found
            if table != "orders" and not set(fault.features) <= set(without)
        ]
        touched = contaminated(faults, days, horizon_days=self.settings.windows.horizon_days)
        return [day for day in days if day not in touched]

    def newest_customer(self) -> dict[str, str | int | float] | None:
        """A customer of the newest feature partition as a request to the service, if it has one."""
        days = self.lake.days("customer_features")
        if not days:
            return None
        rows = self.lake.read("customer_features", days[-1], days[-1]).slice(0, 1).to_pylist()
        names = ["customer_id", *(feature.name for feature in self.features)]
        return {name: rows[0][name] for name in names} if rows else None

    def engine(self) -> AbstractContextManager[BaseBackend]:
        """The engine the settings ask for, for one asset; a JVM it started ends with the block."""
        settings = self.settings
        return open_engine(settings.engine, settings.duckdb, settings.spark, self._spill)

    def local_engine(self) -> AbstractContextManager[BaseBackend]:
        """DuckDB in this process, for what fits in memory anyway."""
        return open_duckdb(self.settings.duckdb, self._spill)

    @property
    def _spill(self) -> Path:
        return self.home.root / "tmp"

    def mlflow_run_url(self, run_id: str) -> str:
        """Where MLflow's UI shows a run under `make up`."""
        client = self.mlflow_client()
        experiment = client.get_run(run_id).info.experiment_id
        # MLflow's UI begins in its mode for language models unless told.
        mode = "workflowType=machine_learning"
        return f"{MLFLOW.url}#/experiments/{experiment}/runs/{run_id}?{mode}"

    def report_url(self, path: Path) -> str:
        """Where `make up` serves a page of the home's reports."""
        return f"{REPORTS.url}{path.relative_to(self.home.reports).as_posix()}"

    def about_model(self, mlflow_run: str) -> About:
        """What a model card needs to know of the settings and of the run."""
        settings = self.settings
        tags = self.mlflow_client().get_run(mlflow_run).data.tags
        dirty = ", changed" if tags.get("git_dirty") == "true" else ""
        return About(
            team=settings.team,
            use_case=settings.use_case,
            source=settings.describe_source(),
            activity_days=settings.windows.activity_days,
            horizon_days=settings.windows.horizon_days,
            decision_threshold=settings.training.decision_threshold,
            confidence=settings.evaluation.confidence,
            offer=settings.costs.offer,
            customer_value=settings.costs.customer_value,
            success_rate=settings.costs.success_rate,
            mlflow_url=self.mlflow_run_url(mlflow_run),
            commit=f"{tags.get('git_commit', 'unknown')}{dirty}",
        )

    def mlflow_client(self) -> MlflowClient:
        """A client of this home's tracking and registry store."""
        from mlflow import MlflowClient

        return MlflowClient(self.home.mlflow_uri)

    def comparison(self, registry: Registry) -> Comparison:
        """What compares two versions of `registry` on labelled customers."""
        settings = self.settings
        return Comparison(
            client=self.mlflow_client(),
            registry=registry,
            lake=self.lake,
            releases=self.home.releases,
            policy=settings.promotion,
            holdout=settings.holdout,
            horizon_days=settings.windows.horizon_days,
        )


@dg.resource(
    config_schema={"experiment_name": str, "mlflow_tracking_uri": str, "artifacts": str},
    description="dagster-mlflow's resource: the steps of one Dagster run share one MLflow run.",
)
def mlflow_tracking(context: dg.InitResourceContext) -> Iterator[Any]:
    """dagster-mlflow's resource, imported when a step asks for it (mlflow takes seconds)."""
    import dagster_mlflow
    from mlflow import MlflowClient

    config = context.resource_config
    ensure_experiment(MlflowClient(config["mlflow_tracking_uri"]), Path(config["artifacts"]))
    yield from cast("Any", dagster_mlflow.mlflow_tracking.resource_fn)(context)


def mlflow_for(home: Home) -> dg.ResourceDefinition:
    """The MLflow resource of `home`."""
    return mlflow_tracking.configured(
        {
            "experiment_name": EXPERIMENT,
            "mlflow_tracking_uri": home.mlflow_uri,
            "artifacts": str(home.mlflow_artifacts),
        }
    )


class RecordIOManager(dg.IOManager):
    """Hands small records from one asset to the next as JSON, one file a run.

    A step reads what its own run wrote, or else the newest: so one asset can be materialized alone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        """Store a msgspec Struct under the asset's name and the run's id."""
        if obj is None:
            return
        folder = self._folder.joinpath(*context.asset_key.path)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (f"{context.run_id}.json", "latest.json"):
            temporary = folder / f".{name}.tmp"
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(obj)))
            temporary.replace(folder / name)

    def load_input(self, context: dg.InputContext) -> Any:
        """The upstream asset's record, as the type the parameter is annotated with."""
        record = read_record(self._folder, context.asset_key.path[-1], _run_of(context))
        return msgspec.json.decode(record, type=context.dagster_type.typing_type)


def _run_of(context: dg.InputContext) -> str | None:
    return context.step_context.run_id


def read_record(folder: Path, asset: str, run_id: str | None = None) -> bytes:
    """The record `asset` left in run `run_id`, or else its newest.

    Raises UserError when there is none.
    """
    for name in (f"{run_id}.json", "latest.json"):
        path = folder / asset / name
        if path.exists():
            return path.read_bytes()
    raise UserError(f"{asset} has not been materialized yet; materialize it first")
