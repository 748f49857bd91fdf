"""The prediction log in the lake: every answered prediction once, by the UTC day it was answered.

Services write to logs that are quick to write (contract/logged.py). A pass over such a log adds
what is new to the partitions of its days, reads back that they have it, and only then trims the
log. One that ends in between finds the same rows again, knows them by their keys, and goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from churn_assets.contract.features import FEATURES, Feature
from churn_assets.contract.logged import LoggedPrediction, decode_logged
from churn_assets.data.checks import CheckResult
from churn_assets.data.lake import Lake
from churn_assets.data.log_sources import LogSource, OpenLog, Rows
from churn_assets.data.tables import TIMESTAMP

PREDICTION_LOG = "prediction_log"
ROWS_AT_ONCE = 200_000
_ORDER = ("at", "key")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECONDS_A_DAY = 86_400_000_000
_TYPES = {"int": pa.int64(), "float": pa.float64()}


def _schema(features: Sequence[Feature] = FEATURES) -> pa.Schema:
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("request_id", pa.string(), nullable=False),
            pa.field("at", TIMESTAMP, nullable=False),
            pa.field("customer_id", pa.string(), nullable=False),
            *(pa.field(feature.name, _TYPES[feature.dtype]) for feature in features),
            pa.field("probability", pa.float64(), nullable=False),
            pa.field("champion", pa.float64()),
            pa.field("challenger", pa.float64()),
            pa.field("arm", pa.string(), nullable=False),
            pa.field("model_version", pa.string(), nullable=False),
            pa.field("release_id", pa.string(), nullable=False),
            pa.field("bento", pa.string()),
            pa.field("cutoff", TIMESTAMP),
            pa.field("stale", pa.bool_()),
            pa.field("latency_us", pa.int64(), nullable=False),
            # Null in what was logged before there was a hold-out.
            pa.field("holdout", pa.bool_()),
        ]
    )


SCHEMA = _schema()


@dataclass(frozen=True)
class Ingested:
    """What one pass over a log did.

    added: rows by day that the lake did not have. known: rows it had from a pass that did not get
    to trim them. trimmed: rows removed from the log. served: added rows by arm and release.
    oldest, newest: when the added rows were answered. left_alone: what was not read, and why.
    removed: what workers that have ended left behind without rows.
    """

    added: dict[date, int] = field(default_factory=dict)
    known: int = 0
    trimmed: int = 0
    served: dict[tuple[str, str], int] = field(default_factory=dict)
    oldest: datetime | None = None
    newest: datetime | None = None
    left_alone: dict[str, str] = field(default_factory=dict)
    removed: tuple[str, ...] = ()


def ingest(source: LogSource, lake: Lake, *, rows_at_once: int = ROWS_AT_ONCE) -> Ingested:
    """Bring what `source` holds into the lake, then trim it.

    Raises UserError when another pass holds the log, or log or lake cannot be used; what was not
    trimmed then is found again.
    """
    added: Counter[date] = Counter()
    served: Counter[tuple[str, str]] = Counter()
    known = trimmed = 0
    answered: list[datetime] = []
    with source.open() as log:
        while rows := log.read(rows_at_once):
            read, table = _decoded(log, rows)
            for day, part in _by_day(table):
                new = _add(lake, day, part)
                known += part.num_rows - new.num_rows
                if new.num_rows:
                    added[day] += new.num_rows
                    served.update(_served(new))
                    found = pc.call_function("min_max", [new["at"]]).as_py()
                    answered += [found["min"], found["max"]]
            trimmed += sum(log.trim(part) for part in read)
        removed = log.clear()
        left_alone = dict(log.left_alone)
    return Ingested(
        added=dict(sorted(added.items())),
        known=known,
        trimmed=trimmed,
        served=dict(sorted(served.items())),
        oldest=min(answered, default=None),
        newest=max(answered, default=None),
        left_alone=left_alone,
        removed=tuple(removed),
    )


def read_log(lake: Lake, days: Sequence[date], columns: Sequence[str]) -> pa.Table:
    """`columns` of the partitions of `days` that are there, oldest first.

    A column that a partition was written without is null there.
    """
    there = sorted(set(days) & set(lake.days(PREDICTION_LOG)))
    if not there:
        return SCHEMA.empty_table().select(list(columns))
    return lake.read(PREDICTION_LOG, days=there, columns=columns, schema=SCHEMA)


def _decoded(log: OpenLog, rows: Sequence[Rows]) -> tuple[list[Rows], pa.Table]:
    """The rows that can be read, and all of them as a table; the writers of others are skipped."""
    read, tables = [], [SCHEMA.empty_table()]
    for part in rows:
        try:
            tables.append(log_table(part.keys, [decode_logged(record) for record in part.records]))
            read.append(part)
        except (msgspec.MsgspecError, KeyError, ValueError) as error:
            log.skip(part, f"a record cannot be read: {error}")
    return read, pa.concat_tables(tables)


def log_table(keys: Sequence[str], predictions: Sequence[LoggedPrediction]) -> pa.Table:
    """Logged predictions as rows of the lake's table; null for features a release does not have.

    Raises KeyError for a feature that the contract does not have.
    """
    values: dict[str, list[float | None]] = {
        feature.name: [None] * len(predictions) for feature in FEATURES
    }
    for row, prediction in enumerate(predictions):
        for name, value in zip(prediction.features, prediction.values, strict=True):
            values[name][row] = value
    columns: dict[str, pa.Array] = {"key": pa.array(keys, pa.string())}
    for column in SCHEMA:
        if column.name in values:
            columns[column.name] = pa.array(values[column.name], pa.float64()).cast(column.type)
        elif column.name != "key":
            found = [getattr(prediction, column.name) for prediction in predictions]
            if column.type == TIMESTAMP:
                columns[column.name] = pa.array(found, pa.int64()).cast(TIMESTAMP)
            else:
                columns[column.name] = pa.array(found, column.type)
    return pa.table(columns, SCHEMA)


def _by_day(table: pa.Table) -> Iterable[tuple[date, pa.Table]]:
    """The rows of each UTC day, oldest first. A clock that jumped may leave years between two."""
    days = table["at"].cast(pa.int64()).to_numpy() // _MICROSECONDS_A_DAY
    for day in np.unique(days):
        yield (_EPOCH + timedelta(days=int(day))).date(), table.filter(pa.array(days == day))


def _add(lake: Lake, day: date, rows: pa.Table) -> pa.Table:
    """Add to a partition those of `rows` it does not have, and return them; all are there then."""
    there = SCHEMA.empty_table()
    if day in lake.days(PREDICTION_LOG):
        there = lake.read(PREDICTION_LOG, days=[day])
    known = pc.call_function("is_in", [rows["key"]], pc.SetLookupOptions(there["key"]))
    new = rows.filter(pc.call_function("invert", [known]))
    if new.num_rows:
        # What was written before the contract had a feature has nothing for it.
        together = pa.concat_tables([there, new], promote_options="default")
        table = together.select(SCHEMA.names).cast(SCHEMA)
        lake.write(PREDICTION_LOG, day, day, table, day_of="at", order_by=_ORDER)
    stored = lake.read(PREDICTION_LOG, days=[day], columns=["key"])["key"]
    missing = (
        rows.num_rows
        - pc.call_function(
            "sum", [pc.call_function("is_in", [rows["key"]], pc.SetLookupOptions(stored))]
        ).as_py()
    )
    if missing:
        raise RuntimeError(
            f"{missing} of {rows.num_rows} predictions of {day} are not in the lake; another run "
            "replaced the partition, and the log was not trimmed"
        )
    return new


def _served(rows: pa.Table) -> dict[tuple[str, str], int]:
    groups = rows.group_by(["arm", "release_id"]).aggregate([("key", "count")]).to_pylist()
    return {(group["arm"], group["release_id"]): group["key_count"] for group in groups}


def all_trimmed(ingested: Ingested) -> CheckResult:
    """Whether what the lake took over is what left the log, and nothing was skipped."""
    taken = sum(ingested.added.values()) + ingested.known
    passed = ingested.trimmed == taken and not ingested.left_alone
    figures = {"taken_over": taken, "trimmed": ingested.trimmed}
    if ingested.left_alone:
        told = "; ".join(f"{name}: {why}" for name, why in ingested.left_alone.items())
        return CheckResult(False, f"left alone: {told}", figures)
    return CheckResult(passed, f"{taken:,} rows taken over, {ingested.trimmed:,} trimmed", figures)


def keys_unique(lake: Lake, days: Sequence[date]) -> CheckResult:
    """Whether no key is twice in the partitions of `days`."""
    there = sorted(set(days) & set(lake.days(PREDICTION_LOG)))
    if not there:
        return CheckResult(True, "no prediction was ingested", {"rows": 0, "twice": 0})
    keys = lake.read(PREDICTION_LOG, days=there, columns=["key"])["key"]
    twice = len(keys) - pc.call_function("count_distinct", [keys]).as_py()
    figures = {"rows": len(keys), "twice": twice}
    return CheckResult(not twice, f"{twice:,} of {len(keys):,} keys are there twice", figures)
