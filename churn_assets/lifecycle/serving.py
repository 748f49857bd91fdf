"""Running the churn service in a process of its own, and timing it over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
import psutil

from churn_assets.contract.keys import KEYS_VARIABLE
from churn_assets.contract.logged import (
    DURABILITY_VARIABLE,
    LOG_VARIABLE,
    OFF,
    WHEN_BROKEN_VARIABLE,
    is_postgres,
)
from churn_assets.contract.online import is_redis
from churn_assets.contract.release import Release, read_release
from churn_assets.contract.response import Prediction, predict
from churn_assets.contract.trial import assignment
from churn_assets.errors import UserError
from churn_assets.home import PROJECT_ROOT, Home
from churn_assets.lifecycle.bento import BENTO_NAME, Bento, bento_of_tag, code_of
from churn_assets.lifecycle.pointer import read_current

HOST = "127.0.0.1"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 10.0
WARM_UP = 20
# Among so many customers there is one in either arm of any trial that can be begun.
EXAMPLES = 100_000
POLL_S = 0.2

# The kernel tells the service to stop when the process that started it is gone, killed or not.
_LAUNCH = """\
import runpy, signal, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
runpy.run_module("bentoml", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Answer:
    """One answer of the service; `latency_ms` runs from sending to the last byte received."""

    status: int
    content: bytes
    latency_ms: float

    def json(self) -> dict[str, Any]:
        """The decoded content."""
        return msgspec.json.decode(self.content)


@dataclass(frozen=True)
class Latency:
    """Percentiles in milliseconds over the answered predictions of `requests` sent in turn.

    `errors` counts what was not answered with 200.
    """

    p50_ms: float
    p95_ms: float
    p99_ms: float
    requests: int
    errors: int

    def figures(self) -> dict[str, float]:
        """The percentiles by the names they are tracked under."""
        return {
            "p50_latency_ms": self.p50_ms,
            "p95_latency_ms": self.p95_ms,
            "p99_latency_ms": self.p99_ms,
        }


@dataclass(frozen=True)
class Proof:
    """A bento asked for a prediction whose answer is known.

    `as_expected` is whether it answered as the judged model did; `reason` says so in a sentence.
    """

    as_expected: bool
    reason: str
    release_id: str
    request: dict[str, str | int | float]
    response: dict[str, Any]
    latency_ms: float


@dataclass(frozen=True)
class OnlineStore:
    """Where a service looks customers up, and how old what it finds there may be.

    `location` is the path of a SQLite file or a redis:// URL. `max_age_hours` are hours of data
    time; `when_stale` is `refuse` or `flag`.
    """

    location: str
    max_age_hours: float = 36.0
    when_stale: str = "refuse"

    def environment(self) -> dict[str, str]:
        """The settings as the service reads them."""
        return {
            # A service runs in a folder of its own, where a relative path would be another file.
            "CHURN_ONLINE_STORE": (
                self.location if is_redis(self.location) else str(Path(self.location).resolve())
            ),
            "CHURN_MAX_AGE_HOURS": f"{self.max_age_hours:g}",
            "CHURN_WHEN_STALE": self.when_stale,
        }


@dataclass(frozen=True)
class PredictionLog:
    """Where a service keeps what it answers: a directory, a postgresql:// URL or `off`.

    `durability` is `process` (what is kept survives SIGKILL) or `power` (a power cut, too);
    `when_broken` is `refuse` or `serve`.
    """

    location: str
    durability: str = "process"
    when_broken: str = "refuse"

    def environment(self) -> dict[str, str]:
        """The settings as the service reads them."""
        as_it_is = self.location == OFF or is_postgres(self.location)
        return {
            # A service runs in a folder of its own, where a relative path would be another one.
            LOG_VARIABLE: self.location if as_it_is else str(Path(self.location).resolve()),
            DURABILITY_VARIABLE: self.durability,
            WHEN_BROKEN_VARIABLE: self.when_broken,
        }


@contextlib.contextmanager
def serve(
    target: Path | str,
    release_dir: Path | None = None,
    *,
    online: OnlineStore | None = None,
    log: PredictionLog | None = None,
    environment: Mapping[str, str] | None = None,
    bentoml_home: Path | None = None,
    port: int | None = None,
    scratch: Path | None = None,
    start_timeout: float = START_TIMEOUT_S,
) -> Generator[str]:
    """Serve `target` while the block runs; yields its URL, `http://127.0.0.1:<port>`.

    `target` is a service directory (then `release_dir` names the release) or the tag of a bento in
    `bentoml_home`. Without `online` the service has no online store, whatever the environment says;
    without `log` its log is removed with all it writes.
    `environment` are further settings of the service. Without `port` a free one is taken. What the
    service writes goes into a folder of its own in `scratch` (default: the system's temporary
    folder), removed at the end. However the block ends, no process of the service is left. Raises
    UserError when the port is taken, or with what its log says when the service does not start.
    """
    with tempfile.TemporaryDirectory(prefix="churn-serve-", dir=scratch) as own:
        said = Path(own) / "service.log"
        with (
            said.open("wb") as sink,
            _running(
                _resolve(target, bentoml_home),
                release_dir,
                online,
                port if port is not None else free_port(),
                scratch=Path(own),
                # Who asks here has no key of the service in production.
                environment={KEYS_VARIABLE: ""} | dict(environment or {}),
                log=log,
                sink=sink.fileno(),
                said=said,
                start_timeout=start_timeout,
            ) as (_, url),
        ):
            yield url


def serve_current(
    home: Home,
    port: int,
    online: OnlineStore | None = None,
    log: PredictionLog | None = None,
    *,
    workers: int = 1,
    listen: str = HOST,
) -> None:
    """Serve what the pointer of `home` names on `port`, in the foreground, and what it names next.

    What it answers is kept in `log`, by default in the home. `listen` is the address of the
    interface it answers on.

    Waits until it names something. The service follows the pointer itself and swaps to another
    release between requests. A bento of other code is first started on a port of its own: one that
    does not start is told, and what serves goes on serving. Then it takes the place, and for the
    seconds that takes nobody answers. It need not wait for the online store: the service answers
    requests by id once there is one.

    Ends, with every process of the service, on SIGINT and SIGTERM. Raises UserError when the port
    is taken or the service stops by itself.
    """
    signal.signal(signal.SIGTERM, _exit_on_signal)
    check_port(port, listen)
    settings = {"CHURN_FOLLOW": str(home.current)} | with_workers(workers)
    log = log or PredictionLog(str(home.prediction_log))
    tag = _next_to_serve(home)
    while True:
        path = bento_of_tag(tag, home.bentoml).path
        with tempfile.TemporaryDirectory(prefix="churn-serve-") as scratch:
            # A worker that is started again needs the code after its bento has been cleaned away.
            own = Path(shutil.copytree(path, Path(scratch) / path.name))
            with _running(
                own,
                None,
                online,
                port,
                scratch=Path(scratch),
                log=log,
                environment=settings,
                listen=listen,
            ) as (process, url):
                print(f"{tag} answers at {url}/predict", flush=True)
                tag = _next_to_serve(home, tag, process)


def with_workers(number: int) -> dict[str, str]:
    """The environment of a service with `number` worker processes."""
    given = os.environ.get("BENTOML_CONFIG_OPTIONS", "")
    return {"BENTOML_CONFIG_OPTIONS": f"{given} services.{BENTO_NAME}.workers={number}".strip()}


def _next_to_serve(
    home: Home, serving: str | None = None, process: subprocess.Popen | None = None
) -> str:
    """Wait until a bento of other code is to be served; returns its tag once it proves to start.

    Raises UserError when `process`, which serves `serving`, ends by itself.
    """
    told, refused = "", None
    while True:
        if process is not None and (code := process.poll()) is not None:
            raise UserError(
                f"the churn service stopped with exit code {code}; its log above says why"
            )
        current, said = None, ""
        try:
            current = read_current(home.current)
            if current is None:
                said = "nothing is in Production yet: `make run` brings a first version there"
            elif current == refused:
                said = told
            elif serving is None or code_of(current.bento) != code_of(serving):
                path = bento_of_tag(current.bento, home.bentoml).path
                if serving is not None:
                    _try_out(path)
                return current.bento
        except UserError as error:
            # What does not start is not tried again until the pointer is written anew.
            said, refused = str(error), current if serving else None
        if said and said != told:
            print(f"{said}; {f'{serving} goes on serving' if serving else 'waiting'}", flush=True)
        told = said
        time.sleep(POLL_S)


def _try_out(bento: Path) -> None:
    """Start a bento once, beside what serves. Raises UserError with what its log says."""
    with tempfile.TemporaryDirectory(prefix="churn-serve-") as scratch:
        said = Path(scratch) / "service.log"
        with (
            said.open("wb") as sink,
            _running(
                bento,
                None,
                None,
                free_port(),
                scratch=Path(scratch),
                sink=sink.fileno(),
                said=said,
            ),
        ):
            pass


def ask(base_url: str, body: bytes | dict, *, path: str = "/predict") -> Answer:
    """POST one request. Raises UserError when nobody answers."""
    connection = _connect(base_url)
    try:
        return _post(connection, _encoded(body), path)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"no answer from {base_url} ({error}); is the service running?") from error
    finally:
        connection.close()


