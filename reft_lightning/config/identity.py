"""Decide whether two runs are the same run, for hashes, resuming, reports, searches and the paper's tables.

The schema marks each key that does not identify a run, see :mod:`.schema`. The location of rows and models never does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import PurePath
from typing import Any

from ..adapters.methods import method_named
from .schema import WATCHING, Config, marks


def identity(config: Config | Mapping[str, Any], *, seed: bool = True) -> dict[str, Any]:
    """Return dotted key -> value for everything that identifies a run.

    Args:
        config: a configuration, or the contents of a run's ``config.yaml``, nested or dotted; keys added after the
            run was made take their defaults.
        seed: whether the seed counts: with it, two seeds of one experiment are two runs.
    """
    values = _defaults() | flat(dataclasses.asdict(config) if isinstance(config, Config) else config)
    found: dict[str, Any] = {}
    for key, value in values.items():
        mark = _mark(key)
        if (
            mark == "free"
            or (mark == "seed" and not seed)
            or (mark == "watching" and _only_watches(key, values))
        ):
            continue
        if mark == "place" and value:
            local = values[f"{key.partition('.')[0]}.source"] == "local"
            value = None if local or PurePath(value).is_absolute() else value
        elif mark == "file" and value:
            value = PurePath(value).name
        found[key] = value
    return found


def used_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what identifies a run, without the intervention settings that do not apply to its method."""
    method = settings.get("intervention.method")
    unused = {name for name in ("beside", "beside_options") if not settings.get("intervention.beside")}
    if method and not method_named(method).takes_settings:
        kept = {"method", "heads", "options", "init_from"}
        unused |= {key.split(".")[1] for key in settings if key.startswith("intervention.")} - kept
    elif settings.get("intervention.rank") is None:  # no subspace, hence nothing to initialise in it
        unused |= {"rank", "init", "weight_dtype"}
    if not settings.get("intervention.init_from"):
        unused.add("init_from")
    if not settings.get("intervention.dropout"):
        unused.add("dropout_on")
    return {
        key: value for key, value in settings.items()
        if not (key.startswith("intervention.") and key.split(".")[1] in unused)
    }  # fmt: skip


def config_hash(config: Config | Mapping[str, Any]) -> str:
    """Return a short hash of what identifies a run, including its seed."""
    text = json.dumps(identity(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(
    one: Config | Mapping[str, Any], other: Config | Mapping[str, Any], *, seed: bool = True
) -> dict[str, tuple[Any, Any]]:
    """Return dotted key -> (value of one, value of the other) for the identifying keys that differ."""
    first, second = identity(one, seed=seed), identity(other, seed=seed)
    return {
        key: (first.get(key), second.get(key))
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value; an empty dictionary is not a key.

    >>> flat({"optimizer": {"lr": 0.1}, "seed": 42})
    {'optimizer.lr': 0.1, 'seed': 42}
    """
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested sections from dotted keys: the inverse of :func:`flat`.

    >>> nested({"optimizer.lr": 0.1, "seed": 42})
    {'optimizer': {'lr': 0.1}, 'seed': 42}
    """
    sections: dict[str, Any] = {}
    for key, value in values.items():
        *path, name = key.split(".")
        inside = sections
        for part in path:
            inside = inside.setdefault(part, {})
        inside[name] = value
    return sections


def _only_watches(key: str, values: Mapping[str, Any]) -> bool:
    """Whether a key belongs to a callback of :data:`~reft_lightning.config.schema.WATCHING`."""
    target = str(values.get(".".join([*key.split(".")[:2], "_target_"]), ""))
    return target.rpartition(".")[2] in WATCHING.get(target.partition(".")[0], ())


@cache
def _defaults() -> dict[str, Any]:
    return flat(dataclasses.asdict(Config()))


def _mark(key: str) -> str:
    """Return the mark of a key, or of the section that contains it."""
    parts = key.split(".")
    sections = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((marks()[name] for name in sections if name in marks()), "result")
