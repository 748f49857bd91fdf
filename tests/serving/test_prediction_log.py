"""The prediction log over HTTP: what is answered is kept, whatever becomes of the service."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from log_cases import Client, stored
from serving_cases import SERVICE, VALID, without

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.contract.holdout import Holdout
from churn_assets.contract.release import Release
from churn_assets.errors import UserError
from churn_assets.lifecycle.serving import PredictionLog, serve

HALF = Holdout(0.5)


@dataclass(frozen=True)
class Logged:
    """A service and the directory of its log."""

    client: Client
    directory: Path
    release: Release

    def rows(self, customer: str):
        return [row for row in stored(self.directory) if row.customer_id == customer]


@pytest.fixture(scope="module")
def logged(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Generator[Logged]:
    directory = tmp_path_factory.mktemp("logged") / "log"
    log, held_out = PredictionLog(str(directory)), HALF.environment()
    with serve(SERVICE, release.directory, log=log, environment=held_out) as url:
        client = Client(url)
        yield Logged(client, directory, release)
        client.close()


def test_a_prediction_is_in_the_log_when_its_answer_arrives(logged: Logged):
    before = time.time()
    status, answer, headers = logged.client.ask(VALID | {"customer_id": "whole"})
    assert status == 200
    (row,) = logged.rows("whole")
    assert row.request_id == headers["x-request-id"]
    assert before <= row.at / 1e6 <= time.time()
    assert tuple(row.features) == FEATURE_NAMES
    assert list(row.values) == [VALID[name] for name in FEATURE_NAMES]
    assert row.probability == answer["churn_probability"] == round(row.champion or -1, 4)
    assert row.probability != row.champion
    assert (row.challenger, row.arm) == (None, "champion")
    manifest = logged.release.manifest
    assert (row.model_version, row.release_id) == (manifest.model_version, manifest.release_id)
    assert (row.bento, row.cutoff, row.stale) == (None, None, None)
    assert 0 < row.latency_us < 1e6


def test_who_is_held_out_is_marked_in_the_answer_and_the_log(logged: Logged):
    customers = [f"held-{number}" for number in range(12)]
    bodies = [VALID | {"customer_id": customer} for customer in customers]
    single = [logged.client.ask(body)[1] for body in bodies]
    batch = logged.client.ask({"rows": bodies}, "/predict_batch")[1]["predictions"]
    assert batch == single
    for customer, answer in zip(customers, single, strict=True):
        mark = HALF.membership()(customer)
        assert answer["holdout"] is mark
        assert [row.holdout for row in logged.rows(customer)] == [mark, mark]
    assert {answer["holdout"] for answer in single} == {True, False}


def test_every_answered_row_of_a_batch_is_in_the_log(logged: Logged):
    rows = [VALID | {"customer_id": "batch"}, {"customer_id": "batch", "plan": "gold"}]
    rows.append(VALID | {"customer_id": "batch", "total_orders_30d": 9})
    status, answer, headers = logged.client.ask({"rows": rows}, "/predict_batch")
    assert status == 200
    first, second = logged.rows("batch")
    made = headers["x-request-id"]
    assert [first.request_id, second.request_id] == [f"{made}-0", f"{made}-2"]
    answered = [row["churn_probability"] for row in answer["predictions"] if "error" not in row]
    assert [first.probability, second.probability] == answered


def test_what_is_refused_is_not_in_the_log(logged: Logged):
    before = len(stored(logged.directory))
    status, _, headers = logged.client.ask(without("avg_order_value"))
    assert (status, len(headers["x-request-id"])) == (422, 32)
    assert len(stored(logged.directory)) == before


@pytest.mark.parametrize("given", ["a", "order 17/b~", "x" * 128])
def test_a_caller_may_name_the_request(logged: Logged, given: str):
    _, _, headers = logged.client.ask(headers={"x-request-id": given})
    assert headers["x-request-id"] == given
    assert stored(logged.directory)[-1].request_id == given


@pytest.mark.parametrize("given", ["", "x" * 129, "caf\xe9", "tab\there"])
def test_a_name_that_is_none_is_replaced(logged: Logged, given: str):
    _, _, headers = logged.client.ask(headers={"x-request-id": given})
    assert len(headers["x-request-id"]) == 32
    assert stored(logged.directory)[-1].request_id == headers["x-request-id"]


def test_a_name_used_again_loses_nothing(logged: Logged):
    for orders in (1, 2, 3):
        body = VALID | {"customer_id": "again", "total_orders_30d": orders}
        logged.client.ask(body, headers={"x-request-id": "same"})
    kept = logged.rows("again")
    assert [row.values[0] for row in kept] == [1, 2, 3]
    assert {row.request_id for row in kept} == {"same"}


def test_health_shows_the_log(logged: Logged):
    logged.client.ask()
    health = logged.client.health()
    assert health["status"] == "healthy"
    log = health["prediction_log"]
    oldest = datetime.fromisoformat(log.pop("oldest_waiting"))
    kept = stored(logged.directory)
    assert oldest == datetime.fromtimestamp(kept[0].at // 10**6, UTC).replace(
        microsecond=kept[0].at % 10**6
    )
    assert log == {
        "store": str(logged.directory),
        "usable": True,
        "durability": "process",
        "when_broken": "refuse",
        "rows_waiting": len(kept),
        "unlogged": 0,
        "reason": None,
    }


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"CHURN_PREDICTION_LOG": ""}, "CHURN_PREDICTION_LOG is not set, .* set it to a directory"),
        ({"CHURN_PREDICTION_LOG": "log"}, "CHURN_PREDICTION_LOG is 'log'"),
        ({"CHURN_PREDICTION_LOG": "/dev/null/log"}, "/dev/null/log cannot be made"),
        ({"CHURN_LOG_DURABILITY": "some"}, "CHURN_LOG_DURABILITY is 'some'; set it to process or"),
        ({"CHURN_LOG_WHEN_BROKEN": "hide"}, "CHURN_LOG_WHEN_BROKEN is 'hide'; set it to refuse or"),
    ],
)
def test_without_a_log_the_service_does_not_start(service, monkeypatch, environment, says):
    from churn_service.prediction_log import prediction_log

    with pytest.raises(service.ReleaseError, match=says):
        prediction_log({"CHURN_PREDICTION_LOG": "/nowhere"} | environment)


def test_a_service_without_the_setting_says_what_to_set(release: Release):
    unset = {"CHURN_PREDICTION_LOG": ""}
    with (
        pytest.raises(UserError, match="refused to start: CHURN_PREDICTION_LOG is not set"),
        serve(SERVICE, release.directory, environment=unset),
    ):
        pass


def test_a_service_told_to_serve_unlogged_says_so(release: Release):
    with serve(SERVICE, release.directory, log=PredictionLog("off")) as url:
        client = Client(url)
        assert client.ask()[0] == 200
        assert client.ask({"rows": [VALID, VALID]}, "/predict_batch")[0] == 200
        health = client.health()
        client.close()
    assert health["status"] == "healthy"
    log = health["prediction_log"]
    assert (log["store"], log["usable"], log["unlogged"]) == ("off", False, 3)
