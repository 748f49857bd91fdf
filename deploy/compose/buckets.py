"""Make the buckets that are missing: `buckets.py URL NAME...`. Credentials are AWS's variables."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import s3fs


def make_buckets(url: str, names: Sequence[str]) -> list[str]:
    """Make each bucket of the store at `url` that is not there; returns those that were made."""
    store = s3fs.S3FileSystem(endpoint_url=url)
    missing = [name for name in names if not store.exists(name)]
    for name in missing:
        store.mkdir(name)
    return missing


if __name__ == "__main__":
    for made in make_buckets(sys.argv[1], sys.argv[2:]):
        print(f"made the bucket {made}")
