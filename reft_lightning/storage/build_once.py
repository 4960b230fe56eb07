"""Folders of the cache that are built once, and rebuilt if incomplete.

The sha256 of each file is in `<folder>.json`, which is written last. A folder without this record, or with other files,
was left by a crash or by a full or damaged disk, and is never used.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from .atomic import write_json
from .digests import sha256_once
from .reading import read_json

log = logging.getLogger(__name__)


def publish(folder: Path, build: Callable[[Path], None]) -> Path:
    """Build a folder next to its final place and move it there when complete; one process builds, others wait.

    Args:
        folder: the final place; returned at once if it is complete, even on a read-only disk.
        build: fills the folder it is given.
    """
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not is_whole(folder):
            part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.part"))
            try:
                build(part)
                part.chmod(0o755)
                _replace(folder, part)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a folder contains exactly the files that were published, unchanged."""
    try:
        published = read_json(_record(folder))
    except (FileNotFoundError, ValueError):
        return False
    return folder.is_dir() and _digests(folder) == published


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_once(path) for path in sorted(files)}


def _record(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _replace(folder: Path, part: Path) -> None:
    """Put a complete folder in its place: the record is removed first and written last."""
    record = _record(folder)
    record.unlink(missing_ok=True)
    if folder.exists():
        log.warning("%s is incomplete or damaged; rebuilding it", folder)
        shutil.rmtree(folder)
    os.replace(part, folder)
    write_json(record, _digests(folder))
