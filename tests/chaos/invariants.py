"""What has to hold whatever was killed, each checked by code on what is stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow.parquet as pq
from dagster import AssetKey, DagsterEventType, DagsterRun

from churn_assets.data.lake import Lake
from churn_assets.data.prediction_log import PREDICTION_LOG
from churn_assets.lifecycle.promotion import PromotionDecision
from churn_assets.lifecycle.records import every_record
from churn_assets.lifecycle.registry import POLICY, Registry, read_registry
from churn_assets.monitoring.rollback import RollbackDecision
from tests.chaos.shop import UNFINISHED, Shop

MODEL = "churn"
# A job of ops: its steps materialize nothing.
NO_ASSETS = {"clean_archive"}


class Invariants:
    """The invariants of a shop; what cannot change any more is looked at once."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self._runs_seen: set[str] = set()
        self._files_seen: set[tuple[str, int, int]] = set()

    def events(self) -> list[str]:
        """Steps that finished and whose events Dagster has not, or not all."""
        found = []
        for run in self._shop.instance.get_runs():
            if run.run_id in self._runs_seen or run.status in UNFINISHED:
                continue
            faults = self._events_of(run)
            found += faults
            if not faults:
                self._runs_seen.add(run.run_id)
        return found

    def _events_of(self, run: DagsterRun) -> list[str]:
        begun = self._shop.steps(run.run_id, DagsterEventType.STEP_START)
        done = self._shop.steps(run.run_id, DagsterEventType.STEP_SUCCESS)
        failed = self._shop.steps(run.run_id, DagsterEventType.STEP_FAILURE)
        made = self._shop.steps(run.run_id, DagsterEventType.ASSET_MATERIALIZATION)
        # Steps go one after the other: only the last one can have been stopped in the middle.
        where = f"run {run.run_id} of {run.job_name}"
        found = [
            f"{where}: {step} has no end, and others came after it"
            for step in begun[:-1]
            if step not in done and step not in failed
        ]
        if run.job_name not in NO_ASSETS:
            found += [f"{where}: {s} is done and made nothing" for s in done if s not in made]
        open_ones = {step for step in begun[-1:] if step not in done}
        for record in self._shop.home.records.glob(f"*/{run.run_id}.json"):
            asset = record.parent.name
            if asset not in made and asset not in open_ones:
                found.append(f"{where}: {asset} left a record, and Dagster knows nothing of it")
        return found

    def partitions(self) -> list[str]:
        """Files of the lake that are not whole, and days that only lake or only Dagster has."""
        root, found = self._shop.home.lake, []
        for path in root.rglob("day=*/*"):
            state = path.stat()
            seen = (str(path), state.st_ino, state.st_mtime_ns)
            if seen in self._files_seen:
                continue
            if fault := _fault_of(path):
                found.append(f"{path.relative_to(root)}: {fault}")
            else:
                self._files_seen.add(seen)
        lake = Lake(str(root))
        for folder in sorted(root.iterdir()):
            if folder.name == PREDICTION_LOG or not any(folder.glob("day=*")):
                continue
            stored = {day.isoformat() for day in lake.days(folder.name)}
            known = self._shop.instance.get_materialized_partitions(AssetKey(folder.name))
            if stored != known:
                found.append(f"{folder.name}: lake and Dagster differ on {sorted(stored ^ known)}")
        return found

    def registry(self) -> list[str]:
        """What contradicts itself in the registry."""
        return self._read_registry().faults()

    def decisions(self) -> list[str]:
        """Decisions of the policy that were carried out twice, or never."""
        records, history = self._shop.home.records, self._read_registry().history
        promotions = every_record(records, "promotion_decision", PromotionDecision)
        rollbacks = every_record(records, "rollback_decision", RollbackDecision)
        wanted = {d.id for d in promotions if d.verdict == "promote" and d.who == POLICY}
        wanted |= {d.id for d in rollbacks if d.verdict == "rollback"}
        times = Counter(step.decision for step in history if step.decision)
        return [
            *(f"{name} was carried out {n} times" for name, n in times.items() if n > 1),
            *(f"{name} was never carried out" for name in sorted(wanted - set(times))),
        ]

    def predictions(self, acknowledged: Iterable[str]) -> tuple[int, int]:
        """How many acknowledged predictions the lake has not, and how many it has twice."""
        lake = Lake(str(self._shop.home.lake))
        kept = Counter(lake.read(PREDICTION_LOG)["request_id"].to_pylist())
        lost = set(acknowledged) - set(kept)
        return len(lost), sum(times > 1 for times in kept.values())

    def stored(self) -> dict[str, Callable[[], list[str]]]:
        """The invariants that need nothing but what is stored, by name."""
        return {
            "events": self.events,
            "partitions": self.partitions,
            "registry": self.registry,
            "decisions": self.decisions,
        }

    def _read_registry(self) -> Registry:
        from mlflow import MlflowClient

        return read_registry(MlflowClient(self._shop.home.mlflow_uri), MODEL)


def _fault_of(path: Path) -> str | None:
    if path.name != "part-0.parquet":
        return "does not belong into a partition"
    try:
        pq.ParquetFile(path).read()
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    return None
