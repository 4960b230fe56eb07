"""The sha256 of a file's contents."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


def sha256_once(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits, reading it only once per process unless it changes."""
    facts = path.stat()
    return _sha256_of_state(path, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


@cache
def _sha256_of_state(path: Path, *state: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