def ask_health(base_url: str) -> dict[str, Any] | None:
    """What `GET /health` answers; None when nobody does, or not as the churn service."""
    connection = _connect(base_url)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        told = msgspec.json.decode(response.read()) if response.status == 200 else None
    except (OSError, http.client.HTTPException, msgspec.DecodeError):
        return None
    finally:
        connection.close()
    return told if isinstance(told, dict) else None


def measure_latency(
    base_url: str, bodies: Sequence[bytes | dict], *, warmup: int = 50, requests: int = 500
) -> Latency:
    """Time `requests` predictions, one after the other over one kept connection.

    `bodies` are sent in turn, from the first again when they run out; `warmup` requests before are
    not counted. Raises UserError when there is nothing to send or no prediction is answered.
    """
    if not bodies or requests < 1:
        raise UserError("measuring the latency needs at least one request; give held-out rows")
    encoded = [_encoded(body) for body in bodies]
    times: list[float] = []
    refused: Answer | None = None
    connection = _connect(base_url)
    try:
        for number in range(warmup + requests):
            try:
                answer = _post(connection, encoded[number % len(encoded)])
            except (OSError, http.client.HTTPException):
                connection.close()
                continue
            if answer.status != 200:
                refused = answer
            elif number >= warmup:
                times.append(answer.latency_ms)
    finally:
        connection.close()
    if not times:
        why = refused.content[:200].decode(errors="replace") if refused else "no answer"
        raise UserError(f"{base_url} answered none of {requests} predictions: {why}")
    p50, p95, p99 = (float(value) for value in np.percentile(times, [50, 95, 99]))
    return Latency(p50, p95, p99, requests, requests - len(times))


