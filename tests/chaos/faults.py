"""The faults: which process is killed, and what is going on then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import psutil

from churn_assets.data.lake import Lake
from tests.chaos.servers import Postgres, Redis
from tests.chaos.shop import Shop

TRAINING, REFRESH, INGEST = "training", "daily_refresh", "ingest_predictions"
REASON = {"churn/reason": "chaos"}
Victim = Callable[[Shop, str], psutil.Process]


def run_worker(shop: Shop, run_id: str) -> psutil.Process:
    """The process that executes the run."""
    return shop.run_worker(run_id)


def part(name: str) -> Victim:
    """One of the processes of `churn up`."""
    return lambda shop, _: shop.part(name)


def next_day(shop: Shop) -> dict[str, str]:
    """The day after the newest one of the raw events, as a refresh names it."""
    newest = Lake(str(shop.home.lake)).days("orders")[-1]
    return {"dagster/partition": (newest + timedelta(days=1)).isoformat()}


@dataclass(frozen=True)
class Fault:
    """kill -9 of one process in the middle of a step of a run.

    process: in words. job: the run that is launched, with `tags`. step: what is being made. of: the
    job the step belongs to, when a sensor asks for its run once the launched one has ended.
    noticed: by the end of the `run`, by the `part` of `churn up` that is there again, or `outside`,
    by `again`, which stands for whoever keeps a process that `churn up` does not.
    """

    name: str
    process: str
    victim: Victim
    job: str
    step: str
    of: str | None = None
    tags: Callable[[Shop], Mapping[str, str]] = field(default=lambda _: {})
    noticed: Literal["run", "part", "outside"] = "run"
    again: Callable[[Shop], None] | None = None


def _worker(step: str, job: str, of: str | None = None) -> Fault:
    return Fault(f"run_{step}", "run worker", run_worker, job, step, of, _tags_of(job))


def _part(
    name: str, process: str, victim: Victim, job: str = REFRESH, step: str = "customer_features"
) -> Fault:
    return Fault(name, process, victim, job, step, tags=_tags_of(job), noticed="part")


def _tags_of(job: str) -> Callable[[Shop], Mapping[str, str]]:
    return {TRAINING: lambda _: REASON, REFRESH: next_day}.get(job, lambda _: {})


FAULTS = (
    _worker("orders", REFRESH),
    _worker("customer_features", REFRESH),
    _worker("online_features", REFRESH),
    _worker("training_set", TRAINING),
    _worker("trained_model", TRAINING),
    _worker("evaluation_report", TRAINING),
    _worker("registered_model", TRAINING),
    _worker("production_release", TRAINING, of="promotion"),
    _worker("churn_bento", "promotion"),
    _worker("deployment", "promotion"),
    _worker("prediction_log", INGEST),
    _part("webserver", "webserver", part("dagster")),
    _part("daemon", "daemon", part("daemon"), TRAINING, "trained_model"),
    _part("code", "code server", part("code"), TRAINING, "trained_model"),
    _part("mlflow", "MLflow server", part("mlflow")),
    _part("service_worker", "worker of the service", lambda shop, _: shop.service_worker()),
    _part("service_bento", "its parent, BentoML", lambda shop, _: shop.bento()),
    _part("service", "its parent, `churn serve`", part("service")),
    Fault(
        "up",
        "`churn up` itself",
        lambda shop, _: shop.up,
        TRAINING,
        "trained_model",
        tags=_tags_of(TRAINING),
        again=Shop.start_again,
    ),
)


SERVERS = ("postgres", "redis")


def faults_of_servers(postgres: Postgres, redis: Redis) -> tuple[Fault, ...]:
    """The faults of the servers a shop keeps its prediction log and its online store in."""
    return (
        Fault(
            SERVERS[0],
            "Postgres of the prediction log",
            lambda *_: postgres.process(),
            INGEST,
            "prediction_log",
            noticed="outside",
            again=lambda _: postgres.start_again(),
        ),
        Fault(
            SERVERS[1],
            "Redis of the online store",
            lambda *_: redis.process(),
            REFRESH,
            "online_features",
            tags=next_day,
            noticed="outside",
            again=lambda _: redis.start_again(),
        ),
    )
