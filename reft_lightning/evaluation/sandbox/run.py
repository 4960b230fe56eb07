"""Run generated programs in a sandbox: does a program run to its last line, including its tests?

Each program gets its own process (a fresh interpreter without site-packages, with a scrubbed environment), its own
session, which is killed as a whole, and a temporary folder, which is removed afterwards. It has no input, output or
network, and limits on time, memory, files and processes; `confinement.py` explains how.

What this does not cover:

- The limits on writing, network and processes are enforced by the kernel if it has Landlock and seccomp (Linux on
  x86_64 and arm64, except in containers that forbid them; a warning is logged if a guard is missing). Otherwise they
  are enforced only by Python's audit hook, which is not a security boundary against a malicious program: it can be
  evaded, it does not see native code, and Python does not report everything to it (`os.mkfifo`, `os.setpriority` and
  `os.sched_setaffinity` on the evaluator, in some versions threads).
- A program can read every file that this user can read, and see everything that `/proc` shows. It cannot send data
  anywhere, but still run programs only where nothing is secret.
- Not every change to files counts as writing: with the hook evaded, a program can change the modes and times of files
  that this user owns.
- Memory is limited per process (there is only one), and disk use by the size and number of files it creates. With the
  hook evaded, files are counted every 0.1 s: a program can create more in between, but is then killed.
- The processor is not reserved: programs share it with everything else that runs.
- pass@k is not safe against adversarial training. A program that tries to cheat can pass falsely in about ten lines: it
  reads the token from the inherited descriptor and writes the report itself, or returns an `int` subclass whose
  `__eq__` is always true. Exiting early and printing are detected, but not a program written to cheat: use this to
  measure models, never as a reward in reinforcement learning.
- Flaws of the kernel and of the interpreter.

For programs from a model that you do not trust, run the whole evaluation in a container or virtual machine without
network, as an unprivileged user; this sandbox is then an additional layer.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

STARTING_SECONDS = 60.0  # for the interpreter to start on a busy machine, not counted for the program
COUNT_SECONDS = 0.1  # interval between counts of the files in the program's folder
REPORT_BYTES = 4096
GUARDS = ("landlock", "seccomp")


class Outcome(NamedTuple):
    """The outcome of running a program.

    Args:
        passed: whether it ran to its last line.
        reason: `"passed"`, or in one line why it did not.
    """

    passed: bool
    reason: str


@dataclass(frozen=True)
class Limits:
    """The resources that one program may use.

    Args:
        seconds: processor time, rounded up to whole seconds, so that the result hardly depends on the machine's load.
            3 is the timeout of the published HumanEval scorer, which measures wall-clock time.
        wall_seconds: wall-clock time, for programs that wait.
        memory_bytes: address space, including the interpreter.
        file_bytes: maximum size of a file.
        files: maximum number of files and folders that it may create or open for writing.
    """

    seconds: float = 3.0
    wall_seconds: float = 12.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 22
    files: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive; got {value}")


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Run a program in the sandbox.

    It passes if it runs to its end. It fails on an exception, a refused action, `sys.exit(0)` or `os._exit(0)` before
    the end, a crash, or when it reaches a limit. Its output is discarded. Its module is called `program`, so a block
    under `if __name__ == "__main__"` is not run.

    Args:
        source: Python source code with its tests at the end.
        limits: resource limits; None for the defaults of :class:`Limits`.

    Raises:
        RuntimeError: if the sandbox itself does not start; includes its report.
        OSError: on systems without POSIX limits.
    """
    if os.name != "posix":
        raise OSError(
            f"the sandbox needs POSIX resource limits, which {sys.platform} does not have: use Linux or a container"
        )
    limits = limits or Limits()
    folder = tempfile.TemporaryDirectory(prefix="reft-program-")
    try:
        return _run_in(os.path.realpath(folder.name), source, limits)
    finally:
        try:
            folder.cleanup()
        except OSError as error:  # a program's files must not end the evaluation
            log.warning("%s could not be removed: %s", folder.name, error)


