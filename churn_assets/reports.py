"""`make up`'s server of the home's reports: files of one folder, and nothing else.

A link that leads out of the folder is not followed. The server is Python's own, but that it tells
Prometheus the type of the metrics page: without it, Prometheus 3 refuses the page.
"""

from __future__ import annotations

import functools
import os
import sys
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

from churn_assets.monitoring.exposition import CONTENT_TYPE


class Reports(SimpleHTTPRequestHandler):
    """Answers GET and HEAD for the files of a folder."""

    def send_head(self) -> BinaryIO | None:
        """The file of the path, once the head of the answer is sent; None without one."""
        path = Path(self.translate_path(self.path))
        # Of a folder either page is shown.
        if all(self._is_inside(each) for each in (path, path / "index.html", path / "index.htm")):
            return super().send_head()
        self.send_error(HTTPStatus.NOT_FOUND, "File not found")
        return None

    def _is_inside(self, path: Path) -> bool:
        try:
            return path.resolve().is_relative_to(Path(self.directory).resolve())
        # Names no file can have, such as one with a NUL, and links in a circle.
        except (OSError, ValueError, RuntimeError):
            return False

    def guess_type(self, path: str | os.PathLike[str]) -> str:
        """The type of the file at `path`, by its name."""
        return CONTENT_TYPE if str(path).endswith(".prom") else super().guess_type(path)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Answered requests are not told: a scrape every few seconds says nothing new."""


def serve_reports(host: str, port: int, folder: str) -> ThreadingHTTPServer:
    """A server of `folder` at `host`:`port`, ready for `serve_forever`."""
    return ThreadingHTTPServer((host, port), functools.partial(Reports, directory=folder))


if __name__ == "__main__":
    with serve_reports(sys.argv[1], int(sys.argv[2]), sys.argv[3]) as server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            sys.exit(0)
