"""Looks for secrets in every line that was ever committed; exits with 1 when there is a new one.

What .secrets.baseline has is known: examples in tests and docs. Lines that are still in a file are
not looked at again: `make scan-secrets` has seen the files before.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from detect_secrets.core.secrets_collection import SecretsCollection
from detect_secrets.settings import transient_settings

BASELINE = Path(".secrets.baseline")
# Digests and numbers, not secrets, and thousands of them: what the baseline leaves out, too.
LEFT_OUT = (":!requirements.lock", ":!deploy/grafana/churn.json", f":!{BASELINE}")


def main() -> int:
    """Scan the history of the repository in the working directory."""
    known = json.loads(BASELINE.read_text(encoding="utf-8"))
    hashes = {one["hashed_secret"] for found in known["results"].values() for one in found}
    seen = lines_of_files()
    # What was removed has been added before.
    added = {line: where for where, line in added_lines() if line not in seen}
    # What detect-secrets would take for the end of a line is none in the list of places.
    lines = {" ".join(line.splitlines()): where for line, where in added.items()}
    found = SecretsCollection()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "history.txt"
        path.write_text("\n".join(lines), encoding="utf-8")
        with transient_settings({"plugins_used": known["plugins_used"]}):
            found.scan_file(str(path))
    places = list(lines.values())
    new = [secret for _, secret in found if secret.secret_hash not in hashes]
    for secret in new:
        print(f"{secret.type} in the history: {places[secret.line_number - 1]}")
    return 1 if new else 0


def added_lines() -> Iterator[tuple[str, str]]:
    """Every line that a commit added, merges included, with the commit and the file."""
    log = ["log", "--all", "--patch", "--unified=0", "--diff-merges=first-parent", "--no-ext-diff"]
    patch = git(*log, "--no-color", "--format=commit %h", "--", ".", *LEFT_OUT)
    commit = file = before = ""
    for line in patch.split("\n"):
        if line.startswith("commit "):
            commit = line
        elif line.startswith("+++ ") and before.startswith("--- "):
            file = line.removeprefix("+++ b/")
        elif line.startswith("+"):
            yield f"{commit}, {file}", line[1:]
        before = line


def lines_of_files() -> set[str]:
    """The lines of the files that git has now."""
    listed = git("ls-files", "-z", "--", ".", *LEFT_OUT).split("\0")
    files = [Path(name) for name in listed if name and Path(name).is_file()]
    return {
        line for file in files for line in file.read_bytes().decode(errors="replace").split("\n")
    }


def git(*arguments: str) -> str:
    """What a command of git prints."""
    done = subprocess.run(["git", *arguments], capture_output=True, check=True)
    return done.stdout.decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
