"""The registry under random transitions, kills and races, against a model of its rules."""

from __future__ import annotations

import copy
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from churn_assets.errors import UserError
from churn_assets.lifecycle.history import (
    Evidence,
    RollbackPlan,
    in_production,
    last_known_good,
)
from churn_assets.lifecycle.lock import registry_lock
from churn_assets.lifecycle.registry import (
    ARCHIVED_AT_TAG,
    INTENT_TAG,
    POLICY,
    finish_pending,
    read_registry,
    register_version,
    transition,
)

NOW = datetime(2026, 1, 2, tzinfo=UTC)
WRITES = {
    "set_registered_model_tag",
    "delete_registered_model_tag",
    "set_registered_model_alias",
    "delete_registered_model_alias",
    "set_model_version_tag",
    "transition_model_version_stage",
    "delete_model_version",
}
KINDS = ("gates", "bootstrap", "trial", "paired_replay", "rollback", "retired", "retention")
STAGES = ("None", "Staging", "Production", "Archived", "Deleted")


class Killed(BaseException):
    """The process is gone: nothing in the program catches it."""


class Mortal:
    """A client that is killed at its write number `at`: before it happens, or right after it.

    written: the names of the writes that happened.
    """

    def __init__(self, client: MlflowClient, at: int | None = None, *, before: bool = True):
        self._client, self._at, self._before = client, at, before
        self.written: list[str] = []

    def __getattr__(self, attribute: str) -> Any:
        method = getattr(self._client, attribute)
        if attribute not in WRITES:
            return method

        def write(*arguments: Any, **named: Any) -> Any:
            last = len(self.written) == self._at
            if last and self._before:
                raise Killed
            answer = method(*arguments, **named)
            self.written.append(attribute)
            if last:
                raise Killed
            return answer

        return write


@dataclass(frozen=True)
class Ask:
    """One call of the transition function. plan: the version it would go back to."""

    version: str
    target: str
    kind: str
    who: str = "ada"
    incumbent: str | None = None
    passed: bool = True
    plan: str | None = None
    archived_at: str | None = None

    def call(self, client: Any, name: str, wait_s: float = 20.0) -> Any:
        figures: dict[str, float | str] = {"auc": 0.9}
        if self.archived_at:
            figures[ARCHIVED_AT_TAG] = self.archived_at
        return transition(
            client,
            name,
            self.version,
            self.target,  # ty: ignore[invalid-argument-type]
            who=self.who,
            why="because",
            evidence=Evidence(
                self.kind,  # ty: ignore[invalid-argument-type]
                figures,
                passed=self.passed,
                incumbent=self.incumbent,
                rows=10,
            ),
            now=NOW,
            plan=RollbackPlan(self.plan, None, "the job rollback"),
            wait_s=wait_s,
        )


@dataclass
class Rules:
    """The registry as its rules have it, without a word of the code that is tested.

    good: the versions Production can go back to, the one in Production last.
    """

    stages: dict[str, str] = field(default_factory=dict)
    served: set[str] = field(default_factory=set)
    good: list[str] = field(default_factory=list)
    production: str | None = None
    staging: str | None = None
    history: list[tuple[str, str, str]] = field(default_factory=list)

    def refuses(self, ask: Ask) -> bool:
        source = self.stages.get(ask.version)
        if not ask.who or source is None:
            return True
        match source, ask.target, ask.kind:
            case "None", "Staging", "gates":
                return not ask.passed
            case "Staging", "Archived", "retired":
                return False
            case "Staging", "Production", "bootstrap":
                wrong = self.production is not None
            case "Staging", "Production", "trial" | "paired_replay":
                wrong = self.production is None or ask.incumbent != self.production
            case "Archived", "Production", "rollback":
                return ask.version not in self.served
            case "Archived", "Deleted", "retention":
                return len(self.good) > 1 and self.good[-2] == ask.version
            case _:
                return True
        return wrong or ask.plan != self.production or (ask.who == POLICY and not ask.passed)

    def apply(self, ask: Ask) -> None:
        source = self.stages[ask.version]
        self.history.append((ask.version, source, ask.target))
        self.stages[ask.version] = ask.target
        if ask.target == "Staging":
            self.staging = ask.version
        elif source == "Staging" and self.staging == ask.version:
            left = [v for v, stage in self.stages.items() if stage == "Staging"]
            self.staging = max(left, key=int) if left else None
        if ask.target == "Production":
            if self.production:
                self.stages[self.production] = "Archived"
            # Back to one of the good: those above it were bad. Any other stands on top of them.
            while ask.version in self.good:
                self.good.pop()
            self.good.append(ask.version)
            self.served.add(ask.version)
            self.production = ask.version
        if ask.target == "Deleted":
            del self.stages[ask.version]
            self.good = [v for v in self.good if v != ask.version]


