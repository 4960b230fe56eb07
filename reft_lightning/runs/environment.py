"""The machine, the versions and the memory of a run."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import re
import resource
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..storage.atomic import now

PACKAGES = (
    "reft_lightning", "torch", "lightning", "transformers", "peft", "datasets", "tokenizers", "hydra-core",
)  # fmt: skip
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class _Process:
    """What this process knows about its peak memory."""

    runs = 0  # number of runs started
    shared = False  # whether other runs are active at the same time
    alone = True  # whether the peak belongs to the last run only


def environment() -> dict[str, Any]:
    """Return versions, the code's git commit, and a description of the machine."""
    cpu = f"CPU, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else cpu
    return {**_code(), "device": device, "started": now()}


@cache
def _code() -> dict[str, Any]:
    """Return versions and commit, read once: later commits do not change the code that this process imported."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["torch"] = torch.__version__  # with the build (+cu130), which the package's metadata may lack
    return {"versions": versions, "git_commit": git_commit()}


def git_commit() -> str | None:
    """Return the commit of this source tree, with ``+changes`` if it has uncommitted ones; None outside git."""
    ask = ["git", "-C", str(Path(__file__).parent), "status", "--porcelain=v2", "--branch", "."]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=10).stdout
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    commit = re.match(r"# branch\.oid (\w+)", said)
    return commit and commit[1] + ("+changes" if re.search("^[^#]", said, re.MULTILINE) else "")


def begin_peak_memory(shared: bool = False) -> None:
    """Reset the peak-memory counters; ``shared`` means that other runs are active in this process."""
    _Process.shared = shared
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    _Process.runs, _Process.alone = _Process.runs + 1, True
    try:
        CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident set size of this process
    except OSError:  # not Linux, or not permitted
        _Process.alone = _Process.runs == 1


def peak_memory_bytes() -> int | None:
    """Return the peak memory of the GPU if one is used, else of the process; None if other runs share it."""
    if _Process.shared:
        return None
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
    """Return the most memory that torch reserved on the GPU; None without a GPU, or with several runs."""
    if _Process.shared:
        return None
    return torch.cuda.max_memory_reserved() or None if torch.cuda.is_available() else None
