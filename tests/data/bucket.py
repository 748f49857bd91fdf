"""An S3 endpoint on loopback with a bucket, and this process's credentials for it."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

import pytest
from moto.server import ThreadedMotoServer

from churn_assets.data.lake import open_lake


@contextmanager
def s3_endpoint(bucket: str, key_id: str, secret: str) -> Generator[str]:
    """Its URL. Processes that are started meanwhile have the credentials in their environment."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patch.delenv(name)
            patch.setenv("AWS_ACCESS_KEY_ID", key_id)
            patch.setenv("AWS_SECRET_ACCESS_KEY", secret)
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            patch.setenv("AWS_CONFIG_FILE", os.devnull)
            patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
            open_lake(f"s3://{bucket}", f"http://{host}:{port}").filesystem.mkdir(bucket)
            yield f"http://{host}:{port}"
    finally:
        server.stop()
