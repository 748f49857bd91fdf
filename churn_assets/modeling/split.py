"""Which cutoffs train, which calibrate, which judge: a split in time, with an embargo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
from numpy.typing import NDArray

from churn_assets.contract.trial import position
from churn_assets.data.windows import days_between, label_partition, labelled_partition
from churn_assets.errors import UserError

# Half learn, and enough are left to judge that a comparison can be sure.
_PARTS = {"train": (0.0, 0.5), "calibration": (0.5, 0.7), "test": (0.7, 1.0)}
_SALT = "the parts of a split by customers"


@dataclass(frozen=True)
class Split:
    """Feature days by their part in training, all of them in order of time.

    train: the cutoffs the model learns from, oldest first, at least one. Candidates are compared by
    a backtest among them.
    calibration: the cutoff the probabilities of the chosen model are calibrated on.
    test: the newest labelled cutoff; it judges the chosen model, once.
    The labels of each part have matured by the first cutoff of the next one, or, where the parts
    are `by_customers`, no customer is in two of them.
    """

    train: tuple[date, ...]
    calibration: date
    test: date
    horizon_days: int
    by_customers: bool = False

    @property
    def days(self) -> tuple[date, ...]:
        """Every feature day of the split, oldest first."""
        return (*self.train, self.calibration, self.test)

    def to_dict(self) -> dict[str, Any]:
        """The split in JSON's types."""
        return {
            "train": [day.isoformat() for day in self.train],
            "calibration": self.calibration.isoformat(),
            "test": self.test.isoformat(),
            "horizon_days": self.horizon_days,
            "by_customers": self.by_customers,
        }

    def takes(self, day: date, customers: Sequence[str]) -> NDArray[np.bool_]:
        """Which of the customers of a feature day are rows of its part [customers]."""
        if not self.by_customers:
            return np.ones(len(customers), dtype=np.bool_)
        low, high = _PARTS["test" if day == self.test else "train"]
        if day == self.calibration:
            low, high = _PARTS["calibration"]
        place = position(_SALT)
        places = np.array([place(customer) for customer in customers], dtype=np.float64)
        return (low <= places) & (places < high)


def recent_split(
    feature_days: Sequence[date],
    horizon_days: int,
    *,
    max_train_cutoffs: int = 6,
    spacing_days: int = 7,
) -> Split:
    """Split the newest feature days with matured labels by customers instead of by time.

    For a training that cannot wait: a split in time learns from nothing younger than two horizons
    before the newest label. Here the newest labelled day judges, the day before it calibrates, and
    those before that train, `spacing_days` apart. No customer is in two parts, so that none is
    judged by an outcome it was learned from; what happened to everybody at that time is in all of
    them, which the model card says.

    Raises UserError when there are fewer than three days.
    """
    days = sorted(set(feature_days))
    if len(days) < 3:
        raise UserError(
            f"{len(days)} sound feature days have matured labels, and a training on recent ones "
            "takes 3 (training, calibration and test); wait for labels, or train by plan `history`"
        )
    train = [days[-3]]
    while len(train) < max_train_cutoffs:
        earlier = [day for day in days if day <= labelled_partition(train[-1], spacing_days)]
        if not earlier:
            break
        train.append(earlier[-1])
    return Split(tuple(reversed(train)), days[-2], days[-1], horizon_days, by_customers=True)


