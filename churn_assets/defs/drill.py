"""One case of the drill: months of the shop through the jobs and sensors of this code location.

The home, the registry, the bento, the service and the prediction log are real; what is simulated is
the shop, its customers' requests, and the clock. Of what is decided the shop hears of the offers
that its customers were served, and of nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from pathlib import Path
from typing import Any

import dagster as dg
import ibis
import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
from dagster import DagsterInstance
from dagster._core.instance.ref import InstanceRef
from numpy.typing import NDArray

from churn_assets.contract.clock import CLOCK_VARIABLE, set_clock
from churn_assets.contract.request import ROWS
from churn_assets.data.features import customer_features, look_back_days
from churn_assets.data.lake import DAY
from churn_assets.data.offers import offers_table, read_offers, record_offers
from churn_assets.data.prediction_log import PREDICTION_LOG
from churn_assets.data.sources import OfferedShop, ShopSourceConfig, Source, open_source
from churn_assets.data.windows import label_partition, partition_of_cutoff
from churn_assets.defs.launch import NO_CAPTURE, run_everything
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.defs.simulated_daemon import SimulatedDaemon
from churn_assets.drill.cases import HISTORY_DAYS, START, Case
from churn_assets.drill.offer_desk import OfferDesk
from churn_assets.drill.outcome import OUTCOME, Event, Outcome, Treated, outcome, rolling_auc
from churn_assets.drill.sabotage import SABOTEUR, force_into_production
from churn_assets.home import Home
from churn_assets.lifecycle.history import Step
from churn_assets.lifecycle.records import every_record
from churn_assets.lifecycle.registry import NOT_PERSONS, read_registry
from churn_assets.lifecycle.release import fetch_release
from churn_assets.lifecycle.relocation import relocate
from churn_assets.lifecycle.serving import HOST, ask, ask_health, free_port
from churn_assets.modeling.backtest import fitted, predict_churn
from churn_assets.modeling.candidates import STARTS
from churn_assets.modeling.onnx_export import predict_onnx
from churn_assets.modeling.rows import Part, feature_matrix
from churn_assets.monitoring.metric import read_metrics
from churn_assets.monitoring.retraining import RetrainingDecision
from churn_assets.monitoring.rollback import RollbackDecision
from churn_assets.monitoring.treatment import TreatmentReport, entries_of, marked_predictions

REQUESTS_A_DAY = 600
ONE_BY_ONE = 40
_DAY = timedelta(days=1)
_HOURS = (9, 12, 16, 20)
_START_TIMEOUT_S = 60
_ORACLE_CUTOFFS, _ORACLE_SPACING = 6, 7
_STORAGES = {
    "event_log_storage": "OneEngineEventLogStorage",
    "run_storage": "OneEngineRunStorage",
}


@dataclass
class Counts:
    """Requests that were sent, failed, and came late, after the change."""

    sent: int = 0
    after: int = 0
    failed: int = 0
    late: int = 0


def begin(home: Home) -> None:
    """The months before a case: the stable shop in `home`, and its first model in Production."""
    set_clock(Path(os.environ[CLOCK_VARIABLE]), _BEGAN)
    run_everything(home)


def run_case(case: Case, home: Home, clock: Path, *, customers: int = REQUESTS_A_DAY) -> Outcome:
    """Run `case` in `home`, as `begin` left it, and judge it.

    The environment names the configuration and the clock.
    """
    begun = time.monotonic()
    first = START + timedelta(days=HISTORY_DAYS)
    counts = Counts()
    horizon = timedelta(days=SETTINGS.windows.horizon_days)
    offers = OfferDesk(SETTINGS.costs.threshold, horizon) if case.offers else None
    with _instance(home) as instance, _served(home) as url:
        project = Project.of(home)
        daemon = SimulatedDaemon(
            definitions=_definitions(),
            instance=instance,
            resources={"project": project},
            clock_path=clock,
            state_path=home.root / "drill" / "daemon.json",
            began=_BEGAN,
            alter=_late_labels(case),
            after_run=_end_mlflow_run,
            # What the night's jobs found is looked at together, at their end.
            sensors_every=timedelta(hours=12),
        )
        kept = _served_graph(project, "1")
        for day in (first + number * _DAY for number in range(case.days)):
            daemon.run_until(_at(day, 5, 30))
            if case.sabotage and day == case.change:
                forced = _sabotage(case, project, daemon, _at(day, 6))
                # Doing nothing is to let what was forced in serve on.
                kept = _served_graph(project, forced) if case.sabotage == "backwards" else kept
            after = day >= case.change
            _ask_all_day(
                project, url, clock, day, customers, counts, offers if after else None, after=after
            )
        daemon.run_until(_at(first + case.days * _DAY, 5, 30))
        failed = [run for run in daemon.runs if not run.success]
        events = _events(project, daemon)
        days, requests = _judged(case, project, kept)
        treated = _treated(project) if case.offers else None
        history = read_registry(project.mlflow_client(), SETTINGS.model_name).history
    return outcome(
        case,
        days,
        events,
        lost=_lost(case, counts),
        human_steps=_human_steps(history),
        failed_runs=len(failed) + len(daemon.failed_ticks),
        requests=requests,
        horizon_days=SETTINGS.windows.horizon_days,
        seconds=time.monotonic() - begun,
        treated=treated,
    )


def run_and_write(case: Case, home: Home, copied_from: Path) -> None:
    """Run `case` by the clock CHURN_CLOCK names, and write what it came to into the home.

    copied_from: the home in which the months before it were spent.
    """
    relocate(home, copied_from)
    # Up to the change, the shop of the case is the stable one.
    home.claim(SETTINGS.identity(), anew=True)
    result = run_case(case, home, Path(os.environ[CLOCK_VARIABLE]))
    path = home.root / OUTCOME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(result))


def _definitions() -> dg.Definitions:
    from churn_assets.definitions import defs

    return defs


@contextmanager
def _instance(home: Home) -> Generator[DagsterInstance]:
    folder = home.dagster / "events"
    folder.mkdir(exist_ok=True)
    storages = {
        name: {
            "module": "churn_assets.defs.event_log",
            "class": kind,
            "config": {"base_dir": str(folder)},
        }
        for name, kind in _STORAGES.items()
    }
    overrides = {**NO_CAPTURE, **storages}
    reference = InstanceRef.from_dir(str(home.dagster), overrides=overrides)
    with DagsterInstance.from_ref(reference) as instance:
        yield instance


@contextmanager
def _served(home: Home) -> Generator[str]:
    """The service of this home in a process of its own, following what is in Production."""
    port = free_port()
    url = f"http://{HOST}:{port}"
    log = (home.root / "drill" / "service.log").open("ab")
    process = subprocess.Popen(
        [sys.executable, "-m", "churn_assets", "serve", "--port", str(port)],
        env=os.environ | home.environment(),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while ask_health(url) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the service did not start; see {log.name}")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()
        log.close()


def _end_mlflow_run() -> None:
    """The next training would go on in the MLflow run of the last one."""
    import mlflow

    mlflow.end_run()


def _late_labels(case: Case) -> Any:
    """While labels are late, a refresh goes without them; the first one after brings them all."""
    until = _at(case.change + timedelta(days=case.labels_late), 0)

    def alter(job: str, request: dg.RunRequest, at: datetime) -> dg.RunRequest:
        late = case.labels_late and _at(case.change, 0) <= at < until
        if not late or job != "daily_refresh":
            return request
        assets = [*SETTINGS.raw_tables, "customer_features", "online_features"]
        return request._replace(asset_selection=[dg.AssetKey(name) for name in assets])

    return alter


def _sabotage(case: Case, project: Project, daemon: SimulatedDaemon, at: datetime) -> str:
    """The version that is in Production now, against every rule."""
    assert case.sabotage is not None
    names = [feature.name for feature in project.features]
    newest = project.lake.days("customer_features")[-1]
    rows = project.lake.read("customer_features", newest, newest).to_pandas()
    set_clock(daemon.clock_path, at)
    version = force_into_production(
        project.mlflow_client(),
        SETTINGS.model_name,
        project.home.releases,
        feature_matrix(rows, names),
        names.index("days_since_last_order"),
        case.sabotage,
        now=at,
    )
    request = dg.RunRequest(run_key=f"forced-{case.name}")
    daemon.execute("promotion", SABOTEUR, request, at)
    return version


def _ask_all_day(
    project: Project,
    url: str,
    clock: Path,
    day: date,
    customers: int,
    counts: Counts,
    offers: OfferDesk | None,
    *,
    after: bool,
) -> None:
    """Requests of a day: by id, in batches and one by one, about some of the customers.

    `offers` acts on the answers, and the lake is told.
    """
    newest = project.lake.days("customer_features")[-1]
    table = project.lake.read("customer_features", newest, newest, columns=["customer_id"])
    ids = table["customer_id"].to_pylist()
    draw = np.random.default_rng([SETTINGS.seed, day.toordinal()])
    asked = draw.choice(ids, size=min(customers, len(ids)), replace=False).tolist()
    parts = np.array_split(np.array(asked, dtype=object), len(_HOURS))
    for hour, part in zip(_HOURS, parts, strict=True):
        set_clock(clock, _at(day, hour))
        alone = part[: ONE_BY_ONE // len(_HOURS)]
        answers = []
        for customer in alone:
            answer = ask(url, {"customer_id": customer})
            _count(counts, 1, after, answer)
            answers += [msgspec.json.decode(answer.content)] if answer.status == 200 else []
        rows = [{"customer_id": customer} for customer in part[len(alone) :]]
        answer = ask(url, {ROWS: rows}, path="/predict_batch")
        _count(counts, len(rows), after, answer)
        if answer.status == 200:
            answers += msgspec.json.decode(answer.content)["predictions"]
        if offers is not None and (chosen := offers.serve(answers, _at(day, hour))):
            record_offers(project.lake, offers_table(chosen))


def _count(counts: Counts, rows: int, after: bool, answer: Any) -> None:
    if answer.status not in (200, 500):
        raise RuntimeError(f"a request of the drill was answered with {answer.content!r}")
    counts.sent += rows
    if after:
        counts.after += rows
        counts.failed += rows if answer.status >= 500 else 0
        counts.late += rows if rows == 1 and answer.latency_ms > 100 else 0


def _lost(case: Case, counts: Counts) -> float | None:
    if case.sabotage not in ("slow", "failing"):
        return None
    spoiled = counts.failed if case.sabotage == "failing" else counts.late
    return spoiled / max(1, counts.after)


def _events(project: Project, daemon: SimulatedDaemon) -> list[Event]:
    """Alerts of metrics, decisions that ask for something, and steps of the registry, by time."""
    found = [
        Event(m.at, "alert", m.name, m.reason)
        for m in read_metrics(project.home.metrics)
        if m.verdict == "alert"
    ]
    records = project.home.records
    for made in every_record(records, "retraining_decision", RetrainingDecision):
        if made.verdict != "wait" or made.alert:
            what = f"{made.verdict}:{made.trigger}" if made.verdict == "retrain" else made.verdict
            found.append(Event(made.at, "decision", what, "; ".join(made.reasons)))
    for taken in every_record(records, "rollback_decision", RollbackDecision):
        if taken.verdict != "keep":
            found.append(Event(taken.at, "decision", taken.verdict, "; ".join(taken.reasons)))
    found += _verdicts(treatment_reports(project))
    history = read_registry(project.mlflow_client(), SETTINGS.model_name).history
    found += [
        Event(step.at, "step", f"version {step.version} {step.target}", f"{step.who}: {step.why}")
        for step in history
    ]
    found += [
        Event(run.at, "run", f"{run.job} failed", run.run_id)
        for run in daemon.runs
        if not run.success
    ]
    found += [Event(t.at, "run", f"{t.sensor} failed", t.why) for t in daemon.failed_ticks]
    return sorted(found, key=lambda event: event.at)


def treatment_reports(project: Project) -> list[TreatmentReport]:
    """Every one there is, the oldest first."""
    found = every_record(project.home.records, "treatment_report", TreatmentReport)
    return sorted(found, key=lambda report: report.at)


def _verdicts(reports: Sequence[TreatmentReport]) -> list[Event]:
    """What treatment reports say, each time it is something else."""
    said = [None, *(report.verdict for report in reports)]
    return [
        Event(report.at, "report", report.verdict, report.reason)
        for before, report in zip(said, reports, strict=False)
        if report.verdict != before
    ]


def _treated(project: Project) -> Treated | None:
    """What the last treatment report says, beside what the shop knows; None without a report."""
    reports, source = treatment_reports(project), SETTINGS.source
    if not reports or not isinstance(source, ShopSourceConfig):
        return None
    last, lake = reports[-1], project.lake
    log = lake.read(PREDICTION_LOG, days=lake.days(PREDICTION_LOG)).to_pandas()
    entered = entries_of(marked_predictions(log), last.threshold, ())
    horizon = timedelta(days=SETTINGS.windows.horizon_days)
    known = entered["cutoff"] + horizon <= last.until
    others = entered[known & entered["holdout"].eq(False)].reset_index(drop=True)
    untold = open_source(source, SETTINGS.calendar.start)
    offers = read_offers(lake)
    return Treated(
        verdict=last.verdict,
        effect=last.effect,
        lower=last.lower,
        upper=last.upper,
        true_effect=float(_truth(untold, others).mean() - _truth(project.source, others).mean())
        if len(others)
        else None,
        held_out=last.held_out.rows,
        others=last.others.rows,
        offers=0 if offers is None else offers.num_rows,
        scores=last.scores,
        intact=last.intact.verdict,
    )


def _human_steps(history: Sequence[Step]) -> int:
    return sum(step.who not in (*NOT_PERSONS, SABOTEUR) for step in history)


def _judged(case: Case, project: Project, kept: bytes) -> tuple[Any, int]:
    """The rolling AUC of what was served, of doing nothing and of the oracle, and the requests.

    kept: the graph that doing nothing would serve. Where offers are served, of the customers held
    out from them: what others did says nothing of a model that was acted on.
    """
    lake, names = project.lake, [feature.name for feature in project.features]
    log = lake.read(PREDICTION_LOG, days=lake.days(PREDICTION_LOG)).to_pandas()
    judged = log["cutoff"].notna() & (log["holdout"].eq(True) if case.offers else True)
    log = log[judged].reset_index(drop=True)
    x = feature_matrix(log, names)
    churned = _truth(project.source, log)
    days = sorted({moment.date() for moment in log["at"]})
    scores = {
        "served": log["probability"].to_numpy(dtype=np.float64),
        "nothing": predict_onnx(kept, x),
        "oracle": _oracle(project, log, _seen_by_oracle(case, project, log, x), days),
    }
    day_of = log["at"].dt.tz_convert(None).to_numpy().astype("datetime64[D]")
    return rolling_auc(days, day_of, churned, scores), len(log)


def _served_graph(project: Project, version: str) -> bytes:
    """The ONNX graph of a version, as it was released. Kept, as the archive is cleaned in time."""
    client = project.mlflow_client()
    registry = read_registry(client, SETTINGS.model_name)
    release = fetch_release(client, registry.version(version), project.home.releases, kept=True)
    return release.model


def _truth(source: Source, log: pd.DataFrame) -> NDArray[np.bool_]:
    """Who placed no order within the horizon after the cutoff [rows], from the shop itself."""
    horizon = timedelta(days=SETTINGS.windows.horizon_days)
    first = partition_of_cutoff(log["cutoff"].min())
    last = (log["cutoff"].max() + horizon).date()
    orders = source.read("orders", first, last).events.to_pandas()
    found = pd.merge_asof(
        log[["customer_id", "cutoff"]].reset_index().sort_values("cutoff"),
        orders[["customer_id", "occurred_at"]].sort_values("occurred_at"),
        left_on="cutoff",
        right_on="occurred_at",
        by="customer_id",
        direction="forward",
    ).sort_values("index")
    stayed = (found["occurred_at"] - found["cutoff"]) < horizon
    return ~stayed.to_numpy(dtype=np.bool_)


def _seen_by_oracle(
    case: Case, project: Project, log: pd.DataFrame, x: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The rows as they were logged, or as they would have been had the feed not been broken."""
    source = SETTINGS.source
    if case.shop != "login_tracking_broken" or not isinstance(source, ShopSourceConfig):
        return x
    first = partition_of_cutoff(log["cutoff"].min())
    last = partition_of_cutoff(log["cutoff"].max())
    sound = OfferedShop(ShopSourceConfig(source.shop), SETTINGS.calendar.start, project.lake)
    tables = {}
    for table in SETTINGS.raw_tables:
        if look_back_days(table, SETTINGS.windows):
            events = sound.events(table, SETTINGS.calendar.start, last)
            days = events["occurred_at"].cast(pa.date32())
            tables[table] = ibis.memtable(events.append_column(DAY, days))
    found = customer_features(tables, first, last, SETTINGS.windows).to_pyarrow().to_pandas()
    keys = ["customer_id", "cutoff"]
    found["cutoff"] = found["cutoff"].astype(log["cutoff"].dtype)
    rows = log[keys].merge(found, on=keys, how="left", validate="many_to_one")
    return feature_matrix(rows, [feature.name for feature in project.features])


