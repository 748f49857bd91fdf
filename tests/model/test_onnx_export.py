from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
from numpy.typing import NDArray

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.modeling.backtest import predict_churn
from churn_assets.modeling.calibrated_classifier import CalibratedClassifier
from churn_assets.modeling.candidates import FAMILIES, Family, build_estimator
from churn_assets.modeling.onnx_export import check_parity, export_onnx, predict_onnx
from churn_assets.modeling.rows import feature_matrix, outcomes, rows_of
from churn_assets.modeling.split import Split

Fitted = dict[str, tuple[Any, bytes]]


@pytest.fixture(scope="module")
def held_out(frame: pd.DataFrame, split: Split) -> NDArray[np.float64]:
    return rows_of(frame, [split.test])[list(FEATURE_NAMES)].to_numpy(dtype=np.float64)


@pytest.fixture(scope="module")
def fitted(frame: pd.DataFrame, split: Split) -> Callable[[Family], tuple[Any, bytes]]:
    train = rows_of(frame, split.train)
    x, y = feature_matrix(train, FEATURE_NAMES), outcomes(train)
    made: Fitted = {}

    def make(family: Family) -> tuple[Any, bytes]:
        if family not in made:
            few = {"n_estimators": 30} if family == "random_forest" else None
            estimator = build_estimator(family, seed=1, n_jobs=1, params=few)
            estimator.fit(x.astype(np.float64), y)
            made[family] = (estimator, export_onnx(estimator, len(FEATURE_NAMES)))
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_survives_the_conversion(
    family: Family, fitted: Callable[[Family], tuple[Any, bytes]], held_out: NDArray[np.float64]
) -> None:
    estimator, content = fitted(family)
    parity = check_parity(estimator, content, held_out)
    assert parity.passed, parity.reason
    assert parity.rows == len(held_out)
    assert parity.max_difference is not None
    assert parity.max_difference < 1e-6
    np.testing.assert_allclose(
        predict_onnx(content, held_out), predict_churn(estimator, held_out), atol=1e-6
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("line", [(1.2, 0.3), (0.6, -0.8), (2.5, 1.0)])
def test_every_family_survives_the_conversion_calibrated(
    family: Family,
    line: tuple[float, float],
    fitted: Callable[[Family], tuple[Any, bytes]],
    held_out: NDArray[np.float64],
) -> None:
    estimator, plain = fitted(family)
    model = CalibratedClassifier(estimator, *line)
    content = export_onnx(model, len(FEATURE_NAMES))
    onnx.checker.check_model(onnx.load_model_from_string(content), full_check=True)
    parity = check_parity(model, content, held_out)
    assert parity.passed, parity.reason
    assert content == export_onnx(model, len(FEATURE_NAMES))
    assert not check_parity(model, plain, held_out).passed
    graph = onnx.load_model_from_string(content).graph
    assert [o.name for o in graph.output] == ["label", "probabilities"]


def test_a_calibrated_graph_labels_by_its_calibrated_probability(
    fitted: Callable[[Family], tuple[Any, bytes]], held_out: NDArray[np.float64]
) -> None:
    import onnxruntime

    model = CalibratedClassifier(fitted("hist_gradient_boosting")[0], 1.0, -2.0)
    session = onnxruntime.InferenceSession(export_onnx(model, len(FEATURE_NAMES)))
    label, p = session.run(None, {"features": held_out.astype(np.float32)})
    assert isinstance(label, np.ndarray)
    assert isinstance(p, np.ndarray)
    np.testing.assert_array_equal(label, model.predict(held_out.astype(np.float32)))
    np.testing.assert_allclose(p.sum(axis=1), 1.0, atol=1e-6)
    assert 0 < label.sum() < fitted("hist_gradient_boosting")[0].predict(held_out).sum()


def test_the_served_graph_has_one_input_and_ends_in_probabilities(
    fitted: Callable[[Family], tuple[Any, bytes]],
) -> None:
    _, content = fitted("hist_gradient_boosting")
    graph = onnx.load_model_from_string(content).graph
    assert [i.name for i in graph.input] == ["features"]
    assert [o.name for o in graph.output] == ["label", "probabilities"]
    kind = graph.input[0].type.tensor_type
    assert kind.elem_type == onnx.TensorProto.FLOAT
    assert kind.shape.dim[1].dim_value == len(FEATURE_NAMES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_estimator_gives_the_same_bytes(
    family: Family, fitted: Callable[[Family], tuple[Any, bytes]]
) -> None:
    estimator, content = fitted(family)
    assert export_onnx(estimator, len(FEATURE_NAMES)) == content


def test_exporting_leaves_the_forest_as_it_was(
    fitted: Callable[[Family], tuple[Any, bytes]],
) -> None:
    forest, _ = fitted("random_forest")
    assert forest.bootstrap is True


def perturbed(content: bytes, amount: float) -> bytes:
    """The graph with every leaf of its trees moved by `amount` of its own size."""
    model = onnx.load_model_from_string(content)
    changed = 0
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("class_weights", "target_weights"):
                weights = np.array(attribute.floats, dtype=np.float32) * np.float32(1 + amount)
                del attribute.floats[:]
                attribute.floats.extend(weights.tolist())
                changed += 1
    assert changed
    return model.SerializeToString()


@pytest.mark.parametrize("family", ["random_forest", "hist_gradient_boosting"])
def test_a_planted_perturbation_is_found(
    family: Family, fitted: Callable[[Family], tuple[Any, bytes]], held_out: NDArray[np.float64]
) -> None:
    estimator, content = fitted(family)
    parity = check_parity(estimator, perturbed(content, 1e-3), held_out)
    assert not parity.passed
    assert parity.max_difference is not None
    assert parity.max_difference > 1e-5
    assert "above 1e-05" in parity.reason


def test_another_model_is_found(
    fitted: Callable[[Family], tuple[Any, bytes]], held_out: NDArray[np.float64]
) -> None:
    estimator, _ = fitted("hist_gradient_boosting")
    _, other = fitted("logistic_regression")
    assert not check_parity(estimator, other, held_out).passed


def test_swapped_feature_columns_are_found(
    fitted: Callable[[Family], tuple[Any, bytes]], held_out: NDArray[np.float64]
) -> None:
    estimator, content = fitted("logistic_regression")
    model = onnx.load_model_from_string(content)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Scaler":
                swapped = list(attribute.floats)[::-1]
                del attribute.floats[:]
                attribute.floats.extend(swapped)
    assert not check_parity(estimator, model.SerializeToString(), held_out).passed


def test_no_rows_prove_nothing(
    fitted: Callable[[Family], tuple[Any, bytes]], held_out: NDArray[np.float64]
) -> None:
    estimator, content = fitted("hist_gradient_boosting")
    parity = check_parity(estimator, content, held_out[:0])
    assert not parity.passed
    assert parity.max_difference is None
    assert "no rows" in parity.reason


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_rows_that_are_not_finite_in_float32_are_refused(
    value: float, fitted: Callable[[Family], tuple[Any, bytes]], held_out: NDArray[np.float64]
) -> None:
    estimator, content = fitted("hist_gradient_boosting")
    broken = held_out.copy()
    broken[0, 1] = value
    parity = check_parity(estimator, content, broken)
    assert not parity.passed
    assert "NaN or infinity" in parity.reason


def test_a_graph_that_answers_nan_fails(
    fitted: Callable[[Family], tuple[Any, bytes]], held_out: NDArray[np.float64]
) -> None:
    estimator, content = fitted("random_forest")
    parity = check_parity(estimator, perturbed(content, np.nan), held_out)
    assert not parity.passed
    assert "not finite" in parity.reason


def test_bytes_that_are_no_graph_fail_with_the_reason(
    fitted: Callable[[Family], tuple[Any, bytes]], held_out: NDArray[np.float64]
) -> None:
    estimator, content = fitted("hist_gradient_boosting")
    for broken in (b"not a model", content[: len(content) // 2]):
        parity = check_parity(estimator, broken, held_out)
        assert not parity.passed
        assert parity.reason.startswith("ONNX Runtime cannot run the model")


def test_rounding_across_a_threshold_is_not_held_against_the_conversion() -> None:
    x = np.array([[1.0], [2.0]] * 100)
    model = build_estimator("hist_gradient_boosting", seed=1).fit(x, x[:, 0] > 1.5)
    just_above = np.array([[1.5 + 1e-12]])
    parity = check_parity(model, export_onnx(model, 1), just_above)
    assert parity.passed
    assert parity.full_precision_difference is not None
    assert parity.full_precision_difference > 0.5
