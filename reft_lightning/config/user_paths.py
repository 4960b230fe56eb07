"""The user's files in a configuration: a run folder keeps where they lie, so that later commands start anywhere."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .schema import Config

# (section, key, the section's sources for which the value is a file or folder; None: whatever exists under it)
PLACES = (
    ("model", "path", ("local",)),
    ("model", "tokenizer", None),  # a folder or a name of the hub: transformers, too, takes the folder first
    ("data", "path", ("local",)),
    ("data", "test_path", ("local",)),
    ("data", "mixture", None),
)


def make_absolute(config: Config) -> dict[str, str]:
    """Replace each relative place of an existing file by the absolute one, in the configuration itself.

    Returns:
        dotted key -> what was written, of the places that were replaced.
    """
    written: dict[str, str] = {}
    for section, key, sources in PLACES:
        part = getattr(config, section)
        value = getattr(part, key)
        if not value or (sources is not None and part.source not in sources):
            continue
        place = Path(value).expanduser()
        if place.exists() and str(place.absolute()) != value:
            written[f"{section}.{key}"] = value
            setattr(part, key, str(place.absolute()))
    return written


def as_written(values: Mapping[str, Any], written: Mapping[str, str]) -> dict[str, Any]:
    """Return a copy of a configuration's values with the places as they were written: what its hash is taken of."""
    found = copy.deepcopy(dict(values))
    for name, value in written.items():
        section, _, key = name.partition(".")
        found[section][key] = value
    return found