def numbers() -> Iterator[int]:
    number = 0
    while True:
        yield (number := number + 1)


NUMBERS = numbers()


class RegistryMachine(RuleBasedStateMachine):
    """Transitions of one registered model, each of its own machine."""

    client: MlflowClient

    @initialize()
    def begin(self) -> None:
        self.name = f"churn-{next(NUMBERS)}"
        self.expected = Rules()
        self.register()
        self.register()

    @rule()
    def register(self) -> None:
        version = register_version(
            self.client, self.name, model_uri="/models/m", run_id="0" * 32, tags={}
        )
        self.expected.stages[version] = "None"

    def archived_at(self, version: str) -> str | None:
        known = read_registry(self.client, self.name).versions.get(version)
        return known.tags.get(ARCHIVED_AT_TAG) if known else None

    def likely(self, data: st.DataObject) -> Ask:
        """A move that is mostly legal and mostly has what it needs."""
        moves = {
            "None": [("Staging", "gates")],
            "Staging": [
                ("Production", "bootstrap"),
                ("Production", "paired_replay"),
                ("Production", "trial"),
                ("Archived", "retired"),
            ],
            "Production": [("Archived", "retired")],
            "Archived": [("Production", "rollback"), ("Deleted", "retention")],
        }
        if not self.expected.stages:
            self.register()
        version = data.draw(st.sampled_from(sorted(self.expected.stages)))
        target, kind = data.draw(st.sampled_from(moves[self.expected.stages[version]]))
        production = self.expected.production
        if target == "Production" and kind != "rollback" and production is None:
            kind = "bootstrap"
        return Ask(
            version,
            target,
            kind,
            who=data.draw(st.sampled_from(["ada", "ada", POLICY])),
            incumbent=production,
            passed=data.draw(st.sampled_from([True, True, True, False])),
            plan=production,
            archived_at=self.archived_at(version),
        )

    def anything(self, data: st.DataObject) -> Ask:
        version = data.draw(st.sampled_from([*sorted(self.expected.stages), "99"]))
        others = st.sampled_from([None, *sorted(self.expected.stages)])
        return Ask(
            version,
            data.draw(st.sampled_from(STAGES)),
            data.draw(st.sampled_from(KINDS)),
            who=data.draw(st.sampled_from(["ada", POLICY, ""])),
            incumbent=data.draw(others),
            passed=data.draw(st.booleans()),
            plan=data.draw(others),
            archived_at=self.archived_at(version),
        )

    def ask(self, ask: Ask) -> None:
        if self.expected.refuses(ask):
            with pytest.raises(UserError):
                ask.call(self.client, self.name)
        else:
            ask.call(self.client, self.name)
            self.expected.apply(ask)

    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        self.ask(self.likely(data))

    @rule(data=st.data())
    def ask_for_anything(self, data: st.DataObject) -> None:
        self.ask(self.anything(data))

    @rule(data=st.data(), at=st.integers(0, 12), before=st.booleans())
    def be_killed(self, data: st.DataObject, at: int, before: bool) -> None:
        ask, mortal = self.likely(data), Mortal(self.client, at, before=before)
        pending = read_registry(self.client, self.name).pending is not None
        if self.expected.refuses(ask):
            with suppress(UserError, Killed):
                ask.call(mortal, self.name)
            return
        with suppress(Killed):
            ask.call(mortal, self.name)
        # Once the step is written down it has happened. What another left comes before it.
        own = mortal.written
        if pending:
            own = own[own.index("delete_registered_model_tag") + 1 :] if _finished(own) else []
        if own:
            assert own[0] == "set_registered_model_tag"
            self.expected.apply(ask)

    @rule(data=st.data())
    def race(self, data: st.DataObject) -> None:
        """Two at once: as if one had come after the other, in one of both orders."""
        asks = self.likely(data), self.likely(data)
        won = [False, False]

        def call(number: int) -> None:
            with suppress(UserError):
                asks[number].call(self.client, self.name)
                won[number] = True

        threads = [threading.Thread(target=call, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        history = read_registry(self.client, self.name).history[len(self.expected.history) :]
        assert len(history) == sum(won)
        fits = []
        for order in ((0, 1), (1, 0)):
            after = copy.deepcopy(self.expected)
            outcome = [False, False]
            for number in order:
                if not after.refuses(asks[number]):
                    after.apply(asks[number])
                    outcome[number] = True
            seen = [(s.version, s.source, s.target) for s in history]
            if outcome == won and after.history[len(self.expected.history) :] == seen:
                fits.append(after)
        assert fits, (asks, won, history)
        self.expected = fits[0]

    @precondition(lambda self: hasattr(self, "expected"))
    @rule()
    def repair(self) -> None:
        finish_pending(self.client, self.name)
        assert read_registry(self.client, self.name).pending is None
        self.in_mlflow()

    def in_mlflow(self) -> None:
        """With nothing pending, what MLflow itself shows is the same."""
        aliases = {"production": self.expected.production, "staging": self.expected.staging}
        model = self.client.get_registered_model(self.name)
        assert {k: str(v) for k, v in model.aliases.items()} == {
            alias: version for alias, version in aliases.items() if version
        }
        for version in self.client.search_model_versions(f"name = '{self.name}'"):
            stage = self.expected.stages[str(version.version)]
            assert (version.tags["stage"], version.current_stage) == (stage, stage)

    @invariant()
    def what_is_read_is_what_the_rules_say(self) -> None:
        if not hasattr(self, "expected"):
            return
        registry = read_registry(self.client, self.name)
        assert registry.faults() == []
        assert {v.version: v.stage for v in registry.versions.values()} == self.expected.stages
        assert registry.production == self.expected.production
        assert registry.aliases.get("staging") == self.expected.staging
        steps = [(step.version, step.source, step.target) for step in registry.history]
        assert steps == self.expected.history
        served = [t.version for t in in_production(registry.history, datetime.now(UTC))]
        assert served == ([self.expected.production] if self.expected.production else [])
        good = self.expected.good
        assert last_known_good(registry.history) == (good[-2] if len(good) > 1 else None)
        if registry.pending is None:
            self.in_mlflow()


def _finished(written: list[str]) -> bool:
    """Whether the last write of a step left by another, removing its intent, has happened."""
    return "delete_registered_model_tag" in written


def test_any_walk_keeps_the_rules(client: MlflowClient) -> None:
    RegistryMachine.client = client
    run_state_machine_as_test(
        RegistryMachine,
        settings=settings(
            max_examples=int(os.environ.get("CHURN_TEST_WALKS", "8")),
            stateful_step_count=14,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            # A walk that fails is short enough to read; making it shorter takes minutes.
            phases=[Phase.generate],
        ),
    )


# The same by hand, where every case must come up.


def two_ready(client: MlflowClient) -> tuple[str, Ask]:
    """A model with version 1 in Production and 2 in Staging, and the promotion of 2."""
    name = f"churn-{next(NUMBERS)}"
    for _ in range(2):
        register_version(client, name, model_uri="/models/m", run_id="0" * 32, tags={})
    Ask("1", "Staging", "gates").call(client, name)
    Ask("1", "Production", "bootstrap").call(client, name)
    Ask("2", "Staging", "gates").call(client, name)
    return name, Ask("2", "Production", "paired_replay", incumbent="1", plan="1")


def test_a_promotion_killed_at_any_write_has_happened_or_has_not(client: MlflowClient) -> None:
    name, promote = two_ready(client)
    whole = Mortal(client)
    promote.call(whole, name)
    assert len(whole.written) >= 9
    # Before a write is after the one before it.
    for at in range(len(whole.written) + 1):
        name, promote = two_ready(client)
        with pytest.raises(Killed):
            promote.call(Mortal(client, max(0, at - 1), before=at == 0), name)
        registry = read_registry(client, name)
        happened = at > 0
        assert registry.production == ("2" if happened else "1"), at
        assert registry.faults() == []
        assert len(registry.history) == 3 + happened
        # The next call, whatever it asks for, leaves no trace of the kill.
        with pytest.raises(UserError, match="no version 99"):
            Ask("99", "Staging", "gates").call(client, name)
        after = read_registry(client, name)
        assert after.pending is None
        assert after.faults() == []
        model = client.get_registered_model(name)
        assert INTENT_TAG not in model.tags
        assert str(model.aliases["production"]) == registry.production
        stages = {
            v.version: v.current_stage for v in client.search_model_versions(f"name='{name}'")
        }
        assert {str(version): stage for version, stage in stages.items()} == {
            version.version: version.stage for version in after.versions.values()
        }


class Failing(Mortal):
    """A registry that stops answering at write number `at`, and stays so."""

    def __getattr__(self, attribute: str) -> Any:
        method = super().__getattr__(attribute)
        if attribute not in WRITES:
            return method

        def write(*arguments: Any, **named: Any) -> Any:
            try:
                return method(*arguments, **named)
            except Killed:
                raise MlflowException("API request failed: connection refused") from None

        return write


@pytest.mark.parametrize(("at", "production"), [(0, "1"), (1, "2"), (4, "2"), (8, "2")])
def test_a_registry_that_goes_down_in_mid_promotion_is_said_and_finished_later(
    client: MlflowClient, at: int, production: str
) -> None:
    name, promote = two_ready(client)
    with pytest.raises(UserError, match=r"did not answer .*connection refused.* goes on serving"):
        promote.call(Failing(client, at), name)
    registry = read_registry(client, name)
    assert registry.production == production
    assert registry.faults() == []
    if production == "1":
        promote.call(client, name)
    else:
        with pytest.raises(UserError, match="is in Production"):
            promote.call(client, name)
    assert read_registry(client, name).pending is None
    assert read_registry(client, name).production == "2"


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match="the registry did not answer"):
            Ask("1", "Staging", "gates").call(MlflowClient(url), "churn")


def test_a_repair_that_is_killed_is_repaired(client: MlflowClient) -> None:
    name, promote = two_ready(client)
    with pytest.raises(Killed):
        promote.call(Mortal(client, 0, before=False), name)
    for at in range(5):
        with suppress(Killed):
            finish_pending(Mortal(client, at), name)  # ty: ignore[invalid-argument-type]
        assert read_registry(client, name).production == "2"
    finish_pending(client, name)
    assert finish_pending(client, name) is None
    assert len(read_registry(client, name).history) == 4


def test_who_comes_while_another_writes_is_told_and_changes_nothing(client: MlflowClient) -> None:
    name, promote = two_ready(client)
    told = []

    class Meanwhile(Mortal):
        def __getattr__(self, attribute: str) -> Any:
            if attribute == "set_registered_model_alias":
                with pytest.raises(UserError, match="is going on") as error:
                    promote.call(client, name, wait_s=0.1)
                told.append(error)
            return super().__getattr__(attribute)

    promote.call(Meanwhile(client), name)
    assert len(told) == 1
    assert [step.version for step in read_registry(client, name).history] == ["1", "1", "2", "2"]
    with pytest.raises(UserError, match="is in Production"):
        promote.call(client, name)


def promote_in_a_process(uri: str, name: str, version: str, go: Any, told: Any) -> None:
    client = MlflowClient(uri)
    read_registry(client, name)
    go.wait()
    ask = Ask(version, "Production", "paired_replay", incumbent="1", plan="1", who=f"p{version}")
    try:
        ask.call(client, name)
        told.put((version, "won"))
    except UserError as error:
        told.put((version, str(error)))


def test_of_two_processes_that_promote_at_once_one_wins_and_the_other_is_told(
    client: MlflowClient,
) -> None:
    name, _ = two_ready(client)
    register_version(client, name, model_uri="/models/m", run_id="0" * 32, tags={})
    Ask("3", "Staging", "gates").call(client, name)
    spawn = multiprocessing.get_context("spawn")
    go, told = spawn.Barrier(2), spawn.Queue()
    processes = [
        spawn.Process(target=promote_in_a_process, args=(client.tracking_uri, name, v, go, told))
        for v in ("2", "3")
    ]
    for process in processes:
        process.start()
    outcomes = dict(told.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    (winner,) = [version for version, outcome in outcomes.items() if outcome == "won"]
    loser = "2" if winner == "3" else "3"
    assert f"in Production is {winner}; compare it with that" in outcomes[loser]
    assert read_registry(client, name).production == winner


# The locks.


def test_a_reader_never_sees_half_a_step(client: MlflowClient) -> None:
    name, promote = two_ready(client)
    seen: set[tuple] = set()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            registry = read_registry(client, name)
            stages = tuple(sorted((v.version, v.stage) for v in registry.versions.values()))
            seen.add((stages, registry.production, len(registry.history)))

    class Slow(Mortal):
        def __getattr__(self, attribute: str) -> Any:
            if attribute in WRITES:
                time.sleep(0.03)
            return super().__getattr__(attribute)

    reader = threading.Thread(target=read)
    reader.start()
    promote.call(Slow(client), name)
    time.sleep(0.1)
    stop.set()
    reader.join()
    before = ((("1", "Production"), ("2", "Staging")), "1", 3)
    after = ((("1", "Archived"), ("2", "Production")), "2", 4)
    assert seen <= {before, after}
    assert after in seen


class Remote:
    """A client whose store is not at hand, as one of a tracking server."""

    tracking_uri = "http://registry"

    def __init__(self, client: MlflowClient):
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def postgres(client: MlflowClient) -> Any:
    uri = os.environ.get("CHURN_TEST_POSTGRES")
    if not uri:
        pytest.skip("set CHURN_TEST_POSTGRES to the URL of a database to run this")
    remote = Remote(client)
    remote.tracking_uri = uri.replace("postgresql://", "postgresql+psycopg://")
    return remote


LOCKS: dict[str, Callable[[MlflowClient], Any]] = {
    "file": lambda client: client,
    "lease": Remote,
    "advisory": postgres,
}


@pytest.mark.parametrize("kind", LOCKS)
def test_a_lock_is_held_by_one_and_given_back(client: MlflowClient, kind: str) -> None:
    caller, name = LOCKS[kind](client), f"locked-{kind}-{os.getpid()}"
    inside, most = [], []

    def hold() -> None:
        with registry_lock(caller, name, wait_s=30) as check:
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            check()
            inside.pop()

    threads = [threading.Thread(target=hold) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6
    with (
        registry_lock(caller, name, wait_s=0),
        pytest.raises(UserError, match="another transition"),
        registry_lock(caller, name, wait_s=0.1),
    ):
        pass
    with registry_lock(caller, name, wait_s=0):
        pass


def test_a_lease_runs_out_and_its_holder_may_write_no_more(client: MlflowClient) -> None:
    caller, name = LOCKS["lease"](client), "leased"
    with registry_lock(caller, name, wait_s=0, lease_s=0.2) as check:
        check()
        with registry_lock(caller, name, wait_s=10) as theirs:
            theirs()
            with pytest.raises(UserError, match="lost its lock"):
                check()
    leases = caller.search_registered_models("name LIKE 'leased.lock.%'")
    assert [lease.name for lease in leases] == ["leased.lock.000000002"]
