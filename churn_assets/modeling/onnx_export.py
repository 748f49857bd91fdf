"""The model as ONNX, and the proof that it is still the same model."""

from __future__ import annotations

import warnings
from copy import copy
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from churn_assets.contract.release import NO_OUTSIDE_WEIGHTS
from churn_assets.errors import UserError
from churn_assets.modeling.candidates import limited_threads

INPUT_NAME = "features"
OUTPUT_NAME = "probabilities"
TOLERANCE = 1e-5

# The newest operator set every supported ONNX Runtime reads without a warning.
OPSET = {"": 18, "ai.onnx.ml": 3}


@dataclass(frozen=True)
class Parity:
    """ONNX against scikit-learn on the same rows.

    max_difference: largest absolute difference of P(churn) on float32 input; None when there is
    none. full_precision_difference: the same with scikit-learn seeing the unrounded rows, for
    information: what rounding the input to float32 costs.
    """

    passed: bool
    max_difference: float | None
    rows: int
    tolerance: float
    reason: str
    full_precision_difference: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result in JSON's types."""
        return asdict(self)


def export_onnx(estimator: Any, n_features: int) -> bytes:
    """Convert a fitted scikit-learn classifier, calibrated or not, to ONNX.

    Input `features`, float32 [rows, n_features], in the order of training. Outputs `label`,
    int64 [rows], and `probabilities`, float32 [rows, 2]: retained, churned. The same estimator
    gives the same bytes. A conversion proves nothing: follow it with `check_parity`.
    """
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    from churn_assets.modeling.calibrated_classifier import CalibratedClassifier

    if isinstance(estimator, CalibratedClassifier):
        plain = export_onnx(estimator.estimator, n_features)
        return _with_calibration(plain, estimator.slope, estimator.intercept)
    if hasattr(type(estimator), "estimators_samples_"):
        # The converter reads every property, and this one draws each tree's bootstrap again:
        # half of the time a forest takes. Without `bootstrap` it has nothing to draw.
        estimator = copy(estimator).set_params(bootstrap=False)
    initial_types: Any = [(INPUT_NAME, FloatTensorType([None, n_features]))]
    with warnings.catch_warnings():
        # The converter hands protobuf booleans where it wants integers, which is deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        model = to_onnx(
            estimator,
            name="churn",
            initial_types=initial_types,
            options={"zipmap": False},
            target_opset=OPSET,
        )
    return model.SerializeToString()


def _with_calibration(onnx: bytes, slope: float, intercept: float) -> bytes:
    """The graph with `calibration.calibrated` behind its probabilities.

    The converter's own calibrators are wrong for some families without an error, so these nodes are
    ours. The log-odds z of the two classes are -z/2 and z/2 but for a constant, and softmax of
    these is what the sigmoid of z is.
    """
    from onnx import helper, load_model_from_string, numpy_helper

    from churn_assets.modeling.calibration import MARGIN

    model = load_model_from_string(onnx)
    graph = model.graph
    plain = {"label": "plain_label", OUTPUT_NAME: "plain_probabilities"}
    for node in graph.node:
        for place, name in enumerate(node.output):
            node.output[place] = plain.get(name, name)
        for place, name in enumerate(node.input):
            node.input[place] = plain.get(name, name)
    constants = {
        "margin": MARGIN,
        "one_less_margin": 1.0 - MARGIN,
        "slope": [[slope / 2, -slope / 2], [-slope / 2, slope / 2]],
        "intercept": [-intercept / 2, intercept / 2],
    }
    graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value, dtype=np.float32), name)
        for name, value in constants.items()
    )
    graph.node.extend(
        [
            helper.make_node(
                "Clip", ["plain_probabilities", "margin", "one_less_margin"], ["kept"]
            ),
            helper.make_node("Log", ["kept"], ["logs"]),
            helper.make_node("Gemm", ["logs", "slope", "intercept"], ["halves"]),
            helper.make_node("Softmax", ["halves"], [OUTPUT_NAME], axis=1),
            helper.make_node("ArgMax", [OUTPUT_NAME], ["label"], axis=1, keepdims=0),
        ]
    )
    return model.SerializeToString()


