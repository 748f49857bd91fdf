"""Two models in one release: who answers whom, what is kept of it, and a challenger that fails."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
from log_cases import stored
from online_cases import STORED, content, write
from serving_cases import (
    SERVICE,
    THREE,
    VALID,
    Model,
    release_of,
    rewrite_manifest,
    train,
    trial_of,
)

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.contract.lookup import Found
from churn_assets.contract.release import (
    CHALLENGER_GOLDEN,
    CHALLENGER_MODEL,
    MANIFEST,
    Release,
    ReleaseError,
    encode_manifest,
    read_release,
    release_id_of,
)
from churn_assets.contract.trial import assignment, position
from churn_assets.home import PROJECT_ROOT
from churn_assets.lifecycle.bento import build_bento
from churn_assets.lifecycle.serving import OnlineStore, PredictionLog, ask, ask_bento, serve

IDS = [f"c-{number:05}" for number in range(20_000)]
ARM_OF = assignment("trial-1", 0.3)
CHAMPIONS = [i for i in IDS if ARM_OF(i) == "champion"]
CHALLENGED = [i for i in IDS if ARM_OF(i) == "challenger"]
STAMP = datetime(2025, 6, 1, tzinfo=UTC)
ROW = [float(VALID[name]) for name in FEATURE_NAMES]


@pytest.fixture(scope="module")
def other() -> Model:
    return train(FEATURE_NAMES, seed=3)


@pytest.fixture(scope="module")
def challenger(other: Model, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return release_of(other, tmp_path_factory.mktemp("releases"), version="8")


@pytest.fixture(scope="module")
def trial(
    release: Release, challenger: Release, tmp_path_factory: pytest.TempPathFactory
) -> Release:
    return trial_of(release, challenger, tmp_path_factory.mktemp("releases"))


@pytest.fixture(scope="module")
def without_shadow(
    release: Release, challenger: Release, tmp_path_factory: pytest.TempPathFactory
) -> Release:
    return trial_of(release, challenger, tmp_path_factory.mktemp("releases"), shadow=False)


@dataclass(frozen=True)
class Served:
    url: str
    log: Path


@pytest.fixture(scope="module")
def served(trial: Release, tmp_path_factory: pytest.TempPathFactory) -> Generator[Served]:
    folder = tmp_path_factory.mktemp("served")
    write(folder / "online.db", *content())
    log = folder / "log"
    log.mkdir()
    with serve(
        SERVICE,
        trial.directory,
        online=OnlineStore(str(folder / "online.db")),
        log=PredictionLog(str(log)),
    ) as url:
        yield Served(url, log)


def test_an_assignment_is_what_it_was() -> None:
    """Were it to change, a trial that is going on would mix its arms."""
    place = position("trial-1")
    assert [round(place(i), 6) for i in ("c-1", "ć-2", "")] == [0.123365, 0.452908, 0.539931]
    digest = hashlib.blake2b(b"7:trial-1c-1", digest_size=8).digest()
    assert place("c-1") == (int.from_bytes(digest, "big") >> 11) / 2**53
    assert position("trial-1c")("-1") != place("c-1")


def test_every_process_assigns_alike() -> None:
    code = (
        "from churn_assets.contract.trial import assignment\n"
        "of = assignment('trial-1', 0.3)\n"
        "print(''.join(of(f'c-{n:05}')[3] for n in range(500)))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=PROJECT_ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert told == {"".join(ARM_OF(i)[3] for i in IDS[:500])}


def test_assignments_are_uniform_and_independent_from_trial_to_trial() -> None:
    first, second = (
        np.array([of(i) for i in IDS]) for of in (position("trial-1"), position("trial-2"))
    )
    for placed in (first, second):
        assert placed.min() >= 0
        assert placed.max() < 1
        # Chi-squared of 19 degrees of freedom: above 43.8 once in a thousand.
        counts = np.histogram(placed, bins=20, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 43.8
    table = np.histogram2d(first, second, bins=5, range=[[0, 1]] * 2)[0]
    # 16 degrees of freedom.
    assert ((table - 800) ** 2 / 800).sum() < 39.3


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_a_share_is_kept_and_a_larger_one_takes_nobody_out(share: float) -> None:
    of, wider = assignment("trial-1", share), assignment("trial-1", min(share * 1.5, 1))
    taken = {i for i in IDS if of(i) == "challenger"}
    spread = 4 * (share * (1 - share) / len(IDS)) ** 0.5
    assert abs(len(taken) / len(IDS) - share) < spread
    assert all(wider(i) == "challenger" for i in taken)


OLD: dict[str, Any] = {
    "format": 1,
    "release_id": "v7-ad3f18d860c1",
    "model_name": "churn",
    "model_version": "7",
    "challenger": None,
    "risk": {"high": 0.7, "medium": 0.4},
    "features": [
        {
            "name": "total_orders_30d",
            "dtype": "int",
            "unit": "orders",
            "meaning": "Orders placed in the 30 days before the cutoff",
            "window_days": 30,
            "tables": ["orders"],
            "minimum": 0,
            "maximum": 10000,
        },
        {
            "name": "avg_order_value",
            "dtype": "float",
            "unit": "currency units per order",
            "meaning": "Mean order value over the 365 days before the cutoff",
            "window_days": 365,
            "tables": ["orders"],
            "minimum": 0.0,
            "maximum": 10000000.0,
        },
    ],
    "reference": {
        "total_orders_30d": {
            "count": 10,
            "mean": 3.0,
            "std": 1.0,
            "minimum": 0.0,
            "maximum": 9.0,
            "quantiles": [0.0, 9.0],
        }
    },
    "files": {
        "model.onnx": "9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4",
        "golden.json": "676e409528bb2f7d044668cc8ff973f9d47a066c4b173fe835a176d8f6659ffb",
    },
    "mlflow_run": "m",
    "dagster_run": "d",
    "data_hash": "h",
    "created_at": "2025-06-01T12:00:00Z",
}


def test_a_release_of_before_there_were_challengers_still_proves(tmp_path: Path) -> None:
    directory = tmp_path / OLD["release_id"]
    directory.mkdir()
    (directory / MANIFEST).write_text(json.dumps(OLD))
    (directory / "model.onnx").write_bytes(b"model")
    (directory / "golden.json").write_text('{"rows":[[3.0,49.5]],"probabilities":[0.25]}')
    read = read_release(directory)
    assert (read.manifest.challenger, read.challenger) == (None, None)


def test_a_release_of_a_trial_has_both_models_as_they_were_released(
    trial: Release, release: Release, challenger: Release, tmp_path: Path
) -> None:
    read = read_release(trial.directory)
    assert (read.model, read.golden) == (release.model, release.golden)
    assert read.challenger is not None
    assert (read.challenger.model, read.challenger.golden) == (challenger.model, challenger.golden)
    told = read.manifest.challenger
    assert told is not None
    assert (told.model_version, told.release_id) == ("8", challenger.manifest.release_id)
    assert (told.share, told.shadow, told.features) == (0.3, True, FEATURE_NAMES)
    assert read.manifest.release_id != release.manifest.release_id
    again = trial_of(release, challenger, tmp_path)
    assert again.manifest.release_id == read.manifest.release_id
    elsewhere = trial_of(release, challenger, tmp_path, trial="trial-2")
    assert elsewhere.manifest.release_id != read.manifest.release_id


def test_a_challenger_may_take_fewer_features_and_no_others(
    release: Release, release_of_three: Release, tmp_path: Path
) -> None:
    fewer = trial_of(release, release_of_three, tmp_path)
    assert fewer.manifest.feature_names == FEATURE_NAMES
    assert fewer.manifest.challenger is not None
    assert fewer.manifest.challenger.features == THREE
    with pytest.raises(ReleaseError, match="version 7 needs support_tickets_90d, which version 3"):
        trial_of(release_of_three, release, tmp_path)
    redefined = [msgspec.structs.replace(f, maximum=9e9) for f in release.manifest.features]
    manifest = msgspec.structs.replace(release.manifest, features=tuple(redefined))
    foreign = Release(release.directory, manifest, release.golden, release.model)
    with pytest.raises(ReleaseError, match="define total_orders_30d differently"):
        trial_of(release_of_three, foreign, tmp_path)


def changed_challenger(directory: Path, **changes: object) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    rewrite_manifest(directory, challenger=manifest["challenger"] | changes)


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda d: (d / CHALLENGER_MODEL).write_bytes(b"x"), "challenger.onnx was changed"),
    (lambda d: (d / CHALLENGER_MODEL).unlink(), "challenger.onnx is missing"),
    (lambda d: (d / CHALLENGER_GOLDEN).write_text("{}"), "challenger-golden.json was changed"),
    (lambda d: changed_challenger(d, share=0.9), "manifest.json was changed"),
    (lambda d: changed_challenger(d, share=1.0), "is not a manifest"),
    (lambda d: changed_challenger(d, trial="other"), "manifest.json was changed"),
    (lambda d: rewrite_manifest(d, challenger=None), "manifest.json was changed"),
    (lambda d: changed_challenger(d, file="model.onnx"), "no files of its own"),
    (lambda d: changed_challenger(d, file="other.onnx"), "has no digest of other.onnx"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=[reason for _, reason in DAMAGES])
def test_a_damaged_challenger_is_refused(
    trial: Release, tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    copy = Path(shutil.copytree(trial.directory, tmp_path / "copy"))
    read_release(copy)
    damage(copy)
    with pytest.raises(ReleaseError, match=reason):
        read_release(copy)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_version": "7"}, "on trial against itself"),
        ({"trial": ""}, "its trial has no id"),
        ({"features": ()}, "its challenger has no features"),
        ({"features": ("shoe_size",)}, "its challenger needs shoe_size"),
        ({"features": FEATURE_NAMES[::-1]}, "not in the order"),
        ({"features": THREE}, "challenger-golden.json has a row that is not 3 features wide"),
    ],
)
def test_a_challenger_must_fit_its_release(
    trial: Release, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    """Even where every digest is right."""
    copy = Path(shutil.copytree(trial.directory, tmp_path / "copy"))
    assert trial.manifest.challenger is not None
    manifest = msgspec.structs.replace(
        trial.manifest,
        challenger=msgspec.structs.replace(trial.manifest.challenger, **changes),
    )
    manifest = msgspec.structs.replace(manifest, release_id=release_id_of(manifest))
    (copy / MANIFEST).write_bytes(encode_manifest(manifest))
    with pytest.raises(ReleaseError, match=reason):
        read_release(copy)


def test_a_challenger_that_computes_otherwise_is_not_served(
    service: ModuleType, release: Release, challenger: Release, tmp_path: Path
) -> None:
    wrong = msgspec.structs.replace(
        challenger.golden, probabilities=tuple(1 - p for p in challenger.golden.probabilities)
    )
    lying = Release(challenger.directory, challenger.manifest, wrong, challenger.model)
    with pytest.raises(ReleaseError, match=r"challenger\.onnx does not compute what it was"):
        service.Served(trial_of(release, lying, tmp_path))
    broken = Release(challenger.directory, challenger.manifest, challenger.golden, b"no model")
    with pytest.raises(ReleaseError, match=r"challenger\.onnx cannot be loaded"):
        service.Served(trial_of(release, broken, tmp_path))


def all_ways(service: ModuleType, served: Any, ids: list[str]) -> list[Any]:
    """Each customer's row scored alone, as a stored one, and in a batch."""
    found = Found(tuple(ROW), STAMP, False)
    request = {name: VALID[name] for name in FEATURE_NAMES}
    alone = [
        served.predict(served.decoder.decode(json.dumps({"customer_id": i} | request).encode()))
        for i in ids
    ]
    stored = [served.predict_stored(i, found) for i in ids]
    batch = served.predict_rows([(i, ROW, found if n % 2 else None) for n, i in enumerate(ids)])
    for n, (one, by_id, row) in enumerate(zip(alone, stored, batch, strict=True)):
        kept = (one.champion, one.challenger, one.arm)
        assert (by_id.champion, by_id.challenger, by_id.arm) == kept
        assert (row.champion, row.challenger, row.arm) == kept
        assert by_id.answer.cutoff == STAMP
        assert hasattr(row.answer, "cutoff") == bool(n % 2)
        for scored in (one, by_id, row):
            assert scored.answer.churn_probability == alone[n].answer.churn_probability
            assert scored.answer.model_version == alone[n].answer.model_version
    return alone