def run_programs(sources: Sequence[str]) -> list[Outcome]:
    """Run programs in parallel, identical ones only once, and return their outcomes in the given order.

    At most as many run at a time as this process has processors in its share, and never more than 8.
    """
    distinct = list(dict.fromkeys(sources))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine
    share = (os.cpu_count() or 1) // ranks
    with ThreadPoolExecutor(max(1, min(8, share))) as pool:
        outcomes = dict(zip(distinct, pool.map(run_program, distinct), strict=True))
    return [outcomes[source] for source in sources]


def _run_in(folder: str, source: str, limits: Limits) -> Outcome:
    # what cannot be encoded (an unpaired surrogate) becomes "?", because no program needs it
    Path(folder, "program.py").write_bytes(source.encode("utf-8", "replace"))
    token = secrets.token_hex(16)
    token_read, token_write = os.pipe()
    report_read, report_write = os.pipe()
    with os.fdopen(report_read, "rb", buffering=0) as report:
        try:
            os.write(token_write, token.encode())
            process = _start(folder, limits, report_write, token_read)
        finally:
            for descriptor in (token_read, token_write, report_write):
                os.close(descriptor)
        try:
            lines, ended = _listen(report.fileno(), folder, limits)
        finally:
            # before waiting for the process, while its id cannot belong to another session
            with contextlib.suppress(ProcessLookupError, PermissionError):  # the whole session has ended
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    if not lines or not lines[0].startswith("ready"):
        reported = (
            lines[0] if lines else f"it exited with code {code}" if ended else "it was not ready in time"
        )
        raise RuntimeError(f"the sandbox for generated programs did not start: {reported}")
    _warn_of_missing(tuple(name for name in GUARDS if name not in lines[0].split()))
    if _holds_more_than(limits.files, folder):
        return Outcome(False, f"created more than {limits.files} files")
    verdict, _, rest = lines[1].partition(" ") if len(lines) > 1 else ("", "", "")
    if verdict == "passed" and secrets.compare_digest(rest.encode(), token.encode()):
        return Outcome(True, "passed")
    if verdict == "failed":
        return Outcome(False, rest)
    if code == -signal.SIGXCPU:
        return Outcome(False, f"used more than {limits.seconds:g} s of processor time")
    if not ended:
        return Outcome(False, f"ran longer than {limits.wall_seconds:g} s")
    if code < 0:
        return Outcome(False, f"killed by {signal.Signals(-code).name}")
    return Outcome(False, f"exited with code {code} before its end")


def _start(folder: str, limits: Limits, report: int, token: int) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("confinement.py")
    settings = (limits.seconds, limits.memory_bytes, limits.file_bytes, limits.files)
    return subprocess.Popen(
        # no user or installed packages, the script's folder not on the path, no bytecode written
        [sys.executable, "-s", "-S", "-P", "-B", str(script), folder, *map(str, (report, token, *settings))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        # a fixed hash seed, so that a program that depends on the order of a set always has the same outcome
        env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
        pass_fds=(report, token),
        start_new_session=True,
    )


def _holds_more_than(files: int, folder: str) -> bool:
    """Return whether a program created more files and folders than allowed, not counting `program.py`."""
    made = (name for _, folders, names in os.walk(folder) for name in (*folders, *names))
    return sum(1 for _ in itertools.islice(made, files + 2)) > files + 1


def _listen(report: int, folder: str, limits: Limits) -> tuple[list[str], bool]:
    """Return the lines of a report until it ends or a limit on time or files is reached, and whether it ended."""
    poll = select.poll()
    poll.register(report, select.POLLIN)
    text = b""
    end = time.monotonic() + STARTING_SECONDS
    while len(text) < REPORT_BYTES:
        left = end - time.monotonic()
        if left <= 0 or _holds_more_than(limits.files, folder):
            return text.decode("utf-8", "replace").splitlines(), False
        if not poll.poll(1000 * min(left, COUNT_SECONDS)):
            continue
        piece = os.read(report, REPORT_BYTES)
        if not piece:
            break
        if b"\n" not in text and b"\n" in text + piece:  # ready, so the program's own time begins
            end = time.monotonic() + limits.wall_seconds
        text += piece
    return text.decode("utf-8", "replace").splitlines(), True


@functools.cache
def _warn_of_missing(guards: tuple[str, ...]) -> None:
    if guards:
        log.warning(
            "this system does not have %s, so generated programs are confined by Python's audit hook instead, which a "
            "malicious program can evade; run the evaluation in a container without network",
            " or ".join(guards),
        )
