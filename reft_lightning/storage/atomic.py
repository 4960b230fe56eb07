"""Files that are written completely or not at all, and folders that belong to whoever created them."""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)

_held: dict[Path, IO[str]] = {}  # lock files of this process


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file next to its place, flush it to disk, and move it there.

    If the writer fails or the disk is full, an existing file stays as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file completely or not at all."""
    write_text(path, json_text(values, indent=2, default=str) + "\n")


def json_text(values: Any, **options: Any) -> str:
    """Return values as JSON; non-finite numbers, which JSON lacks, become null.

    >>> json_text({"loss": float("nan"), "steps": [1, float("inf")]})
    '{"loss": null, "steps": [1, null]}'
    """
    return json.dumps(_finite(values), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key) if isinstance(key, float) else key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def claim_folder(folder: Path) -> Path:
    """Create a new folder and return it: with this name, or with -2, -3 and so on appended.

    Two processes that request the same name at the same time get two folders.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    claimed, number = folder, 1
    while True:
        try:
            claimed.mkdir()
            return claimed
        except FileExistsError:
            number += 1
            claimed = folder.with_name(f"{folder.name}-{number}")


def hold_folder(folder: Path) -> bool:
    """Reserve an existing folder for this process until :func:`release_folder`, or until it ends, however it ends.

    This is a POSIX lock: a killed process releases it at once, and forked children do not inherit it.

    Returns:
        False if another process holds it.
    """
    import fcntl  # not on Windows, where adapters can be saved and loaded but not trained

    path = Path(folder).resolve() / ".lock"
    if path not in _held:
        file = path.open("w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            return False
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be reserved (%s): start no other process on it", path.parent, error)
        _held[path] = file
    return True


def release_folder(folder: Path) -> None:
    """Release a folder for other processes; a folder that is not held is ignored."""
    file = _held.pop(Path(folder).resolve() / ".lock", None)
    if file is not None:
        file.close()


def new_folder(parent: Path) -> Path:
    """Create a folder named after the current time."""
    return claim_folder(parent / now().replace(":", ""))


def now() -> str:
    """Return the current UTC time in ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
