"""Run a job of a sweep in its own process.

Lightning's ``ddp`` starts the other ranks by running this process's command line again, which is the whole sweep, and
watches them in a thread that outlives the job: if a rank of one job has failed, it kills the process, and with it the
sweep, during the next job. A process that runs a single job avoids both. Each job of a launcher has its own process
too: if something kills it, the launcher's process, which waits for it, can report that.

A cluster that ends a job early sends USR2 to all its processes, and submitit's handler, in the waiting process,
requeues the job. The run is first stopped as by SIGTERM, and only then is that handler called: when the job restarts,
its run continues from the checkpoint that it wrote.
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
from ..terminal.ranks import srun_tasks
from .results import RESULTS, Results
from .sweep import Job

# Overrides that choose how jobs start or where they write; they belong to the sweep, not to the job.
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
LOG = "log.txt"  # output of the process of a launcher's job
PATIENCE = 30  # seconds that a job has to save its state after it was told to stop
LOOKING = 2  # seconds between two looks at whether another rank has failed


def in_sweep() -> bool:
    """Whether this is a job of a sweep."""
    return not OmegaConf.is_missing(HydraConfig.get().job, "num")


def ranks_of(devices: Any, num_nodes: int) -> int | None:
    """Return the number of processes of a run; None if it depends on the machine's devices (auto, -1)."""
    if isinstance(devices, str) and devices.isdecimal():
        devices = int(devices)
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        devices = len(devices)
    return devices * num_nodes if isinstance(devices, int) and devices > 0 else None


def needs_own_process(devices: Any, num_nodes: int) -> bool:
    """Whether a job of a sweep starts ranks itself: it uses several devices, and no cluster has started them."""
    one = ranks_of(devices, num_nodes) == 1
    return not one and "LOCAL_RANK" not in os.environ and "WORLD_SIZE" not in os.environ


def job_arguments(argv: Sequence[str]) -> list[str]:
    """Return the arguments that run the current Hydra job, and only it.

    Flags of this process that locate configurations are kept.
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
    """Run the current Hydra job in its own process; return the contents of its ``results.json``.

    Raises:
        CompactHydraException: if it fails; its results then say how, and the other jobs of the sweep continue.
    """
    own = [run_dir(folder), "hydra.output_subdir=null", "hydra.mode=RUN"]
    if job.requeued or os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        own.append("resume=auto")
    said = (folder / LOG).open("ab") if job.elsewhere else None
    failed = _mark_of_failure(folder)
    requeue = signal.getsignal(signal.SIGUSR2)
    command = [sys.executable, "-m", "reft_lightning.cli", *job_arguments(sys.argv[1:]), *own]
    environment = os.environ | {SWEPT: ",".join(swept())}
    with said or nullcontext(), _passed_on(partial(
        subprocess.Popen, command, env=environment, stdout=said, stderr=subprocess.STDOUT if said else None,
        preexec_fn=_as_a_job, cwd=HydraConfig.get().runtime.cwd,  # which a job may have left
    )) as (process, told):  # fmt: skip
        another_failed = _wait(process, failed)
    code = process.returncode
    if code and failed and not told:
        failed.touch()
    ending = "another rank failed" if another_failed else f"exit status {code}"
    results = Results.read(folder) if (folder / RESULTS).is_file() else None
    # it was killed, unless another process is working on it
    if code and results is not None and results.values["status"] == "running" and hold_folder(folder):
        results.update(status="stopped", error=ending, stopped=now())
        release_folder(folder)
    if code and signal.SIGUSR2 in told and callable(requeue):
        job.requeued = True  # pickled with the job
        requeue(signal.SIGUSR2, None)  # exits, in the first of the job's processes
        time.sleep(PATIENCE)  # until the cluster ends the others
    if signal.SIGTERM in told or (told and code):
        raise SystemExit(128 + signal.SIGTERM)
    if code or results is None:
        where = folder / LOG if said else f"above, and in {folder}"
        how = "because another rank failed" if another_failed else f"with exit status {code}"
        raise CompactHydraException(f"the run ended {how}; for its output, see {where}")
    return results.values


def _mark_of_failure(folder: Path) -> Path | None:
    """Return the file by which a rank that srun started tells the others that it has failed; None for a single one."""
    if srun_tasks() == 1:
        return None
    attempt = (os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    return folder / f".failed_{'_'.join(attempt)}"


def _wait(process: subprocess.Popen[bytes], failed: Path | None) -> bool:
    """Wait until a process ends, or another rank has failed, for which torch waits half an hour; whether one has."""
    while failed is None or not failed.exists():
        with suppress(subprocess.TimeoutExpired):
            process.wait(None if failed is None else LOOKING)
            return False
    return True


def _as_a_job() -> None:
    """Leave a cluster's USR2 to the waiting process, and get SIGTERM when that process dies, even by kill -9."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextmanager
def _passed_on(
    start: Callable[[], subprocess.Popen[bytes]],
) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """Start a process, pass stop signals on to it, and end it on exit; yield it and the signals received."""
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
