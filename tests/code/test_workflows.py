"""The GitHub workflows run commands that there are; actionlint looks at the rest (`make lint`)."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from churn_assets.cli import cli
from churn_assets.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"


def workflow(name: str) -> dict[str, Any]:
    return yaml.load((WORKFLOWS / name).read_text(), yaml.BaseLoader)


def commands(name: str) -> list[str]:
    (job,) = workflow(name)["jobs"].values()
    return [step["run"] for step in job["steps"] if "run" in step]


def churn_commands() -> list[str]:
    ours = [run for run in commands("training.yml") if run.startswith(".venv/bin/churn ")]
    return [re.sub(r"\$\{REASON:\+(.*)\}$", r"\1", run) for run in ours]


def test_the_training_goes_step_by_step() -> None:
    names = [shlex.split(run)[1] for run in churn_commands()]
    assert names == ["validate-data", "train", "evaluate", "promote", "deploy"]


@pytest.mark.parametrize("run", churn_commands())
def test_a_step_is_a_command_of_ours(run: str) -> None:
    _, name, *arguments = shlex.split(run)
    command = cli.commands[name]
    context = click.Context(command)
    command.parse_args(context, list(arguments))


def test_the_targets_of_make_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {run.split()[1] for run in commands("tests.yml") if run.startswith("make ")}
    assert {"lint", "lint-workflows", "test", "test-image"} == asked <= targets


def test_the_workflow_comes_after_dagsters_own_schedule() -> None:
    (schedule,) = workflow("training.yml")["on"]["schedule"]
    minute, hour, *_, weekday = schedule["cron"].split()
    ours = load_settings(ROOT / "churn_assets/config/shop.yaml").schedules.training.split()
    assert weekday == ours[-1]
    assert (int(hour), int(minute)) > (int(ours[1]), int(ours[0]))


def test_a_retrain_by_hand_needs_a_reason() -> None:
    given = workflow("training.yml")["on"]["workflow_dispatch"]["inputs"]["retrain_reason"]
    assert given["required"] == "true"
