"""Distributed training as one job of a Hydra sweep.

Lightning's ``ddp`` starts the other ranks by running this process's command line again. Under ``--multirun``
that is the whole sweep, so each rank would run every job, in a folder of its own; and what the first job
leaves behind (a process group, ranks and ports in the environment) keeps the second from starting one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict, read_write

# What Lightning's launcher writes into the environment, and reads as "the ranks exist already".
RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Overrides that choose how jobs are started or where they write: no business of a running job's other ranks.
LAUNCHING = (
    "hydra.mode",
    "hydra.run.",
    "hydra.sweep.",
    "hydra.sweeper",
    "hydra/sweeper",
    "hydra.launcher",
    "hydra/launcher",
    "hydra.job.name",
    "hydra.output_subdir",
)


@contextmanager
def single_job_ddp() -> Iterator[None]:
    """Make the ranks that Lightning starts inside the block run this job alone, then forget them.

    Inside a Hydra job the other ranks compose exactly this job's overrides, in mode RUN, into this job's
    folder, and write no second ``.hydra``. On leaving, the process group is destroyed and the environment is
    as it was: variables set from outside (torchrun, a cluster) stay. Outside Hydra only the second half
    happens.

    Lightning ends the process with ``SystemExit(1)`` after Ctrl-C in ``fit``: a sweep stops there as well.
    """
    environment = {name: os.environ.get(name) for name in RANK_VARIABLES}
    argv = list(sys.argv)
    run_dir: str | None = None
    in_hydra = HydraConfig.initialized()
    if in_hydra:
        sys.argv[1:] = job_arguments(argv[1:])
        run_dir = _set_run_dir(str(HydraConfig.get().runtime.output_dir))
    try:
        yield
    finally:
        sys.argv[:] = argv
        if in_hydra:
            _set_run_dir(run_dir)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def job_arguments(argv: Sequence[str]) -> list[str]:
    """Return the command-line arguments that run the present Hydra job, and only it.

    Args:
        argv: the arguments of this process; of them only those that say where configurations lie are kept.
    """
    arguments = get_args_parser().parse_args(list(argv))
    kept: list[str] = []
    for flag in ("config_path", "config_name", "config_dir"):
        value = getattr(arguments, flag)
        if value is not None:
            kept += [f"--{flag.replace('_', '-')}", value]
    overrides = HydraConfig.get().overrides
    hydra = [text for text in overrides.hydra if not text.lstrip("+~").startswith(LAUNCHING)]
    return [*kept, *overrides.task, *hydra, "hydra.mode=RUN"]


def _set_run_dir(value: str | None) -> str | None:
    """Set ``hydra.run.dir``, which Lightning hands to the other ranks; return what stood there, unresolved.

    In a sweep it is the folder of a run that never was; the job's own is ``hydra.runtime.output_dir``.
    """
    hydra: Any = HydraConfig.instance().cfg
    run: Any = hydra.hydra.run
    unresolved: Any = OmegaConf.to_container(run, resolve=False)
    before = unresolved["dir"]
    with read_write(run), open_dict(run):
        run.dir = value
    return before
