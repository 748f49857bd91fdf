"""The cases of the drill: what happens to the shop or to the service, when, and for how long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any, Literal

from churn_assets.errors import UserError

Sabotage = Literal["backwards", "slow", "failing"]

START = date(2024, 1, 1)
HISTORY_DAYS = 240
"""Days of the shop there are when the first model is trained; the drill begins with the next."""

HORIZON_DAYS = 14


@dataclass(frozen=True)
class Case:
    """One case. Days count from the first day of the drill.

    shop: the scenario of the simulated shop. days: how long the drill goes on. every: days between
    two ticks of the daily schedules; a tick catches up on the days before it. sabotage: what is
    forced into production on the day of the change. labels_late: days for which no labels come in
    after the change. change_after: days before anything happens, so that a false alarm has the time
    to show. customers: of the shop, about. offers: from the change on, customers are served
    retention offers. settings: what the configuration of the case has otherwise, by section.
    """

    name: str
    title: str
    shop: str = "stable"
    days: int = 90
    every: int = 2
    sabotage: Sabotage | None = None
    labels_late: int = 0
    change_after: int = 14
    customers: int = 2000
    offers: bool = False
    settings: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def change(self) -> date:
        """The day on which it happens."""
        return START + timedelta(days=HISTORY_DAYS + self.change_after)


CASES = (
    Case("stable_year", "stable year", days=365, every=7),
    Case("holiday_season", "holiday season", "holiday_season", days=70, every=4),
    Case("price_rise", "price rise", "price_rise", days=60, every=4),
    Case("ticket_storm", "ticket storm", "ticket_storm", days=50, every=3),
    Case("login_tracking_broken", "login tracking broken", "login_tracking_broken", days=54),
    Case("new_market", "new market", "new_market", days=75, every=4),
    Case("gradual_shift", "gradual behaviour shift", "gradual_shift", days=110, every=3),
    Case("sudden_shift", "sudden concept shift", "sudden_shift", days=110, every=3),
    Case("bad_model", "bad model forced into production", days=38, sabotage="backwards"),
    Case("slow_release", "slow release", days=20, sabotage="slow"),
    Case("failing_release", "failing release", days=20, sabotage="failing"),
    Case(
        "label_delay", "sudden shift, labels late", "label_delay", days=100, every=3, labels_late=35
    ),
    Case("flapping", "flapping", "flapping", days=60, every=3),
    Case(
        "offers",
        "retention offers",
        days=90,
        every=3,
        change_after=0,
        # Offers change a few points of churn, which fewer customers would not show.
        customers=4000,
        offers=True,
        settings={
            "holdout": {"share": 0.4},
            "schedules": {"treatment_report": "0 4 1-31/3 * *"},
        },
    ),
)
SHORT = (
    Case(
        "sudden_shift",
        "sudden concept shift",
        "sudden_shift",
        days=50,
        every=4,
        change_after=6,
        customers=1200,
    ),
    Case(
        "bad_model",
        "bad model forced into production",
        days=12,
        sabotage="backwards",
        change_after=6,
        customers=1200,
    ),
    Case(
        "login_tracking_broken",
        "login tracking broken",
        "login_tracking_broken",
        days=36,
        every=3,
        change_after=6,
        customers=1200,
    ),
)
"""The worst three, shortened for the test suite: a world that changes, a model that never was any
good, and data that lies."""


def case_named(name: str, *, short: bool = False) -> Case:
    """The case of that name, or its short form. Raises UserError when there is none."""
    cases = SHORT if short else CASES
    found = next((case for case in cases if case.name == name), None)
    if found is None:
        raise UserError(f"there is no case {name}; there are {', '.join(c.name for c in cases)}")
    return found


def start_of(case: Case) -> Case:
    """The months before a case: those of the stable shop, the same for all of its size."""
    return Case(f"start_{case.customers}", "the months before", every=1, customers=case.customers)


def configuration(case: Case) -> dict[str, Any]:
    """The configuration of the project for a case, as CHURN_CONFIG holds it.

    Shorter windows than the product's, and gates that a shop of this size can pass: what is
    drilled is the loop, not the shop.
    """
    source: dict[str, Any] = {"kind": "shop", "shop": {"customers": case.customers}}
    if case.shop != "stable":
        source["scenario"] = {"name": case.shop, "day": case.change}
    tick = _cron_day(case.every)
    document: dict[str, Any] = {
        "source": source,
        "calendar": {"start": START, "days": HISTORY_DAYS},
        "plots": False,
        "windows": {"activity_days": 60, "horizon_days": HORIZON_DAYS},
        "data_gate": {"min_rows": 2000},
        "training": {"families": ["hist_gradient_boosting"], "trials": 2, "folds": 1},
        "evaluation": {"resamples": 50},
        "quality_gates": {
            "accuracy": 0.6,
            "auc": 0.7,
            "p95_latency_ms": 5000,
            "calibration_error": 0.1,
            "segment_auc": 0.5,
            "auc_over_recency": -0.05,
        },
        "promotion": {"mode": "automatic", "min_rows": 300},
        # What the triggers do is drilled: a schedule would heal by luck.
        "retraining": {
            "modes": {"scheduled": "off"},
            "new_label_days": 60,
            "persistence": 3 if case.every < 3 else 2,
        },
        "serving_health": {
            "window_hours": min(24 * case.every, 168),
            # Real time, of a machine that runs cases side by side. A slow release takes 200 ms and
            # more; elsewhere a busy machine is not what is drilled.
            "max_p95_latency_ms": 180 if case.sabotage == "slow" else 5000,
        },
        "performance": {"min_accuracy": 0.75},
        # Evidently's pages change nothing of what is decided.
        "drift": {"draw": "never"},
        "schedules": {
            "daily_refresh": f"0 2 {tick}",
            "prediction_log": f"30 2 {tick}",
            "drift_report": f"0 3 {tick}",
            "performance_report": f"30 3 {tick}",
            "serving_health": f"45 3 {tick}",
            "treatment_report": "0 4 1 1 *",
            "health_page": "30 5 1 * *",
            "decisions": f"0 5 {tick}",
            "trial_report": "0 4 1 1 *",
            "clean_archive": "30 5 1 1 *",
            "training": "0 6 1 1 *",
        },
    }
    for section, values in case.settings.items():
        document[section] = document.get(section, {}) | dict(values)
    return document


def _cron_day(every: int) -> str:
    if every == 7:
        return "* * 1"
    return "* * *" if every == 1 else f"1-31/{every} * *"
