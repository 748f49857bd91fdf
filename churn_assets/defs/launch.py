"""`make run`: the whole graph in this process, stage by stage, and what came out of it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date

import dagster as dg
from dagster import DagsterInstance, DagsterRunStatus, RunsFilter

from churn_assets.data.features import earliest_feature_day
from churn_assets.data.late import find_outdated, spanning, to_follow
from churn_assets.data.windows import cutoff_of, days_between, label_partition
from churn_assets.defs.partitions import range_tags
from churn_assets.defs.resources import Project
from churn_assets.defs.sensors import ENDINGS
from churn_assets.defs.summary import collect, show
from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.lifecycle.experiments import Ending, reconcile

LAUNCHER = {"churn/launched_by": "make run"}


@dataclass
class Outcome:
    """How one Dagster run ended: the checks that stopped it, and the seconds it took."""

    success: bool
    run_id: str
    seconds: float
    refused_by: dict[str, str] = field(default_factory=dict)


@dataclass
class Launcher:
    """Runs jobs of the code location in this process, on the home's instance."""

    definitions: dg.Definitions
    instance: DagsterInstance
    project: Project
    seconds: dict[str, float] = field(default_factory=dict)

    def run(
        self,
        stage: str,
        job: str,
        assets: Sequence[str] | None = None,
        days: tuple[date, date] | None = None,
    ) -> Outcome:
        """Execute `job`, or some of its assets, for a range of days.

        Raises UserError for what a person can mend; any other error of a step is raised as it is.
        """
        tags = dict(LAUNCHER)
        if days:
            tags |= range_tags(*days)
        started = time.monotonic()
        result = self.definitions.resolve_job_def(job).execute_in_process(
            instance=self.instance,
            tags=tags,
            asset_selection=[dg.AssetKey(name) for name in assets] if assets else None,
            run_config={"loggers": {"progress": {}}},
            raise_on_error=False,
        )
        seconds = time.monotonic() - started
        self.seconds[stage] = round(self.seconds.get(stage, 0) + seconds, 2)
        refused = {
            f"{check.asset_key.path[-1]}.{check.check_name}": check.description or "not passed"
            for check in result.get_asset_check_evaluations()
            if check.blocking and not check.passed and check.severity is dg.AssetCheckSeverity.ERROR
        }
        if not result.success and not refused:
            _raise_failure(result)
        return Outcome(result.success, result.run_id, seconds, refused)


def _raise_failure(result: dg.ExecuteInProcessResult) -> None:
    for event in result.all_events:
        if event.is_step_failure:
            error = event.step_failure_data.error
            while error is not None and error.cause is not None:
                error = error.cause
            if error is not None and error.cls_name == "UserError":
                raise UserError(error.message.split("UserError: ", 1)[-1].strip())
            raise RuntimeError(
                f"{event.step_key} failed in Dagster run {result.run_id}\n"
                f"{error.to_string() if error else event.message}"
            )
    raise RuntimeError(f"Dagster run {result.run_id} failed before its first step")


def missing_days(
    launcher: Launcher, asset: str, first: date, last: date
) -> tuple[date, date] | None:
    """The smallest range that holds every day of `asset` that Dagster or the lake does not have."""
    recorded = launcher.instance.get_materialized_partitions(dg.AssetKey(asset))
    stored = set(launcher.project.lake.days(asset))
    lacking = [
        day
        for day in days_between(first, last)
        if day not in stored or day.isoformat() not in recorded
    ]
    return (lacking[0], lacking[-1]) if lacking else None


def close_dead_runs(instance: DagsterInstance) -> list[str]:
    """Fail the runs an earlier `make run` left behind when it was killed; returns their ids.

    Only safe while the home is held exclusively: then none of them can still be running.
    """
    unfinished = [
        DagsterRunStatus.NOT_STARTED,
        DagsterRunStatus.STARTING,
        DagsterRunStatus.STARTED,
        DagsterRunStatus.CANCELING,
    ]
    dead = instance.get_runs(RunsFilter(statuses=unfinished, tags=LAUNCHER))
    for run in dead:
        instance.report_run_failed(run, "The `make run` that executed this run is gone.")
    return [run.run_id for run in dead]


def reconcile_mlflow(home: Home) -> dict[str, Ending]:
    """Give the MLflow runs of this home the endings of their Dagster runs; returns what changed."""
    with DagsterInstance.get() as instance:
        return _reconcile(Project.of(home), instance)


def _reconcile(project: Project, instance: DagsterInstance) -> dict[str, Ending]:
    trained = RunsFilter(statuses=list(ENDINGS), job_name="training")
    endings = {run.run_id: ENDINGS[run.status] for run in instance.get_runs(trained)}
    return reconcile(project.mlflow_client(), endings) if endings else {}