def test_with_shadow_both_score_and_one_answers(
    service: ModuleType, trial: Release, model: Model, other: Model
) -> None:
    served = service.Served(trial)
    row = np.array([ROW], dtype=np.float32)
    champion, challenger = float(model.predict(row)[0]), float(other.predict(row)[0])
    assert abs(champion - challenger) > 1e-3
    for scored in all_ways(service, served, CHAMPIONS[:20] + CHALLENGED[:20]):
        arm = ARM_OF(scored.answer.customer_id)
        assert scored.arm == arm
        assert scored.champion == pytest.approx(champion, abs=1e-5)
        assert scored.challenger == pytest.approx(challenger, abs=1e-5)
        answered = champion if arm == "champion" else challenger
        assert scored.answer.churn_probability == pytest.approx(answered, abs=6e-5)
        assert scored.answer.model_version == ("7" if arm == "champion" else "8")
    assert served.trial.health().asked == 120
    assert served.trial.health().failed == 0


def test_without_shadow_only_the_one_that_answers_scores(
    service: ModuleType, without_shadow: Release
) -> None:
    served = service.Served(without_shadow)
    for scored in all_ways(service, served, CHAMPIONS[:10] + CHALLENGED[:5]):
        arm = ARM_OF(scored.answer.customer_id)
        assert scored.arm == arm
        assert (scored.champion is None) == (arm == "challenger")
        assert (scored.challenger is None) == (arm == "champion")
    assert served.trial.health().asked == 15


