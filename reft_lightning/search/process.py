"""Processes that end with their parent, and locks that end with their holders.

A trial runs in its own process, so an out-of-memory kill ends the trial, not the study. The standard input of that
process is a pipe from its worker: when the worker dies, for whatever reason, the pipe closes, and the trial ends.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from ..terminal.ranks import single_process

LAST_LINES = 20  # number of log lines kept with a failed trial


class Lock:
    """An advisory lock on a file; the kernel releases it when every process that holds it has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor: int | None = None

    def acquire(self, wait: bool = True) -> bool:
        """Acquire the lock; without wait, return False if it is taken."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return False
        self.descriptor = descriptor
        return True

    def release(self) -> None:
        """Release the lock; a process that inherited it still holds it."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def __enter__(self) -> Lock:
        if self.descriptor is None:
            self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def start(
    arguments: Sequence[str],
    log: Path,
    environment: dict[str, str] | None = None,
    directory: Path | None = None,
    lock: Lock | None = None,
) -> subprocess.Popen[bytes]:
    """Start ``python -m ARGUMENTS``, a module that calls :func:`end_with_parent`; the process inherits the lock."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            # -P: the directory where a study starts its runs may contain someone else's modules
            [sys.executable, "-P", "-m", *arguments], stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
            env={**single_process(os.environ), **(environment or {})}, cwd=directory,
            pass_fds=() if lock is None or lock.descriptor is None else (lock.descriptor,),
            start_new_session=True,  # Ctrl-C reaches the command, which ends the others
        )  # fmt: skip


def stop(process: subprocess.Popen[bytes], patience: float = 10) -> None:
    """End a process started by :func:`start`, and wait for it."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_with_parent(ending: int = signal.SIGKILL) -> None:
    """Send this process a signal when its parent closes the pipe or dies."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), ending)

    threading.Thread(target=watch, daemon=True, name="end_with_parent").start()


def failure(code: int, log: Path) -> str:
    """Return how a process ended, with the end of its log; empty for success."""
    if code == 0:
        return ""
    how = f"exit status {code}"
    if code < 0:
        how = f"killed by {signal.Signals(-code).name}" + " (out of memory?)" * (-code == signal.SIGKILL)
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return "\n".join([how, *text.splitlines()[-LAST_LINES:]])
