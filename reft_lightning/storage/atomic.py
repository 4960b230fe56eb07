"""Files that are written whole or not at all, and folders named by the time."""

from __future__ import annotations

import datetime
import itertools
import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)


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
