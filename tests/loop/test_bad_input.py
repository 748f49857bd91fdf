"""What is wrong is said in one line, before anything is written."""

from __future__ import annotations

import fcntl
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from command import churn, days_of, look, write_config

from churn_assets.cli import cli
from churn_assets.errors import UserError

SHOP: dict[str, Any] = {"source": {"kind": "shop"}, "calendar": {"start": "2024-01-01"}}
HEADER = "order,customer,at,amount\n"


def own(place: str = "orders.csv", **columns: str) -> dict[str, Any]:
    mapped = {"order_id": "order", "customer_id": "customer", "occurred_at": "at"}
    orders = {"from": place, "columns": {**mapped, "amount": "amount", **columns}}
    return {
        "source": {
            "kind": "tables",
            "tables": {"orders": orders, "customers": {"derive_from": "orders"}},
        },
        "calendar": {"start": "2024-01-01", "end": "2024-12-31"},
    }


NONSENSE = {
    "bad YAML": ("source: {kind: shop", r"is not valid YAML: line \d+: expected"),
    "no settings": ("- a\n- b\n", "has no settings"),
    "unknown key": (SHOP | {"qualty_gates": {}}, "unknown key qualty_gates; did you mean quality"),
    "unknown inner key": (SHOP | {"drift": {"min_row": 5}}, "unknown key drift.min_row; did you"),
    "no calendar": ({"source": {"kind": "shop"}}, "missing required field `calendar`"),
    "too short": (SHOP | {"calendar": {"start": "2024-01-01", "days": 100}}, "too short: data fr"),
    "no day yet": (SHOP | {"calendar": {"start": "2124-01-01"}}, "set calendar.start to an earlie"),
    "end first": (SHOP | {"calendar": {"start": "2024-01-02", "end": "2024-01-01"}}, "is before"),
    "no days": (SHOP | {"calendar": {"start": "2024-01-01", "days": 0}}, "days is 0; set at least"),
    "AUC": (SHOP | {"quality_gates": {"auc": 1.5}}, "auc is 1.5; set a number from 0 to 1"),
    "accuracy": (SHOP | {"quality_gates": {"accuracy": "high"}}, "Expected `float`, got `str`"),
    "latency": (SHOP | {"quality_gates": {"p95_latency_ms": -1}}, "p95_latency_ms is -1.0; set a"),
    "not a number": (
        SHOP | {"quality_gates": {"calibration_error": float("nan")}},
        "quality_gates.calibration_error is nan; set a number from 0 to 1",
    ),
    "negative gate": (
        SHOP | {"quality_gates": {"log_loss_over_production": -0.1}},
        "log_loss_over_production is -0.1; set a number from 0 to 10",
    ),
    "no offer pays": (SHOP | {"costs": {"offer": 99}}, "so no offer ever pays; set a lower offer"),
    "no interval": (SHOP | {"evaluation": {"resamples": 3}}, "resamples is 3; set a number from"),
    "no trial": (SHOP | {"training": {"trials": 0}}, "trials is 0; set at least 3, one for each"),
    "no rows asked": (SHOP | {"data_gate": {"min_rows": 0}}, "min_rows is 0; set at least 1"),
    "horizon": (SHOP | {"windows": {"horizon_days": 0}}, "horizon_days is 0; set at least 1"),
    "time zone": (SHOP | {"schedules": {"timezone": "Mars"}}, "no time zone Mars; write one such"),
    "retention": (SHOP | {"online_store": {"retention_days": 0}}, "retention_days is 0; give days"),
    "rows in use": (
        SHOP | {"serving": {"max_age_hours": 800}},
        "must be longer than serving.max_a",
    ),
    "no file": (own("gone.csv"), r"orders: there is no file .*gone\.csv; check the path"),
    "no variable": (own("${CHURN_DATA}"), r"needs \$\{CHURN_DATA\}; set that environment variabl"),
    "no column": (own(amount="Amount"), r"has no column Amount \(did you mean amount\?\); it has"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_refused_before_a_home_is_made(case: str, tmp_path: Path):
    document, told = NONSENSE[case]
    text = document if isinstance(document, str) else yaml.safe_dump(document)
    (tmp_path / "churn.yaml").write_text(text)
    (tmp_path / "orders.csv").write_text(HEADER + "1,a,2024-01-02,1\n")
    home, config = str(tmp_path / "home"), str(tmp_path / "churn.yaml")
    where = {"CHURN_HOME": home, "CHURN_CONFIG": config, "CHURN_DATA": None}
    # In this process: another one takes seconds to import what it needs.
    done = CliRunner().invoke(cli, ["run"], env=where)
    assert isinstance(done.exception, UserError)
    assert re.search(told, str(done.exception))
    assert done.output == ""
    assert not (tmp_path / "home").exists()


def test_what_is_refused_is_one_line(tmp_path: Path):
    (tmp_path / "churn.yaml").write_text("source: {kind: shop")
    done = churn(tmp_path / "home", tmp_path / "churn.yaml")
    assert "is not valid YAML" in done.refusal()
    assert done.out == ""


def test_a_configuration_that_is_not_there(tmp_path: Path):
    done = churn(tmp_path / "home", tmp_path / "gone.yaml")
    assert f"there is no configuration file {tmp_path / 'gone.yaml'}" in done.refusal()
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("place", ["home", "home/inside"])
def test_a_home_that_cannot_be_written(place: str, tmp_path: Path):
    # A file where a folder is needed stops root as well.
    (tmp_path / "home").write_text("a file")
    done = churn(tmp_path / place, None)
    assert "set CHURN_HOME to a folder you may write" in done.refusal()
    assert (tmp_path / "home").read_text() == "a file"


def test_a_home_another_run_holds(tmp_path: Path):
    (tmp_path / "run.lock").touch()
    with (tmp_path / "run.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = churn(tmp_path, None)
    assert "another `make run` is using" in done.refusal()


def test_a_home_of_another_source(tmp_path: Path):
    home = tmp_path / "home"
    (home / "lake" / "orders" / "day=2024-01-01").mkdir(parents=True)
    (home / "source.json").write_text("another")
    config = write_config(tmp_path / "churn.yaml", SHOP)
    assert "holds the data of another source" in churn(home, config).refusal()
    assert (home / "source.json").read_text() == "another"


def test_a_schedule_that_is_none(tmp_path: Path):
    config = write_config(tmp_path / "churn.yaml", SHOP | {"schedules": {"training": "often"}})
    assert "schedules.training is 'often'" in churn(tmp_path / "home", config).refusal()


def test_an_empty_table_then_one_without_customers(tmp_path: Path):
    home = tmp_path / "home"
    (tmp_path / "orders.csv").write_text(HEADER)
    done = churn(home, write_config(tmp_path / "own.yaml", own()))
    assert "orders.csv has no rows; give one with data" in done.refusal()
    assert done.out.endswith("s  stopped\n")
    (tmp_path / "orders.csv").write_text(HEADER + "1,,2024-01-02,1\n2,,2024-01-03,1\n")
    # Nothing came in, so the home is still free for a configuration that was mended.
    mended = own()
    mended["calendar"]["start"] = "2024-01-02"
    done = churn(home, write_config(tmp_path / "own.yaml", mended))
    assert "usable (missing_customer_id 2); check columns" in done.refusal()
    assert days_of(home, "orders") == days_of(home, "customers") == []
    assert look(home).runs == [("daily_refresh", "FAILURE")] * 2
