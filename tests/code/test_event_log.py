from pathlib import Path
from typing import Any, cast

import dagster as dg
import pytest
from dagster._core.instance import InstanceRef

from churn_assets.defs.event_log import BatchedSqliteEventLogStorage

DAYS = dg.DailyPartitionsDefinition("2024-01-01", end_date="2024-02-01")


@dg.asset(partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run())
def events(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    for key in context.partition_keys:
        context.add_asset_metadata({"rows": int(key[-2:])}, partition_key=key)
    return dg.MaterializeResult(metadata={"read": 1})


@dg.asset_check(asset=events, blocking=True)
def has_rows() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=True)


def instance_in(folder: Path, module: str, storage: str) -> dg.DagsterInstance:
    (folder / "dagster.yaml").write_text(
        f"""
run_storage:
  module: dagster._core.storage.runs
  class: SqliteRunStorage
  config: {{base_dir: {folder}}}
schedule_storage:
  module: dagster._core.storage.schedules
  class: SqliteScheduleStorage
  config: {{base_dir: {folder}}}
event_log_storage:
  module: {module}
  class: {storage}
  config: {{base_dir: {folder}}}
"""
    )
    return dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(folder)))


def materialized(folder: Path, module: str, storage: str) -> list[tuple]:
    folder.mkdir()
    with instance_in(folder, module, storage) as instance:
        defs = dg.Definitions(assets=[events], asset_checks=[has_rows])
        result = defs.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance,
            tags={
                "dagster/asset_partition_range_start": "2024-01-01",
                "dagster/asset_partition_range_end": "2024-01-31",
            },
        )
        assert result.success
        assert len(instance.get_materialized_partitions(dg.AssetKey("events"))) == 31
        return sorted(
            (
                entry.get_dagster_event().event_type_value,
                entry.get_dagster_event().partition or "",
                entry.get_dagster_event().message or "",
            )
            for entry in instance.all_logs(result.run_id)
            if entry.is_dagster_event and entry.get_dagster_event().partition
        )


@pytest.mark.parametrize("batch", ["0", "7", "1000"])
def test_a_batched_backfill_leaves_the_log_dagsters_own_storage_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: str
):
    monkeypatch.setenv("DAGSTER_EVENT_BATCH_SIZE", "0")
    plain = materialized(
        tmp_path / "plain", "dagster._core.storage.event_log", "SqliteEventLogStorage"
    )
    monkeypatch.setenv("DAGSTER_EVENT_BATCH_SIZE", batch)
    batched = materialized(
        tmp_path / "batched", "churn_assets.defs.event_log", "BatchedSqliteEventLogStorage"
    )
    assert len(plain) == 62
    assert batched == plain


def test_the_configured_storage_is_the_batched_one(tmp_path: Path):
    with instance_in(
        tmp_path, "churn_assets.defs.event_log", "BatchedSqliteEventLogStorage"
    ) as instance:
        assert isinstance(instance.event_log_storage, BatchedSqliteEventLogStorage)


def test_a_batch_that_fails_leaves_nothing_of_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with instance_in(
        tmp_path, "churn_assets.defs.event_log", "BatchedSqliteEventLogStorage"
    ) as instance:
        storage = instance.event_log_storage
        observation = dg.AssetObservation("events", partition="2024-01-01")
        entries = []
        monkeypatch.setattr(storage, "store_event", entries.append)
        instance.report_runless_asset_event(observation)
        monkeypatch.undo()
        with pytest.raises(Exception, match="EventLogEntry"):
            storage.store_event_batch([entries[0], cast("Any", None)])
        records = instance.get_latest_materialization_event(dg.AssetKey("events"))
        assert records is None
        storage.store_event_batch(entries)
        assert instance.fetch_observations(dg.AssetKey("events"), limit=5).records
