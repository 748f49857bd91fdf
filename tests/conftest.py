from __future__ import annotations

import os

import pytest

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="session")
def online_retail() -> str:
    """The path of UCI Online Retail, or a skip that says how to have it."""
    path = os.environ.get("CHURN_ONLINE_RETAIL")
    if not path:
        pytest.skip("set CHURN_ONLINE_RETAIL to the path of online_retail.csv.gz to run this")
    return path