def check_same_source(project: Project) -> None:
    """Refuse a home, or a lake of its own, that was filled from another source or calendar.

    Raises UserError; the first run of a home, and of a lake, writes down what it is for.
    """
    marker = project.home.root / "source.json"
    mine = project.settings.identity()
    if not marker.exists():
        marker.write_text(mine, encoding="utf-8")
    elif marker.read_text(encoding="utf-8") != mine:
        raise UserError(
            f"{project.home.root} holds the data of another source, calendar or windows; "
            "set CHURN_HOME to another folder for this configuration"
        )
    if project.settings.lake is None:
        return
    try:
        theirs = project.lake.get_bytes("about", "source.json").decode()
    except FileNotFoundError:
        project.lake.put("about", "source.json", mine.encode())
    else:
        if theirs != mine:
            raise UserError(
                f"the lake {project.settings.lake} holds the data of another source, calendar or "
                "windows; set lake to another prefix for this configuration"
            )


@contextlib.contextmanager
def _the_truth_in_mlflow(project: Project, instance: DagsterInstance) -> Iterator[None]:
    """However the block ends, MLflow's runs say what Dagster's say."""
    try:
        yield
    finally:
        import mlflow

        mlflow.end_run()
        _reconcile(project, instance)


def run_everything(home: Home) -> None:
    """Materialize the whole graph: what is missing of the data, then a model and all it leads to.

    Prints progress and a summary, and writes the summary to `$CHURN_HOME/run/summary.json`.
    Raises UserError for what a person can mend.
    """
    from churn_assets.definitions import defs

    project = Project.of(home)
    print(f"home {home.root}\nsource {project.settings.describe_source()}", flush=True)
    with home.exclusive(), DagsterInstance.get() as instance:
        check_same_source(project)
        close_dead_runs(instance)
        launcher = Launcher(defs, instance, project)
        _bring_in_data(launcher)
        with _the_truth_in_mlflow(project, instance):
            trained = launcher.run("training", "training")
            if trained.success:
                launcher.run("bento", "build_bento")
            elif any(not name.startswith("evaluation_report.") for name in trained.refused_by):
                name, reason = next(iter(trained.refused_by.items()))
                raise UserError(f"{name}: {reason}")
            launcher.run("drift", "drift")
        summary = collect(project, instance, trained.run_id, trained.refused_by, launcher.seconds)
    home.summary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    show(summary, home)


def _bring_in_data(launcher: Launcher) -> None:
    project = launcher.project
    settings = project.settings
    first, last = settings.history(project.now().date())
    with contextlib.suppress(UserError):
        last = max(last, project.data_time())
    earliest = earliest_feature_day(first, settings.windows, project.features)
    first_label = label_partition(earliest, settings.windows.horizon_days)
    if first_label > last:
        raise UserError(
            f"the source covers {first} to {last}; labels need data up to {first_label} at least: "
            "bring in a longer history"
        )
    stages = [
        ("raw", settings.raw_tables, first),
        ("features", ("customer_features",), earliest),
        ("labels", ("churn_labels",), first_label),
    ]
    for stage, assets, since in stages:
        lacking = [
            (asset, days)
            for asset in assets
            if (days := missing_days(launcher, asset, since, last))
        ]
        lacking += _outdated(project, assets)
        if lacking:
            starts, ends = zip(*(days for _, days in lacking), strict=True)
            names = list(dict.fromkeys(asset for asset, _ in lacking))
            _refresh(launcher, stage, names, (min(starts), max(ends)))
    online = project.feature_repo.newest_online()
    if "features" in launcher.seconds or online is None or online < cutoff_of(last):
        _refresh(launcher, "online", ["online_features"], (last, last))


def _outdated(project: Project, assets: Sequence[str]) -> list[tuple[str, tuple[date, date]]]:
    """Which of `assets` have partitions that late or corrected events made outdated, and when."""
    settings, lake, ranges = project.settings, project.lake, []
    for asset in assets:
        if asset in settings.raw_tables:
            found = find_outdated(
                lake, project.source, asset, settings.late_events, now=project.now()
            )
            for outdated in found:
                print(f"  {outdated.reason}", flush=True)
            days = spanning(outdated.day for outdated in found)
        else:
            days = to_follow(lake, asset, settings.windows)
        if days:
            ranges.append((asset, days))
    return ranges


def _refresh(
    launcher: Launcher, stage: str, assets: Sequence[str], days: tuple[date, date]
) -> None:
    outcome = launcher.run(stage, "daily_refresh", assets, days)
    if not outcome.success:
        name, reason = next(iter(outcome.refused_by.items()))
        raise UserError(f"{name}: {reason}")
