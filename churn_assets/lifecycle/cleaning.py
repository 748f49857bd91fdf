"""What has been archived for long enough goes, with its release and bentos; nothing in use does."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.lifecycle.bento import BENTO_NAME
from churn_assets.lifecycle.history import Evidence, Step, trials
from churn_assets.lifecycle.pointer import Current, read_current
from churn_assets.lifecycle.registry import (
    ARCHIVED_AT_TAG,
    RETENTION,
    Registry,
    Version,
    in_use,
    read_registry,
    transition,
)
from churn_assets.lifecycle.release import RELEASE_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class RetentionPolicy:
    """How long an archived version is kept for rollback, in days of operational time.

    Raises UserError for less than a day.
    """

    keep_archived_days: int = 30

    def __post_init__(self) -> None:
        if self.keep_archived_days < 1:
            raise UserError(
                f"registry.keep_archived_days is {self.keep_archived_days}; set at least 1"
            )


@dataclass(frozen=True)
class Cleaning:
    """What a cleaning does, or would do.

    versions: that go. kept: old enough to go, each with why it stays. files: the directories of
    releases and bentos that go, also those an earlier cleaning was stopped before.
    """

    versions: tuple[str, ...]
    kept: dict[str, str]
    files: tuple[Path, ...]

    def lines(self) -> list[str]:
        """The cleaning for a person."""
        told = [f"version {version}" for version in self.versions]
        told += [str(path) for path in self.files]
        told += [f"kept: version {version}, {why}" for version, why in self.kept.items()]
        return told or ["nothing is old enough"]


def plan_cleaning(
    registry: Registry, policy: RetentionPolicy, home: Home, *, now: datetime
) -> Cleaning:
    """What `clean` would do at `now`. Raises UserError when it cannot be told what serves."""
    current = read_current(home.current)
    oldest = now - timedelta(days=policy.keep_archived_days)
    used = in_use(registry)
    if current is not None:
        used.setdefault(current.model_version, "the service is pointed at it")
    going, kept = [], {}
    for number in reversed(registry.in_stage("Archived")):
        version = registry.version(number)
        archived_at = _archived_at(version)
        if archived_at is None:
            kept[number] = f"it has no tag {ARCHIVED_AT_TAG} that says since when it is archived"
        elif archived_at > oldest:
            continue
        elif number in used:
            kept[number] = used[number]
        else:
            going.append(number)
    releases = [registry.version(number).tags.get(RELEASE_TAG) for number in going]
    releases += _of_trials(registry.history, going)
    return Cleaning(
        tuple(going),
        kept,
        _files(home, [*_cleaned_before(registry.history), *releases], registry, current),
    )


def clean(
    client: MlflowClient, name: str, policy: RetentionPolicy, home: Home, *, now: datetime
) -> Cleaning:
    """Delete what has been archived for longer than the policy says; returns what was done.

    A version that has come into use meanwhile is refused by the registry and stays, with its files.
    """
    planned = plan_cleaning(read_registry(client, name), policy, home, now=now)
    gone, kept = [], dict(planned.kept)
    for number in planned.versions:
        version = read_registry(client, name).version(number)
        figures: dict[str, float | str] = {ARCHIVED_AT_TAG: version.tags[ARCHIVED_AT_TAG]}
        if release_id := version.tags.get(RELEASE_TAG):
            figures[RELEASE_TAG] = release_id
        try:
            transition(
                client,
                name,
                number,
                "Deleted",
                who=RETENTION,
                why=f"archived for more than {policy.keep_archived_days} days",
                evidence=Evidence("retention", figures),
                now=now,
            )
        except UserError as error:
            kept[number] = str(error)
        else:
            gone.append(number)
    registry = read_registry(client, name)
    files = _files(home, _cleaned_before(registry.history), registry, read_current(home.current))
    for path in files:
        _remove(path, home.root)
    return Cleaning(tuple(gone), kept, files)


def _archived_at(version: Version) -> datetime | None:
    try:
        moment = datetime.fromisoformat(version.tags.get(ARCHIVED_AT_TAG, ""))
    except ValueError:
        return None
    return moment.replace(tzinfo=moment.tzinfo or UTC)


def _cleaned_before(history: Sequence[Step]) -> list[str]:
    """The releases of versions that were deleted; the history alone still knows them."""
    gone = [step for step in history if step.target == "Deleted"]
    found = [
        str(step.evidence.figures[RELEASE_TAG])
        for step in gone
        if RELEASE_TAG in step.evidence.figures
    ]
    return found + _of_trials(history, {step.version for step in gone})


def _of_trials(history: Sequence[Step], versions: Collection[str]) -> list[str]:
    """The releases of trials that are over and had one of `versions`."""
    return [
        trial.release_id
        for trial in trials(history)
        if trial.until is not None and not {trial.champion, trial.challenger}.isdisjoint(versions)
    ]


def _files(
    home: Home, releases: Sequence[str | None], registry: Registry, current: Current | None
) -> tuple[Path, ...]:
    """The directories of `releases` and of the bentos made of them, but for what is in use."""
    kept = in_use(registry)
    used = {v.tags.get(RELEASE_TAG) for v in registry.versions.values() if v.version in kept}
    used.add(current.release_id if current else None)
    bentos = home.bentoml / "bentos" / BENTO_NAME
    found = []
    for release_id in dict.fromkeys(releases):
        if not release_id or release_id in used or Path(release_id).name != release_id:
            continue
        found += [home.releases / release_id, *sorted(bentos.glob(f"{release_id}-*"))]
    return tuple(path for path in found if path.is_dir())


def _remove(path: Path, root: Path) -> None:
    """Out of its place in one step, so that nobody ever finds half of it."""
    (root / "tmp").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cleaned-", dir=root / "tmp") as folder:
        moved = Path(folder) / path.name
        os.rename(path, moved)
        shutil.rmtree(moved)
