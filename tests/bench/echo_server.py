"""As little as a server can do that reads and writes JSON: the ceiling of the bench."""

from __future__ import annotations

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


class Customer(msgspec.Struct):
    """What is asked."""

    customer_id: str
    total_orders_30d: int
    avg_order_value: float
    days_since_last_order: int
    support_tickets_90d: int
    login_frequency_7d: float


class Prediction(msgspec.Struct):
    """What is answered, whoever asks."""

    customer_id: str
    churn_probability: float
    risk_level: str
    model_version: str


_decode = msgspec.json.Decoder(Customer).decode
_encode = msgspec.json.Encoder().encode


async def predict(request: Request) -> Response:
    """An answer of the right form."""
    customer = _decode(await request.body())
    answer = _encode(Prediction(customer.customer_id, 0.5, "medium", "1"))
    return Response(answer, media_type="application/json")


app = Starlette(routes=[Route("/predict", predict, methods=["POST"])])
