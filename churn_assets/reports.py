"""`make up`'s server of the home's reports: files of one folder, and nothing else.

It is Python's own, but that it tells Prometheus the type of the metrics page: without it,
Prometheus 3 refuses the page.
"""

from __future__ import annotations

import functools
import os
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

from churn_assets.monitoring.exposition import CONTENT_TYPE


class Reports(SimpleHTTPRequestHandler):
    """Answers GET and HEAD for the files of a folder."""

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
