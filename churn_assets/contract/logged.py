"""The prediction log: its record, and how its files and its table lie in a store.

A record is self-contained: it names the features its values are of, so that whoever reads the log
needs neither the release nor the service it came from.

    SQLite    one file a worker process, "<writer>.sqlite" in the directory of the log, beside it
              "<writer>.lock", which the worker holds for as long as it lives
    Postgres  one table for all workers

A row is the record under (writer, number). Writers are never the same, and a writer never uses a
number again, so the two are the prediction's key, however often its request id is used.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

Arm = Literal["champion", "challenger"]
Durability = Literal["process", "power"]
WhenBroken = Literal["refuse", "serve"]

LOG_VARIABLE = "CHURN_PREDICTION_LOG"
DURABILITY_VARIABLE = "CHURN_LOG_DURABILITY"
WHEN_BROKEN_VARIABLE = "CHURN_LOG_WHEN_BROKEN"
OFF = "off"
POSTGRES_SCHEMES = ("postgresql://", "postgres://")

# In PRAGMA user_version of a file, and in the name of the table. A reader leaves others alone.
# A field that is added at the end of a record with a default changes no format: who knows it reads
# records without it, and who does not know it leaves it out.
FORMAT = 1
FILE_SUFFIX = ".sqlite"
LOCK_SUFFIX = ".lock"
CREATE_FILE = "CREATE TABLE prediction (number INTEGER PRIMARY KEY, record BLOB NOT NULL)"
TABLE = f"churn_prediction_log_v{FORMAT}"
CREATE_TABLE = (
    f"CREATE TABLE IF NOT EXISTS {TABLE} "
    "(writer text, number bigint, record bytea NOT NULL, PRIMARY KEY (writer, number))"
)
# What the connections of services call themselves.
LOG_APPLICATION = "churn prediction log"
# Of pg_advisory_lock: who makes the table, and who ingests.
TABLE_LOCK = 0x636875726E0001
INGEST_LOCK = 0x636875726E0002


class LoggedPrediction(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One answered prediction.

    request_id: the caller's or a made one; in a batch with the number of the row. at: microseconds
    since the epoch, by the clock of the service. features, values: names and values, in the order
    of the release. probability: as it was answered. champion, challenger: by each model that
    scored, unrounded. arm: whose score was answered; model_version is that model's. cutoff: of
    stored features, in microseconds since the epoch, None where the request brought them.
    latency_us: from the arrival of the request to the answer, before it was logged. holdout: as it
    was answered, None by a service that knew of no hold-out.
    """

    request_id: str
    at: int
    customer_id: str
    features: Sequence[str]
    values: Sequence[float]
    probability: float
    champion: float | None
    challenger: float | None
    arm: Arm
    model_version: str
    release_id: str
    bento: str | None
    cutoff: int | None
    stale: bool | None
    latency_us: int
    holdout: bool | None = None


encode_logged = msgspec.msgpack.Encoder().encode
decode_logged = msgspec.msgpack.Decoder(LoggedPrediction).decode


def is_postgres(location: str) -> bool:
    """Whether `location` is the URL of a Postgres server rather than a directory."""
    return location.startswith(POSTGRES_SCHEMES)


def without_password(url: str) -> str:
    """A URL as it may be shown: nothing but the scheme, the user, the host and the database."""
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    name = user.partition(":")[0]
    return f"{parts.scheme}://{name + '@' if name else ''}{host}{parts.path}"


def one_line_without_password(error: Exception, url: str) -> str:
    """What an error about the server at `url` says, as it may be shown."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for secret in (url, urlsplit(url).password):
        text = text.replace(secret, "***") if secret else text
    return text


def hold(lock: Path) -> int | None:
    """Lock a file, made where it is missing; its descriptor, or None when another has it.

    The lock goes with the process, however it ends. Raises OSError.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between the two calls another may have removed the file as that of a dead worker.
        if os.fstat(descriptor).st_nlink:
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
