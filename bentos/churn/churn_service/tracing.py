"""Trace headers of callers, which this service does not read."""

from __future__ import annotations

from typing import Any

from opentelemetry.context import Context, get_current
from opentelemetry.propagate import set_global_textmap
from opentelemetry.propagators.textmap import TextMapPropagator


def ignore_trace_headers() -> None:
    """Read no `traceparent`: BentoML's instrumentation answers 500 to some that are not UTF-8.

    What is not UTF-8 it takes for Python escapes. Nothing here exports traces.
    """
    set_global_textmap(_NoPropagation())


class _NoPropagation(TextMapPropagator):
    def extract(self, carrier: Any, context: Context | None = None, getter: Any = None) -> Context:
        return get_current() if context is None else context

    def inject(self, carrier: Any, context: Context | None = None, setter: Any = None) -> None:
        pass

    @property
    def fields(self) -> set[str]:
        return set()