def _oracle(
    project: Project, log: pd.DataFrame, x: NDArray[np.float32], days: Sequence[date]
) -> NDArray[np.float64]:
    """P(churn) [rows] by a model trained anew each day on the newest labels that had matured."""
    horizon = SETTINGS.windows.horizon_days
    names = [feature.name for feature in project.features]
    labelled = set(project.sound_days(project.labelled_days()))
    parts: dict[date, Part] = {}
    p = np.full(len(log), np.nan)
    day_of = np.array([moment.date() for moment in log["at"]])
    for day in days:
        newest = day - timedelta(days=horizon + 1)
        cutoffs = [newest - timedelta(days=_ORACLE_SPACING * k) for k in range(_ORACLE_CUTOFFS)]
        chosen = [cutoff for cutoff in cutoffs if cutoff in labelled]
        for cutoff in chosen:
            if cutoff not in parts:
                parts[cutoff] = _part(project, cutoff, names)
        if chosen:
            rows = Part(
                np.vstack([parts[c].x for c in chosen]),
                np.concatenate([parts[c].y for c in chosen]),
            )
            family = "hist_gradient_boosting"
            model = fitted(rows, family, STARTS[family], seed=SETTINGS.seed, n_jobs=1)
            p[day_of == day] = predict_churn(model, x[day_of == day])
    return p


def _part(project: Project, day: date, names: Sequence[str]) -> Part:
    matured = label_partition(day, SETTINGS.windows.horizon_days)
    features = project.lake.read("customer_features", day, day).to_pandas()
    labels = project.lake.read("churn_labels", matured, matured).to_pandas()
    rows = features.merge(labels[["customer_id", "churned"]], on="customer_id")
    return Part(feature_matrix(rows, names), rows["churned"].to_numpy(dtype=np.bool_))


def _at(day: date, hour: int, minute: int = 0) -> datetime:
    return datetime.combine(day, time_of_day(hour, minute), UTC)


_BEGAN = _at(START + timedelta(days=HISTORY_DAYS), 0, 30)
