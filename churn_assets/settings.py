"""All settings in one place: read from the YAML file CHURN_CONFIG names, checked, and frozen."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from churn_assets.contract.features import features_for
from churn_assets.contract.holdout import Holdout
from churn_assets.contract.logged import OFF, Durability, WhenBroken
from churn_assets.contract.online import is_redis
from churn_assets.data.engines import DuckDBSettings, Engine, SparkSettings
from churn_assets.data.features import earliest_feature_day
from churn_assets.data.gate import GatePolicy
from churn_assets.data.late import LatePolicy
from churn_assets.data.mapping import check_timezone
from churn_assets.data.sources import (
    ShopSourceConfig,
    SourceConfig,
    fill_variables,
    resolve_paths,
    resolve_place,
    source_tables,
    without_passwords,
)
from churn_assets.data.validation import ValidationPolicy
from churn_assets.data.windows import Windows, label_partition
from churn_assets.errors import UserError
from churn_assets.lifecycle.cleaning import RetentionPolicy
from churn_assets.lifecycle.promotion import PromotionPolicy
from churn_assets.lifecycle.targets import DeploymentSettings
from churn_assets.lifecycle.trials import TrialPolicy
from churn_assets.modeling.costs import CostPolicy
from churn_assets.modeling.gates import QualityPolicy
from churn_assets.modeling.held_out import EvaluationPolicy
from churn_assets.modeling.training import TrainingPolicy
from churn_assets.monitoring.alerts import AlertPolicy
from churn_assets.monitoring.drift import DriftPolicy
from churn_assets.monitoring.feeds import FeedPolicy
from churn_assets.monitoring.performance import PerformancePolicy
from churn_assets.monitoring.retraining import RetrainingPolicy
from churn_assets.monitoring.rollback import WatchPolicy
from churn_assets.monitoring.serving_health import ServingHealthPolicy
from churn_assets.monitoring.treatment import TreatmentPolicy
from churn_assets.runs import RunSettings

DEFAULT_CONFIG = Path(__file__).parent / "config" / "shop.yaml"


class Calendar(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which days there are.

    start: the first day with data. end: the last one, for a source that has ended. days: how much
    history the first `make run` brings in (default: everything up to `end`, or yesterday).
    """

    start: date
    end: date | None = None
    days: int | None = None

    def __post_init__(self) -> None:
        if self.end is not None and self.end < self.start:
            raise ValueError(f"end {self.end} is before start {self.start}; set a later end")
        if self.days is not None and self.days < 1:
            raise ValueError(f"days is {self.days}; set at least 1")


class Schedules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Cron expressions, in `timezone`."""

    daily_refresh: str = "0 2 * * *"
    training: str = "0 6 * * 1"
    drift_report: str = "0 4 * * *"
    trial_report: str = "30 4 * * *"
    treatment_report: str = "45 4 * * 1"
    prediction_log: str = "7 * * * *"
    serving_health: str = "12 * * * *"
    performance_report: str = "45 4 * * *"
    clean_archive: str = "0 5 * * *"
    decisions: str = "15 5 * * *"
    health_page: str = "20 * * * *"
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        check_timezone(self.timezone)


class OnlineStoreSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the newest features are kept for serving.

    url: the path of the SQLite file (default: in CHURN_HOME), or a redis:// URL. retention_days: of
    data time; the rows of customers who have not been active for longer are removed.
    """

    kind: Literal["sqlite", "redis"] = "sqlite"
    url: str | None = None
    retention_days: int = 30

    def __post_init__(self) -> None:
        if not 1 <= self.retention_days <= 36_500:
            raise ValueError(
                f"online_store.retention_days is {self.retention_days}; give days from 1 on"
            )
        if self.kind == "redis" and not self.url:
            raise ValueError("online_store.url is needed: redis://host:6379/0 or ${VARIABLE}")


class PredictionLogSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where services keep what they answer until the lake has it.

    store: a directory (default: in CHURN_HOME), a postgresql:// URL, or `off` to serve unlogged
    (which YAML reads as false). durability: what is kept survives the kill of a `process`, or a cut
    of the `power`, too. when_broken: `refuse` to answer, or `serve` unlogged.
    """

    store: str | bool | None = None
    durability: Durability = "process"
    when_broken: WhenBroken = "refuse"

    def __post_init__(self) -> None:
        if self.store is True:
            raise ValueError("serving.prediction_log.store: give a directory, a URL or off")

    def location(self, home: Path) -> str:
        """The directory, URL or `off`, for a home whose own directory for it is `home`."""
        return OFF if self.store is False else str(self.store or home)


class ServingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many processes answer, and how old features of the online store may be for them.

    max_age_hours: in data time. when_stale: `refuse` answers 409, `flag` predicts from the last
    values and says so. api_keys: whether a prediction needs a key of `churn keys add`.
    """

    workers: int = 1
    max_age_hours: float = 36.0
    when_stale: Literal["refuse", "flag"] = "refuse"
    api_keys: bool = False
    prediction_log: PredictionLogSettings = PredictionLogSettings()

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= 256:
            raise ValueError(f"serving.workers is {self.workers}; give 1 to 256 processes")
        if not 0 < self.max_age_hours <= 876_000:
            raise ValueError(f"serving.max_age_hours is {self.max_age_hours}; give hours above 0")


class FeastSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """registry: a path (default: in CHURN_HOME), or the URL of a database, such as Postgres."""

    registry: str | None = None


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that is configured. See churn_assets/config/shop.yaml for each key."""

    source: SourceConfig
    calendar: Calendar
    lake: str | None = None
    lake_endpoint_url: str | None = None
    engine: Engine = "duckdb"
    duckdb: DuckDBSettings = DuckDBSettings()
    spark: SparkSettings = SparkSettings()
    team: str = "growth"
    use_case: str = "customer churn"
    plots: bool = True
    model_name: str = "churn"
    seed: int = 42
    windows: Windows = Windows()
    late_events: LatePolicy = LatePolicy()
    validation: ValidationPolicy = ValidationPolicy()
    data_gate: GatePolicy = GatePolicy()
    online_store: OnlineStoreSettings = OnlineStoreSettings()
    serving: ServingSettings = ServingSettings()
    feast: FeastSettings = FeastSettings()
    training: TrainingPolicy = TrainingPolicy()
    evaluation: EvaluationPolicy = EvaluationPolicy()
    costs: CostPolicy = CostPolicy()
    quality_gates: QualityPolicy = QualityPolicy()
    promotion: PromotionPolicy = PromotionPolicy()
    trial: TrialPolicy = TrialPolicy()
    holdout: Holdout = Holdout()
    treatment: TreatmentPolicy = TreatmentPolicy()
    registry: RetentionPolicy = RetentionPolicy()
    deployment: DeploymentSettings = DeploymentSettings()
    drift: DriftPolicy = DriftPolicy()
    feeds: FeedPolicy = FeedPolicy()
    retraining: RetrainingPolicy = RetrainingPolicy()
    rollback: WatchPolicy = WatchPolicy()
    alerts: AlertPolicy = AlertPolicy()
    performance: PerformancePolicy = PerformancePolicy()
    serving_health: ServingHealthPolicy = ServingHealthPolicy()
    schedules: Schedules = Schedules()
    runs: RunSettings = RunSettings()

    @property
    def raw_tables(self) -> tuple[str, ...]:
        """The raw tables the source has."""
        return source_tables(self.source)

    @property
    def is_shop(self) -> bool:
        """Whether the source is the built-in shop."""
        return isinstance(self.source, ShopSourceConfig)

    @property
    def is_live(self) -> bool:
        """Whether data time is the wall clock: the source has neither ended nor is it simulated."""
        return not self.is_shop and self.calendar.end is None

    def identity(self) -> str:
        """What a home is for: source, first day and windows, as canonical JSON, without secrets."""
        source = msgspec.to_builtins(without_passwords(self.source))
        if self.is_shop and source["scenario"]["name"] == "stable":
            # Homes made before there were scenarios are the same shop.
            del source["scenario"]
        parts = {"source": source, "start": self.calendar.start, "windows": self.windows}
        return msgspec.json.encode(parts, order="deterministic").decode()

    def describe_source(self) -> str:
        """The source in a few words, for a person."""
        kind = "built-in shop" if self.is_shop else "own tables"
        return f"{kind} ({', '.join(self.raw_tables)})"

    @property
    def earliest_feature_day(self) -> date:
        """The first day whose features do not reach before the start of the data."""
        return earliest_feature_day(
            self.calendar.start, self.windows, features_for(self.raw_tables)
        )

    def require_history(self, last: date) -> None:
        """Raise UserError when data up to `last` is too short to train, choose and judge on.

        The three cutoffs lie a horizon apart, and the labels of the last need another one.
        """
        needed = label_partition(self.earliest_feature_day, 3 * self.windows.horizon_days)
        if last < needed:
            raise UserError(
                f"the history is too short: data from {self.calendar.start} to {last}, and to "
                f"train and judge a model takes it up to {needed}; set calendar.start, end or days "
                "for a longer one"
            )

    def history(self, today: date) -> tuple[date, date]:
        """The first and last day of history `make run` brings in.

        Raises UserError when that would reach beyond yesterday or is empty.
        """
        start, yesterday = self.calendar.start, today - timedelta(days=1)
        last = self.calendar.end or yesterday
        if self.calendar.days is not None:
            last = min(last, start + timedelta(days=self.calendar.days - 1))
        last = min(last, yesterday)
        if last < start:
            raise UserError(
                f"calendar: no complete day between {start} and {last}; "
                "set calendar.start to an earlier day"
            )
        return start, last


def load_settings(path: str | Path | None = None) -> Settings:
    """The settings of `path`, of the file CHURN_CONFIG names, or of the built-in shop.

    Raises UserError naming the file and the key when something in it is wrong.
    """
    chosen = Path(path or os.environ.get("CHURN_CONFIG") or DEFAULT_CONFIG).expanduser()
    try:
        document = yaml.safe_load(chosen.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no configuration file {chosen}; check CHURN_CONFIG") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{chosen} cannot be read ({error}); check CHURN_CONFIG") from error
    except yaml.YAMLError as error:
        raise UserError(f"{chosen} is not valid YAML: {_yaml_problem(error)}") from error
    except ValueError as error:
        # PyYAML lets through what Python says of a date or a number that cannot be one.
        reason = str(error).partition(";")[0]
        raise UserError(f"{chosen} has a value that is none: {reason}; correct it") from error
    except RecursionError:
        raise UserError(f"{chosen} is nested too deeply; write it as the examples are") from None
    if not isinstance(document, dict):
        raise UserError(
            f"{chosen} has no settings (keys and values); start from churn_assets/config/shop.yaml"
        )
    _refuse_unknown_keys(
        dict.fromkeys(document), dict.fromkeys(Settings.__struct_fields__), chosen, ""
    )
    try:
        settings = _filled_in(msgspec.convert(document, Settings))
    except (msgspec.ValidationError, ValueError) as error:
        raise UserError(f"{chosen}: {error}; churn_assets/config has examples") from error
    _refuse_unknown_keys(document, msgspec.to_builtins(settings), chosen, "")
    base = chosen.resolve().parent

    def place(key: str, value: str | None) -> str | None:
        return resolve_place(value, base, os.environ, key) if value else None

    def filled(key: str, value: Any) -> Any:
        return fill_variables(value, os.environ, key) if isinstance(value, str) else value

    online, feast, spark = settings.online_store, settings.feast, settings.spark
    deployment = settings.deployment
    docker, kubernetes = deployment.docker, deployment.kubernetes
    log, key = settings.serving.prediction_log, "serving.prediction_log.store"
    # YAML's off is false.
    store = place(key, log.store) if isinstance(log.store, str) and log.store != OFF else log.store
    log = msgspec.structs.replace(log, store=False if store == OFF else store)
    settings = msgspec.structs.replace(
        settings,
        source=resolve_paths(settings.source, base, os.environ),
        lake=place("lake", settings.lake),
        lake_endpoint_url=place("lake_endpoint_url", settings.lake_endpoint_url),
        spark=msgspec.structs.replace(
            spark,
            master=filled("spark.master", spark.master),
            conf={name: filled(f"spark.conf.{name}", spark.conf[name]) for name in spark.conf},
        ),
        online_store=msgspec.structs.replace(online, url=place("online_store.url", online.url)),
        feast=msgspec.structs.replace(feast, registry=place("feast.registry", feast.registry)),
        deployment=msgspec.structs.replace(
            deployment,
            docker=msgspec.structs.replace(
                docker,
                environment={
                    name: filled(f"deployment.docker.environment.{name}", value)
                    for name, value in docker.environment.items()
                },
            ),
            kubernetes=msgspec.structs.replace(
                kubernetes,
                manifests=place("deployment.kubernetes.manifests", kubernetes.manifests),
            ),
        ),
        serving=msgspec.structs.replace(settings.serving, prediction_log=log),
    )
    url = settings.online_store.url
    if url and is_redis(url) != (online.kind == "redis"):
        raise UserError(f"{chosen}: online_store.url does not go with kind: {online.kind}")
    if settings.trial.max_days <= settings.windows.horizon_days:
        raise UserError(
            f"{chosen}: trial.max_days ({settings.trial.max_days}) must be longer than "
            f"windows.horizon_days ({settings.windows.horizon_days}), or no outcome is ever known "
            "before a trial is over"
        )
    if online.retention_days * 24 <= settings.serving.max_age_hours:
        raise UserError(
            f"{chosen}: online_store.retention_days ({online.retention_days}) must be longer than "
            f"serving.max_age_hours ({settings.serving.max_age_hours:g}), or rows the service may "
            "use are removed"
        )
    return settings


def _filled_in(settings: Settings) -> Settings:
    """The same settings; msgspec leaves what was not given out of a dataclass's own attributes."""
    values = {name: getattr(settings, name) for name in settings.__struct_fields__}
    policies = {
        name: dataclasses.replace(value)
        for name, value in values.items()
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
    }
    retraining = settings.retraining
    policies["retraining"] = dataclasses.replace(
        retraining, modes=dataclasses.replace(retraining.modes)
    )
    source = settings.source
    if isinstance(source, ShopSourceConfig):
        source = msgspec.structs.replace(
            source,
            shop=dataclasses.replace(source.shop),
            scenario=dataclasses.replace(source.scenario),
        )
    return msgspec.structs.replace(settings, source=source, **policies)


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem or error.context}"
    return " ".join(str(error).split())


def _refuse_unknown_keys(given: Any, known: Any, path: Path, where: str) -> None:
    """Structs refuse unknown keys themselves; dataclasses among the settings do not."""
    if not isinstance(given, Mapping) or not isinstance(known, Mapping):
        return
    for key, value in given.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), [str(k) for k in known], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{path}: unknown key {where}{key}{hint}")
        _refuse_unknown_keys(value, known[key], path, f"{where}{key}.")


def utc_today() -> date:
    """Today in UTC."""
    return datetime.now(UTC).date()
