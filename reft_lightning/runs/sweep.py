"""A sweep: the state its jobs carry into a launcher's processes, and the summary at its end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..config import compose
from .results import RESULTS, read_results


class Job:
    """The function that Hydra calls for each job, in this process or in one that a launcher started.

    Args:
        train: called with the configuration of a job, and this object.
    """

    def __init__(self, train: Callable[[DictConfig, Job], Any]) -> None:
        self.train, self.arguments = train, sys.argv[1:]
        self.elsewhere = False  # whether this is a launcher's process, not that of the sweep
        self.requeued = False  # whether a cluster has stopped the job before and requeued it

    def __call__(self, config: DictConfig) -> Any:
        """Run the job."""
        return self.train(config, self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"swept": compose.swept()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        compose.register()
        compose.sweep_over(state.pop("swept"))
        self.__dict__ |= state | {"elsewhere": True}
        sys.argv[1:] = self.arguments


def say_what_came_out(folder: Path) -> None:
    """Print which jobs of a sweep are complete, the status of the others, and how to compare them."""
    jobs = sorted({path.parent for name in (RESULTS, ".hydra") for path in folder.glob(f"*/{name}")})
    found = {job: read_results(job) for job in jobs}
    missing = {job: values for job, values in found.items() if values.get("status") != "complete"}
    for job, values in missing.items():
        sys.stderr.write(
            f"{job.name}: {values.get('status', 'ended without results')}"
            f"{': ' if 'error' in values else ''}{values.get('error', '')}\n"
        )
    if complete := len(jobs) - len(missing):
        others = f", {len(missing)} of those that started are not" if missing else ""
        done = "1 job is complete" if complete == 1 else f"{complete} jobs are complete"
        sys.stdout.write(f"{done}{others}; to compare them: {shlex.join(['reft-report', str(folder)])}\n")
