"""A job of a sweep as a process of its own.

Lightning's ``ddp`` starts the other ranks by running this process's command line again, which is the whole sweep, and
watches them in a thread that outlives the job: where a rank of one job has failed, it kills the process, and so the
sweep, during the next. A process that runs only this job has neither fault. The jobs of a launcher have one each, too:
what kills it leaves the launcher's process, which waits for it, to say so.

A cluster that ends a job early sends USR2 to all its processes, and submitit's handler, in the process that waits, has
the job queued again. The run is told to stop as by SIGTERM, and only then is that handler called: when the job comes
back, its run goes on from the checkpoint that it wrote.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from ..config.compose import SWEPT, flags_of, run_dir, swept
from ..storage.atomic import hold_folder, now, release_folder
from .results import Results
from .run_folder import RESULTS
from .sweep import Job

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
    "launcher=",
)
LOG = "log.txt"  # what the process of a launcher's job says
PATIENCE = 30  # seconds in which a job that was told to stop may write down what it has


def in_sweep() -> bool:
    """Whether this is a job of a sweep."""
    return not OmegaConf.is_missing(HydraConfig.get().job, "num")


def ranks_of(devices: Any, num_nodes: int) -> int | None:
    """Return how many processes a run has; None where only its machine knows how many devices there are (auto, -1)."""
    if isinstance(devices, str) and devices.isdecimal():
        devices = int(devices)
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        devices = len(devices)
    return devices * num_nodes if isinstance(devices, int) and devices > 0 else None


def needs_own_process(devices: Any, num_nodes: int) -> bool:
    """Whether a job of a sweep starts ranks: it asks for several devices, and no cluster has started them."""
    one = ranks_of(devices, num_nodes) == 1
    return not one and "LOCAL_RANK" not in os.environ and "WORLD_SIZE" not in os.environ


def job_arguments(argv: Sequence[str]) -> list[str]:
    """Return the arguments that run the present Hydra job, and only it.

    Of this process's own, those are kept that say where configurations lie.
    """
    arguments = flags_of(argv)
    kept: list[str] = []
    for flag in ("config_path", "config_name", "config_dir"):
        value = getattr(arguments, flag)
        if value is not None:
            kept += [f"--{flag.replace('_', '-')}", value]
    overrides = HydraConfig.get().overrides
    given = [*overrides.task, *overrides.hydra]
    return [*kept, *(text for text in given if not text.lstrip("+~").startswith(LAUNCHING))]


def run_in_own_process(folder: Path, job: Job) -> dict[str, Any]:
    """Run the present Hydra job in a process of its own; return the contents of its ``results.json``.

    Raises:
        RuntimeError: if it fails; its results then say how, and the other jobs of the sweep go on.
    """
    own = [run_dir(folder), "hydra.output_subdir=null", "hydra.mode=RUN"]
    if job.requeued or os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        own.append("resume=auto")
    said = (folder / LOG).open("ab") if job.elsewhere else None
    requeue = signal.getsignal(signal.SIGUSR2)
    command = [sys.executable, "-m", "reft_lightning.cli", *job_arguments(sys.argv[1:]), *own]
    environment = os.environ | {SWEPT: ",".join(swept())}
    with said or nullcontext(), _passed_on(partial(
        subprocess.Popen, command, env=environment, stdout=said, stderr=subprocess.STDOUT if said else None,
        preexec_fn=_as_a_job, cwd=HydraConfig.get().runtime.cwd,  # which a job may have left
    )) as (process, told):  # fmt: skip
        code = process.wait()
    results = Results.read(folder) if (folder / RESULTS).is_file() else None
    # killed, if nobody else is at work on it
    if code and results is not None and results.values["status"] == "running" and hold_folder(folder):
        results.update(status="stopped", error=f"exit status {code}", stopped=now())
        release_folder(folder)
    if code and signal.SIGUSR2 in told and callable(requeue):
        job.requeued = True  # which is written down with the job
        requeue(signal.SIGUSR2, None)  # leaves, in the first of the job's processes
        time.sleep(PATIENCE)  # until the cluster ends the others
    if signal.SIGTERM in told or (told and code):
        raise SystemExit(128 + signal.SIGTERM)
    if code or results is None:
        where = folder / LOG if said else f"above, and in {folder}"
        raise CompactHydraException(f"the run ended with exit status {code}; what it said: {where}")
    return results.values


def _as_a_job() -> None:
    """Leave a cluster's USR2 to the process that waits, and be told to stop when that dies, also by kill -9."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextmanager
def _passed_on(
    start: Callable[[], subprocess.Popen[bytes]],
) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """Start a process, which is told to stop when this one is, and leave none behind; gives it and the signals."""
    process, told = None, []

    def stop(number: int, frame: Any) -> None:
        told.append(number)
        if process is not None:
            process.send_signal(signal.SIGTERM)

    main = threading.current_thread() is threading.main_thread()
    heard = [signal.SIGTERM, *([signal.SIGUSR2] if callable(signal.getsignal(signal.SIGUSR2)) else [])]
    before = {number: signal.signal(number, stop) for number in heard if main}
    try:
        process = start()
        if told:
            process.send_signal(signal.SIGTERM)
        yield process, told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process is not None:
            for end in (lambda: None, process.terminate, process.kill):  # Ctrl-C has reached both
                end()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE)
                    break
