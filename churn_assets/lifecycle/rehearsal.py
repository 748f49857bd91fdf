"""Trying out what is about to be served: a candidate's release, then the bento built from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from churn_assets.contract.response import predict
from churn_assets.contract.risk import RiskThresholds
from churn_assets.lifecycle.bento import Bento
from churn_assets.lifecycle.records import Example
from churn_assets.lifecycle.serving import Latency, ask, measure_latency, serve

# The service rounds to four digits; a float32 model may differ from the judged value in the last.
TOLERANCE = 1.01e-4


@dataclass(frozen=True)
class Answered:
    """What a bento answered to an example, and whether that is what the judged model says."""

    passed: bool
    reason: str
    response: dict[str, str | float]
    latency_ms: float


def measure_release(
    service: Path, release_dir: Path, bodies: Sequence[dict[str, str | int | float]]
) -> Latency:
    """Serve a release with the code in `service` and time single predictions over HTTP.

    Raises UserError when the service does not start or refuses what it is asked.
    """
    with serve(service, release_dir) as url:
        return measure_latency(url, bodies)


def ask_bento(bento: Bento, bentoml_home: Path, example: Example, version: str) -> Answered:
    """Serve a built bento and ask it about one customer, twice: the second answer is timed."""
    expected = predict(
        str(example.request["customer_id"]), example.probability, version, RiskThresholds()
    )
    with serve(bento.tag, bentoml_home=bentoml_home) as url:
        ask(url, example.request)
        answer = ask(url, example.request)
    if answer.status != 200:
        text = answer.content.decode(errors="replace")
        return Answered(False, f"answered {answer.status}: {text}", {}, answer.latency_ms)
    response = answer.json()
    difference = abs(response["churn_probability"] - expected.churn_probability)
    passed = difference <= TOLERANCE and response["model_version"] == version
    reason = (
        f"answered {response['churn_probability']} by version {response['model_version']}; "
        f"the judged model says {expected.churn_probability} by version {version}"
    )
    return Answered(passed, reason, response, answer.latency_ms)
