"""The server a team writes by hand: FastAPI, pydantic and a scikit-learn forest.

It differs from the published one in a single thing, without which it answers nothing: that one
loads its model with `mlflow.pyfunc.load_model`, whose models have no `predict_proba`; this one
loads the scikit-learn flavour. The endpoint is a plain function, which FastAPI runs in a thread;
SEED_ASYNC=1 makes it a coroutine on the event loop, the other way to write it.
"""

from __future__ import annotations

import os

import mlflow.sklearn
import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel

MODEL_VERSION = "1"

app = FastAPI()
model = mlflow.sklearn.load_model(os.environ["SEED_MODEL"])


class Customer(BaseModel):
    """What is asked."""

    customer_id: str
    total_orders_30d: int
    avg_order_value: float
    days_since_last_order: int
    support_tickets_90d: int
    login_frequency_7d: float


class Prediction(BaseModel):
    """What is answered."""

    customer_id: str
    churn_probability: float
    risk_level: str
    model_version: str


def predict(customer: Customer) -> Prediction:
    """The churn probability of one customer."""
    features = np.array(
        [
            [
                customer.total_orders_30d,
                customer.avg_order_value,
                customer.days_since_last_order,
                customer.support_tickets_90d,
                customer.login_frequency_7d,
            ]
        ]
    )
    probability = float(model.predict_proba(features)[0][1])
    risk = "high" if probability > 0.7 else "medium" if probability > 0.4 else "low"
    return Prediction(
        customer_id=customer.customer_id,
        churn_probability=round(probability, 4),
        risk_level=risk,
        model_version=MODEL_VERSION,
    )


async def predict_on_the_loop(customer: Customer) -> Prediction:
    """The same, in the way of every other request."""
    return predict(customer)


on_the_loop = os.environ.get("SEED_ASYNC") == "1"
app.post("/predict")(predict_on_the_loop if on_the_loop else predict)


@app.get("/health")
def health() -> dict[str, str]:
    """What is served."""
    return {"status": "healthy", "model": "churn", "version": MODEL_VERSION}