def temporal_split(
    feature_days: Sequence[date],
    horizon_days: int,
    *,
    max_train_cutoffs: int = 6,
    spacing_days: int | None = None,
) -> Split:
    """Split the feature days that have matured labels, with an embargo of one horizon.

    The embargo: a cutoff + horizon <= the next part's first cutoff, so that no label of one part
    looks into the time the next part is judged on (Lopez de Prado, Advances in Financial Machine
    Learning, ch. 7). Training cutoffs lie `spacing_days` apart (one horizon unless given, so that
    their label windows do not overlap), at most `max_train_cutoffs` of them. Where a day is
    missing, the nearest earlier one stands in; that only widens the gap.

    Raises UserError when the history is too short, saying how many days it takes.
    """
    if horizon_days < 1:
        raise UserError(f"a horizon of {horizon_days} days is not possible; set at least 1")
    if max_train_cutoffs < 1:
        raise UserError(
            f"training.max_train_cutoffs is {max_train_cutoffs}; set at least 1 training cutoff"
        )
    spacing = horizon_days if spacing_days is None else spacing_days
    if spacing < 1:
        raise UserError(f"training.spacing_days is {spacing}; set at least 1")

    days = sorted(set(feature_days))
    test = days[-1] if days else None
    calibration = _matured_by(days, test, horizon_days)
    latest = _matured_by(days, calibration, horizon_days)
    if test is None or calibration is None or latest is None:
        raise UserError(_too_short(days, horizon_days))

    train = [latest]
    while len(train) < max_train_cutoffs:
        limit = labelled_partition(train[-1], spacing)
        earlier = [day for day in days if day <= limit]
        if not earlier:
            break
        train.append(earlier[-1])
    return Split(tuple(reversed(train)), calibration, test, horizon_days)


@dataclass(frozen=True)
class Fold:
    """One origin of a backtest: what is learned before it, and the cutoff it is judged on.

    calibration: the cutoff between, whose rows calibrate; None when the history has none to spare.
    """

    train: tuple[date, ...]
    calibration: date | None
    judged: date

    def to_dict(self) -> dict[str, Any]:
        """The fold in JSON's types."""
        return {
            "train": [day.isoformat() for day in self.train],
            "calibration": self.calibration.isoformat() if self.calibration else None,
            "judged": self.judged.isoformat(),
        }


def rolling_origins(split: Split, most: int) -> tuple[Fold, ...]:
    """The newest `most` origins to compare candidates on, newest first; a short history has fewer.

    Method: Tashman, Out-of-sample tests of forecasting accuracy (2000), with an expanding window.
    Every fold repeats the whole procedure on an earlier day: train, then calibrate, then judge, an
    embargo apart, all of it among the training cutoffs, so that the calibration and the test cutoff
    choose nothing. With two training cutoffs, no fold is calibrated; with a single one, the
    calibration cutoff has to judge. So it does where the parts are by customers: their cutoffs lie
    too close for an embargo, and the customers it judges by were learned from by no candidate.
    """
    if split.by_customers:
        return (Fold(split.train, None, split.calibration),)
    train, horizon = list(split.train), split.horizon_days
    folds: list[Fold] = []
    for judged in reversed(train):
        calibration = _matured_by(train, judged, horizon)
        learned = _until(train, _matured_by(train, calibration, horizon))
        if calibration is not None and learned:
            folds.append(Fold(learned, calibration, judged))
    if not folds:
        for judged in (train[-1], split.calibration):
            learned = _until(train, _matured_by(train, judged, horizon))
            if learned:
                return (Fold(learned, None, judged),)
    return tuple(folds[:most])


def _until(days: list[date], last: date | None) -> tuple[date, ...]:
    return tuple(day for day in days if last is not None and day <= last)


def _matured_by(days: Sequence[date], day: date | None, horizon_days: int) -> date | None:
    """The newest of `days` whose labels have matured by the cutoff of `day`."""
    if day is None:
        return None
    matured = [d for d in days if label_partition(d, horizon_days) <= day]
    return matured[-1] if matured else None


def _too_short(days: Sequence[date], horizon_days: int) -> str:
    needed = 2 * horizon_days + 1
    if not days:
        have, span = "no feature day has matured labels", 0
    else:
        span = len(days_between(days[0], days[-1]))
        have = f"feature days with matured labels span {span} days ({days[0]} to {days[-1]})"
    more = f"load at least {needed - span} more days" if span < needed else "fill the missing days"
    return (
        f"the history is too short to train: {have}, and with a horizon of {horizon_days} days "
        f"it takes {needed} (training, calibration and test cutoffs {horizon_days} days apart); "
        f"{more} or shorten windows.horizon_days"
    )
