"""Folders of the cache that are built once: whole, or built again.

The sizes of its files are in `<folder>.json`, written last. A folder without this record, or with other files, was left
by a crash or a full disk, and is never used.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from .atomic import write_json

log = logging.getLogger(__name__)


def publish(folder: Path, build: Callable[[Path], None]) -> Path:
    """Build a folder next to its final place and move it there when complete; one process builds, others wait.

    Args:
        folder: the final place; returned at once when it is there and whole.
        build: fills the folder it is given.
    """
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
    """Whether a folder holds the files that were published, each as long as it was."""
    try:
        published = json.loads(_record(folder).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return folder.is_dir() and sizes(folder) == published


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file of a folder, by its path inside."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}


def _record(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _replace(folder: Path, part: Path) -> None:
    """Put a complete folder into its place: the record goes first and comes last."""
    record = _record(folder)
    record.unlink(missing_ok=True)
    if folder.exists():
        log.warning("%s is not whole; it is built again", folder)
        shutil.rmtree(folder)
    os.replace(part, folder)
    write_json(record, sizes(folder))
