"""Files that are written whole or not at all, and folders that belong to whoever created them."""

from __future__ import annotations

import datetime
import itertools
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
    """Write a file next to its place, flush it to the disk, and move it there.

    A writer that fails, or a full disk, leaves the file that was there before.
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
    """Write a text file whole or not at all."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json_text(values, indent=2, default=str) + "\n")


def json_text(values: Any, **options: Any) -> str:
    """Return values as JSON; numbers that are not finite, which JSON does not have, become null.

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
    """Create a folder that did not exist and return it: of this name, or with -2, -3 and so on after it.

    Two processes that ask for one name at the same time get two folders.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        claimed = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            claimed.mkdir()
        except FileExistsError:
            continue
        return claimed
    raise AssertionError


def hold_folder(folder: Path) -> bool:
    """Reserve a folder that exists for this process until :func:`release_folder`, or until it ends, however it ends.

    A lock of POSIX: that of a killed process is free at once, and children of a fork have none.

    Returns:
        False if another process holds it.
    """
    import fcntl  # not on Windows, where adapters are saved and loaded, and nothing is trained

    path = Path(folder).resolve() / ".lock"
    if path not in _held:
        file = path.open("w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            return False
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be reserved (%s): start nothing else on it", path.parent, error)
        _held[path] = file
    return True


def release_folder(folder: Path) -> None:
    """Let other processes hold a folder; nothing happens to one that is not held."""
    file = _held.pop(Path(folder).resolve() / ".lock", None)
    if file is not None:
        file.close()


def new_folder(parent: Path) -> Path:
    """Create a folder named by the time."""
    return claim_folder(parent / now().replace(":", ""))


def now() -> str:
    """Return the time in ISO 8601, UTC, in seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
