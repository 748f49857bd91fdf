"""The ledger of held-out windows: every look at one, so that a second look is no secret."""

from __future__ import annotations

import os
from datetime import date, datetime
from pathlib import Path

import msgspec

from churn_assets.errors import UserError


class Window(msgspec.Struct, frozen=True):
    """A held-out window: the feature day whose customers were judged, and what churn was there."""

    day: date
    horizon_days: int
    activity_days: int


class Look(msgspec.Struct, frozen=True):
    """One evaluation on a held-out window.

    rows_hash: of the rows judged, with their outcomes. data_hash: of the whole training set.
    """

    window: Window
    rows_hash: str
    data_hash: str
    model: str
    version: str
    mlflow_run: str
    dagster_run: str
    at: datetime


class Use(msgspec.Struct, frozen=True):
    """The place of a look among those at its window.

    number: 1 when the window was fresh. same_rows: how many of the earlier ones saw the very same
    rows; late events change them. versions: the versions judged on it before.
    """

    window: Window
    rows_hash: str
    number: int
    same_rows: int
    versions: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """What a person should know of it."""
        if self.number == 1:
            return f"the held-out window of {self.window.day} was used for the first time"
        return (
            f"the held-out window of {self.window.day} was used for the {_ordinal(self.number)} "
            f"time (before: version {', '.join(self.versions)}): figures on it flatter a model "
            "that was changed after an earlier look"
        )


def record_look(ledger: Path, look: Look) -> Use:
    """Append `look` to the ledger, on disk before this returns, and say the how manieth it is.

    Call it before the rows are judged: a look that is cut short has still been one. Raises
    UserError when a line of the ledger cannot be read, since a look may be lost with it.
    """
    earlier = [seen for seen in read_ledger(ledger) if seen.window == look.window]
    ledger.parent.mkdir(parents=True, exist_ok=True)
    with ledger.open("ab") as file:
        file.write(msgspec.json.encode(look) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return Use(
        window=look.window,
        rows_hash=look.rows_hash,
        number=len(earlier) + 1,
        same_rows=sum(seen.rows_hash == look.rows_hash for seen in earlier),
        versions=tuple(dict.fromkeys(seen.version for seen in earlier)),
    )


def read_ledger(ledger: Path) -> list[Look]:
    """Every look, oldest first. Raises UserError naming the line that cannot be read."""
    try:
        lines = ledger.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    looks = []
    for number, line in enumerate(lines, 1):
        try:
            looks.append(msgspec.json.decode(line, type=Look))
        except msgspec.MsgspecError as error:
            raise UserError(
                f"line {number} of {ledger} cannot be read ({error}); put it right from a backup, "
                "or remove the line and accept that this look is forgotten"
            ) from error
    return looks


def _ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10)
    return f"{number}{ending or 'th'}"
