"""`python -m tests.chaos [FAULT...]`: kill each process in turn, and write what came of it.

Writes `$CHURN_HOME/chaos/report.json` and `report.md`; exits with 1 when something was lost.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import psutil

from churn_assets.data.lake import Lake
from churn_assets.home import Home
from tests.chaos.clients import Clients
from tests.chaos.faults import FAULTS, REFRESH, SERVERS, Fault, faults_of_servers, next_day
from tests.chaos.invariants import Invariants
from tests.chaos.servers import NotInstalled, Postgres, Redis
from tests.chaos.shop import SHOP, Shop
from tests.chaos.strike import Result, strike

CUSTOMER = {
    "customer_id": "c-1",
    "total_orders_30d": 3,
    "avg_order_value": 49.9,
    "days_since_last_order": 12,
    "support_tickets_90d": 0,
    "login_frequency_7d": 1.5,
}
HEAD = (
    *("killed", "while", "noticed", "answers", "well", "silent"),
    *("acknowledged", "lost", "twice", "the run", "load"),
)


class Report(msgspec.Struct):
    """The newest result of each fault, and what they were measured on."""

    machine: dict[str, Any]
    faults: list[Result]


def main(names: Sequence[str]) -> int:
    """Run the faults `names`, or all; 1 when one was not survived, 2 for a name that is none."""
    known = [*(fault.name for fault in FAULTS), *SERVERS]
    if unknown := [name for name in names if name not in known]:
        print(f"there is no fault {unknown[0]}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    # However it is asked to stop, it stops what it started.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    # Of libraries, about this program's own reading.
    warnings.filterwarnings("ignore")
    folder = Home.from_environment().root / "chaos"
    by_name = {fault.name: fault for fault in FAULTS}
    wanted = [by_name[name] for name in names or by_name if name in by_name]
    results: list[Result] = []
    if wanted:
        for result in _strike_all(Shop(folder), wanted):
            _tell(folder, results, result)
    if not names or set(names) & set(SERVERS):
        try:
            for result in _strike_servers(folder, names):
                _tell(folder, results, result)
        except NotInstalled as missing:
            print(f"  left out {', '.join(SERVERS)}: {missing}", flush=True)
    print(write(folder, results), folder / "report.json", sep="\n")
    return 0 if all(result.survived for result in results) else 1


def _strike_all(shop: Shop, faults: Sequence[Fault]) -> Iterator[Result]:
    """Strike in turn while clients ask with the features of a customer."""
    try:
        shop.start()
        with Clients(shop.url("service"), lambda _: CUSTOMER) as clients:
            yield from _strikes(shop, clients, faults)
    finally:
        shop.stop()


def _strike_servers(folder: Path, names: Sequence[str]) -> Iterator[Result]:
    """The same with the log in Postgres and the online store in Redis; clients ask by id.

    Raises NotInstalled.
    """
    with tempfile.TemporaryDirectory(prefix="churn-chaos-") as data, ExitStack() as stack:
        # Postgres is another user.
        os.chmod(data, 0o755)
        postgres, redis = Postgres(Path(data)), Redis(Path(data))
        for server in (postgres, redis):
            stack.callback(server.stop)
            server.start()
        settings = {
            "serving": {"prediction_log": {"store": postgres.url}},
            "online_store": {"kind": "redis", "url": redis.url},
        }
        shop = Shop(folder, {**SHOP, **settings})
        stack.callback(shop.stop)
        shop.start()
        # Redis has nothing yet.
        shop.finish(REFRESH, next_day(shop))
        lake = Lake(str(shop.home.lake))
        features = lake.read("customer_features", days=lake.days("customer_features")[-1:])
        customers = features["customer_id"].to_pylist()
        faults = [f for f in faults_of_servers(postgres, redis) if not names or f.name in names]
        body = lambda number: {"customer_id": customers[number % len(customers)]}  # noqa: E731
        with Clients(shop.url("service"), body) as clients:
            yield from _strikes(shop, clients, faults)


def _strikes(shop: Shop, clients: Clients, faults: Sequence[Fault]) -> Iterator[Result]:
    invariants = Invariants(shop)
    for fault in faults:
        print(f"  {fault.name}", end="", flush=True)
        yield strike(shop, clients, invariants, fault)


def _tell(folder: Path, results: list[Result], result: Result) -> None:
    results.append(result)
    print(f"  noticed {result.noticed_s} s, well {result.well_s} s, {result.run}")
    for name, found in result.faults.items():
        print(f"    {name}: {'; '.join(found)}"[:2000], flush=True)
    write(folder, results)


def write(folder: Path, results: Sequence[Result]) -> str:
    """Put the results into the report, in place of earlier ones; returns its table."""
    path = folder / "report.json"
    known = msgspec.json.decode(path.read_bytes(), type=Report).faults if path.exists() else []
    newest = {result.name: result for result in [*known, *results]}
    order = [*(fault.name for fault in FAULTS), *SERVERS]
    machine = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
    }
    report = Report(machine, [newest[name] for name in order if name in newest])
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    shown = table(report.faults)
    (folder / "report.md").write_text(shown + "\n", encoding="utf-8")
    return shown


def table(results: Sequence[Result]) -> str:
    """The results as a table in Markdown; times are seconds."""
    rows = [HEAD, ("---",) * len(HEAD)]
    for r in results:
        times = r.noticed_s, r.answers_s, r.well_s, r.silent_s
        shown = ["-" if v is None else f"{v:g}" for v in times]
        counts = [str(count) for count in (r.acknowledged, r.lost, r.twice)]
        said = r.run if r.survived else f"{r.run} **{'; '.join(r.faults)}**"
        load = "-" if r.load is None else f"{r.load:.0f}"
        rows.append((r.process, f"`{r.during}`", *shown, *counts, said, load))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
