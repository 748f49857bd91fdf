"""`make run`: the whole graph in this process, stage by stage, and what came out of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import NoReturn

import dagster as dg
import msgspec
from dagster import DagsterInstance, DagsterRunStatus, RunsFilter
from dagster._core.errors import DagsterExecutionInterruptedError
from dagster._core.instance.ref import InstanceRef
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus
from dagster_shared.error import SerializableErrorInfo

from churn_assets.data.late import find_outdated, spanning, to_follow
from churn_assets.data.windows import cutoff_of, days_between, label_partition
from churn_assets.defs.dagster_storage import open_dagster
from churn_assets.defs.partitions import SETTINGS, range_tags
from churn_assets.defs.resources import Project, read_record
from churn_assets.defs.sensors import ENDINGS
from churn_assets.defs.summary import collect, show
from churn_assets.defs.weekly import REASON, trained_in, week_of, week_tags
from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.lifecycle.experiments import Ending, reconcile, require_store
from churn_assets.lifecycle.promotion import PromotionDecision
from churn_assets.lifecycle.records import DeploymentRecord
from churn_assets.lifecycle.registry import read_registry

LAUNCHED_BY = "churn/launched_by"
LAUNCHER = {LAUNCHED_BY: "make run"}
BY_HAND = {LAUNCHED_BY: "churn"}
# Whoever called the command calls it again; a daemon would do it behind their back.
NOT_AGAIN = {"dagster/max_retries": "0"}
EXECUTING = [
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
]

# What a step prints belongs on this terminal. Dagster would pass it through two processes a step,
# which cost time, and which a Ctrl-C ends before the run they serve.
NO_CAPTURE = {
    "compute_logs": {
        "module": "dagster._core.storage.noop_compute_log_manager",
        "class": "NoOpComputeLogManager",
    }
}


@dataclass
class Outcome:
    """How one Dagster run ended: the checks that stopped it, and the seconds it took."""

    success: bool
    run_id: str
    seconds: float
    refused_by: dict[str, str] = field(default_factory=dict)

    def require(self) -> None:
        """Raise UserError when a blocking check did not pass."""
        for name, reason in self.refused_by.items():
            raise UserError(f"{name} did not pass: {reason}")


@dataclass
class Launcher:
    """Runs jobs of the code location in this process, on the home's instance."""

    definitions: dg.Definitions
    instance: DagsterInstance
    project: Project
    interrupted: Callable[[], bool]
    seconds: dict[str, float] = field(default_factory=dict)

    def run(
        self,
        stage: str,
        job: str,
        assets: Sequence[str] | None = None,
        days: tuple[date, date] | None = None,
        why: Mapping[str, str] | None = None,
        config: Mapping[str, Mapping[str, object]] | None = None,
    ) -> Outcome:
        """Execute `job`, or some of its assets, for a range of days.

        `why`: more tags of the run. `config`: of its assets.

        Raises UserError for what a person can mend, KeyboardInterrupt when a person stopped it;
        any other error of a step is raised as it is.
        """
        tags = {**LAUNCHER, **NOT_AGAIN, **(why or {})}
        if days:
            tags |= range_tags(*days)
        started = time.monotonic()
        result = self.definitions.resolve_job_def(job).execute_in_process(
            instance=self.instance,
            tags=tags,
            asset_selection=[dg.AssetKey(name) for name in assets] if assets else None,
            run_config={
                "loggers": {"progress": {}},
                "ops": {asset: {"config": dict(given)} for asset, given in (config or {}).items()},
            },
            raise_on_error=False,
        )
        if self.interrupted():
            raise KeyboardInterrupt
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


def _raise_failure(result: dg.ExecuteInProcessResult) -> NoReturn:
    steps = [e for e in result.all_events if e.is_step_failure]
    errors = [e.step_failure_data.error for e in steps]
    errors += [e.job_failure_data.error for e in result.all_events if e.is_job_failure]
    for cause in (cause for error in errors for cause in _causes(error)):
        if cause.cls_name in _names(UserError):
            raise UserError(cause.message.split(f"{cause.cls_name}: ", 1)[-1].strip())
    told = next((error.to_string() for error in errors if error), "no step says why")
    what = steps[0].step_key if steps else "the job"
    raise RuntimeError(f"{what} failed in Dagster run {result.run_id}\n{told}")


