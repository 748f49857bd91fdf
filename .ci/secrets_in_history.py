"""Looks for secrets in every line that was ever committed; exits with 1 when there is a new one.

What .secrets.baseline has is known: examples in tests and docs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from detect_secrets.core.secrets_collection import SecretsCollection
from detect_secrets.settings import transient_settings

BASELINE = Path(".secrets.baseline")
# Digests, not secrets, and thousands of them.
LEFT_OUT = (":!requirements.lock", ":!*.json", f":!{BASELINE}")


def main() -> int:
    """Scan the history of the repository in the working directory."""
    known = json.loads(BASELINE.read_text(encoding="utf-8"))
    hashes = {one["hashed_secret"] for found in known["results"].values() for one in found}
    command = ["git", "log", "--all", "--patch", "--format=", "--unified=0", "--", ".", *LEFT_OUT]
    patch = subprocess.run(command, capture_output=True, check=True).stdout.decode(errors="replace")
    lines = {line[1:] for line in patch.split("\n") if line[:1] in "+-" and line[:3] != "+++"}
    found = SecretsCollection()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "history.txt"
        path.write_text("\n".join(sorted(lines)), encoding="utf-8")
        with transient_settings({"plugins_used": known["plugins_used"]}):
            found.scan_file(str(path))
        text = path.read_text(encoding="utf-8").split("\n")
    new = [secret for _, secret in found if secret.secret_hash not in hashes]
    for secret in new:
        shown = text[secret.line_number - 1].partition("=")[0].strip()[:60]
        print(f"{secret.type} in the history, in a line that begins: {shown}")
    return 1 if new else 0


if __name__ == "__main__":
    sys.exit(main())
