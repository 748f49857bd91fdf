"""A script in kubectl's place: it notes every call and plays the answers it was given."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLAYER = """#!{python}
import json, pathlib, sys, time
folder = pathlib.Path(__file__).parent
argv = sys.argv[1:]
with (folder / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps([argv, sys.stdin.read()]) + "\\n")
plan = json.loads((folder / "plan.json").read_text())
answer = next(a for a in plan if all(word in argv for word in a["to"]))
if answer.get("once"):
    plan.remove(answer)
    (folder / "plan.json").write_text(json.dumps(plan))
time.sleep(answer.get("seconds", 0))
sys.stdout.write(answer.get("out", ""))
sys.stderr.write(answer.get("err", ""))
sys.exit(answer.get("code", 0))
"""

# In the words of kubectl.
APPLIED = {"to": ["apply"], "out": "deployment.apps/churn configured\nservice/churn unchanged\n"}
ROLLED_OUT = {"to": ["status"], "out": 'deployment "churn" successfully rolled out\n'}
UNDONE = {"to": ["undo"], "out": "deployment.apps/churn rolled back\n"}
STUCK = {
    "to": ["status"],
    "out": 'Waiting for deployment "churn" rollout to finish: 1 out of 2 new replicas...\n',
    "err": 'error: deployment "churn" exceeded its progress deadline\n',
    "code": 1,
    "once": True,
}
NO_PODS = {"to": ["pods"], "out": '{"apiVersion": "v1", "items": [], "kind": "List"}'}


def there(image: str, revision: str = "3") -> dict[str, Any]:
    deployment = {
        "metadata": {"annotations": {"deployment.kubernetes.io/revision": revision}},
        "spec": {"template": {"spec": {"containers": [{"name": "churn", "image": image}]}}},
    }
    return {"to": ["get", "deployment"], "out": json.dumps(deployment)}


NOTHING_THERE = {"to": ["get", "deployment"], "out": ""}


@dataclass(frozen=True)
class Kubectl:
    folder: Path

    def plays(self, *answers: dict[str, Any]) -> None:
        (self.folder / "plan.json").write_text(json.dumps(answers))

    @property
    def calls(self) -> list[list[str]]:
        return [argv for argv, _ in self._lines()]

    def given(self, word: str) -> str:
        return next(given for argv, given in self._lines() if word in argv)

    def _lines(self) -> list[tuple[list[str], str]]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]
