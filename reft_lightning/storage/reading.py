"""What is read is named where it is wrong: small files of a run or a study, and whatever else has a place."""

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
    """Let a ValueError of the block begin with the folder, file or row that was read, if it does not name it."""
    try:
        yield
    except ValueError as error:
        raise error if str(place) in str(error) else ValueError(f"{place}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds, or raise a ValueError that names the file."""
    return _object(path, json.loads, "JSON")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the keys and values that a YAML file holds, or raise a ValueError that names the file."""
    return _object(path, yaml.safe_load, "YAML")


def _object(path: Path, parse: Callable[[str], Any], kind: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        value = parse(text) if text.strip() else None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged, it is not {kind}: {reason}") from error
    if not isinstance(value, dict):
        held = "is empty" if value is None else f"holds a {type(value).__name__}"
        raise ValueError(f"{path} is damaged, it should hold keys and values: it {held}")
    return value