def measure_release(
    release_dir: Path | str, bodies: Sequence[bytes | dict], *, scratch: Path | None = None
) -> Latency:
    """The latency of a release over HTTP, served from the source of this project.

    Raises UserError when the service refuses any of `bodies`: a model that does not answer the
    customers it was judged on is not slow, it is broken.
    """
    with serve(PROJECT_ROOT / "bentos" / "churn", Path(release_dir), scratch=scratch) as url:
        for body in bodies:
            answer = ask(url, body)
            if answer.status != 200:
                why = answer.content[:200].decode(errors="replace")
                raise UserError(f"the candidate refuses a held-out customer: {why}")
        return measure_latency(url, bodies)


def ask_bento(
    bento: Bento, bentoml_home: Path, customer: Mapping[str, str | int | float] | None = None
) -> Proof:
    """Serve `bento` and ask it for a golden prediction of its own release, then about `customer`.

    During a trial it is asked for one of each model. The proof is of the golden predictions;
    request, response and latency are those of `customer` (a whole request body) when one is given.
    The latency is that of a warm service. Raises UserError when it does not start or answer.
    """
    release = read_release(bento.path / "src" / "release")
    questions = _golden_questions(release)
    with serve(bento.tag, bentoml_home=bentoml_home) as url:
        for _ in range(WARM_UP):
            answers = [ask(url, request) for request, _ in questions]
        shown = ask(url, dict(customer)) if customer else answers[0]
    told = [
        _as_the_model(answer, expected)
        for answer, (_, expected) in zip(answers, questions, strict=True)
    ]
    request, _ = questions[0]
    fits, reason = _together(told)
    return Proof(
        as_expected=fits and shown.status == 200,
        reason=reason,
        release_id=release.manifest.release_id,
        request=dict(customer or request),
        response=shown.json(),
        latency_ms=round(shown.latency_ms, 3),
    )


