"""Clean up what Lightning's ``ddp`` leaves in a process: a process group, and rank variables in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed

# Variables that Lightning's launcher sets, and later reads as a sign that the ranks already exist.
RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def leaving_no_ranks() -> Iterator[None]:
    """Destroy the process group on exit; variables set from outside (torchrun, a cluster) keep their values."""
    environment = {name: os.environ.get(name) for name in RANK_VARIABLES}
    try:
        yield
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
