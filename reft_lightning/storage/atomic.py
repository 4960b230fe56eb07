"""Files that are written whole or not at all, and folders named by the time."""

from __future__ import annotations

import datetime
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file next to its place, flush it to the disk, and move it there."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(values, indent=2, default=str) + "\n")


def new_folder(parent: Path) -> Path:
    """Create a folder named by the time, and by a number after the first of one second."""
    name = now().replace(":", "")
    names = (name if number == 1 else f"{name}_{number}" for number in itertools.count(1))
    folder = next(parent / name for name in names if not (parent / name).exists())
    folder.mkdir(parents=True)
    return folder


def now() -> str:
    """Return the time in ISO 8601, UTC, in seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