def _causes(error: SerializableErrorInfo | None) -> Iterator[SerializableErrorInfo]:
    """An error and what it was raised from, outermost first."""
    while error is not None:
        yield error
        error = error.cause


def _names(kind: type[Exception]) -> set[str]:
    """The names of an exception class and of all that are made of it."""
    return {kind.__name__}.union(*(_names(sub) for sub in kind.__subclasses__()))


def missing_days(
    launcher: Launcher, asset: str, first: date, last: date
) -> tuple[date, date] | None:
    """The smallest range that holds every day of `asset` that Dagster or the lake does not have.

    All of them, when a blocking check of the asset has last said that they are not to be used.
    """
    if failed_checks(launcher, asset):
        return first, last
    recorded = launcher.instance.get_materialized_partitions(dg.AssetKey(asset))
    stored = set(launcher.project.lake.days(asset))
    lacking = [
        day
        for day in days_between(first, last)
        if day not in stored or day.isoformat() not in recorded
    ]
    return (lacking[0], lacking[-1]) if lacking else None


def failed_checks(launcher: Launcher, asset: str) -> list[str]:
    """The blocking checks of `asset` that did not pass when they were last evaluated.

    Dagster stops a run at such a check; the next run would find the partitions and go on.
    """
    graph = launcher.definitions.resolve_asset_graph()
    blocking = [
        key
        for key in graph.get(dg.AssetKey(asset)).check_keys
        if graph.get_check_spec(key).blocking
    ]
    storage = launcher.instance.event_log_storage
    records = storage.get_latest_asset_check_execution_by_key(blocking)
    return [
        key.name
        for key, record in records.items()
        if record.status is AssetCheckExecutionRecordStatus.FAILED
    ]


def close_dead_runs(instance: DagsterInstance) -> list[str]:
    """Fail the runs an earlier `make run` left behind when it was killed; returns their ids.

    Only safe while the home is held exclusively: then none of them can still be running.
    """
    dead = instance.get_runs(RunsFilter(statuses=EXECUTING, tags=LAUNCHER))
    for run in dead:
        instance.report_run_failed(run, "The `make run` that executed this run is gone.")
    return [run.run_id for run in dead]


def close_dead_server_runs(
    why: str = "The `make up` that executed this run is gone.",
) -> list[str]:
    """Fail the runs an earlier code server left behind when it was killed; returns their ids.

    Dagster does not see that their processes are gone, and nothing that must wait for them would
    ever start. Only safe before the servers of this home do.
    """
    with open_dagster(DagsterInstance.get) as instance:
        executing = instance.get_runs(RunsFilter(statuses=EXECUTING))
        dead = [run for run in executing if not LAUNCHER.items() <= run.tags.items()]
        for run in dead:
            instance.report_run_failed(run, why)
    return [run.run_id for run in dead]


def close_lost_runs(alive: Callable[[], Container[int]]) -> list[str]:
    """Fail the runs whose process is none of `alive()`, ids of processes; returns the runs' ids.

    For runs a code server started, whose process it watches as long as it lives itself. One that
    has not begun has no process yet: the time it is given for that ends it.
    """
    with DagsterInstance.get() as instance:
        executing = instance.get_runs(RunsFilter(statuses=EXECUTING))
        ours = {run.run_id: _process_of(instance, run) for run in executing}
        # Asked after the runs, so that the process of each has begun, and then for the runs once
        # more, as one may have come to its end.
        living = alive()
        lost = [run for run, pid in ours.items() if pid is not None and pid not in living]
        # No ids at all would be every run.
        still = RunsFilter(run_ids=lost, statuses=EXECUTING) if lost else None
        dead = instance.get_runs(still) if still else []
        for run in dead:
            instance.report_run_failed(run, "The process that executed this run is gone.")
    return [run.run_id for run in dead]


def _process_of(instance: DagsterInstance, run: dg.DagsterRun) -> int | None:
    """The process a code server has started for `run`, as Dagster noted it."""
    if LAUNCHED_BY in run.tags:
        return None
    noted = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
    events = [entry.get_dagster_event().engine_event_data.metadata for entry in noted]
    pids = [metadata["pid"].value for metadata in events if "pid" in metadata]
    return int(str(pids[-1])) if pids else None


