"""`results.json`: what a run obtained, and what is needed to run it again.

It is written after every stage, so that a crash loses nothing that was computed; ``status`` is running, stopped
or complete.
"""

from __future__ import annotations

import datetime
import gc
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import resource
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "reft_lightning", "torch", "lightning", "transformers", "peft", "datasets", "tokenizers", "hydra-core",
)  # fmt: skip
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class _Process:
    """What this process knows of its peak memory."""

    runs = 0  # that have begun
    alone = True  # whether the peak is that of the last run alone


class Results:
    """The contents of ``results.json`` in a run folder, kept on disk."""

    def __init__(self, folder: Path, **values: Any) -> None:
        self.path = folder / "results.json"
        self.on = True  # only one process of a run writes
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
        results.values = json.loads(results.path.read_text(encoding="utf-8"))
        return results

    def resume(self) -> None:
        """Take up what an interrupted run had obtained in the same folder; its environment is this one's."""
        if self.path.is_file():
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            now = {k: v for k, v in self.values.items() if k not in ("metrics", "counts", "test_reads")}
            self.values = {k: v for k, v in earlier.items() if k not in ("stopped", "error")} | now

    def has(self, prefix: str) -> bool:
        """Whether a metric with this prefix was obtained."""
        return any(name.startswith(prefix) for name in self.values["metrics"])

    def update(self, **values: Any) -> None:
        """Set values, merging dictionaries, and write the file."""
        for name, value in values.items():
            old = self.values.get(name)
            self.values[name] = (
                {**old, **value} if isinstance(old, dict) and isinstance(value, Mapping) else value
            )
        if self.on:
            write_json(self.path, self.values)


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


def write_predictions(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def config_hash(config: Mapping[str, Any]) -> str:
    """Return a hash of what determines a result: the configuration without names, places, and what is kept."""
    kept = {k: v for k, v in config.items() if k not in ("name", "resume", "logger", "kept")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Return versions, git commit of the code, and the machine in words."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    device = (
        torch.cuda.get_device_name(0)
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return {"versions": versions, "git_commit": git_commit(), "device": device, "started": now()}


def git_commit() -> str | None:
    """Return the commit of this source tree, with ``+changes`` where it differs; None outside git."""
    here = Path(__file__).parent
    run = ["git", "-C", str(here)]
    try:
        commit = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run(
            [*run, "status", "--porcelain", "."], capture_output=True, text=True, timeout=10
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def begin_peak_memory() -> None:
    """Let the peaks count from here: a process may have run others before, as a multirun does."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    _Process.runs += 1
    try:
        CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident set size, of this process alone
    except OSError:  # another system than Linux, or one that forbids it
        _Process.alone = _Process.runs == 1
    else:
        _Process.alone = True


def peak_memory_bytes() -> int | None:
    """Return the peak memory of a run: of the GPU where one is used, else of the process.

    Returns:
        None where the process cannot tell it from the peak of the runs before.
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if not _Process.alone:
        return None
    if STATUS.is_file():
        found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_reserved_bytes() -> int | None:
    """Return the most memory that torch held on the GPU so far, used or not; None without a GPU."""
    return torch.cuda.max_memory_reserved() or None if torch.cuda.is_available() else None


def now() -> str:
    """Return the time in ISO 8601, UTC, in seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