def ask_golden(base_url: str, release: Release) -> tuple[bool, str]:
    """Whether a service answers as the models of `release` did, and that in a sentence.

    Raises UserError when nobody answers.
    """
    return _together(
        [
            _as_the_model(ask(base_url, request), expected)
            for request, expected in _golden_questions(release)
        ]
    )


def _together(told: Sequence[tuple[bool, str]]) -> tuple[bool, str]:
    fits = all(as_expected for as_expected, _ in told)
    return fits, "; ".join(reason for as_expected, reason in told if as_expected or not fits)


def _golden_questions(
    release: Release,
) -> list[tuple[dict[str, str | int | float], Prediction]]:
    """A golden row of each model as a request of a customer it answers, with the answer."""
    manifest, challenger = release.manifest, release.manifest.challenger
    models = [("champion", manifest.model_version, manifest.feature_names, release.golden)]
    if challenger is not None and release.challenger is not None:
        golden = release.challenger.golden
        models.append(("challenger", challenger.model_version, challenger.features, golden))
    questions = []
    for arm, version, names, golden in models:
        given = dict(zip(names, golden.rows[0], strict=True))
        customer_id = "example"
        if challenger is not None:
            arm_of = assignment(challenger.trial, challenger.share)
            examples = (f"example-{number}" for number in range(EXAMPLES))
            customer_id = next(example for example in examples if arm_of(example) == arm)
        request: dict[str, str | int | float] = {"customer_id": customer_id}
        for feature in manifest.features:
            value = given.get(feature.name, feature.minimum)
            request[feature.name] = int(value) if feature.dtype == "int" else value
        answer = predict(
            customer_id,
            golden.probabilities[0],
            version,
            manifest.risk,
            # Not compared: it is the service's, not the model's.
            holdout=False,
        )
        questions.append((request, answer))
    return questions


def _as_the_model(answer: Answer, expected: Prediction) -> tuple[bool, str]:
    """Whether the service answered as the judged model did, and that in a sentence."""
    response = answer.json()
    difference = abs(response.get("churn_probability", math.inf) - expected.churn_probability)
    # The last of the four digits may round the other way.
    fits = answer.status == 200 and difference < 1.5e-4
    if fits and response.get("model_version") == expected.model_version:
        return True, f"answered {response['churn_probability']} as the model did"
    said = answer.content[:200].decode(errors="replace")
    gave = f"{expected.churn_probability} as version {expected.model_version}"
    return False, f"answered {said}, the model gave {gave}"


def free_port() -> int:
    """A port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def check_port(port: int, address: str = HOST) -> None:
    """Raise UserError when `port` of the interface with `address` cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a port"
            raise UserError(
                f"port {port} for the churn service cannot be used ({reason}); stop what listens "
                "there or choose another port"
            ) from None


def _resolve(target: Path | str, bentoml_home: Path | None) -> Path:
    """The directory to serve: a service's or a bento's. BentoML wants it absolute."""
    if Path(target).is_dir():
        return Path(target).resolve()
    if bentoml_home is None or isinstance(target, Path):
        raise UserError(f"there is no service directory {target}; give one or the tag of a bento")
    return bento_of_tag(target, bentoml_home).path.resolve()