def reconcile_mlflow(home: Home) -> dict[str, Ending]:
    """Give the MLflow runs of this home the endings of their Dagster runs; returns what changed."""
    with open_dagster(DagsterInstance.get) as instance:
        return _reconcile(Project.of(home), instance)


def _reconcile(project: Project, instance: DagsterInstance) -> dict[str, Ending]:
    trained = RunsFilter(statuses=list(ENDINGS), job_name="training")
    endings = {run.run_id: ENDINGS[run.status] for run in instance.get_runs(trained)}
    return reconcile(project.mlflow_client(), endings) if endings else {}


@contextlib.contextmanager
def watch_interrupts() -> Generator[Callable[[], bool]]:
    """Gives a function that tells whether a Ctrl-C or a SIGTERM has come since the block began.

    Dagster raises an error in the signal handler. Python drops it when it happens to be in a
    destructor or a weak reference's callback: then the signal is sent once more. What the
    interpreter writes to the pipe stays, whatever becomes of the error.
    """
    received, written = os.pipe()
    os.set_blocking(received, False)
    os.set_blocking(written, False)
    before = signal.set_wakeup_fd(written, warn_on_full_buffer=False), sys.unraisablehook

    def interrupted() -> bool:
        with contextlib.suppress(BlockingIOError):
            return not {signal.SIGINT, signal.SIGTERM}.isdisjoint(os.read(received, 4096))
        return False

    def once_more(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, DagsterExecutionInterruptedError | KeyboardInterrupt):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            before[1](dropped)

    sys.unraisablehook = once_more
    try:
        yield interrupted
    finally:
        signal.set_wakeup_fd(before[0])
        sys.unraisablehook = before[1]
        os.close(received)
        os.close(written)


