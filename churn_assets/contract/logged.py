"""The prediction log's record: what is kept of every answered prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

Arm = Literal["champion", "challenger"]


class LoggedPrediction(msgspec.Struct, frozen=True, gc=False):
    """One answered prediction.

    request_id: the caller's or a made one; in a batch with the number of the row. at: microseconds
    since the epoch, by the clock of the service. values: the features, in the order of the release.
    probability: as it was answered. champion, challenger: by each model that scored, unrounded.
    arm: whose score was answered; model_version is that model's. cutoff: of stored features, in
    microseconds since the epoch, None where the request brought them. latency_us: from the arrival
    of the request to the answer, before it was logged.
    """

    request_id: str
    at: int
    customer_id: str
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
