from __future__ import annotations

import csv
import signal
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from command import Run, churn, dagster_of, look, started, stop_at, with_a_child, writing
from command import write_config as write

from churn_assets.simulator.params import ShopParams
from churn_assets.simulator.shop import Shop

# The smallest shop that passes the quality gates well; the latency of a loaded machine is not
# what these tests are about.
SHOP: Mapping[str, Any] = {
    "source": {"kind": "shop", "shop": {"customers": 1500}},
    "calendar": {"start": "2024-01-01", "days": 220},
    "data_gate": {"min_rows": 5000},
    "quality_gates": {"p95_latency_ms": 5000},
}
MORE_DAYS = {
    **SHOP,
    "calendar": {"start": "2024-01-01", "days": 223},
    "training": {"families": ["logistic_regression"], "trials": 2},
    # What is compared is not what these tests are about.
    "promotion": {"mode": "automatic", "margin": 0.5},
    "quality_gates": {"p95_latency_ms": 5000, "log_loss_over_production": 0.5},
}
IMPOSSIBLE = {**MORE_DAYS, "quality_gates": MORE_DAYS["quality_gates"] | {"auc": 0.9999}}


def run(home: Path, config: Path) -> Run:
    return Run(churn(home, config), look(home))


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A shop from nothing to a bento."""
    folder = tmp_path_factory.mktemp("shop")
    return run(folder / "home", write(folder / "shop.yaml", SHOP))


@pytest.fixture(scope="session")
def resumed_run(first_run: Run) -> Run:
    """Three days later: killed while training, killed while packaging, then left to finish."""
    home = first_run.home
    config = write(home.parent / "shop.yaml", MORE_DAYS)
    moments = started("trained_model"), with_a_child("churn_bento")
    stopped = tuple(
        (stop_at(home, config, moment, signal.SIGKILL), look(home)) for moment in moments
    )
    return Run(churn(home, config), look(home), stopped)


@pytest.fixture(scope="session")
def refused_run(resumed_run: Run) -> Run:
    """The same shop with gates no model passes, after a check has refused its labels."""
    from dagster import AssetCheckEvaluation, AssetKey

    home = resumed_run.home
    with dagster_of(home) as instance:
        instance.report_runless_asset_event(
            AssetCheckEvaluation(
                asset_key=AssetKey("churn_labels"),
                check_name="whole_window_there",
                passed=False,
                metadata={},
                blocking=True,
            )
        )
    return run(home, write(home.parent / "shop.yaml", IMPOSSIBLE))


FAULTS = (
    ["{first}", "c-1", "2024-02-02T00:00:00Z", "3"],
    ["negative", "c-1", "2024-02-02T00:00:00Z", "-3"],
    ["future", "c-1", "2124-02-02T00:00:00Z", "3"],
    ["when", "c-1", "soon", "3"],
    ["who", "", "2024-02-02T00:00:00Z", "3"],
    ["much", "c-1", "2024-02-02T00:00:00Z", "three"],
)
CORRUPT = "a line of another kind\n" + 'open,"c-1,2024-02-02T00:00:00Z,3\n'
OWN_TABLES: Mapping[str, Any] = {
    "source": {
        "kind": "tables",
        "tables": {
            "orders": {
                "from": "orders.csv",
                "columns": {
                    "order_id": "order",
                    "customer_id": "customer",
                    "occurred_at": "at",
                    "amount": "amount",
                },
            },
            "customers": {"derive_from": "orders"},
        },
    },
    "calendar": {"start": "2024-01-01", "end": "2024-03-31"},
    "windows": {"activity_days": 30, "horizon_days": 10},
    "data_gate": {"min_rows": 500},
    "training": {"families": ["logistic_regression"], "trials": 2},
    "quality_gates": {
        "accuracy": 0.5,
        "auc": 0.5,
        "p95_latency_ms": 5000,
        "calibration_error": 0.2,
        "segment_auc": 0.4,
        "auc_over_recency": -0.1,
    },
}


@pytest.fixture(scope="session")
def own_tables_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A file with faults: killed while it is read, while features are made, then Ctrl-C."""
    folder = tmp_path_factory.mktemp("own")
    home, config = folder / "home", write(folder / "own.yaml", OWN_TABLES)
    write_orders(folder / "orders.csv")
    lake = home / "lake"
    moments = (
        (writing(lake / "orders", "orders"), signal.SIGKILL),
        (writing(lake / "customer_features", "customer_features"), signal.SIGKILL),
        (started("trained_model"), signal.SIGINT),
    )
    stopped = tuple((stop_at(home, config, *moment), look(home)) for moment in moments)
    return Run(churn(home, config), look(home), stopped)


def write_orders(path: Path) -> None:
    """Three months of a shop's orders as CSV, and lines that cannot be used after them."""
    first, last = date(2024, 1, 1), date(2024, 3, 31)
    orders = Shop(ShopParams(customers=400), first).events("orders", first, last).to_pylist()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["order", "customer", "at", "amount"])
        for order in orders:
            amount = f"{order['amount_minor'] / 100:.2f}"
            at = order["occurred_at"].isoformat()
            writer.writerow([order["order_id"], order["customer_id"], at, amount])
        for fault in FAULTS:
            writer.writerow([fault[0].format(first=orders[0]["order_id"]), *fault[1:]])
        file.write(CORRUPT)