def claim_lake(project: Project) -> None:
    """Refuse a lake of its own that was filled from another source or calendar.

    Raises UserError; the first run writes down what the lake is for.
    """
    if project.settings.lake is None:
        return
    mine = project.settings.identity()
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
def _the_truth_in_mlflow(project: Project, instance: DagsterInstance) -> Generator[None]:
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
    The caller holds the home. Raises UserError for what a person can mend, and KeyboardInterrupt
    when a person stopped it.
    """
    with _launching(home) as launcher:
        project, instance = launcher.project, launcher.instance
        print(f"home {home.root}\nsource {project.settings.describe_source()}", flush=True)
        claim_lake(project)
        _bring_in_data(launcher)
        week = week_of(project.now(), project.settings.schedules.timezone)
        # By hand, so it trains whatever was done this week; and then this week is done.
        because = {REASON: "make run"} if trained_in(instance, week) else week_tags(week)
        trained = _train(launcher, because)
        if trained.success and _something_to_serve(project, trained.run_id):
            launcher.run("bento", "promotion").require()
        launcher.run("drift", "drift").require()
        _ingest_log(launcher)
        launcher.run("trial", "trial", ["trial_report"]).require()
        launcher.run("performance", "performance").require()
        launcher.run("treatment", "treatment").require()
        launcher.run("service", "watch_service").require()
        launcher.run("decisions", "decisions").require()
        launcher.run("health", "health").require()
        summary = collect(project, instance, trained.run_id, trained.refused_by, launcher.seconds)
    written = home.summary.with_suffix(".tmp")
    written.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    written.replace(home.summary)
    show(summary, home)


def _ingest_log(launcher: Launcher) -> None:
    try:
        launcher.run("log", "ingest_predictions").require()
    except UserError as error:
        # The hourly pass of `make up` may be at it; what is not in the lake yet stays in the log.
        print(f"  {error}; the next pass brings it in", flush=True)


def train(home: Home, reason: str | None) -> Outcome | None:
    """Train on what has matured, judge and register: this week's training, or one for a `reason`.

    None when this week's is there. The caller holds the home. Raises UserError for what a person
    can mend.
    """
    with _launching(home) as launcher:
        week = week_of(launcher.project.now(), launcher.project.settings.schedules.timezone)
        if reason is None and (run := trained_in(launcher.instance, week)):
            print(f"run {run.run_id} is the training of {week}; to train again, give a --reason")
            return None
        return _train(launcher, {REASON: reason} if reason else week_tags(week))


def _something_to_serve(project: Project, run_id: str) -> bool:
    """Whether a version is in Production, or has just been decided to go there."""
    record = read_record(project.home.records, "promotion_decision", run_id)
    decision = msgspec.json.decode(record, type=PromotionDecision)
    return decision.verdict == "promote" or decision.incumbent is not None


def act(home: Home, job: str, asset: str, config: Mapping[str, object]) -> None:
    """A person's word carried out: a job in this process, beside whatever else runs in this home.

    Raises UserError when it is refused; what serves goes on serving.
    """
    with _launching(home, alone=False) as launcher:
        outcome = launcher.run(job, job, why={LAUNCHED_BY: f"churn {job}"}, config={asset: config})
        outcome.require()
        registry = read_registry(launcher.project.mlflow_client(), SETTINGS.model_name)
        print(f"version {registry.production} is in Production (Dagster run {outcome.run_id})")
        if registry.trial is not None:
            print(registry.trial.line())


def promote(home: Home) -> tuple[PromotionDecision, str | None]:
    """Carry out the latest decision, when it says promote and has not been carried out before.

    Returns the decision, whatever it says, and the version that is in Production then. Raises
    UserError when there is none, or it cannot be carried out.
    """
    with _launching(home, alone=False) as launcher:
        record = read_record(launcher.project.home.records, "promotion_decision")
        decision = msgspec.json.decode(record, type=PromotionDecision)
        if decision.verdict == "promote":
            assets = ["production_release", "registry_history"]
            launcher.run("promotion", "promotion", assets, why=BY_HAND).require()
        registry = read_registry(launcher.project.mlflow_client(), SETTINGS.model_name)
        return decision, registry.production


def deploy(home: Home) -> DeploymentRecord:
    """Package what is in Production and deploy it to the target of the settings.

    Raises UserError when nothing is, the bento does not answer as its model does, or it does not
    come to serve.
    """
    with _launching(home, alone=False) as launcher:
        read_record(home.records, "production_release")
        assets = ["churn_bento", "deployment"]
        launcher.run("deployment", "promotion", assets, why=BY_HAND).require()
        return msgspec.json.decode(read_record(home.records, "deployment"), type=DeploymentRecord)


@contextlib.contextmanager
def _launching(home: Home, *, alone: bool = True) -> Generator[Launcher]:
    """alone: the caller holds the home, so what is still executing there is dead."""
    from churn_assets.definitions import defs

    project = Project.of(home)
    if "CHURN_MLFLOW_URI" in os.environ:
        require_store(project.mlflow_client())
    reference = InstanceRef.from_dir(str(home.dagster), overrides=NO_CAPTURE)
    with (
        open_dagster(lambda: DagsterInstance.from_ref(reference)) as instance,
        watch_interrupts() as interrupted,
    ):
        if alone and close_dead_runs(instance):
            _reconcile(project, instance)
        yield Launcher(defs, instance, project, interrupted)


def _train(launcher: Launcher, because: Mapping[str, str]) -> Outcome:
    """Raises UserError when another check than a gate stopped it."""
    with _the_truth_in_mlflow(launcher.project, launcher.instance):
        trained = launcher.run("training", "training", why=because)
    if not all(name.startswith("evaluation_report.") for name in trained.refused_by):
        trained.require()
    return trained


def _bring_in_data(launcher: Launcher) -> None:
    project = launcher.project
    settings = project.settings
    first, last = settings.history(project.now().date())
    with contextlib.suppress(UserError):
        last = max(last, project.data_time())
    settings.require_history(last)
    earliest = settings.earliest_feature_day
    stages = [
        ("raw", settings.raw_tables, first),
        ("features", ("customer_features",), earliest),
        ("labels", ("churn_labels",), label_partition(earliest, settings.windows.horizon_days)),
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
            launcher.run(stage, "daily_refresh", names, (min(starts), max(ends))).require()
    online = project.feature_repo.newest_online()
    if "features" in launcher.seconds or online is None or online < cutoff_of(last):
        launcher.run("online", "daily_refresh", ["online_features"], (last, last)).require()


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
