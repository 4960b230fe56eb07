"""The user's files in a configuration: a run folder keeps where they lie, so that later commands start anywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .schema import Config, marks


def with_absolute_paths(config: Config, start: Path = Path()) -> Config:
    """Return the configuration with the absolute path of each file or folder that exists, or must.

    Relative ones are below ``start``. They are those that the schema marks: places of a local source, files that may
    have a name of the hub instead, and the adapter that training begins with.
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