class ModelFails(UserError):
    """A model gives an error in the place of a probability."""


def predict_onnx(onnx: bytes, x: NDArray[Any], *, threads: int = 0) -> NDArray[np.float64]:
    """P(churn) [rows] of `x` [rows, features] by ONNX Runtime; threads 0 means every core.

    Raises ModelFails when the graph cannot be run on one of the rows.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait without spinning leave the cores to whatever else runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(*NO_OUTSIDE_WEIGHTS)
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    rows = np.ascontiguousarray(x, dtype=np.float32)
    try:
        output = np.asarray(session.run([OUTPUT_NAME], {INPUT_NAME: rows})[0])
    except Exception as error:  # onnxruntime's exceptions share no base class of its own
        first = str(error).splitlines()[0]
        raise ModelFails(f"the model fails on one of {len(rows):,} rows: {first}") from error
    return output[:, 1].astype(np.float64)


def session_latency(onnx: bytes, x: NDArray[Any], *, runs: int = 1000) -> dict[str, float]:
    """Milliseconds a row takes in the session as the service makes it: one thread, one row a call.

    Rows of `x` [rows, features] are asked in turn, after a tenth as many that are not counted.
    Returns session_p50_ms, session_p95_ms and session_p99_ms.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry(*NO_OUTSIDE_WEIGHTS)
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    rows = np.ascontiguousarray(x, dtype=np.float32)
    times = []
    for number in range(-(runs // 10), runs):
        row = rows[number % len(rows)][None, :]
        begun = perf_counter()
        session.run([OUTPUT_NAME], {INPUT_NAME: row})
        if number >= 0:
            times.append(1000 * (perf_counter() - begun))
    p50, p95, p99 = (float(value) for value in np.percentile(times, [50, 95, 99]))
    return {"session_p50_ms": p50, "session_p95_ms": p95, "session_p99_ms": p99}


def check_parity(
    estimator: Any, onnx: bytes, x: NDArray[Any], *, tolerance: float = TOLERANCE
) -> Parity:
    """Compare P(churn) of `onnx` and of `estimator` on held-out rows `x` [rows, features].

    Both see `x` rounded to float32, the type the ONNX graph takes: a tree compares an input with
    a threshold, and a value that rounding moves across one would be sent down another branch,
    which says nothing about the conversion. Fails on a difference above `tolerance`, on anything
    not finite in input or output, on no rows, and on a graph that cannot be run.
    """
    rows = len(x)

    def failed(reason: str) -> Parity:
        return Parity(False, None, rows, tolerance, reason)

    if rows == 0:
        return failed("there are no rows to compare on")
    with np.errstate(over="ignore"):
        rounded = np.asarray(x).astype(np.float32)
    if not np.isfinite(rounded).all():
        return failed("the rows to compare on hold NaN or infinity")
    try:
        served = predict_onnx(onnx, rounded)
    except Exception as error:  # onnxruntime's exceptions share no base class of its own
        return failed(f"ONNX Runtime cannot run the model: {str(error).splitlines()[0]}")
    # A float64 array of float32 values: every estimator then works at its own precision.
    with limited_threads(rows):
        expected = np.asarray(estimator.predict_proba(rounded.astype(np.float64))[:, 1])
        exact = np.asarray(estimator.predict_proba(np.asarray(x, dtype=np.float64))[:, 1])
    if served.shape != expected.shape:
        return failed(f"ONNX gives {served.shape[0]} probabilities for {rows} rows")
    if not (np.isfinite(served).all() and np.isfinite(expected).all()):
        return failed("a probability is not finite")
    difference = float(np.abs(served - expected).max())
    passed = difference <= tolerance
    relation = "within" if passed else "above"
    return Parity(
        passed=passed,
        max_difference=difference,
        rows=rows,
        tolerance=tolerance,
        reason=f"largest difference {difference:.2g} on {rows} rows, {relation} {tolerance:g}",
        full_precision_difference=float(np.abs(served - exact).max()),
    )
