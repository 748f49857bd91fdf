"""The body of `POST /predict`: one decoder, made of the features a release has.

What is not the contract is refused with the field that is at fault, never mended: an integer
feature takes a JSON integer (neither "3", true, 3.5 nor 3.0), a float feature a finite JSON
number, both within the range the feature has in `contract.features`.

Status codes: 400 for what is not JSON (NaN and Infinity are not), 422 for JSON that breaks the
contract. A key given twice counts with its last value, as in every JSON parser of the standard
library.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from churn_assets.contract.features import Feature

MAX_BODY_BYTES = 64 * 1024
MAX_CUSTOMER_ID = 128
CUSTOMER_ID = "customer_id"
WHOLE_BODY = "body"

# Echoed in answers, so that a caller's 60 KB key does not come back as a 60 KB message.
_MAX_ECHO = 80

_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`\Z", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`\Z")
_AT_FIELD = re.compile(r"(?P<detail>.*) - at `\$\.(?P<field>\w+)`\Z", re.DOTALL)
_GOT = re.compile(r"got `(\w+)`")
_NOT_A_NUMBER = re.compile(rb'"([^"\\]{1,80})"\s{0,80}:\s{0,80}(-?(?:NaN|Infinity))\b')


class Refusal(Exception):
    """A request that is not answered: HTTP status (4xx), the field at fault, and why."""

    def __init__(self, status: int, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.status = status
        self.field = field
        self.message = message


class PredictionRequest(msgspec.Struct, frozen=True):
    """Base of the request types: `customer_id`, then one field a feature."""

    customer_id: str


def request_type(features: Sequence[Feature]) -> type[PredictionRequest]:
    """The request type of a release with `features`, its fields in that order after customer_id."""
    fields = [(CUSTOMER_ID, _CUSTOMER_ID_TYPE), *((f.name, _feature_type(f)) for f in features)]
    made = msgspec.defstruct(
        "PredictionRequest",
        fields,
        bases=(PredictionRequest,),
        frozen=True,
        forbid_unknown_fields=True,
        gc=False,
    )
    return cast(type[PredictionRequest], made)


_CUSTOMER_ID_TYPE = Annotated[
    str,
    msgspec.Meta(
        min_length=1,
        max_length=MAX_CUSTOMER_ID,
        pattern=r"\S",
        description="Identifier of the customer, returned as it came",
    ),
]


def _feature_type(feature: Feature) -> Any:
    kind: type[int] | type[float] = int if feature.dtype == "int" else float
    return Annotated[
        kind,
        msgspec.Meta(
            ge=kind(feature.minimum),
            le=kind(feature.maximum),
            description=f"{feature.meaning} ({feature.unit})",
        ),
    ]


def _expectation(feature: Feature) -> str:
    kind = "an integer" if feature.dtype == "int" else "a number"
    return f"{kind} from {feature.minimum:.0f} to {feature.maximum:.0f} ({feature.unit})"


class RequestDecoder:
    """Decodes bodies for a model with `features` (at least one, in the model's column order)."""

    def __init__(self, features: Sequence[Feature]):
        self.type = request_type(features)
        self._decode = msgspec.json.Decoder(self.type).decode
        self._expectations = {
            CUSTOMER_ID: f"a string of 1 to {MAX_CUSTOMER_ID} characters that is not blank",
            **{feature.name: _expectation(feature) for feature in features},
        }

    def decode(self, body: bytes) -> PredictionRequest:
        """The request in `body`. Raises Refusal naming the field when it breaks the contract."""
        try:
            return self._decode(body)
        except msgspec.ValidationError as error:
            raise self._broken(str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._malformed(body, error) from None

    @staticmethod
    def row(request: PredictionRequest) -> NDArray[np.float32]:
        """The features of `request` as the model takes them: float32 of shape (1, features)."""
        return np.array([msgspec.structs.astuple(request)[1:]], dtype=np.float32)

    def schema(self) -> dict[str, Any]:
        """The JSON schema of the body."""
        return msgspec.json.schema(self.type)

    def _broken(self, reason: str) -> Refusal:
        if missing := _MISSING.match(reason):
            field = missing[1]
            return Refusal(422, field, f"is missing: give {self._expectations[field]}")
        if unknown := _UNKNOWN.match(reason):
            known = ", ".join(self._expectations)
            name = unknown[1][:_MAX_ECHO] or '""'
            return Refusal(422, name, f"is not a field; the fields are {known}")
        if at_field := _AT_FIELD.match(reason):
            field = at_field["field"]
            got = _GOT.search(at_field["detail"])
            suffix = f", got {got[1]}" if got else ""
            return Refusal(422, field, f"must be {self._expectations[field]}{suffix}")
        return Refusal(422, WHOLE_BODY, f"must be a JSON object: {reason}")

    def _malformed(self, body: bytes, error: Exception) -> Refusal:
        for match in _NOT_A_NUMBER.finditer(body):
            field, literal = match[1].decode(errors="replace"), match[2].decode()
            if field in self._expectations:
                return Refusal(400, field, f"must be {self._expectations[field]}, got {literal}")
        return Refusal(400, WHOLE_BODY, f"must be JSON in UTF-8: {error}")
