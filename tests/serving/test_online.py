"""Requests by id and batches, answered by the service from a real online store."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from online_cases import CUTOFF, HOUR, STORED, Caller, RedisServer, content, until, write
from serving_cases import BAD_BODIES, SERVICE, THREE, VALID, Model

from churn_assets.contract.features import FEATURE_NAMES, features_named
from churn_assets.contract.release import Release, read_release
from churn_assets.contract.request import MAX_BATCH_BYTES, MAX_ROWS
from churn_assets.errors import UserError
from churn_assets.lifecycle.serving import OnlineStore, ask, serve
from churn_service.endpoint import Endpoint
from churn_service.traffic import Limits

STAMP = CUTOFF.isoformat().replace("+00:00", "Z")


@pytest.fixture
def call(
    service: ModuleType, release: Release, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Caller]:
    """The endpoint in this process, with the online store at a location."""

    def started(location: Path | str | None, of: Release = release, **variables: str) -> Caller:
        monkeypatch.setenv("CHURN_ONLINE_STORE", str(location or ""))
        monkeypatch.setenv("CHURN_PREDICTION_LOG", "off")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        endpoint = Endpoint(service.lane, Limits())
        endpoint.start(service.Served(read_release(of.directory)))
        return Caller(endpoint)

    return started


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "online.db"
    write(path, *content())
    return path


def expected(model: Model, customer_id: str) -> float:
    row = [STORED[customer_id][name] for name in model.features]
    return float(model.predict(np.array([row], dtype=np.float32))[0])


def test_an_id_is_answered_as_the_model_answers_its_stored_row(
    call: Callable[..., Caller], path: Path, model: Model
) -> None:
    service = call(path)
    for customer_id, row in STORED.items():
        status, answer, _ = service("/predict", {"customer_id": customer_id})
        assert status == 200
        assert answer["churn_probability"] == pytest.approx(expected(model, customer_id), abs=6e-5)
        assert (answer.pop("cutoff"), answer.pop("stale")) == (STAMP, False)
        assert answer == service("/predict", {"customer_id": customer_id} | row)[1]


def test_a_model_of_three_features_reads_its_three_of_five(
    call: Callable[..., Caller], path: Path, release_of_three: Release, model_of_three: Model
) -> None:
    service = call(path, release_of_three)
    for customer_id in STORED:
        answer = service("/predict", {"customer_id": customer_id})[1]
        probability = expected(model_of_three, customer_id)
        assert answer["churn_probability"] == pytest.approx(probability, abs=6e-5)
    assert service("/health")[1]["online_store"]["usable"]


def test_without_a_store_the_features_are_asked_for(call: Callable[..., Caller]) -> None:
    service = call(None)
    status, answer, headers = service("/predict", {"customer_id": "c-1"})
    assert (status, answer["error"]["field"]) == (422, FEATURE_NAMES[0])
    assert "no online store (CHURN_ONLINE_STORE)" in answer["error"]["message"]
    assert "retry-after" not in headers
    rows = service("/predict_batch", {"rows": [VALID, {"customer_id": "c-1"}]})[1]["predictions"]
    assert rows[0] == service("/predict", VALID)[1]
    assert rows[1]["error"] == {"status": 422} | answer["error"]
    assert service("/health")[1]["online_store"] is None


def test_some_of_the_features_are_never_completed_from_the_store(
    call: Callable[..., Caller], path: Path
) -> None:
    service = call(path)
    for given_names in (FEATURE_NAMES[:1], FEATURE_NAMES[1:], FEATURE_NAMES[2:3]):
        body = {"customer_id": "c-1"} | {name: VALID[name] for name in given_names}
        status, answer, _ = service("/predict", body)
        missing = next(name for name in FEATURE_NAMES if name not in given_names)
        assert (status, answer["error"]["field"]) == (422, missing)


def test_unknown_stale_and_early_customers_get_the_reason(
    call: Callable[..., Caller], path: Path
) -> None:
    cutoffs = {"c-1": CUTOFF - 37 * HOUR, "c-2": CUTOFF + HOUR}
    write(path, *content(cutoffs=cutoffs))
    outcomes = {}
    for when_stale in ("refuse", "flag"):
        service = call(path, CHURN_WHEN_STALE=when_stale)
        answers = [service("/predict", {"customer_id": f"c-{n}"}) for n in ("1", "2", "x")]
        outcomes[when_stale] = [status for status, _, _ in answers]
        assert "ahead of data time" in answers[1][1]["error"]["message"]
        assert {answer["error"]["field"] for _, answer, _ in answers[1:]} == {"customer_id"}
    assert outcomes == {"refuse": [409, 409, 404], "flag": [200, 409, 404]}
    flagged = answers[0][1]
    assert (flagged["stale"], flagged["cutoff"]) == (True, "2025-02-27T11:00:00Z")
    patient = call(path, CHURN_MAX_AGE_HOURS="37", CHURN_WHEN_STALE="refuse")
    assert patient("/predict", {"customer_id": "c-1"})[1]["stale"] is False


def test_a_store_of_other_features_is_503_and_full_requests_go_on(
    call: Callable[..., Caller], path: Path
) -> None:
    service = call(path)
    assert service("/predict", {"customer_id": "c-1"})[0] == 200
    write(path, *content(features=features_named(THREE)))
    status, answer, headers = service("/predict", {"customer_id": "c-1"})
    assert (status, answer["error"]["field"], headers["retry-after"]) == (503, "online_store", "60")
    assert "support_tickets_90d" in answer["error"]["message"]
    assert service("/predict", VALID)[0] == 200
    rows = service("/predict_batch", {"rows": [VALID, {"customer_id": "c-1"}]})[1]["predictions"]
    assert [row.get("error", {}).get("status") for row in rows] == [None, 503]
    health = service("/health")[1]
    assert (health["status"], health["online_store"]["usable"]) == ("healthy", False)
    write(path, *content())
    assert service("/predict", {"customer_id": "c-1"})[0] == 200


def test_health_says_what_the_store_holds(call: Callable[..., Caller], path: Path) -> None:
    service = call(path, CHURN_MAX_AGE_HOURS="20.5", CHURN_WHEN_STALE="flag")
    assert service("/health")[1]["online_store"] == {
        "reachable": True,
        "usable": True,
        "newest_cutoff": STAMP,
        "data_time": STAMP,
        "features": list(FEATURE_NAMES),
        "max_age_hours": 20.5,
        "when_stale": "flag",
        "reason": None,
    }


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("CHURN_MAX_AGE_HOURS", {"max_age_hours": float("nan")}),
        ("CHURN_WHEN_STALE", {"when_stale": "guess"}),
    ],
)
def test_a_setting_that_is_wrong_refuses_to_start(
    release: Release, tmp_path: Path, name: str, wrong: dict
) -> None:
    store = dataclasses.replace(OnlineStore(str(tmp_path / "online.db")), **wrong)
    with (
        pytest.raises(UserError, match=f"refused to start: {name}") as refused,
        serve(SERVICE, release.directory, online=store),
    ):
        pass
    assert "\n" not in str(refused.value)


bad_rows = st.sampled_from(
    [body for body, status, _ in BAD_BODIES if status == 422 and len(body) < 1000]
)
ids = st.sampled_from([*STORED, "nobody", "ć", "c-1\0", "'; --", "c-1 "])
by_id = ids.map(lambda customer_id: json.dumps({"customer_id": customer_id}).encode())
good_rows = st.sampled_from([*STORED.values()]).map(
    lambda row: json.dumps({"customer_id": "any"} | row).encode()
)


@given(st.lists(st.one_of(bad_rows, by_id, good_rows), min_size=1, max_size=12))
@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_row_of_a_batch_is_answered_as_it_is_alone(whole: Caller, rows: list[bytes]) -> None:
    status, answer, _ = whole("/predict_batch", b'{"rows": [' + b",".join(rows) + b"]}")
    assert status == 200
    assert list(answer) == ["predictions"]
    assert len(answer["predictions"]) == len(rows)
    for row, in_batch in zip(rows, answer["predictions"], strict=True):
        status, alone, _ = whole("/predict", row)
        if status == 200:
            difference = in_batch.pop("churn_probability") - alone.pop("churn_probability")
            # The last digit may round the other way: the model sums in another order.
            assert abs(difference) < 1.5e-4
            assert in_batch == alone
        else:
            if alone["error"]["field"] == "body":
                alone["error"]["field"] = "row"
            assert in_batch == {"error": {"status": status} | alone["error"]}


@pytest.fixture
def whole(call: Callable[..., Caller], path: Path) -> Caller:
    write(path, *content(cutoffs={"c-1": CUTOFF - 40 * HOUR, "c-2": CUTOFF + 2 * HOUR}))
    return call(path)


def test_a_thousand_rows_are_answered_and_not_one_more(
    call: Callable[..., Caller], path: Path, model: Model
) -> None:
    service = call(path)
    names = list(STORED)
    rows: list[dict] = [
        {"customer_id": names[n % 20]} | (STORED[names[n % 20]] if n % 3 else {})
        for n in range(MAX_ROWS)
    ]
    status, answer, _ = service("/predict_batch", {"rows": rows})
    assert status == 200
    assert [p["customer_id"] for p in answer["predictions"]] == [r["customer_id"] for r in rows]
    for row, prediction in zip(rows, answer["predictions"], strict=True):
        probability = expected(model, row["customer_id"])
        assert prediction["churn_probability"] == pytest.approx(probability, abs=6e-5)
        assert ("cutoff" in prediction) == (len(row) == 1)
    status, answer, _ = service("/predict_batch", {"rows": [*rows, rows[0]]})
    assert (status, answer["error"]["field"]) == (422, "rows")


def test_a_batch_is_scored_in_one_call(
    call: Callable[..., Caller], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = call(path)
    model = service.application.served.model
    shapes = []

    def counted(rows: np.ndarray, real: Callable = model.probabilities) -> np.ndarray:
        shapes.append(rows.shape)
        return real(rows)

    monkeypatch.setattr(model, "probabilities", counted)
    rows = [VALID, {"customer_id": "c-1"}, {}, {"customer_id": "nobody"}, VALID]
    assert service("/predict_batch", {"rows": rows})[0] == 200
    assert shapes == [(3, 5)]
    assert service("/predict_batch", {"rows": [{}, {"customer_id": "nobody"}]})[0] == 200
    assert shapes == [(3, 5)]


def test_a_batch_has_a_body_limit_of_its_own(call: Callable[..., Caller], path: Path) -> None:
    service = call(path)
    body = json.dumps({"rows": [VALID]}).encode()
    assert service("/predict_batch", body + b" " * (MAX_BATCH_BYTES - len(body)))[0] == 200
    status, answer, headers = service("/predict_batch", body + b" " * MAX_BATCH_BYTES)
    assert (status, answer["error"]["field"], headers["connection"]) == (413, "body", "close")


@contextmanager
def gone(path: Path) -> Generator[None]:
    kept = path.rename(path.with_name("kept.db"))
    yield
    kept.rename(path)


@contextmanager
def overwritten(path: Path) -> Generator[None]:
    kept = path.rename(path.with_name("kept.db"))
    path.write_bytes(b"not a database" * 1_000)
    yield
    kept.rename(path)


@contextmanager
def locked(path: Path) -> Generator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("BEGIN EXCLUSIVE")
        yield


@pytest.mark.parametrize("fault", [gone, overwritten, locked])
def test_a_file_that_cannot_be_read_is_503_until_it_can(
    fault: Callable[[Path], AbstractContextManager[None]], call: Callable[..., Caller], path: Path
) -> None:
    with fault(path):
        service = call(path)
        refused(service)
    assert until(lambda: service("/predict", {"customer_id": "c-1"})[0] == 200)


def refused(service: Caller) -> None:
    status, answer, headers = service("/predict", {"customer_id": "c-1"})
    assert (status, answer["error"]["field"], headers["retry-after"]) == (503, "online_store", "1")
    assert service("/predict_batch", {"rows": [{"customer_id": "c-1"}]})[0] == 503
    assert service("/predict", VALID)[0] == 200


needs_redis = pytest.mark.skipif(
    not shutil.which("redis-server"), reason="install redis-server to run this"
)


@pytest.fixture
def redis_server(tmp_path: Path) -> Generator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@needs_redis
def test_a_redis_that_is_killed_costs_the_ids_alone_and_comes_back_by_itself(
    release: Release, redis_server: RedisServer, model: Model
) -> None:
    write(redis_server.url, *content())
    with serve(SERVICE, release.directory, online=OnlineStore(redis_server.url)) as url:

        def by_id() -> int:
            return ask(url, {"customer_id": "c-1"}).status

        first = ask(url, {"customer_id": "c-1"})
        assert first.status == 200
        assert first.json()["churn_probability"] == pytest.approx(expected(model, "c-1"), abs=6e-5)
        redis_server.kill()
        for _ in range(20):
            assert by_id() == 503
            assert ask(url, VALID).status == 200
        rows = [VALID, {"customer_id": "c-1"}, VALID]
        mixed = ask(url, {"rows": rows}, path="/predict_batch")
        assert mixed.status == 200
        found = [row.get("error", {}).get("field") for row in mixed.json()["predictions"]]
        assert found == [None, "online_store", None]
        redis_server.start()
        write(redis_server.url, *content())
        assert until(lambda: by_id() == 200)


@needs_redis
def test_a_redis_that_hangs_holds_up_nobody_with_features(
    release: Release, redis_server: RedisServer
) -> None:
    write(redis_server.url, *content())
    with serve(SERVICE, release.directory, online=OnlineStore(redis_server.url)) as url:
        assert ask(url, {"customer_id": "c-1"}).status == 200
        process = redis_server.process
        assert process
        process.send_signal(signal.SIGSTOP)
        by_id: list[int] = []
        waiting = threading.Thread(
            target=lambda: by_id.append(ask(url, {"customer_id": "c-1"}).status)
        )
        waiting.start()
        full = []
        while waiting.is_alive():
            full.append(ask(url, VALID).status)
        process.send_signal(signal.SIGCONT)
        assert by_id == [503]
        # Held up, there would be one or two: those sent before it.
        assert len(full) > 5
        assert set(full) == {200}
        assert until(lambda: ask(url, {"customer_id": "c-1"}).status == 200)
