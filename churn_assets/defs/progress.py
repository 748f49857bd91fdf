"""Progress of a run on the terminal: one line a step, as it ends."""

from __future__ import annotations

import logging
import time

import dagster as dg


class StepLines(logging.Handler):
    """Prints `name  seconds` when a step ends, and says so when it failed."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self._started: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Look only at records that carry a step's start or end."""
        event = getattr(record, "dagster_meta", {}).get("dagster_event")
        step = getattr(event, "step_key", None)
        if event is None or step is None:
            return
        if event.is_step_start:
            self._started[step] = time.monotonic()
            print(f"  {step:<22}", end="", flush=True)
        elif event.is_step_success or event.is_step_failure:
            seconds = time.monotonic() - self._started.get(step, time.monotonic())
            verdict = "" if event.is_step_success else "  stopped"
            print(f"{seconds:6.1f} s{verdict}", flush=True)


def _progress(_: dg.InitLoggerContext) -> logging.Logger:
    logger = logging.Logger("churn_assets.progress", logging.DEBUG)
    logger.addHandler(StepLines())
    return logger


# What `make run` uses in place of Dagster's console logger.
progress = dg.LoggerDefinition(
    _progress, description="One line a step, for a person at a terminal."
)
