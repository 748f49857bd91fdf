"""One training a week, however many ask for it; and asking a Dagster that runs elsewhere."""

from collections.abc import Generator
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import pytest
from command import churn

from churn_assets.defs.remote import RemoteDagster
from churn_assets.defs.schedules import training_schedule
from churn_assets.defs.weekly import (
    REASON,
    WEEK,
    stop_unless_first,
    trained_in,
    week_of,
    week_tags,
)
from churn_assets.errors import UserError

MONDAY = datetime(2026, 11, 23, 6, tzinfo=UTC)
TAGS = week_tags("2026-W48")


@dg.asset
def training_set(context: dg.AssetExecutionContext) -> None:
    stop_unless_first(context.instance, context.run)


@dg.asset(deps=[training_set])
def trained_model(context: dg.AssetExecutionContext) -> None:
    if context.run.tags.get("fails") == "early":
        raise dg.Failure("before there is a model")


@dg.asset(deps=[trained_model])
def evaluation_report(context: dg.AssetExecutionContext) -> None:
    if context.run.tags.get("fails") == "gates":
        raise dg.Failure("refused")


DEFS = dg.Definitions(
    assets=[training_set, trained_model, evaluation_report],
    jobs=[dg.define_asset_job("training", selection="*")],
)


@pytest.fixture
def instance() -> Generator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


def train(instance: dg.DagsterInstance, **tags: str) -> dg.ExecuteInProcessResult:
    job = DEFS.resolve_job_def("training")
    return job.execute_in_process(instance=instance, tags={**TAGS, **tags}, raise_on_error=False)


def tick(instance: dg.DagsterInstance) -> Any:
    return training_schedule(
        dg.build_schedule_context(instance=instance, scheduled_execution_time=MONDAY)
    )


@pytest.mark.parametrize(
    ("moment", "zone", "week"),
    [
        (MONDAY, "UTC", "2026-W48"),
        (datetime(2026, 11, 22, 23, 30, tzinfo=UTC), "UTC", "2026-W47"),
        (datetime(2026, 11, 22, 23, 30, tzinfo=UTC), "Europe/Berlin", "2026-W48"),
        (datetime(2027, 1, 3, 12, tzinfo=UTC), "UTC", "2026-W53"),
    ],
)
def test_a_week_is_that_of_iso_8601_in_the_zone_of_the_schedules(moment, zone, week) -> None:
    assert week_of(moment, zone) == week


def test_the_schedule_asks_once_a_week(instance: dg.DagsterInstance) -> None:
    assert tick(instance).tags == {WEEK: "2026-W48", REASON: "weekly training of 2026-W48"}
    done = train(instance)
    assert done.success
    skipped = tick(instance)
    assert isinstance(skipped, dg.SkipReason)
    assert done.run_id in skipped.skip_message


@pytest.mark.parametrize(("fails", "counts"), [("early", False), ("gates", True)])
def test_a_week_whose_model_was_refused_is_done_and_one_without_a_model_is_not(
    instance: dg.DagsterInstance, fails: str, counts: bool
) -> None:
    done = train(instance, fails=fails)
    assert not done.success
    found = trained_in(instance, "2026-W48")
    assert (found is not None and found.run_id == done.run_id) == counts


def test_a_week_that_is_being_trained_is_not_asked_for_again(instance: dg.DagsterInstance) -> None:
    run = instance.create_run_for_job(DEFS.resolve_job_def("training"), tags=TAGS)
    assert trained_in(instance, "2026-W48") == instance.get_run_by_id(run.run_id)
    assert isinstance(tick(instance), dg.SkipReason)
    assert trained_in(instance, "2026-W49") is None


def test_of_two_that_ask_at_once_the_later_stops_before_it_trains(
    instance: dg.DagsterInstance,
) -> None:
    first = instance.create_run_for_job(DEFS.resolve_job_def("training"), tags=TAGS)
    late = train(instance)
    assert not late.success
    (told,) = (e for e in late.all_events if e.is_step_failure)
    assert first.run_id in str(told.step_failure_data.user_failure_data)
    assert [e.step_key for e in late.all_events if e.is_step_failure] == ["training_set"]


def test_by_hand_for_a_reason_there_is_no_week(instance: dg.DagsterInstance) -> None:
    assert train(instance).success
    job = DEFS.resolve_job_def("training")
    again = job.execute_in_process(instance=instance, tags={REASON: "prices rose"})
    assert again.success


def test_a_dagster_that_does_not_answer_is_told_without_the_token() -> None:
    with pytest.raises(UserError, match="does not answer") as told:
        RemoteDagster("http://127.0.0.1:1", "secret").trained_in("2026-W48")
    assert "secret" not in str(told.value)


@pytest.mark.parametrize(
    ("url", "told"),
    [("dagster:3000", "not the address"), ("http://me:secret@host", "set CHURN_DAGSTER_TOKEN")],
)
def test_an_address_that_is_none(url: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        RemoteDagster(url)


def test_training_needs_data_and_a_reason_that_is_one(tmp_path) -> None:
    assert "there is no data" in churn(tmp_path / "home", None, "train").refusal()
    told = churn(tmp_path / "home", None, "train", "--reason", " ").refusal()
    assert "say why to train again" in told
