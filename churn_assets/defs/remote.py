"""Asking a Dagster that runs elsewhere to train, through the GraphQL its webserver answers."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from churn_assets.defs.weekly import JOB, REASON, WEEK, week_tags
from churn_assets.errors import UserError

LOCATION = "churn_assets"
REPOSITORY = "__repository__"

_ENDED = {"SUCCESS", "FAILURE", "CANCELED"}
_FIND = """
query($filter: RunsFilter!) {
  runsOrError(filter: $filter) {
    __typename
    ... on Runs { results { runId status assetMaterializations { assetKey { path } } } }
    ... on Error { message }
  }
}"""
_LAUNCH = """
mutation($params: ExecutionParams!) {
  launchRun(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on Error { message }
  }
}"""
_STATUS = """
query($run: ID!) {
  runOrError(runId: $run) {
    __typename
    ... on Run { status }
    ... on Error { message }
  }
}"""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would take the token along to wherever it is sent."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        """Follow none: what comes back is the error of its status."""


_OPENER = urllib.request.build_opener(_NoRedirect)


class RemoteDagster:
    """The webserver at `url`; `token`, when a proxy before it wants one, goes as a bearer's."""

    def __init__(self, url: str, token: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"{url!r} is not the address of a Dagster webserver; write it like "
                "https://dagster.example.com"
            )
        if parts.username or parts.password:
            raise UserError("the address of Dagster has a password in it; set CHURN_DAGSTER_TOKEN")
        self._url = url.rstrip("/") + "/graphql"
        self._headers = {"content-type": "application/json"}
        if token:
            self._headers["authorization"] = f"Bearer {token}"

    def trained_in(self, week: str) -> str | None:
        """The id of the run that trains for `week`, or has trained; None when it is to be done.

        Raises UserError when Dagster cannot be asked, as every method does.
        """
        asked = {"pipelineName": JOB, "tags": [{"key": WEEK, "value": week}]}
        found = self._ask(_FIND, {"filter": asked}, "runsOrError", "Runs")["results"]
        return next((run["runId"] for run in reversed(found) if _counts(run)), None)

    def train(self, tags: Mapping[str, str]) -> str:
        """Start the training job with `tags`; returns the run's id."""
        selector = {
            "repositoryLocationName": LOCATION,
            "repositoryName": REPOSITORY,
            "pipelineName": JOB,
        }
        metadata = {"tags": [{"key": key, "value": value} for key, value in tags.items()]}
        params = {"selector": selector, "mode": "default", "executionMetadata": metadata}
        return self._ask(_LAUNCH, {"params": params}, "launchRun", "LaunchRunSuccess")["run"][
            "runId"
        ]

    def wait(self, run: str, every_s: float = 5.0) -> str:
        """Wait for a run's end and return its status: SUCCESS, FAILURE or CANCELED."""
        while True:
            status = self._ask(_STATUS, {"run": run}, "runOrError", "Run")["status"]
            if status in _ENDED:
                return status
            time.sleep(every_s)

    def train_for(self, week: str, reason: str | None, say: Callable[[str], None]) -> str:
        """Train for `week`, or for `reason` whatever was done this week; returns how it ended."""
        run = None if reason else self.trained_in(week)
        if run:
            say(f"run {run} is the training of {week}; to train again, give a --reason")
        else:
            run = self.train({REASON: reason} if reason else week_tags(week))
            say(f"run {run} trains")
        status = self.wait(run)
        say(f"run {run} ended: {status}")
        return status

    def _ask(self, query: str, variables: Any, field: str, expected: str) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(self._url, body, self._headers)
        try:
            with _OPENER.open(request, timeout=60) as response:
                answer = json.load(response)
        except (OSError, ValueError) as error:
            code = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else str(error)
            raise UserError(
                f"Dagster at {self._url} does not answer ({code}); check CHURN_DAGSTER_URL and, "
                "behind a proxy that asks for it, CHURN_DAGSTER_TOKEN"
            ) from None
        if answer.get("errors"):
            raise UserError(f"Dagster at {self._url}: {answer['errors'][0].get('message')}")
        found = answer["data"][field]
        if found["__typename"] != expected:
            told = found.get("message") or found["__typename"]
            raise UserError(f"Dagster at {self._url} refuses: {told}")
        return found


def _counts(run: dict[str, Any]) -> bool:
    """Whether a run trains or has trained, as in weekly.trained_in."""
    if run["status"] not in _ENDED or run["status"] == "SUCCESS":
        return True
    return any(
        made["assetKey"]["path"] == ["trained_model"] for made in run["assetMaterializations"]
    )
