"""Read small files of a run or a study, with errors that name the file, folder or row."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml


@contextmanager
def naming(place: str | os.PathLike) -> Iterator[None]:
    """Make a ValueError in the block begin with the folder, file or row that was read, unless it names it already."""
    try:
        yield
    except ValueError as error:
        raise error if str(place) in str(error) else ValueError(f"{place}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or raise a ValueError that names the file."""
    return _object(path, json.loads, "JSON")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, or raise a ValueError that names the file."""
    return _object(path, yaml.safe_load, "YAML")


def _object(path: Path, parse: Callable[[str], Any], kind: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        value = parse(text) if text.strip() else None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged or not {kind}: {reason}") from error
    if not isinstance(value, dict):
        held = "is empty" if value is None else f"contains a {type(value).__name__}"
        raise ValueError(f"{path} is damaged: it should contain keys and values, but {held}")
    return value
