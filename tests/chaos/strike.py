"""One fault: what is killed, when it is noticed, when all is well again, and what was lost."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from datetime import UTC, datetime

import msgspec
import psutil
from dagster import DagsterEventType, DagsterRunStatus

from tests.chaos.clients import Clients
from tests.chaos.faults import Fault
from tests.chaos.invariants import Invariants
from tests.chaos.shop import NotThere, Shop

WELL_S = 900.0
RECENT_S = 2.0
CARRIED_OUT_S = 300.0
# In the middle of the step, by how long it took before; at once in one that is soon over.
# A busy machine may have taken much longer than an idle one does.
MOMENT, SHORT_S, LONGEST_S = 0.4, 3.0, 2.0


class Result(msgspec.Struct):
    """What came of a fault. Seconds are counted from the kill.

    during: the step that was going on, as Dagster has it. at, load: of the kill, the latter of the
    machine in the minute before. noticed_s: until the run was closed as failed, or the process was
    there again. answers_s: until everything answered. well_s: until no run was unfinished either,
    and what the run was to do was done. silent_s: the longest time without an answer of the
    service. run: how the run that was going on ended, and what of it was done twice. faults: what
    did not hold, by invariant.
    """

    name: str
    process: str
    during: str
    at: datetime | None = None
    load: float | None = None
    noticed_s: float | None = None
    answers_s: float | None = None
    well_s: float | None = None
    silent_s: float | None = None
    acknowledged: int = 0
    lost: int = 0
    twice: int = 0
    run: str = ""
    faults: dict[str, list[str]] = {}

    @property
    def survived(self) -> bool:
        """Whether nothing was lost and all became well."""
        return not self.faults and self.well_s is not None


def strike(shop: Shop, clients: Clients, invariants: Invariants, fault: Fault) -> Result:
    """Kill what `fault` says, wait until all is well again, and look for what was lost."""
    result = Result(fault.name, fault.process, fault.step)
    faults: dict[str, list[str]] = {}
    killed = 0.0
    try:
        run_id = _bring_about(shop, fault)
        victim = fault.victim(shop, run_id)
        before = shop.steps(run_id, DagsterEventType.STEP_SUCCESS)
        result.at, result.load = datetime.now(UTC), round(os.getloadavg()[0], 1)
        killed, at = time.monotonic(), time.time()
        victim.kill()
        result.during = _open_step(shop, run_id) or f"{fault.step}, just done"
        if fault.again is not None:
            fault.again(shop)
        shop.wait_for(lambda: _noticed(shop, fault, run_id, victim), "it is noticed", WELL_S)
        result.noticed_s = _since(killed)
        heartbeat = at if fault.name in ("daemon", "up") else None
        shop.wait_for(
            lambda: (
                clients.answered_since(max(killed, time.monotonic() - RECENT_S))
                and not shop.silent(heartbeat)
            ),
            "everything answers",
            WELL_S,
        )
        result.answers_s = _since(killed)
        shop.wait_for(lambda: not shop.ailments() and _ended(shop, run_id), "all is well", WELL_S)
        well = time.monotonic()
        result.well_s = _since(killed)
        result.silent_s = round(clients.longest_silence(killed, well), 1)
        result.run = _story(shop, run_id, before)
    except NotThere as missing:
        faults["well"] = [str(missing), *shop.ailments()]
    faults |= _lost(shop, clients, invariants, result)
    result.faults = {name: found for name, found in faults.items() if found}
    return result


def _bring_about(shop: Shop, fault: Fault) -> str:
    """Launch the job; returns the id of the run, once it is in the middle of the step."""
    job = fault.of or fault.job
    usual = shop.usual_seconds(fault.step, job)
    if fault.of is None:
        run_id = shop.launch(fault.job, fault.tags(shop))
    else:
        known = {run.run_id for run in shop.runs(job)}
        shop.launch(fault.job, fault.tags(shop))
        (run_id,) = shop.wait_for(
            lambda: [run.run_id for run in shop.runs(job) if run.run_id not in known],
            f"a run of {job}",
            WELL_S,
        )
    shop.wait_until_in(run_id, fault.step)
    if usual > SHORT_S:
        time.sleep(min(usual * MOMENT, LONGEST_S))
    return run_id


def _open_step(shop: Shop, run_id: str) -> str | None:
    """The step that has begun last, when it has not ended."""
    begun = shop.steps(run_id, DagsterEventType.STEP_START)
    done = shop.steps(run_id, DagsterEventType.STEP_SUCCESS)
    return begun[-1] if begun and begun[-1] not in done else None


def _noticed(shop: Shop, fault: Fault, run_id: str, victim: psutil.Process) -> bool:
    if fault.noticed == "outside":
        return True
    if fault.noticed == "run":
        # One that was just done has nothing to be noticed.
        return shop.status(run_id) in (DagsterRunStatus.FAILURE, DagsterRunStatus.SUCCESS)
    with suppress(NotThere, StopIteration, psutil.Error):
        return fault.victim(shop, run_id) != victim
    return False


def _ended(shop: Shop, run_id: str) -> bool:
    """Whether what the run was to do is done, by it or by one that tried it again."""
    tries = shop.tries(run_id)
    return tries[-1].status is DagsterRunStatus.SUCCESS


def _story(shop: Shop, run_id: str, before: list[str]) -> str:
    tries = shop.tries(run_id)
    if len(tries) == 1:
        return "went on"
    after = shop.steps(tries[-1].run_id, DagsterEventType.STEP_START)
    again = [step for step in before if step in after]
    redone = f"; done before and again: {', '.join(again)}" if again else ""
    return f"failed, tried again {len(tries) - 1}x{redone}"


def _lost(
    shop: Shop, clients: Clients, invariants: Invariants, result: Result
) -> dict[str, list[str]]:
    """What is lost or contradicts itself, by invariant; empty lists are good."""
    found: dict[str, list[str]] = {}
    with suppress(NotThere):
        # A sensor takes its time to carry out what the run decided.
        shop.wait_for(lambda: not invariants.decisions(), "decisions carried out", CARRIED_OUT_S)
    acknowledged = list(clients.acknowledged)
    try:
        log = shop.launch("ingest_predictions")
        shop.wait_for(lambda: not shop.ailments(), "all is well once more", WELL_S)
        if shop.status(log) is not DagsterRunStatus.SUCCESS:
            found["ingest"] = [f"run {log} of ingest_predictions ended {shop.status(log).value}"]
    except (NotThere, OSError) as error:
        found["ingest"] = [str(error)]
    result.acknowledged = len(acknowledged)
    result.lost, result.twice = invariants.predictions(acknowledged)
    if result.lost or result.twice:
        found["predictions"] = [f"{result.lost} lost, {result.twice} twice"]
    for name, look in invariants.stored().items():
        found[name] = look()
    return found


def _since(moment: float) -> float:
    return round(time.monotonic() - moment, 1)
