"""``results.json``: the results of a run, and what is needed to repeat it.

The file is written after every stage, so a crash loses no earlier results; ``status`` is running, stopped or complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..storage.atomic import json_text, write_json, write_text
from ..storage.reading import read_json

RESULTS = "results.json"


def read_results(folder: Path) -> dict[str, Any]:
    """Return the contents of a run's ``results.json``; empty if there is none yet."""
    path = folder / RESULTS
    return read_json(path) if path.is_file() else {}


def has_scores(results: Mapping[str, Any], prefix: str) -> bool:
    """Whether results contain a metric with this prefix, such as ``test/``."""
    return any(name.startswith(prefix) for name in results.get("metrics", {}))


class Results:
    """The contents of ``results.json`` in a run folder, kept on disk."""

    def __init__(self, folder: Path, writes: bool = True, **values: Any) -> None:
        self.path = folder / RESULTS
        self.writes = writes  # true in only one process of a run
        self.values: dict[str, Any] = {
            "status": "running",
            "metrics": {},
            "counts": {},
            "test_reads": [],
        } | values

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Return the results of an earlier run."""
        results = cls(folder)
        results.values |= read_json(results.path)
        return results

    def resume(self) -> None:
        """Take over the results of an interrupted run in the same folder, keeping this process's environment."""
        if earlier := read_results(self.path.parent):
            now = {k: v for k, v in self.values.items() if k not in ("metrics", "counts", "test_reads")}
            then = {k: v for k, v in earlier.items() if k not in ("stopped", "error", "signal")}
            self.values = self.values | then | now

    def has(self, prefix: str) -> bool:
        """Whether there is a metric with this prefix."""
        return has_scores(self.values, prefix)

    def update(self, **values: Any) -> None:
        """Set values, merging dictionaries, and write the file."""
        for name, value in values.items():
            old = self.values.get(name)
            self.values[name] = (
                {**old, **value} if isinstance(old, dict) and isinstance(value, Mapping) else value
            )
        if self.writes:
            write_json(self.path, self.values)


def write_predictions(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json_text(row, ensure_ascii=False) + "\n" for row in rows))
