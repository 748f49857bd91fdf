"""What the registry's tests share: a registered model of their own, and what its moves need."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient

from churn_assets.lifecycle.history import Evidence, Stage
from churn_assets.lifecycle.registry import (
    read_registry,
    register_version,
    rollback_plan,
    transition,
)

NOW = datetime(2026, 1, 2, tzinfo=UTC)
GATES = Evidence("gates", {"auc": "auc 0.95 is at least 0.9"})
BOOTSTRAP = Evidence("bootstrap", {"auc": 0.95})
ROLLBACK = Evidence("rollback", {"reason": "it answers nonsense"})


@dataclass
class Model:
    """A registered model of a test's own, and its moves with what a move usually needs."""

    client: MlflowClient
    name: str
    run_id: str
    source: str = "/models/m"

    def register(self) -> str:
        tags = {"family": "forest"}
        return register_version(
            self.client, self.name, model_uri=self.source, run_id=self.run_id, tags=tags
        )

    def read(self):
        return read_registry(self.client, self.name)

    def stages(self) -> dict[str, str]:
        return {version.version: version.stage for version in self.read().versions.values()}

    def move(self, version: str, target: Stage, **changes: Any):
        given: dict[str, Any] = {"who": "pipeline", "why": "gates passed", "now": NOW}
        given |= {"evidence": GATES, "plan": rollback_plan(self.read())}
        return transition(self.client, self.name, version, target, **(given | changes))

    def stage(self) -> str:
        version = self.register()
        self.move(version, "Staging")
        return version

    def promote(self, **changes: Any) -> str:
        version = self.stage()
        incumbent = self.read().production
        evidence = (
            Evidence("paired_replay", {"auc": 0.95}, incumbent=incumbent, rows=100)
            if incumbent
            else BOOTSTRAP
        )
        self.move(version, "Production", **({"who": "ada", "evidence": evidence} | changes))
        return version