def test_a_challenger_of_fewer_features_gets_its_own(
    service: ModuleType, release: Release, tmp_path: Path
) -> None:
    others = FEATURE_NAMES[::2]
    fewer = train(others, seed=4)
    challenger = release_of(fewer, tmp_path, version="9")
    served = service.Served(trial_of(release, challenger, tmp_path))
    expected = fewer.predict(np.array([ROW[::2]], dtype=np.float32))[0]
    assert abs(expected - fewer.predict(np.array([ROW[:3]], dtype=np.float32))[0]) > 1e-3
    for scored in all_ways(service, served, IDS[:10]):
        assert scored.challenger == pytest.approx(expected, abs=1e-5)


class Failing:
    """A challenger that fails. `answer` is what it says, if it gets so far."""

    def __init__(self, answer: float | None, extra: int = 0) -> None:
        self.answer, self.extra = answer, extra

    def probability(self, values: Any) -> float:
        if self.answer is None:
            raise RuntimeError("the model is out of its mind")
        return self.answer

    def probabilities(self, rows: np.ndarray) -> np.ndarray:
        return np.full(len(rows) + self.extra, self.probability(None), dtype=np.float32)


@pytest.mark.parametrize("failure", [Failing(None), Failing(np.nan), Failing(np.inf)])
@pytest.mark.parametrize("shadow", [True, False])
def test_a_challenger_that_fails_costs_no_request(
    service: ModuleType,
    trial: Release,
    without_shadow: Release,
    model: Model,
    failure: Failing,
    shadow: bool,
) -> None:
    served = service.Served(trial if shadow else without_shadow)
    served.trial._model = failure
    champion = model.predict(np.array([ROW], dtype=np.float32))[0]
    for scored in all_ways(service, served, CHAMPIONS[:4] + CHALLENGED[:4]):
        assert scored.arm == "champion"
        assert scored.answer.model_version == "7"
        assert scored.answer.churn_probability == pytest.approx(champion, abs=6e-5)
        assert scored.champion == pytest.approx(champion, abs=1e-5)
        assert scored.challenger is None
    health = served.trial.health()
    assert (health.asked, health.failed) == ((24, 24) if shadow else (12, 12))


