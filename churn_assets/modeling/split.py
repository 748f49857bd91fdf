"""Which cutoffs train, which choose, and which judge: a split in time, with an embargo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from churn_assets.data.windows import days_between, label_partition, labelled_partition
from churn_assets.errors import UserError


@dataclass(frozen=True)
class Split:
    """Feature days by their part in training, all of them in order of time.

    train: the cutoffs the candidates learn from, oldest first, at least one.
    validation: the cutoff that chooses between candidates.
    test: the newest labelled cutoff; it judges the chosen model, once.
    The labels of each part have matured by the first cutoff of the next one.
    """

    train: tuple[date, ...]
    validation: date
    test: date
    horizon_days: int

    @property
    def days(self) -> tuple[date, ...]:
        """Every feature day of the split, oldest first."""
        return (*self.train, self.validation, self.test)

    def to_dict(self) -> dict[str, Any]:
        """The split in JSON's types."""
        return {
            "train": [day.isoformat() for day in self.train],
            "validation": self.validation.isoformat(),
            "test": self.test.isoformat(),
            "horizon_days": self.horizon_days,
        }


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
    validation = _matured_by(days, test, horizon_days)
    latest = _matured_by(days, validation, horizon_days)
    if test is None or validation is None or latest is None:
        raise UserError(_too_short(days, horizon_days))

    train = [latest]
    while len(train) < max_train_cutoffs:
        limit = labelled_partition(train[-1], spacing)
        earlier = [day for day in days if day <= limit]
        if not earlier:
            break
        train.append(earlier[-1])
    return Split(tuple(reversed(train)), validation, test, horizon_days)


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
        f"it takes {needed} (training, validation and test cutoffs {horizon_days} days apart); "
        f"{more} or shorten windows.horizon_days"
    )