@contextlib.contextmanager
def _running(
    directory: Path,
    release_dir: Path | None,
    online: OnlineStore | None,
    port: int,
    *,
    scratch: Path,
    log: PredictionLog | None = None,
    environment: Mapping[str, str] | None = None,
    sink: int | None = None,
    said: Path | None = None,
    start_timeout: float = START_TIMEOUT_S,
    listen: str = HOST,
) -> Generator[tuple[subprocess.Popen, str]]:
    """`bentoml serve` as a process that ends with the block. All it writes goes to `scratch`.

    BentoML empties a folder of its home when it starts, so no two services share one.
    """
    check_port(port, listen)
    command = [sys.executable, "-c", _LAUNCH, "serve", str(directory)]
    process = subprocess.Popen(
        [*command, "--host", listen, "--port", str(port)],
        cwd=scratch,
        env=_environment(directory, release_dir, online, log, scratch) | dict(environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=sink,
        stderr=sink,
        start_new_session=True,
    )
    family: set[psutil.Process] = set()
    try:
        _wait_until_ready(process, port, said, start_timeout)
        family |= _descendants(process.pid)
        yield process, f"http://{HOST}:{port}"
    finally:
        _stop(process, family)


def _environment(
    directory: Path,
    release_dir: Path | None,
    online: OnlineStore | None,
    log: PredictionLog | None,
    scratch: Path,
) -> dict[str, str]:
    log = log or PredictionLog(str(scratch / "log"))
    unwanted = {"PYTHONPATH", "CHURN_RELEASE_DIR", "PROMETHEUS_MULTIPROC_DIR", "BENTOML_PORT"}
    unwanted |= {"CHURN_FOLLOW", "CHURN_FOLLOW_SECONDS"}
    unwanted |= OnlineStore("online.db").environment().keys() | log.environment().keys()
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    environment |= {
        "BENTOML_HOME": str(scratch / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "True",
        "TMPDIR": str(scratch),
        "PYTHONUNBUFFERED": "1",
    }
    environment |= log.environment()
    (scratch / "bentoml").mkdir(exist_ok=True)
    if not (directory / "bento.yaml").is_file():
        # A service run from its source finds the contract in the project it lies in.
        environment["PYTHONPATH"] = str(directory.parent.parent)
    if release_dir is not None:
        environment["CHURN_RELEASE_DIR"] = str(release_dir.resolve())
    if online is not None:
        environment |= online.environment()
    return environment


def _wait_until_ready(
    process: subprocess.Popen, port: int, log: Path | None, timeout: float
) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise UserError(f"the churn service did not start: {_last_words(log)}")
        connection = http.client.HTTPConnection(HOST, port, timeout=1)
        try:
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            time.sleep(0.02)
        finally:
            connection.close()
    raise UserError(f"the churn service was not ready within {timeout:.0f} s: {_last_words(log)}")


def _last_words(log: Path | None) -> str:
    """What the log says the matter is, on one line."""
    if log is None:
        return "its log above says why"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("Error:")]
    return " | ".join(errors[-1:] or lines[-5:]) or "it left no log"


def _descendants(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def _stop(process: subprocess.Popen, family: set[psutil.Process]) -> None:
    """Ask the service to stop, then kill what is left of it, workers of a dead parent included."""
    family = family | _descendants(process.pid)
    try:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
    finally:
        family |= _descendants(process.pid)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        if process.poll() is None:
            process.kill()
        process.wait()
        psutil.wait_procs(list(family), timeout=STOP_TIMEOUT_S)


def _exit_on_signal(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _connect(base_url: str) -> http.client.HTTPConnection:
    parts = urlsplit(base_url)
    return http.client.HTTPConnection(parts.hostname or HOST, parts.port, timeout=REQUEST_TIMEOUT_S)


def _post(connection: http.client.HTTPConnection, body: bytes, path: str = "/predict") -> Answer:
    started = time.perf_counter()
    connection.request("POST", path, body, {"content-type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    return Answer(response.status, content, (time.perf_counter() - started) * 1000)


def _encoded(body: bytes | dict) -> bytes:
    return body if isinstance(body, bytes) else msgspec.json.encode(body)
