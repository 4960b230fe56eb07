"""The user's files in a configuration: a run folder keeps where they lie, so that later commands start anywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .schema import Config

# (section, key, the section's sources for which the value is a file or folder; None: whatever exists under it)
PLACES = (
    ("model", "path", ("local",)),
    ("model", "tokenizer", None),  # a folder or a name of the hub: transformers, too, takes the folder first
    ("data", "path", ("local",)),
    ("data", "validation_path", ("local",)),
    ("data", "test_path", ("local",)),
    ("data", "mixture", None),
)


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with the absolute path of each file or folder that exists."""
    for section, key, sources in PLACES:
        part = getattr(config, section)
        value = getattr(part, key)
        if not value or (sources is not None and part.source not in sources):
            continue
        place = Path(value).expanduser()
        if place.exists():
            config = replace(config, **{section: replace(part, **{key: str(place.absolute())})})
    return config
