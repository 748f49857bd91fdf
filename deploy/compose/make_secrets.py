"""`make secrets`: the passwords of the platform, made once, in a file only its owner reads.

Which there are stands in compose.yaml, as `${NAME:?...}`. Standard library alone: a server needs
nothing but Python and a container engine.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BYTES = 32
_REQUIRED = re.compile(r"(?<!\$)\$\{([A-Z][A-Z0-9_]*):\?")
_GIVEN = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)\s*=[ \t]*(\S?)", re.MULTILINE)


def required(compose: str) -> list[str]:
    """The variables a compose file cannot do without, in the order it names them."""
    return list(dict.fromkeys(_REQUIRED.findall(compose)))


def given(env: str) -> set[str]:
    """The variables that have a value in an environment file."""
    return {name for name, value in _GIVEN.findall(env) if value}


def make_secrets(compose: Path, target: Path) -> list[str]:
    """Add what `compose` requires and `target` has no value for; returns the names.

    What is there stays as it is, to the byte. The file is of mode 600 from the start, and replaced
    as a whole. Raises OSError when it cannot be read or written.
    """
    before = target.read_text(encoding="utf-8") if target.exists() else ""
    missing = [name for name in required(compose.read_text("utf-8")) if name not in given(before)]
    if missing:
        # Which of two lines of a name counts depends on the reader.
        empty = "|".join(missing)
        kept = re.sub(
            rf"^\s*(?:export\s+)?(?:{empty})\s*=[ \t]*\n?", "", before, flags=re.MULTILINE
        )
        kept += "" if not kept or kept.endswith("\n") else "\n"
        made = "".join(f"{name}={secrets.token_urlsafe(BYTES)}\n" for name in missing)
        temporary = target.with_name(f"{target.name}-{secrets.token_hex(4)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(kept + made)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    elif target.stat().st_mode & 0o077:
        target.chmod(0o600)
    return missing


def main(target: Path = HERE / ".env") -> int:
    """Say what was made; the exit code."""
    try:
        made = make_secrets(HERE / "compose.yaml", target)
    except OSError as error:
        print(
            f"error: {target} cannot be used ({error.strerror}); run it as its owner",
            file=sys.stderr,
        )
        return 2
    if made:
        print(f"made {len(made)} secrets in {target}: {', '.join(made)}")
    else:
        print(f"{target} has every secret already; nothing was changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
