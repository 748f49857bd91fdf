"""Table schemas: derived from the definitions of the raw tables and features, exchanged as JSON.

The JSON is a Table Schema of the Data Package standard (datapackage.org), so that other tools read
it too. `required` says that a null is a fault of the row; the primary key is required as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pyarrow as pa

from churn_assets.contract.features import Feature
from churn_assets.data.tables import TIMESTAMP, RawTable
from churn_assets.errors import UserError

MAX_ID_LENGTH = 128
"""Longest identifier accepted, in UTF-8 bytes."""

FieldType = Literal["string", "integer", "number", "boolean", "date", "datetime"]
RuleKind = Literal["missing", "empty", "overlong", "below", "above"]
Bound = int | float


class Constraints(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel"):
    """What a value of a field must satisfy. `minimum` and `maximum` are inclusive."""

    required: bool = False
    minimum: Bound | None = None
    maximum: Bound | None = None
    max_length: int | None = None


class Field(msgspec.Struct, frozen=True, omit_defaults=True):
    """One column."""

    name: Annotated[str, msgspec.Meta(min_length=1)]
    type: FieldType
    description: str = ""
    constraints: Constraints = Constraints()


class TableSchema(msgspec.Struct, frozen=True, rename="camel"):
    """The columns of a table, in order, and the columns that together name a row."""

    fields: Annotated[tuple[Field, ...], msgspec.Meta(min_length=1)]
    primary_key: tuple[str, ...] = ()
    fields_match: tuple[Literal["subset"]] = ("subset",)
    """The standard's word for: a table has these columns and may have more."""

    def field(self, name: str) -> Field:
        """The field called `name`. Raises KeyError when there is none."""
        for field in self.fields:
            if field.name == name:
                return field
        raise KeyError(name)

    @property
    def required(self) -> frozenset[str]:
        """The columns in which a null is a fault."""
        return frozenset(self.primary_key) | {
            field.name for field in self.fields if field.constraints.required
        }

    @property
    def rules(self) -> tuple[Rule, ...]:
        """What the values of a row must satisfy, in the order in which a fault is told."""
        return tuple(rule for field in self.fields for rule in _rules(field, self.required))

    @property
    def arrow(self) -> pa.Schema:
        """The same columns as the lake stores them."""
        required = self.required
        return pa.schema(
            [pa.field(f.name, _ARROW[f.type], nullable=f.name not in required) for f in self.fields]
        )


@dataclass(frozen=True)
class Rule:
    """One way for the value of a field to be at fault: beyond `limit`, for the kinds with one."""

    field: Field
    kind: RuleKind
    limit: Bound | None = None

    @property
    def reason(self) -> str:
        """The name of the fault."""
        words = {
            "missing": "missing",
            "empty": "missing",
            "overlong": "overlong",
            "below": "negative" if self.limit == 0 else "too_small",
            "above": "too_large",
        }
        return f"{words[self.kind]}_{self.field.name}"

    @property
    def detail(self) -> str:
        """The fault in words."""
        words = {
            "missing": "is not given",
            "empty": "is not given",
            "overlong": f"is longer than {self.limit} bytes",
            "below": f"is below {self.limit}",
            "above": f"is above {self.limit}",
        }
        return f"{self.field.name} {words[self.kind]}"


def _rules(field: Field, required: frozenset[str]) -> Iterator[Rule]:
    limits = field.constraints
    if field.name in required:
        yield Rule(field, "missing")
        if field.type == "string":
            yield Rule(field, "empty")
    if field.type == "string" and limits.max_length is not None:
        yield Rule(field, "overlong", limits.max_length)
    if field.type in ("integer", "number"):
        if limits.minimum is not None:
            yield Rule(field, "below", limits.minimum)
        if limits.maximum is not None:
            yield Rule(field, "above", limits.maximum)


_ARROW: dict[FieldType, pa.DataType] = {
    "string": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
    "date": pa.date32(),
    "datetime": TIMESTAMP,
}

_NON_NEGATIVE = frozenset({"amount_minor"})


def field_type(stored: pa.DataType) -> FieldType | None:
    """The field type a stored column has; None for one no table here uses."""
    if pa.types.is_dictionary(stored):
        return field_type(stored.value_type)
    tests = (
        (pa.types.is_string, "string"),
        (pa.types.is_large_string, "string"),
        (pa.types.is_string_view, "string"),
        (pa.types.is_integer, "integer"),
        (pa.types.is_floating, "number"),
        (pa.types.is_decimal, "number"),
        (pa.types.is_boolean, "boolean"),
        (pa.types.is_date, "date"),
        (pa.types.is_timestamp, "datetime"),
    )
    return next((name for test, name in tests if test(stored)), None)


def table_schema(table: RawTable) -> TableSchema:
    """The schema of a raw table."""
    fields = []
    for column in table.columns:
        kind = field_type(column.type)
        assert kind is not None, f"{table.name}.{column.name} has no field type"
        constraints = Constraints(
            required=not column.nullable,
            minimum=0 if column.name in _NON_NEGATIVE else None,
            max_length=MAX_ID_LENGTH if kind == "string" else None,
        )
        fields.append(Field(column.name, kind, column.description, constraints))
    return TableSchema(tuple(fields), (table.key,))


def features_schema(features: Sequence[Feature]) -> TableSchema:
    """The schema of the feature table of a source that has `features`."""
    keys = (
        Field(
            "customer_id",
            "string",
            "Customer of the population",
            Constraints(required=True, max_length=MAX_ID_LENGTH),
        ),
        Field(
            "cutoff",
            "datetime",
            "Instant the features are as of, UTC; no event at or after it was seen",
            Constraints(required=True),
        ),
    )
    values = (
        Field(
            feature.name,
            "integer" if feature.dtype == "int" else "number",
            f"{feature.meaning} ({feature.unit})",
            Constraints(required=True, minimum=feature.minimum, maximum=feature.maximum),
        )
        for feature in features
    )
    return TableSchema((*keys, *values), ("customer_id", "cutoff"))


def training_schema(features: Sequence[Feature]) -> TableSchema:
    """The schema of a training set: the feature table and what came of each row."""
    schema = features_schema(features)
    churned = Field(
        "churned",
        "boolean",
        "True when the customer placed no order within the horizon from the cutoff on",
        Constraints(required=True),
    )
    return TableSchema((*schema.fields, churned), schema.primary_key)


def schema_as_json(schema: TableSchema) -> str:
    """`schema` as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(schema)).decode()


def read_schema(path: str | Path) -> TableSchema:
    """The schema in JSON file `path`.

    Raises UserError when it is missing, not JSON, not a table schema, or contradicts itself.
    """
    try:
        schema = msgspec.json.decode(Path(path).read_bytes(), type=TableSchema)
    except OSError as error:
        raise UserError(
            f"schema {path} cannot be read ({error.strerror}); check --schema"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"schema {path} is not a table schema: {error}") from error
    names = [field.name for field in schema.fields]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"schema {path} names the field {repeated[0]} twice; remove one")
    unknown = sorted(set(schema.primary_key) - set(names))
    if unknown:
        raise UserError(f"schema {path}: primaryKey {unknown[0]} is not one of its fields")
    return schema
