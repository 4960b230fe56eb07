"""Make the paths of the user's files absolute, so that later commands on a run can start from any folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .schema import Config, marks


def with_absolute_paths(config: Config, start: Path = Path()) -> Config:
    """Return the configuration with absolute paths for files and folders that exist, or that must exist.

    Relative paths start from ``start``. The schema marks the keys concerned: paths of a local source, files that may
    also be given by a name on the hub, and the adapter that training starts from.
    """
    for name, mark in marks().items():
        section, _, key = name.partition(".")
        part = getattr(config, section)
        if mark not in ("place", "file", "path") or (mark == "place" and part.source != "local"):
            continue
        value = getattr(part, key)
        if value and ((place := start / Path(value).expanduser()).exists() or mark == "path"):
            config = replace(config, **{section: replace(part, **{key: str(place.absolute())})})
    return config
