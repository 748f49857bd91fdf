"""A configuration that is meant to do harm is a sentence, and an answer that leads away no way."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path

import pytest

from churn_assets.defs.remote import RemoteDagster
from churn_assets.errors import UserError
from churn_assets.settings import load_settings

SHOP = "source: {kind: shop}\ncalendar: {start: 2024-01-01, days: 800}\n"
LAUGHS = "    a0: &a0 {a: b}\n" + "".join(
    f"    a{n}: &a{n} {{{', '.join(f'{key}: *a{n - 1}' for key in 'abcdefgh')}}}\n"
    for n in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("source: !!python/object/apply:os.mkdir [harmed]\n", "could not determine a constructor"),
        (SHOP + "spark:\n  conf:\n" + LAUGHS, "spark.conf"),
        (SHOP + "drift:\n  more:\n" + LAUGHS, "unknown key drift.more"),
        (SHOP + "drift: &a {min_rows: *a}\n", "drift.min_rows"),
        (SHOP + "drift: " + "[" * 1200, "is nested too deeply"),
        (SHOP + "drift: {min_rows: " + "9" * 5000 + "}\n", "has a value that is none"),
        ("calendar: {start: 2024-99-99}\n", "month must be in 1..12"),
    ],
    ids=["object", "laughs", "laughs of no setting", "itself", "deep", "long number", "no date"],
)
def test_a_hostile_configuration_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        load_settings(tmp_path / "hostile.yaml")
    assert not (tmp_path / "harmed").exists()


def test_a_token_is_not_taken_along_to_another_server() -> None:
    taken = []

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            taken.append(self.headers["authorization"])
            self.send_error(404)

        def do_POST(self) -> None:
            self.send_response(302)
            self.send_header("location", "/elsewhere")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            dagster = RemoteDagster(f"http://127.0.0.1:{server.server_port}", "token")
            with pytest.raises(UserError, match="HTTP 302"):
                dagster.trained_in("2026-W48")
        finally:
            server.shutdown()
            thread.join()
    assert taken == []
