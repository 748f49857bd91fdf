"""The bodies of `POST /predict` and `/predict_batch`: one decoder, made of a release's features.

A request brings every feature, or none but the customer's id: then they come from the online store.
A body with some of them is refused by the first that is missing, never completed from the store.

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
MAX_BATCH_BYTES = 1024 * 1024
MAX_ROWS = 1000
MAX_CUSTOMER_ID = 128
CUSTOMER_ID = "customer_id"
WHOLE_BODY = "body"
WHOLE_ROW = "row"
ROWS = "rows"

# A character that is not white space, in words that Python, ECMAScript and Rust read alike: their
# own \S differ by the separators of ASCII, NEL and the byte order mark.
_NOT_BLANK = r"[^\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff]"

# Echoed in answers, so that a caller's 60 KB key does not come back as a 60 KB message.
_MAX_ECHO = 80

_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`\Z", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`\Z")
_AT_FIELD = re.compile(r"(?P<detail>.*) - at `\$\.(?P<field>\w+)`\Z", re.DOTALL)
_GOT = re.compile(r"got `(\w+)`")
# A string, closed or not, so that the scan never goes back; or one of the literals beside strings.
_STRING_OR_NOT_JSON = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|-?\b(?:NaN|Infinity)\b', re.DOTALL)
_NOT_A_NUMBER = re.compile(rb'"([^"\\]{1,80})"\s{0,80}:\s{0,80}(-?(?:NaN|Infinity))\b')


class Refusal(Exception):
    """A request that is not answered: HTTP status, the field at fault, and why.

    `retry_after` (seconds) is set where the same request can be answered later.
    """

    def __init__(self, status: int, field: str, message: str, retry_after: int | None = None):
        super().__init__(f"{field}: {message}")
        self.status = status
        self.field = field
        self.message = message
        self.retry_after = retry_after


class PredictionRequest(msgspec.Struct, frozen=True):
    """Base of the request types: `customer_id`, then one field a feature."""

    customer_id: str


_CUSTOMER_ID_TYPE = Annotated[
    str,
    msgspec.Meta(
        min_length=1,
        max_length=MAX_CUSTOMER_ID,
        pattern=_NOT_BLANK,
        description="Identifier of the customer, returned as it came",
    ),
]


class CustomerRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A request by id alone."""

    customer_id: _CUSTOMER_ID_TYPE


class _Batch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rows: Annotated[list[msgspec.Raw], msgspec.Meta(min_length=1, max_length=MAX_ROWS)]


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


_decode_customer = msgspec.json.Decoder(CustomerRequest).decode
_decode_batch = msgspec.json.Decoder(_Batch).decode


class RequestDecoder:
    """Decodes bodies for a model with `features` (at least one, in the model's column order)."""

    def __init__(self, features: Sequence[Feature]):
        self.type = request_type(features)
        self._decode = msgspec.json.Decoder(self.type).decode
        self._first = features[0].name
        self._expectations = {
            CUSTOMER_ID: f"a string of 1 to {MAX_CUSTOMER_ID} characters that is not blank",
            **{feature.name: _expectation(feature) for feature in features},
        }

    def decode(self, body: bytes) -> PredictionRequest | CustomerRequest:
        """The request in `body`. Raises Refusal naming the field when it breaks the contract."""
        return self._decode_object(body, WHOLE_BODY)

    def decode_batch(self, body: bytes) -> list[PredictionRequest | CustomerRequest | Refusal]:
        """The rows in `body`, in order, each a request or why it is none.

        NaN and Infinity, which JSON does not have but many writers write, count as null: they cost
        their row, not the batch. Raises Refusal when the body is not 1 to MAX_ROWS rows.
        """
        rows = self._rows(body)
        decoded: list[PredictionRequest | CustomerRequest | Refusal] = []
        for row in rows:
            try:
                decoded.append(self._decode_object(row, WHOLE_ROW))
            except Refusal as refusal:
                decoded.append(refusal)
        return decoded

    @staticmethod
    def row(request: PredictionRequest) -> NDArray[np.float32]:
        """The features of `request` as the model takes them: float32 of shape (1, features)."""
        return np.array([msgspec.structs.astuple(request)[1:]], dtype=np.float32)

    def features_needed(self, why: str) -> Refusal:
        """The refusal of a request by id where there is nothing to look it up in."""
        expected = self._expectations[self._first]
        return Refusal(422, self._first, f"is missing: give {expected}; {why}")

    def schema(self) -> dict[str, Any]:
        """The JSON schema of the body with every feature."""
        return msgspec.json.schema(self.type)

    def _decode_object(
        self, content: bytes | msgspec.Raw, whole: str
    ) -> PredictionRequest | CustomerRequest:
        try:
            return self._decode(content)
        except msgspec.ValidationError as error:
            reason = str(error)
            # What is missing is looked at last, so everything that was given is good.
            if missing := _MISSING.match(reason):
                if missing[1] == self._first and (by_id := _by_id(content)):
                    return by_id
                field = missing[1]
                message = f"is missing: give {self._expectations[field]}"
                raise Refusal(422, field, message) from None
            raise self._broken(reason, whole) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._malformed(bytes(content), error, whole) from None

    def _rows(self, body: bytes) -> list[msgspec.Raw]:
        try:
            try:
                return _decode_batch(body).rows
            except msgspec.ValidationError:
                raise
            except msgspec.DecodeError:
                return _decode_batch(_STRING_OR_NOT_JSON.sub(_null_for_not_json, body)).rows
        except msgspec.ValidationError as error:
            reason = str(error)
            if unknown := _UNKNOWN.match(reason):
                name = unknown[1][:_MAX_ECHO] or '""'
                raise Refusal(422, name, f"is not a field; the field is {ROWS}") from None
            field = WHOLE_BODY if reason.startswith("Expected `object`") else ROWS
            message = f"must be a JSON object with a list of 1 to {MAX_ROWS} {ROWS}: {reason}"
            raise Refusal(422, field, message) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Refusal(400, WHOLE_BODY, f"must be JSON in UTF-8: {error}") from None
        except RecursionError:
            raise Refusal(422, ROWS, "has a row that is nested too deeply") from None

    def _broken(self, reason: str, whole: str) -> Refusal:
        if unknown := _UNKNOWN.match(reason):
            known = ", ".join(self._expectations)
            name = unknown[1][:_MAX_ECHO] or '""'
            return Refusal(422, name, f"is not a field; the fields are {known}")
        if at_field := _AT_FIELD.match(reason):
            field = at_field["field"]
            got = _GOT.search(at_field["detail"])
            suffix = f", got {got[1]}" if got else ""
            return Refusal(422, field, f"must be {self._expectations[field]}{suffix}")
        return Refusal(422, whole, f"must be a JSON object: {reason}")

    def _malformed(self, body: bytes, error: Exception, whole: str) -> Refusal:
        for match in _NOT_A_NUMBER.finditer(body):
            field, literal = match[1].decode(errors="replace"), match[2].decode()
            if field in self._expectations:
                return Refusal(400, field, f"must be {self._expectations[field]}, got {literal}")
        return Refusal(400, whole, f"must be JSON in UTF-8: {error}")


def _by_id(content: bytes | msgspec.Raw) -> CustomerRequest | None:
    try:
        return _decode_customer(content)
    except msgspec.ValidationError:
        return None


def _null_for_not_json(match: re.Match[bytes]) -> bytes:
    return match[0] if match[0].startswith(b'"') else b"null"
