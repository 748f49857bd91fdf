"""The servers CI starts where none answers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from churn_assets.home import PROJECT_ROOT
from churn_assets.lifecycle.serving import free_port

SCRIPT = """
set -euo pipefail
. .ci/servers
trap stop_servers EXIT
start_servers
echo "$CHURN_TEST_POSTGRES $CHURN_TEST_REDIS $servers_folder"
psql --no-psqlrc -Atc "SELECT inet_server_addr(), current_setting('listen_addresses')" \
    "$CHURN_TEST_POSTGRES"
redis-cli -u "$CHURN_TEST_REDIS" config get bind
# A second start uses what answers, and ends none of it.
(servers_folder='' servers_postgres='' servers_redis=''; start_servers; stop_servers)
_postgres_answers
_redis_answers
"""


def test_servers_are_started_where_none_answers_and_gone_at_the_end() -> None:
    here = os.geteuid() == 0 and Path("/etc/debian_version").exists()
    programs = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), shutil.which("redis-server")]
    if not here or not all(programs) or len(programs) < 2:
        pytest.skip("this is not root on a Debian with Postgres and Redis")
    ports = {"PGPORT": str(free_port()), "REDIS_PORT": str(free_port())}
    done = subprocess.run(
        ["bash", "-c", SCRIPT],
        cwd=PROJECT_ROOT,
        env=os.environ | ports,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done
    urls, where, *bound = done.stdout.splitlines()
    postgres, redis, folder = urls.split()
    assert postgres == f"postgresql://postgres@127.0.0.1:{ports['PGPORT']}/test"
    assert redis == f"redis://127.0.0.1:{ports['REDIS_PORT']}/5"
    assert where == "127.0.0.1|127.0.0.1"
    assert bound == ["bind", "127.0.0.1"]
    assert not Path(folder).exists()
    for port in ports.values():
        assert subprocess.run(["bash", "-c", f": </dev/tcp/127.0.0.1/{port}"]).returncode
