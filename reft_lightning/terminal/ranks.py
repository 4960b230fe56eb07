"""Which of the processes of a run this is, and how many were started."""

from __future__ import annotations

import os

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # environment variables with the rank of a process
SHELL = "4294967290"  # the step of a shell that salloc opens on a node: a single process, whatever the job's tasks


def is_first_process() -> bool:
    """Whether this process is the first or the only one of a run."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def in_srun() -> bool:
    """Whether SLURM's srun started this process. A batch script is told its job's tasks too, but belongs to no step."""
    return os.environ.get("SLURM_STEP_ID", SHELL) != SHELL


def started_ranks() -> int:
    """Return the number of processes that torchrun or srun started for this command."""
    tasks = os.environ.get("SLURM_NTASKS") if in_srun() else None
    return int(os.environ.get("WORLD_SIZE") or tasks or 1)
