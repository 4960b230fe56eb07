"""A job of a sweep as a process of its own.

Lightning's ``ddp`` starts the other ranks by running this process's command line again, which is the whole sweep, and
watches them in a thread that outlives the job: where a rank of one job has failed, it kills the process, and so the
sweep, during the next. A process that runs only this job has neither fault.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from ..config.compose import flags_of
from ..storage.atomic import now
from .results import Results
from .run_folder import RESULTS

# Overrides that choose how jobs are started or where they write: the sweep's, not the job's.
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
PATIENCE = 30  # seconds in which a job that was told to stop may write down what it has


def in_sweep() -> bool:
    """Whether this is a job of a sweep."""
    return not OmegaConf.is_missing(HydraConfig.get().job, "num")


def needs_own_process(devices: Any, num_nodes: int) -> bool:
    """Whether a job of a sweep starts ranks: it asks for several devices, and no cluster has started them."""
    one = devices in (1, "1") or (
        isinstance(devices, Sequence) and not isinstance(devices, str) and len(devices) == 1
    )
    return not (one and num_nodes == 1) and "LOCAL_RANK" not in os.environ and "WORLD_SIZE" not in os.environ


def job_arguments(argv: Sequence[str]) -> list[str]:
    """Return the command-line arguments that run the present Hydra job, and only it.

    Args:
        argv: the arguments of this process; of them only those that say where configurations lie are kept.
    """
    arguments = flags_of(argv)
    kept: list[str] = []
    for flag in ("config_path", "config_name", "config_dir"):
        value = getattr(arguments, flag)
        if value is not None:
            kept += [f"--{flag.replace('_', '-')}", value]
    overrides = HydraConfig.get().overrides
    hydra = [text for text in overrides.hydra if not text.lstrip("+~").startswith(LAUNCHING)]
    return [*kept, *overrides.task, *hydra]


def run_in_own_process(folder: Path) -> dict[str, Any]:
    """Run the present Hydra job in a process of its own; return the contents of its ``results.json``.

    Raises:
        RuntimeError: if it fails; its results then say how, and the other jobs of the sweep go on.
    """
    place = str(folder).replace("'", r"\'")
    own = [f"hydra.run.dir='{place}'", "hydra.output_subdir=null", "hydra.mode=RUN"]
    process = subprocess.Popen(
        [sys.executable, "-m", "reft_lightning.cli", *job_arguments(sys.argv[1:]), *own],
        preexec_fn=_stop_with_parent if sys.platform == "linux" else None,
    )
    with _passed_on(process) as told:
        code = process.wait()
    results = Results.read(folder) if (folder / RESULTS).is_file() else None
    if code and results is not None and results.values["status"] == "running":  # killed
        results.update(status="stopped", error=f"exit status {code}", stopped=now())
    if told:
        raise SystemExit(128 + signal.SIGTERM)
    if code or results is None:
        raise RuntimeError(
            f"the run ended with exit status {code}; what it said stands above, and in {folder}"
        )
    return results.values


def _stop_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when the sweep dies, by kill -9 too: prctl(PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Pass SIGTERM on to a process inside the block, and leave none behind; gives the signals that came."""
    told: list[int] = []

    def stop(number: int, frame: Any) -> None:
        told.append(number)
        process.send_signal(number)

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield told
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
        for end in (lambda: None, process.terminate, process.kill):  # Ctrl-C has reached both
            end()
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
                break
