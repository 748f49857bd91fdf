"""The server of the reports, asked by hand for what lies beside its folder."""

from __future__ import annotations

import socket
import threading
from collections.abc import Generator
from pathlib import Path

import pytest

from churn_assets.reports import serve_reports

SECRET = b"t0psecret"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Reports beside a file that is nobody's business, and links to it."""
    folder = tmp_path / "home" / "reports"
    (folder / "models" / "1").mkdir(parents=True)
    (folder / "linked").mkdir()
    (folder / "page.html").write_text("a page")
    (folder / "models" / "1" / "index.html").write_text("a card")
    secret = tmp_path / "home" / "keys.json"
    secret.write_bytes(SECRET)
    # Its name begins as that of the folder does.
    beside = tmp_path / "home" / "reports-old"
    beside.mkdir()
    (beside / "page.html").write_bytes(SECRET)
    (folder / "file").symlink_to(secret)
    (folder / "relative").symlink_to("../keys.json")
    (folder / "home").symlink_to(tmp_path / "home", target_is_directory=True)
    (folder / "old").symlink_to(beside, target_is_directory=True)
    (folder / "linked" / "index.html").symlink_to(secret)
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "within").symlink_to(folder / "page.html")
    return folder


@pytest.fixture
def port(folder: Path) -> Generator[int]:
    with serve_reports("127.0.0.1", 0, str(folder)) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def ask(port: int, target: bytes, method: bytes = b"GET") -> tuple[int, bytes]:
    """Status and everything that was answered. No client may tidy the target up."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(method + b" " + target + b" HTTP/1.1\r\nHost: reports\r\n\r\n")
        answer = b""
        while block := connection.recv(65536):
            answer += block
    return int(answer.split(b" ", 2)[1]) if answer else 0, answer


def test_the_files_of_the_folder_are_served(port: int) -> None:
    for target, content in (
        (b"/page.html", b"a page"),
        (b"/page.html?x=../keys.json", b"a page"),
        (b"/models/1/", b"a card"),
        (b"/models/%31/index.html", b"a card"),
        (b"/within", b"a page"),
    ):
        status, answer = ask(port, target)
        assert (status, answer.endswith(content)) == (200, True), target
    assert ask(port, b"/models/1")[0] == 301


UP = b"../keys.json"
ATTACKS = [
    b"/" + UP,
    UP,
    b"/models/../" + UP,
    b"/models/1/../../" + UP,
    b"/.." + b"/.." * 30 + b"/etc/passwd",
    b"/%2e%2e/keys.json",
    b"/%2e%2e%2fkeys.json",
    b"/..%2fkeys.json",
    b"/%252e%252e%252fkeys.json",
    b"/..%5ckeys.json",
    b"/..\\keys.json",
    b"/%c0%ae%c0%ae/keys.json",
    b"/....//keys.json",
    b"/..;/keys.json",
    b"/../reports-old/page.html",
    b"/%2e%2e/reports-old/page.html",
    b"//etc/passwd",
    b"/%2fetc%2fpasswd",
    b"file:///etc/passwd",
    b"http://127.0.0.1/../keys.json",
    b"/%00",
    b"/page.html%00",
    b"/%00/../keys.json",
    b"/page.html%00.prom",
    b"/\0page.html",
    b"/%ed%a0%80",
    b"/" + b"a" * 5000,
    b"/" + b"a/" * 5000,
    b"/file",
    b"/relative",
    b"/home/keys.json",
    b"/home/",
    b"/home",
    b"/old/page.html",
    b"/linked/",
    b"/linked/index.html",
    b"/circle",
    b"/page.html/",
    b"/page.html/../../keys.json",
]


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: repr(attack[:30]))
def test_nothing_outside_of_the_folder_is_served(
    port: int, tmp_path: Path, attack: bytes, method: bytes
) -> None:
    absolute = str(tmp_path / "home" / "keys.json").encode()
    for target in (attack, attack.replace(b"/etc/passwd", absolute)):
        status, answer = ask(port, target, method)
        assert status in (400, 404), answer
        assert SECRET not in answer
        assert b"root:" not in answer
        assert str(tmp_path).encode() not in answer
    # It goes on serving.
    assert ask(port, b"/page.html")[0] == 200


def test_a_folder_is_no_way_to_another_host(port: int) -> None:
    for target in (b"//models/1", b"///models/1", b"/%2fmodels/1", b"//models%2f1"):
        _, answer = ask(port, target)
        head = answer.partition(b"\r\n\r\n")[0].lower()
        assert b"location: //" not in head, target


@pytest.mark.parametrize("method", [b"POST", b"PUT", b"DELETE", b"TRACE"])
def test_nothing_is_written(port: int, folder: Path, method: bytes) -> None:
    assert ask(port, b"/page.html", method)[0] == 501
    assert (folder / "page.html").read_text() == "a page"
