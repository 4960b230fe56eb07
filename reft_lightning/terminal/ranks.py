"""Which of the processes of a run this is, and how many were started."""

from __future__ import annotations

import os
from collections.abc import Mapping

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # environment variables with the rank of a process
SHELL = "4294967290"  # the step of a shell that salloc opens on a node: a single process, whatever the job's tasks


def is_first_process() -> bool:
    """Whether this process is the first or the only one of a run."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def in_srun() -> bool:
    """Whether SLURM's srun started this process. A batch script is told its job's tasks too, but belongs to no step."""
    return os.environ.get("SLURM_STEP_ID", SHELL) != SHELL


def srun_tasks() -> int:
    """Return the number of processes that srun started for this command; 1 without srun."""
    return int(os.environ.get("SLURM_NTASKS", "1")) if in_srun() else 1


def single_process(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what tells the processes that srun started from each other."""
    return {k: v for k, v in environment.items() if k not in ("SLURM_STEP_ID", "SLURM_PROCID")}


def started_ranks() -> int:
    """Return the number of processes that torchrun or srun started for this command."""
    return int(os.environ.get("WORLD_SIZE") or srun_tasks())
