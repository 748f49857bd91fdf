from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Generator
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from registry_cases import Model

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.data.windows import cutoff_of
from churn_assets.lifecycle.experiments import ensure_experiment
from churn_assets.modeling.split import Split, temporal_split
from churn_assets.modeling.training import TrainedModel, TrainingPolicy, fit

HORIZON = 30
LAST_DAY = date(2025, 6, 30)


def customers(day: date, rows: int, rng: np.random.Generator) -> pd.DataFrame:
    """Customers of one cutoff: who orders less than they used to tends to have left."""
    gone = rng.random(rows) < 0.5
    orders = np.where(gone, rng.poisson(0.3, rows), rng.poisson(2.5, rows))
    recency = np.where(gone, rng.integers(20, 90, rows), rng.integers(0, 30, rows))
    return pd.DataFrame(
        {
            "customer_id": [f"c{i}" for i in range(rows)],
            "cutoff": pd.Series([pd.Timestamp(cutoff_of(day))] * rows).dt.as_unit("us"),
            "total_orders_30d": orders,
            "avg_order_value": rng.lognormal(4.0, 0.8, rows),
            "days_since_last_order": recency,
            "support_tickets_90d": rng.poisson(np.where(gone, 0.8, 0.4)),
            "login_frequency_7d": rng.poisson(np.where(gone, 0.5, 4.0)) / 7.0,
            "churned": np.where(rng.random(rows) < 0.04, ~gone, gone),
        }
    )


@pytest.fixture(scope="session")
def split() -> Split:
    days = [LAST_DAY - timedelta(days=back) for back in range(200)]
    return temporal_split(days, HORIZON, max_train_cutoffs=3)


@pytest.fixture(scope="session")
def frame(split: Split) -> pd.DataFrame:
    rng = np.random.default_rng(7)
    return pd.concat([customers(day, 1200, rng) for day in split.days], ignore_index=True)


@pytest.fixture(scope="session")
def trained(frame: pd.DataFrame, split: Split) -> TrainedModel:
    return fit(frame, split, FEATURE_NAMES, seed=42, policy=TrainingPolicy(n_jobs=2, trials=3))


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Generator[MlflowClient]:
    """MLflow's store, in memory where there is a place for it: a test makes hundreds of commits."""
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK):
        with tempfile.TemporaryDirectory(prefix="churn-registry-", dir=memory) as folder:
            yield store_in(Path(folder))
    else:
        yield store_in(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def model(client: MlflowClient, tmp_path: Path) -> Model:
    run = client.create_run(ensure_experiment(client, tmp_path))
    return Model(client, f"churn-{run.info.run_id[:8]}", run.info.run_id)


def store_in(folder: Path) -> MlflowClient:
    with warnings.catch_warnings():
        # SQLAlchemy's, about how MLflow makes its tables.
        warnings.simplefilter("ignore")
        client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        ensure_experiment(client, folder / "artifacts")
    return client