def test_one_row_of_a_batch_may_fail_alone(service: ModuleType, trial: Release) -> None:
    served = service.Served(trial)
    inner = served.trial._model

    class Picky(Failing):
        def probabilities(self, rows: np.ndarray) -> np.ndarray:
            return np.where(rows[:, 0] > 4, np.nan, inner.probabilities(rows))

    served.trial._model = Picky(None)
    rows = [(i, [orders, *ROW[1:]], None) for i, orders in zip(CHALLENGED, (3, 5, 4), strict=False)]
    scored = served.predict_rows(rows)
    assert [s.arm for s in scored] == ["challenger", "champion", "challenger"]
    assert [s.answer.model_version for s in scored] == ["8", "7", "8"]
    # Answers nobody asked for are those of no row.
    served.trial._model = Failing(0.5, extra=1)
    assert {s.arm for s in served.predict_rows(rows)} == {"champion"}


def test_a_served_release_of_two_logs_who_answered(served: Served, trial: Release) -> None:
    ids = [*CHAMPIONS[:10], *CHALLENGED[:10], *STORED]
    bodies = [VALID | {"customer_id": i} if i not in STORED else {"customer_id": i} for i in ids]
    answers = [ask(served.url, body).json() for body in bodies]
    answers += ask(served.url, {"rows": bodies}, path="/predict_batch").json()["predictions"]
    rows = stored(served.log)
    assert [row.customer_id for row in rows] == ids * 2
    for row, answer in zip(rows, answers, strict=True):
        assert row.release_id == trial.manifest.release_id
        assert row.arm == ARM_OF(row.customer_id)
        assert answer["model_version"] == ("7" if row.arm == "champion" else "8")
        assert row.model_version == answer["model_version"]
        assert row.probability == answer["churn_probability"]
        assert None not in (row.champion, row.challenger)
        score = row.champion if row.arm == "champion" else row.challenger
        assert row.probability == round(float(score or 0), 4)
    with urllib.request.urlopen(f"{served.url}/health", timeout=10) as answer:
        health = json.load(answer)
    assert health["version"] == "7"
    assert health["release_id"] == trial.manifest.release_id
    assert health["trial"] == {
        "trial": "trial-1",
        "challenger": "8",
        "share": 0.3,
        "shadow": True,
        "asked": len(rows),
        "failed": 0,
    }


def test_a_bento_of_two_is_asked_about_both(trial: Release, tmp_path: Path) -> None:
    bento = build_bento(trial.directory, tmp_path, project_root=PROJECT_ROOT)
    proof = ask_bento(bento, tmp_path)
    assert proof.as_expected
    assert proof.reason.count("as the model did") == 2
    assert proof.release_id == trial.manifest.release_id
