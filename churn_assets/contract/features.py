"""The model's features: name, type, range, unit and meaning. The one place that names them.

Everything else derives from here: the feature table and its validation, the training matrix and
its column order, the request schema of the service, the drift report.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import msgspec


class Feature(msgspec.Struct, frozen=True):
    """One feature of one customer at one cutoff.

    `window_days` is the look-back: only events in [cutoff - window_days, cutoff) count.
    `tables` are the raw tables it is computed from; a source without them has no such feature.
    `minimum` and `maximum` are inclusive and bound what training accepts and the service answers.
    """

    name: str
    dtype: Literal["int", "float"]
    unit: str
    meaning: str
    window_days: int
    tables: tuple[str, ...]
    minimum: float
    maximum: float


FEATURES: tuple[Feature, ...] = (
    Feature(
        name="total_orders_30d",
        dtype="int",
        unit="orders",
        meaning="Orders placed in the 30 days before the cutoff",
        window_days=30,
        tables=("orders",),
        minimum=0,
        maximum=10_000,
    ),
    Feature(
        name="avg_order_value",
        dtype="float",
        unit="currency units per order",
        meaning="Mean order value over the 365 days before the cutoff",
        window_days=365,
        tables=("orders",),
        minimum=0.0,
        maximum=10_000_000.0,
    ),
    Feature(
        name="days_since_last_order",
        dtype="int",
        unit="days",
        meaning="Whole days from the last order to the cutoff",
        window_days=365,
        tables=("orders",),
        minimum=0,
        maximum=365,
    ),
    Feature(
        name="support_tickets_90d",
        dtype="int",
        unit="tickets",
        meaning="Support tickets opened in the 90 days before the cutoff",
        window_days=90,
        tables=("support_tickets",),
        minimum=0,
        maximum=10_000,
    ),
    Feature(
        name="login_frequency_7d",
        dtype="float",
        unit="logins per day",
        meaning="Logins per day over the 7 days before the cutoff",
        window_days=7,
        tables=("logins",),
        minimum=0.0,
        maximum=10_000.0,
    ),
)

FEATURE_NAMES: tuple[str, ...] = tuple(feature.name for feature in FEATURES)


def features_for(tables: Collection[str]) -> tuple[Feature, ...]:
    """The features that can be computed from `tables`, in the order the model sees them."""
    return tuple(feature for feature in FEATURES if set(feature.tables) <= set(tables))


def features_named(names: Collection[str]) -> tuple[Feature, ...]:
    """The features called `names`, in the order the model sees them.

    Raises KeyError for a name that is not a feature.
    """
    unknown = sorted(set(names) - set(FEATURE_NAMES))
    if unknown:
        raise KeyError(f"unknown feature {unknown[0]!r}; known are {', '.join(FEATURE_NAMES)}")
    return tuple(feature for feature in FEATURES if feature.name in set(names))
