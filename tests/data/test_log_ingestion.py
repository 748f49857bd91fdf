"""The prediction log on its way into the lake: once, whatever ends the pass, and only then gone."""

from __future__ import annotations

import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from churn_assets.contract.features import FEATURE_NAMES, FEATURES
from churn_assets.contract.logged import FORMAT, LoggedPrediction, decode_logged, encode_logged
from churn_assets.data import log_sources
from churn_assets.data.lake import Lake
from churn_assets.data.log_sources import LogFiles, LogSource
from churn_assets.data.prediction_log import (
    PREDICTION_LOG,
    SCHEMA,
    all_trimmed,
    ingest,
    keys_unique,
    read_log,
)
from churn_assets.errors import UserError
from churn_service.log_files import LogBusy, SqliteLog

NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)
MIDNIGHT = datetime(2025, 6, 2, tzinfo=UTC)


def microseconds(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def prediction(number: int = 0, at: datetime = NOON, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "request_id": f"r-{number}",
        "at": microseconds(at),
        "customer_id": f"c-{number % 7}",
        "features": FEATURE_NAMES,
        "values": (3, 49.9, 12, 0, 1.5),
        "probability": 0.1235,
        "champion": 0.12345,
        "challenger": None,
        "arm": "champion",
        "model_version": "7",
        "release_id": "v7-abc",
        "bento": None,
        "cutoff": None,
        "stale": None,
        "latency_us": 210,
    }
    return encode_logged(LoggedPrediction(**(fields | changes)))


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "lake"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def worker(directory: Path) -> Iterator[SqliteLog]:
    log = SqliteLog(directory, "process")
    yield log
    log.close()


def in_lake(lake: Lake) -> list[dict[str, Any]]:
    days = lake.days(PREDICTION_LOG)
    return lake.read(PREDICTION_LOG, days=days).to_pylist() if days else []


def request_ids(lake: Lake) -> list[str]:
    return sorted(row["request_id"] for row in in_lake(lake))


def waiting(directory: Path) -> int:
    rows = 0
    for path in directory.glob("*.sqlite"):
        connection = sqlite3.connect(path)
        rows += connection.execute("SELECT count(*) FROM prediction").fetchone()[0]
        connection.close()
    return rows


def test_every_field_arrives_in_the_partition_of_its_day(
    lake: Lake, directory: Path, worker: SqliteLog
):
    worker.write([prediction(1), prediction(2, MIDNIGHT)])
    by_id = {"cutoff": microseconds(MIDNIGHT), "stale": True, "bento": "churn:x", "challenger": 0.5}
    by_id["holdout"] = True
    worker.write([prediction(3, MIDNIGHT, arm="challenger", champion=None, **by_id)])
    done = ingest(LogFiles(directory), lake)
    assert done.added == {date(2025, 6, 1): 1, date(2025, 6, 2): 2}
    assert done.served == {("challenger", "v7-abc"): 1, ("champion", "v7-abc"): 2}
    assert (done.trimmed, done.known, done.left_alone) == (3, 0, {})
    assert (done.oldest, done.newest) == (NOON, MIDNIGHT)
    assert lake.schema(PREDICTION_LOG, date(2025, 6, 1)).equals(SCHEMA)
    first, _, third = sorted(in_lake(lake), key=lambda row: row["request_id"])
    (writer,) = (path.stem for path in directory.glob("*.sqlite"))
    assert first == {
        "key": f"{writer}-1",
        "request_id": "r-1",
        "at": NOON,
        "customer_id": "c-1",
        **dict(zip(FEATURE_NAMES, (3, 49.9, 12, 0, 1.5), strict=True)),
        "probability": 0.1235,
        "champion": 0.12345,
        "challenger": None,
        "arm": "champion",
        "model_version": "7",
        "release_id": "v7-abc",
        "bento": None,
        "cutoff": None,
        "stale": None,
        "latency_us": 210,
        "holdout": None,
    }
    assert (third["arm"], third["champion"], third["challenger"]) == ("challenger", None, 0.5)
    assert (third["cutoff"], third["stale"], third["bento"]) == (MIDNIGHT, True, "churn:x")
    assert third["holdout"] is True


def test_records_of_other_versions_are_read(lake: Lake, directory: Path, worker: SqliteLog):
    """A record is a list: an older one ends before `holdout`, which older readers leave out."""
    new = prediction(2, holdout=True)
    old = msgspec.msgpack.encode(msgspec.msgpack.decode(prediction(1, holdout=True))[:-1])
    names = [name for name in LoggedPrediction.__struct_fields__ if name != "holdout"]
    known = msgspec.defstruct("Known", names, array_like=True)
    assert decode_logged(old).holdout is None
    assert decode_logged(old).latency_us == 210
    reader = msgspec.msgpack.Decoder(known)
    assert reader.decode(new) == reader.decode(prediction(2))
    worker.write([old, new])
    assert ingest(LogFiles(directory), lake).left_alone == {}
    assert [row["holdout"] for row in in_lake(lake)] == [None, True]


def test_partitions_from_before_the_hold_out_are_added_to_and_read(
    lake: Lake, directory: Path, worker: SqliteLog
):
    worker.write([prediction(1, holdout=True), prediction(2, MIDNIGHT, holdout=True)])
    ingest(LogFiles(directory), lake)
    first, second = lake.days(PREDICTION_LOG)

    def read() -> list[dict[str, Any]]:
        return read_log(lake, [first, second], ["request_id", "holdout"]).to_pylist()

    for day, marks in ((second, [True, None]), (first, [None, True])):
        whole = {day: lake.read(PREDICTION_LOG, days=[day]) for day in (first, second)}
        old = whole[day].drop_columns("holdout")
        lake.write(PREDICTION_LOG, day, day, old, day_of="at")
        assert read() == [{"request_id": f"r-{n + 1}", "holdout": marks[n]} for n in range(2)]
        lake.write(PREDICTION_LOG, day, day, whole[day], day_of="at")
    old = lake.read(PREDICTION_LOG, days=[first]).drop_columns("holdout")
    lake.write(PREDICTION_LOG, first, first, old, day_of="at")
    worker.write([prediction(3, holdout=True)])
    ingest(LogFiles(directory), lake)
    assert lake.schema(PREDICTION_LOG, first).equals(SCHEMA)
    assert {row["request_id"]: row["holdout"] for row in in_lake(lake)} == {
        "r-1": None,
        "r-2": True,
        "r-3": True,
    }
    assert read_log(Lake(f"{lake.root}-none"), [first], ["holdout"]).schema.names == ["holdout"]


def test_features_a_release_does_not_have_are_null(lake: Lake, directory: Path, worker: SqliteLog):
    worker.write([prediction(features=FEATURE_NAMES[1:3], values=(20.0, 4)), prediction(1)])
    ingest(LogFiles(directory), lake)
    few, whole = in_lake(lake)
    assert [few[name] for name in FEATURE_NAMES] == [None, 20.0, 4, None, None]
    kinds = {"int": int, "float": float}
    assert [type(whole[f.name]) for f in FEATURES] == [kinds[f.dtype] for f in FEATURES]


def test_a_second_pass_adds_what_came_since(lake: Lake, directory: Path, worker: SqliteLog):
    source = LogFiles(directory)
    for number in range(3):
        worker.write([prediction(number)])
        done = ingest(source, lake)
        assert (done.added, done.trimmed) == ({date(2025, 6, 1): 1}, 1)
        assert waiting(directory) == 0
    assert request_ids(lake) == ["r-0", "r-1", "r-2"]
    assert ingest(source, lake).added == {}
    # Rows that were trimmed do not free their numbers.
    assert keys_unique(lake, lake.days(PREDICTION_LOG)).passed


def test_the_same_request_id_twice_is_two_predictions(
    lake: Lake, directory: Path, worker: SqliteLog
):
    other = SqliteLog(directory, "power")
    for log in (worker, other, worker):
        log.write([prediction(1)])
    ingest(LogFiles(directory), lake)
    other.close()
    assert request_ids(lake) == ["r-1"] * 3


def test_a_log_that_is_not_there_yet_is_no_error(lake: Lake, directory: Path):
    done = ingest(LogFiles(directory), lake)
    assert (done.added, done.trimmed) == ({}, 0)
    assert all_trimmed(done).passed
    assert keys_unique(lake, []).passed
    assert lake.days(PREDICTION_LOG) == []
    directory.mkdir()
    assert ingest(LogFiles(directory), lake).added == {}


def test_files_of_workers_that_ended_go_when_they_are_empty(lake: Lake, directory: Path):
    ended, alive = SqliteLog(directory, "process"), SqliteLog(directory, "process")
    for log in (ended, alive):
        log.write([prediction(1)])
    ended.close()
    assert waiting(directory) == 2
    done = ingest(LogFiles(directory), lake)
    assert len(done.removed) == 1
    left = {path.suffix for path in directory.iterdir() if path.stem == done.removed[0][:32]}
    assert left == set()
    alive.write([prediction(2)])
    assert ingest(LogFiles(directory), lake).removed == ()
    alive.close()
    assert len(ingest(LogFiles(directory), lake).removed) == 1
    assert [path.name for path in directory.iterdir()] == ["ingesting"]
    assert request_ids(lake) == ["r-1", "r-1", "r-2"]


def test_a_clock_that_jumps_makes_no_difference(lake: Lake, directory: Path, worker: SqliteLog):
    moments = [
        datetime(2099, 12, 31, 23, 59, 59, 999999, UTC),
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(1969, 12, 31, 23, 59, 59, 1, UTC),
        NOON,
    ]
    for number, moment in enumerate(moments):
        worker.write([prediction(number, moment)])
    assert worker.waiting().rows == 4
    done = ingest(LogFiles(directory), lake)
    assert list(done.added) == sorted(moment.date() for moment in moments)
    assert {row["at"] for row in in_lake(lake)} == set(moments)
    assert waiting(directory) == 0


def test_what_cannot_be_read_is_left_alone_and_told(lake: Lake, directory: Path):
    names = {}
    for kind in ("good", "newer", "damaged", "strange"):
        log = SqliteLog(directory, "process")
        log.write([prediction(1)] if kind != "strange" else [prediction(1), b"no record"])
        names[kind] = log._path
        log.close()
    connection = sqlite3.connect(names["newer"])
    connection.execute(f"PRAGMA user_version = {FORMAT + 1}")
    connection.close()
    names["damaged"].write_bytes(b"SQLite format 3\0" + bytes(5000))
    for _ in range(2):
        done = ingest(LogFiles(directory), lake)
        assert set(done.left_alone) == {names[k].name for k in ("newer", "damaged", "strange")}
        outcome = all_trimmed(done)
        assert not outcome.passed
        assert f"its format is {FORMAT + 1}, known here is {FORMAT}" in outcome.reason
    assert request_ids(lake) == ["r-1"]
    assert not names["good"].exists()
    assert names["newer"].exists()
    assert names["strange"].exists()


def test_a_file_that_was_only_begun_is_cleared_away(lake: Lake, directory: Path):
    directory.mkdir()
    sqlite3.connect(directory / f"{uuid.uuid4().hex}.sqlite").close()
    assert len(ingest(LogFiles(directory), lake).removed) == 1


# Whatever ends a pass.


class Crash(Exception):
    pass


@dataclass
class Until:
    """Counts what goes past it, and raises before the `last` of it."""

    last: int
    seen: int = 0

    def __call__(self) -> None:
        self.seen += 1
        if self.seen == self.last:
            raise Crash


class Watched:
    """An object whose calls go past a count: once before and once after each."""

    def __init__(self, inner: Any, names: set[str], until: Callable[[], None]):
        self._inner, self._names, self._until = inner, names, until

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in self._names:
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            self._until()
            result = found(*arguments, **named)
            self._until()
            return result

        return call


@dataclass
class Dying:
    """A log that dies with the count."""

    source: LogSource
    until: Callable[[], None]
    place: str = "dying"

    @contextmanager
    def open(self):
        with self.source.open() as log:
            yield Watched(log, {"read", "trim", "clear"}, self.until)


def dies_at_every_step(
    monkeypatch: pytest.MonkeyPatch,
    source: LogSource,
    lake: Lake,
    fill: Callable[[int], None],
) -> int:
    """Ingest what `fill` writes with a pass that dies at a step, then a whole one, for each step.

    Returns how many steps there are.
    """
    connect = log_sources._connect
    for step in range(1, 300):
        fill(step)
        until = Until(step)
        with monkeypatch.context() as patch:
            patch.setattr(log_sources, "_connect", partial(_dying_connection, connect, until))
            dying_lake: Any = Watched(lake, {"read", "write"}, until)
            try:
                ingest(Dying(source, until), dying_lake, rows_at_once=2)
                return step - 1
            except Crash:
                pass
        assert all_trimmed(ingest(source, lake)).passed
    raise AssertionError("it never came to its end")


def _dying_connection(
    connect: Callable[[Path], sqlite3.Connection], until: Callable[[], None], path: Path
) -> Any:
    return Watched(connect(path), {"execute"}, until)


def test_a_pass_may_die_between_any_two_steps(
    monkeypatch: pytest.MonkeyPatch, lake: Lake, directory: Path
):
    monkeypatch.setattr(log_sources, "_TRIMMED_AT_ONCE", 2)
    monkeypatch.setattr(log_sources, "_GAP_SECONDS", 0)
    alive, written = SqliteLog(directory, "process"), []

    def fill(step: int) -> None:
        """Rows of two days from a worker that lives and one that does not."""
        ended = SqliteLog(directory, "process")
        for number, log in enumerate((alive, ended, alive)):
            at = (NOON, MIDNIGHT)[(step + number) % 2]
            written.append(f"r-{step}-{number}")
            log.write([prediction(at=at, request_id=written[-1])])
        ended.close()

    steps = dies_at_every_step(monkeypatch, LogFiles(directory), lake, fill)
    assert steps > 30
    alive.close()
    ingest(LogFiles(directory), lake)
    assert request_ids(lake) == sorted(written)
    assert keys_unique(lake, lake.days(PREDICTION_LOG)).passed
    assert [path.name for path in directory.iterdir()] == ["ingesting"]


def test_the_log_is_not_trimmed_of_what_the_lake_does_not_have(
    monkeypatch: pytest.MonkeyPatch, lake: Lake, directory: Path, worker: SqliteLog
):
    worker.write([prediction(1), prediction(2)])
    forgetful: Any = Watched(lake, set(), lambda: None)
    forgetful.write = lambda table, first, last, rows, **how: lake.write(
        table, first, last, rows.slice(1), **how
    )
    with pytest.raises(RuntimeError, match="1 of 2 predictions of 2025-06-01 are not in the lake"):
        ingest(LogFiles(directory), forgetful)
    assert waiting(directory) == 2


def test_two_passes_at_once_are_refused(lake: Lake, directory: Path, worker: SqliteLog):
    worker.write([prediction(1)])
    source = LogFiles(directory)
    with source.open(), pytest.raises(UserError, match="is being ingested by another run"):
        ingest(source, lake)
    assert ingest(source, lake).trimmed == 1


def test_a_worker_writes_while_it_is_ingested(lake: Lake, directory: Path, worker: SqliteLog):
    worker.write([prediction(number) for number in range(6000)])
    ended, busy = threading.Event(), 0

    def write() -> None:
        nonlocal busy
        number = 6000
        while not ended.is_set() or number < 6100:
            try:
                worker.write([prediction(number)])
                number += 1
            except LogBusy:
                busy += 1
        numbers.append(number)

    numbers: list[int] = []
    thread = threading.Thread(target=write)
    thread.start()
    first = ingest(LogFiles(directory), lake)
    ended.set()
    thread.join()
    assert first.trimmed >= 6000
    ingest(LogFiles(directory), lake)
    assert request_ids(lake) == sorted(f"r-{number}" for number in range(numbers[0]))
    assert waiting(directory) == 0
