"""Where a run keeps its state: everything under CHURN_HOME, so that two homes never meet."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from churn_assets import home_format
from churn_assets.errors import UserError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
# Files that a variable may name: from where somebody stands, not where a process is started.
_FILES = ("CHURN_CONFIG", "CHURN_DAGSTER_YAML", "CHURN_API_KEYS")


@dataclass(frozen=True)
class Home:
    """The folders of one home. Nothing the product writes lies outside of them."""

    root: Path

    @classmethod
    def from_environment(cls) -> Home:
        """CHURN_HOME, or `var` beside the project."""
        return cls(
            Path(os.environ.get("CHURN_HOME") or PROJECT_ROOT / "var").expanduser().resolve()
        )

    @property
    def dagster(self) -> Path:
        """Dagster's instance: DAGSTER_HOME."""
        return self.root / "dagster"

    @property
    def dagster_yaml(self) -> Path:
        """What Dagster's instance is made of: the project's, or what CHURN_DAGSTER_YAML names."""
        named = os.environ.get("CHURN_DAGSTER_YAML")
        return Path(named).expanduser().resolve() if named else PROJECT_ROOT / "dagster.yaml"

    @property
    def lake(self) -> Path:
        """Partitioned parquet, where the settings name no other place."""
        return self.root / "lake"

    @property
    def mlflow_uri(self) -> str:
        """MLflow's tracking and registry store; CHURN_MLFLOW_URI names another."""
        return os.environ.get("CHURN_MLFLOW_URI") or f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def mlflow_artifacts(self) -> Path:
        """MLflow's artifacts."""
        return self.root / "mlartifacts"

    @property
    def bentoml(self) -> Path:
        """BENTOML_HOME: the built bentos."""
        return self.root / "bentoml"

    @property
    def releases(self) -> Path:
        """One directory a release."""
        return self.root / "serving" / "releases"

    @property
    def current(self) -> Path:
        """Which bento serves."""
        return self.root / "serving" / "current.json"

    @property
    def running_service(self) -> Path:
        """Where the service of this home answers, while it runs."""
        return self.root / "serving" / "service.json"

    @property
    def api_keys(self) -> Path:
        """Which API keys the service takes; CHURN_API_KEYS names another file."""
        named = os.environ.get("CHURN_API_KEYS")
        return Path(named).expanduser().resolve() if named else self.root / "serving" / "keys.json"

    @property
    def prediction_log(self) -> Path:
        """What services answered and the lake has not yet, where the settings name no store."""
        return self.root / "serving" / "log"

    @property
    def feast_registry(self) -> Path:
        """Feast's registry, where the settings name no database."""
        return self.root / "feast" / "registry.db"

    @property
    def online_store(self) -> Path:
        """The newest features of every customer, where the settings name no other store."""
        return self.root / "feast" / "online.db"

    @property
    def records(self) -> Path:
        """What each asset handed to the next, as JSON."""
        return self.root / "records"

    @property
    def proposals(self) -> Path:
        """What persons made of the proposals of decisions."""
        return self.root / "proposals"

    @property
    def ledger(self) -> Path:
        """Every evaluation on a held-out window, a JSON line each; it is only ever appended to."""
        return self.root / "ledger" / "held_out.jsonl"

    @property
    def metrics(self) -> Path:
        """Every metric that was measured, a JSON line each."""
        return self.root / "monitoring" / "metrics.jsonl"

    @property
    def alerts(self) -> Path:
        """The outbox: which alerts are open, and which messages wait to be sent."""
        return self.root / "alerts" / "outbox.db"

    @property
    def service_samples(self) -> Path:
        """What the service counted, each time it was asked, a JSON line each."""
        return self.root / "monitoring" / "service_samples.jsonl"

    @property
    def metrics_page(self) -> Path:
        """The newest value of every metric, for Prometheus, among what `make up` serves."""
        return self.reports / "metrics.prom"

    @property
    def reports(self) -> Path:
        """The HTML reports, which `make up` serves."""
        return self.root / "reports"

    @property
    def evidently(self) -> Path:
        """Evidently's workspace, which `make evidently` shows."""
        return self.root / "evidently"

    def model_card(self, version: str) -> Path:
        """The folder of the card of a version."""
        return self.reports / "models" / version

    @property
    def summary(self) -> Path:
        """What `make run` printed, for a machine."""
        return self.root / "run" / "summary.json"

    def check_format(self) -> None:
        """Raise UserError unless this code may use the home as it is; one not made yet it may."""
        home_format.check(self.root)

    def prepare(self) -> None:
        """Make the folders, hand Dagster its configuration and point the libraries here.

        Raises UserError when the home cannot be written or is of another format, or Dagster's
        configuration cannot be read.
        """
        marker = home_format.check(self.root)
        try:
            wanted = self.dagster_yaml.read_bytes()
        except OSError as error:
            raise UserError(
                f"{self.dagster_yaml} cannot be read ({error.strerror}); set CHURN_DAGSTER_YAML to "
                "the dagster.yaml of this installation, or unset it"
            ) from error
        folders = (
            self.dagster / "storage",
            self.lake,
            self.mlflow_artifacts,
            self.bentoml,
            self.releases,
            self.records,
            self.reports,
            self.summary.parent,
        )
        try:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            if marker is None:
                # Before dagster.yaml, by which a home from before there was a marker is known.
                home_format.write_marker(self.root, home_format.current_marker())
            target = self.dagster / "dagster.yaml"
            if not target.exists() or target.read_bytes() != wanted:
                target.write_bytes(wanted)
        except OSError as error:
            raise UserError(
                f"CHURN_HOME {self.root} cannot be used ({error.strerror}: {error.filename}); "
                "set CHURN_HOME to a folder you may write"
            ) from error
        os.environ.update(self.environment())

    def environment(self) -> dict[str, str]:
        """What a process of this home needs in its environment, wherever it is started."""
        named = {name: os.environ.get(name) for name in _FILES}
        return {
            **{
                name: str(Path(path).expanduser().resolve()) for name, path in named.items() if path
            },
            "CHURN_HOME": str(self.root),
            "DAGSTER_HOME": str(self.dagster),
            "CHURN_DAGSTER_STORAGE": str(self.dagster / "storage"),
            "DAGSTER_EVENT_BATCH_SIZE": "1000",
            "BENTOML_HOME": str(self.bentoml),
            "BENTOML_DO_NOT_TRACK": "True",
            "DO_NOT_TRACK": "1",
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
            # A server would name its address at every run and trial that ends.
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            # A server that hangs is told of after two minutes, not after a quarter of an hour.
            "MLFLOW_HTTP_REQUEST_TIMEOUT": os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", "30"),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": os.environ.get(
                "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3"
            ),
            "MLFLOW_LOGGING_LEVEL": os.environ.get("MLFLOW_LOGGING_LEVEL", "WARNING"),
            "GIT_PYTHON_REFRESH": "quiet",
        }

    def has_data(self) -> bool:
        """Whether a run has begun to fill it: its own lake, or its records of one elsewhere."""
        return any(self.lake.glob("*/day=*")) or any(self.records.glob("*/latest.json"))

    def claim(self, identity: str, *, anew: bool = False) -> None:
        """Write down what this home is for, and refuse another use of it once it has data.

        anew: whoever calls knows that the data is that of `identity` as well. Raises UserError.
        Hold the home while calling it.
        """
        marker = self.root / "source.json"
        if marker.exists() and marker.read_text(encoding="utf-8") == identity:
            return
        if marker.exists() and self.has_data() and not anew:
            raise UserError(
                f"{self.root} holds the data of another source, calendar or windows; "
                "set CHURN_HOME to another folder for this configuration"
            )
        written = marker.with_suffix(".tmp")
        written.write_text(identity, encoding="utf-8")
        written.replace(marker)

    @contextmanager
    def exclusive(self, command: str = "run") -> Generator[None]:
        """Hold the home for one `churn <command>`; the lock goes with the process, however it ends.

        Raises UserError when another one holds it.
        """
        typed = f"{'make' if command in ('run', 'up') else 'churn'} {command}"
        with (self.root / f"{command}.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another `{typed}` is using {self.root}; wait for it or set CHURN_HOME "
                    "to another folder"
                ) from None
            yield
