"""The page for newcomers: its commands as they are written, in a copy of the project."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import pytest
from command import ROOT, environment
from test_up import processes_of

from churn_assets.simulator.params import ShopParams
from churn_assets.simulator.shop import Shop
from churn_assets.up import SERVERS, free_port

pytestmark = [pytest.mark.hour, pytest.mark.timeout(1500)]

PAGE = (ROOT / "docs" / "first-hour.md").read_text()
PATIENCE_S = 300
TABLES = {
    "orders": ("orders", "order", "order_id"),
    "tickets": ("support_tickets", "ticket", "ticket_id"),
    "logins": ("logins", "login", "login_id"),
}


@dataclass
class Hour:
    """What each command of the page said, by the command as it is written there."""

    said: dict[str, str]
    health: str

    def __getitem__(self, part: str) -> str:
        (found,) = [text for command, text in self.said.items() if part in command]
        return found


def commands() -> list[str]:
    return re.findall(r"^    (\S.*)$", re.sub(r"```.*?```", "", PAGE, flags=re.S), re.M)


def export(folder: Path) -> None:
    """Seven months of a shop as somebody else's tables."""
    first, last = date(2024, 1, 1), date(2024, 1, 1) + timedelta(days=219)
    shop = Shop(ShopParams(customers=1500), first)
    folder.mkdir()
    for name, (table, key, column) in TABLES.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            more = ["amount"] if table == "orders" else []
            writer.writerow([key, "customer", "at", *more])
            for event in shop.events(table, first, last).to_pylist():
                amount = [f"{event['amount_minor'] / 100:.2f}"] if more else []
                at = event["occurred_at"].isoformat()
                writer.writerow([event[column], event["customer_id"], at, *amount])


def clone(folder: Path) -> None:
    """The project's files as they are, with the environment that is there."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.split("\0"):
        source = ROOT / name
        if name and source.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            # With its times: an environment older than the lock would be made anew.
            shutil.copy2(source, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")


@pytest.fixture(scope="module")
def hour(tmp_path_factory: pytest.TempPathFactory) -> Generator[Hour]:
    place = tmp_path_factory.mktemp("hour") / "churn_assets"
    clone(place)
    export(place / "exports")
    (settings,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    (place / "my-shop.yaml").write_text(settings)
    ports = {server.variable: str(free_port()) for server in SERVERS}
    variables = environment(place, None, **ports)
    del variables["CHURN_HOME"]
    service = next(ports[server.variable] for server in SERVERS if server.name == "service")
    exports: list[str] = []
    said: dict[str, str] = {}
    up: subprocess.Popen | None = None
    try:
        for command in commands():
            if command.startswith("export "):
                exports.append(command)
                continue
            typed = [*exports, command.replace(":3001", f":{service}")]
            script = ["bash", "-ec", "\n".join(typed)]
            if command == "make up":
                with (place / "up.log").open("wb") as log:
                    up = subprocess.Popen(script, cwd=place, env=variables, stdout=log, stderr=log)
                wait_for(f"http://127.0.0.1:{service}/health", up, place / "up.log")
                continue
            done = subprocess.run(
                script, cwd=place, env=variables, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
            said[command] = done.stdout
        yield Hour(said, said[next(c for c in said if c.endswith("/health"))])
    finally:
        if up is not None:
            up.terminate()
        for process in processes_of(place / "var" / "my-shop"):
            with suppress(ProcessLookupError):
                process.kill()
        if up is not None:
            up.wait(60)


def wait_for(url: str, up: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and up.poll() is None:
        with suppress(OSError, urllib.error.URLError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    pytest.fail(log.read_text()[-3000:])


def test_a_model_of_ones_own_tables_passes_the_gates(hour: Hour) -> None:
    assert "version 1, stage Production" in hour["make run"]
    assert "order,customer,at,amount" in hour["head -2"]
    assert re.search(r"^ *1  Production  gates passed", hour["churn versions"], re.M)


def test_the_next_version_serves_when_somebody_lets_it(hour: Hour) -> None:
    last = hour["churn history"].splitlines()[-1]
    assert "version 2  Staging -> Production (version 1 -> Archived)  by ada: no worse" in last
    assert '"model_version":"2"' in hour["/predict"].replace(" ", "")
    assert '"churn_probability":' in hour["/predict"]
    assert json.loads(hour.health)["version"] == "2"


def test_it_goes_back_and_all_of_it_is_kept(hour: Hour) -> None:
    assert "version 1 is in Production" in hour["churn rollback"]
    assert "0 not delivered" in hour["churn alerts"]
    assert "my-shop.tar" in hour["make backup"]


def test_every_command_was_run() -> None:
    assert len(commands()) == 14
    assert sum(command.startswith("make ") for command in commands()) == 3
