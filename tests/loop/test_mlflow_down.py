"""MLflow goes away while a decision to train is carried out, and the loop finds its way back.

A real home, its jobs and sensors by a turned clock, and a real MLflow server that is killed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, churn, environment
from command import write_config as write
from mlflow import MlflowClient
from tracking import tracking_server

from churn_assets.contract.clock import CLOCK_VARIABLE, set_clock
from churn_assets.drill.cases import START, Case, configuration
from churn_assets.home import Home
from churn_assets.lifecycle.pointer import read_current
from churn_assets.lifecycle.registry import PIPELINE, POLICY, Registry, read_registry
from churn_assets.lifecycle.serving import free_port
from churn_assets.monitoring.alert_outbox import Outbox
from churn_assets.monitoring.alerts import AlertPolicy

pytestmark = pytest.mark.timeout(900)
DAY = timedelta(days=1)
HISTORY_DAYS = 180
MIDNIGHT = datetime.combine(START + HISTORY_DAYS * DAY, datetime.min.time(), UTC)


def settings() -> dict[str, Any]:
    """A small shop in which a single newer labelled day is worth training on."""
    never = "0 4 1 1 *"
    found = configuration(Case("stable", "stable", days=3, every=1, customers=800))
    others = ("prediction_log", "drift_report", "performance_report", "serving_health")
    return found | {
        "calendar": {"start": START, "days": HISTORY_DAYS},
        "data_gate": {"min_rows": 1000},
        "promotion": {"mode": "automatic", "margin": 0.5},
        "quality_gates": found["quality_gates"] | {"log_loss_over_production": 0.5},
        "retraining": {
            "modes": {"scheduled": "off", "drift": "off", "concept_drift": "off"},
            "new_label_days": 1,
            "min_new_label_days": 1,
            "cool_down_days": 0,
        },
        "schedules": found["schedules"] | dict.fromkeys(others, never) | {"health_page": never},
    }


@dataclass
class Night:
    """What a night came to, and how things stood at its end."""

    runs: list[tuple[str, str | None, bool]]
    failed_ticks: list[str]
    served: Any
    open_alerts: set[str]

    def trainings(self) -> list[tuple[str | None, bool]]:
        """The decision that asked for each, and whether it succeeded."""
        return [(decision, done) for job, decision, done in self.runs if job == "training"]


@dataclass
class Nights:
    """A quiet night; one in which MLflow is killed, one without it, and one with it again."""

    quiet: Night
    killed: Night
    away: Night
    back: Night
    served_before: Any
    registry: Registry


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Generator[Nights]:
    folder = tmp_path_factory.mktemp("down")
    home, config = Home(folder / "home"), write(folder / "shop.yaml", settings())
    clock, port = folder / "clock", free_port()
    set_clock(clock, MIDNIGHT)
    more = {
        "CHURN_MLFLOW_URI": f"http://127.0.0.1:{port}",
        CLOCK_VARIABLE: str(clock),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    }
    store = folder / "mlflow"
    store.mkdir()
    with ExitStack() as stack:
        server = stack.enter_context(tracking_server(store, port))
        begun = churn(home.root, config, timeout=600, **more)
        assert begun.code == 0, begun
        before = read_current(home.current)
        process = stack.enter_context(
            subprocess.Popen(
                [
                    *(sys.executable, str(Path(__file__).with_name("nights.py"))),
                    *(MIDNIGHT.isoformat(), str(server.pid)),
                ],
                cwd=ROOT,
                env=environment(home.root, config, **more),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stack.enter_context((folder / "nights.log").open("wb")),
                text=True,
            )
        )
        stack.callback(process.kill)
        found = []
        for number in range(4):
            if number == 3:
                stack.enter_context(tracking_server(store, port))
            assert process.stdin is not None
            assert process.stdout is not None
            print((MIDNIGHT + number * DAY + 8 * DAY / 24).isoformat(), file=process.stdin)
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, (folder / "nights.log").read_text()[-4000:]
            said = json.loads(line)
            found.append(
                Night(
                    [tuple(run) for run in said["runs"]],
                    said["failed_ticks"],
                    read_current(home.current),
                    {c.key for c in Outbox(home.alerts, AlertPolicy()).open()},
                )
            )
            print(found[-1])
        registry = read_registry(MlflowClient(more["CHURN_MLFLOW_URI"]), "churn")
        process.stdin.close()
        yield Nights(*found, before, registry)


def test_the_training_fails_and_is_told_and_what_serves_serves_on(nights: Nights) -> None:
    assert nights.quiet.trainings() == []
    # Dagster tries a run again that broke off between its steps.
    (once, *more) = nights.killed.trainings()
    assert once[0] is not None
    assert not once[1]
    assert more == [once, once]
    assert nights.killed.served == nights.served_before
    assert "run/training" in nights.killed.open_alerts


def test_while_it_is_away_nothing_is_decided_and_data_comes_in_all_the_same(
    nights: Nights,
) -> None:
    away = nights.away
    assert away.trainings() == []
    assert ("daily_refresh", None, True) in away.runs
    assert ("decisions", None, False) in away.runs
    assert {"run/training", "run/decisions"} <= away.open_alerts
    assert away.served == nights.served_before


def test_once_it_is_back_the_training_is_done_and_released_without_a_person(
    nights: Nights,
) -> None:
    ((decision, done),) = nights.back.trainings()
    assert done
    assert decision not in {None, *(each for each, _ in nights.killed.trainings())}
    assert nights.back.failed_ticks == []
    assert not any(key.startswith("run/") for key in nights.back.open_alerts)
    assert sorted(nights.registry.versions) == ["1", "2"]
    assert nights.registry.production == "2"
    assert {step.who for step in nights.registry.history} <= {PIPELINE, POLICY}
