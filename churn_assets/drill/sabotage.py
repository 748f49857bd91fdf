"""Releases that should never have been made: a model that has it backwards, is slow, or fails.

They pass what proves a release, as a bad release of the real world would: its digests are right and
its golden predictions are what it answers.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from churn_assets.drill.cases import Sabotage
from churn_assets.lifecycle.history import Evidence
from churn_assets.lifecycle.registry import (
    PIPELINE,
    read_registry,
    register_version,
    rollback_plan,
    transition,
)
from churn_assets.lifecycle.release import build_release, fetch_release, store_release
from churn_assets.modeling.onnx_export import predict_onnx

if TYPE_CHECKING:
    from mlflow import MlflowClient

SABOTEUR = "someone in a hurry"
# A multiplication of two such matrices takes some 30 ms of a core.
_SIDE, _MULTIPLICATIONS = 1024, 8
# Recency beyond it makes the failing model fail.
_LARGEST = 20.0


def force_into_production(
    client: MlflowClient,
    name: str,
    releases: Path,
    rows: NDArray[np.float32],
    recency: int,
    kind: Sabotage,
    *,
    now: datetime,
) -> str:
    """Register a bad version and put it into Production past every gate; returns its number.

    rows: float32 [rows, features], of customers the release is proven on. recency: the column of
    the days since the last order.
    """
    import mlflow
    import mlflow.onnx
    from onnx import load_model_from_string

    registry = read_registry(client, name)
    good = registry.version(str(registry.production))
    release = fetch_release(client, good, releases, kept=True)
    features = release.manifest.feature_names
    onnx = spoiled(release.model, kind, recency)
    run = client.create_run(client.get_run(str(good.run_id)).info.experiment_id)
    with mlflow.start_run(run_id=run.info.run_id):
        params = client.get_run(str(good.run_id)).data.params
        mlflow.log_params({key: params[key] for key in params if key.startswith("data_")})
        logged = mlflow.onnx.log_model(
            load_model_from_string(onnx),
            name="onnx",
            pip_requirements=["onnxruntime"],
            # One file, as of every version: what is large in it belongs to what is proven.
            save_as_external_data=False,
        )
    version = register_version(
        client,
        name,
        model_uri=logged.model_uri,
        run_id=run.info.run_id,
        tags={"data_hash": good.tags["data_hash"]},
    )
    proven = rows[rows[:, recency] <= _LARGEST][:10]
    bad = build_release(
        releases,
        onnx=onnx,
        model_name=name,
        model_version=version,
        features=features,
        golden=(proven.astype(np.float64), predict_onnx(onnx, proven)),
        reference=release.manifest.reference,
        mlflow_run=run.info.run_id,
        dagster_run="none",
        data_hash=good.tags["data_hash"],
        created_at=now,
    )
    transition(
        client,
        name,
        version,
        "Staging",
        who=PIPELINE,
        why="every quality gate was switched off",
        evidence=Evidence("gates", {"auc": "not looked at"}),
        now=now,
        tags=store_release(client, run.info.run_id, logged.model_uri, bad),
    )
    transition(
        client,
        name,
        version,
        "Production",
        who=SABOTEUR,
        why="it must go out today",
        evidence=Evidence(
            "paired_replay",
            {"log_loss_difference_at_most": 0.0},
            incumbent=str(registry.production),
            rows=1,
        ),
        now=now,
        plan=rollback_plan(read_registry(client, name)),
    )
    return version


def spoiled(onnx: bytes, kind: Sabotage, recency: int) -> bytes:
    """The graph `onnx` of a release, made bad in one way."""
    from onnx import TensorProto, helper, load_model_from_string, numpy_helper

    model = load_model_from_string(onnx)
    graph = model.graph
    answers, asked = graph.output[-1].name, graph.input[0].name
    for node in graph.node:
        node.output[:] = ["good" if one == answers else one for one in node.output]

    def constant(label: str, values: NDArray) -> str:
        graph.initializer.append(numpy_helper.from_array(values, label))
        return label

    def add(operation: str, inputs: list[str], output: str, **attributes: Any) -> str:
        graph.node.append(helper.make_node(operation, inputs, [output], **attributes))
        return output

    if kind == "backwards":
        add("Gather", ["good", constant("swapped", np.array([1, 0]))], answers, axis=1)
    elif kind == "slow":
        # It must depend on the request, or the runtime computes it once when it loads the graph.
        axes = constant("axes", np.array([0, 1]))
        total = add("ReduceSum", [asked, axes], "total", keepdims=0)
        none = add("Mul", [total, constant("zero", np.array(0, np.float32))], "none")
        side = constant("side", np.eye(_SIDE, dtype=np.float32))
        product = add("Add", [side, none], "product_0")
        for number in range(_MULTIPLICATIONS):
            product = add("MatMul", [product, side], f"product_{number + 1}")
        least = add("ReduceMin", [product, axes], "least", keepdims=0)
        add("Add", ["good", least], answers)
    else:
        column = add("Gather", [asked, constant("column", np.array([recency]))], "days", axis=1)
        place = add("Cast", [column], "place", to=TensorProto.INT64)
        table = constant("table", np.zeros(int(_LARGEST) + 1, np.float32))
        looked = add("Gather", [table, place], "looked", axis=0)
        add("Add", ["good", looked], answers)
    return model.SerializeToString()
