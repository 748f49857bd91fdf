"""What the serving tests share: small real models, releases of them, and bodies to refuse."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.contract.release import MANIFEST, Release
from churn_assets.home import PROJECT_ROOT
from churn_assets.lifecycle.release import (
    build_release,
    build_trial_release,
    reference_statistics,
)

SERVICE = PROJECT_ROOT / "bentos" / "churn"
THREE = FEATURE_NAMES[:3]
NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)


PATIENCE_S = 30


def family(of: int) -> list[psutil.Process]:
    return psutil.Process(of).children(recursive=True)


def wait_until_gone(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those still there when patience ends; a zombie is gone, only nobody asked after it."""
    deadline = time.monotonic() + PATIENCE_S
    alive = processes
    while alive and time.monotonic() < deadline:
        time.sleep(0.05)
        alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    return alive


@dataclass(frozen=True)
class Model:
    """A model both ways: `onnx` to serve, `predict` of scikit-learn to compare with."""

    features: tuple[str, ...]
    onnx: bytes
    x: np.ndarray
    predict: Callable[[np.ndarray], np.ndarray]


def train(features: tuple[str, ...], seed: int, *, backwards: bool = False) -> Model:
    """A small forest; one that has it `backwards` calls churned who stays."""
    from skl2onnx import to_onnx
    from sklearn.ensemble import RandomForestClassifier

    rng = np.random.default_rng(seed)
    x = np.column_stack(
        [
            rng.integers(0, 30, 2000),
            rng.gamma(2.0, 30.0, 2000),
            rng.integers(0, 90, 2000),
            rng.integers(0, 5, 2000),
            rng.integers(0, 20, 2000) / 7.0,
        ]
    )[:, : len(features)].astype(np.float32)
    y = (x[:, 2] - x[:, 0] + rng.normal(0, 15, 2000) > 30) ^ backwards
    estimator = RandomForestClassifier(30, max_depth=6, random_state=seed).fit(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        onnx = to_onnx(estimator, x[:1], options={"zipmap": False}).SerializeToString()
    return Model(features, onnx, x, lambda rows: estimator.predict_proba(rows)[:, 1])


def release_of(model: Model, releases: Path, version: str = "7", **changes: Any) -> Release:
    arguments: dict[str, Any] = {
        "onnx": model.onnx,
        "model_name": "churn",
        "model_version": version,
        "features": model.features,
        "golden": (model.x[:40], model.predict(model.x[:40])),
        "reference": reference_statistics(
            {name: model.x[:, column] for column, name in enumerate(model.features)},
            model.features,
        ),
        "mlflow_run": "mlflow-run",
        "dagster_run": "dagster-run",
        "data_hash": "data-hash",
        "created_at": NOON,
    }
    return build_release(releases, **(arguments | changes))


def trial_of(
    champion: Release,
    challenger: Release,
    releases: Path,
    *,
    trial: str = "trial-1",
    share: float = 0.3,
    shadow: bool = True,
) -> Release:
    return build_trial_release(
        releases,
        champion,
        challenger,
        trial=trial,
        share=share,
        shadow=shadow,
        created_at=NOON,
    )


def rewrite_manifest(directory: Path, **changes: object) -> None:
    path = directory / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


VALID = {
    "customer_id": "c-1",
    "total_orders_30d": 3,
    "avg_order_value": 49.9,
    "days_since_last_order": 12,
    "support_tickets_90d": 0,
    "login_frequency_7d": 1.5,
}


def changed(**fields: object) -> bytes:
    return json.dumps(VALID | fields).encode()


def literal(field: str, text: str) -> bytes:
    """A valid body but for the raw `text` where the value of `field` should be."""
    pairs = [f'"{k}": {text if k == field else json.dumps(v)}' for k, v in VALID.items()]
    return f"{{{', '.join(pairs)}}}".encode()


def without(field: str) -> bytes:
    return json.dumps({k: v for k, v in VALID.items() if k != field}).encode()


def only(*fields: str) -> bytes:
    return json.dumps({field: VALID[field] for field in fields}).encode()


# Each body with the status and the field it must be refused with.
BAD_BODIES: list[tuple[bytes, int, str]] = [
    *((without(field), 422, field) for field in VALID),
    (only("customer_id", FEATURE_NAMES[3]), 422, FEATURE_NAMES[0]),
    (only("customer_id", *FEATURE_NAMES[:2]), 422, FEATURE_NAMES[2]),
    (b'{"customer_id": "c-1", "plan": "gold"}', 422, "plan"),
    (b'{"customer_id": " "}', 422, "customer_id"),
    (b'{"customer_id": 17}', 422, "customer_id"),
    (b'{"customer_id": null}', 422, "customer_id"),
    (changed(plan="gold"), 422, "plan"),
    (changed(**{"": 1}), 422, '""'),
    (changed(**{"a` - at `$.x": 1}), 422, "a` - at `$.x"),
    (changed(customer_id=""), 422, "customer_id"),
    (changed(customer_id=" \t"), 422, "customer_id"),
    (changed(customer_id="x" * 129), 422, "customer_id"),
    (changed(customer_id=17), 422, "customer_id"),
    (changed(customer_id=None), 422, "customer_id"),
    (changed(total_orders_30d="3"), 422, "total_orders_30d"),
    (changed(total_orders_30d=True), 422, "total_orders_30d"),
    (changed(total_orders_30d=3.5), 422, "total_orders_30d"),
    (changed(total_orders_30d=3.0), 422, "total_orders_30d"),
    (literal("total_orders_30d", "3e0"), 422, "total_orders_30d"),
    (changed(total_orders_30d=-1), 422, "total_orders_30d"),
    (changed(total_orders_30d=10_001), 422, "total_orders_30d"),
    (changed(total_orders_30d=2**63), 422, "total_orders_30d"),
    (literal("total_orders_30d", "1" + "0" * 5000), 422, "total_orders_30d"),
    (changed(total_orders_30d=None), 422, "total_orders_30d"),
    (changed(total_orders_30d=[3]), 422, "total_orders_30d"),
    (changed(avg_order_value="49.9"), 422, "avg_order_value"),
    (changed(avg_order_value=False), 422, "avg_order_value"),
    (changed(avg_order_value=-0.01), 422, "avg_order_value"),
    (changed(avg_order_value=1e300), 422, "avg_order_value"),
    (literal("avg_order_value", "1e999"), 422, "avg_order_value"),
    (literal("avg_order_value", "-1e999"), 422, "avg_order_value"),
    (literal("avg_order_value", "NaN"), 400, "avg_order_value"),
    (literal("avg_order_value", "Infinity"), 400, "avg_order_value"),
    (literal("login_frequency_7d", "-Infinity"), 400, "login_frequency_7d"),
    (changed(login_frequency_7d={"value": 1}), 422, "login_frequency_7d"),
    (b"[]", 422, "body"),
    (b"null", 422, "body"),
    (b'"text"', 422, "body"),
    (b"3", 422, "body"),
    (b"{}", 422, "customer_id"),
    (b"", 400, "body"),
    (b"{", 400, "body"),
    (b"not json", 400, "body"),
    (json.dumps(VALID).encode() + b"}", 400, "body"),
    (json.dumps(VALID).encode("utf-16"), 400, "body"),
    (b"\xef\xbb\xbf" + json.dumps(VALID).encode(), 400, "body"),
    (json.dumps(VALID).encode().replace(b"c-1", b"\xff\xfe"), 400, "body"),
    (literal("customer_id", '"\\ud800"'), 400, "body"),
    (literal("customer_id", '"\x00"'), 400, "body"),
    (b"[" * 60_000, 422, "body"),
    (b'{"avg_order_value":' * 3000, 422, "avg_order_value"),
    (b'{"deep":' * 7000, 422, "deep"),
]
