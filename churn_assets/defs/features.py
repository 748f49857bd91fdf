"""Features and labels: what the model sees of a customer at a cutoff, and what came of it."""

from __future__ import annotations
