"""Processes that do not outlive the one that started them, and locks that do not outlive their holders.

A trial runs in a process of its own: what kills it, such as the want of memory, does not kill the study. Its
standard input is a pipe from the process that started it; when that one dies, of whatever cause, the pipe ends, and
with it the trial. A lock is held by a worker and by the trial that it started, so that a trial counts as running
until both are gone.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

LAST_LINES = 20  # of a log, kept with a trial that failed


class Lock:
    """An advisory lock on a file: it ends with the processes that hold it, however they end.

    Args:
        path: of the lock file; it is created, and stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor: int | None = None

    def acquire(self, wait: bool = True) -> bool:
        """Take the lock; return whether it was free, where there is no waiting."""
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
        """Give it back; a process that inherited it holds it still."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def start(
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    directory: Path | None = None,
    lock: Lock | None = None,
) -> subprocess.Popen[bytes]:
    """Start ``python -m ARGUMENTS``, bound to this process's life.

    Args:
        arguments: the module and its arguments; the module calls :func:`end_with_parent`.
        log: takes what it writes.
        environment: variables beside this process's.
        directory: where it runs.
        lock: held by it as well.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments], stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, **environment}, cwd=directory,
            pass_fds=() if lock is None or lock.descriptor is None else (lock.descriptor,),
            start_new_session=True,  # Ctrl-C is for the process that was typed; it ends the others
        )  # fmt: skip


def stop(process: subprocess.Popen[bytes], patience: float = 10) -> None:
    """End a process of :func:`start`, and wait for it."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_with_parent(ending: int = signal.SIGKILL) -> None:
    """Watch the pipe from the process that started this one; when it ends, so does this.

    Args:
        ending: the signal that this process sends itself; SIGTERM leaves time to end others.
    """

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), ending)

    threading.Thread(target=watch, daemon=True, name="end_with_parent").start()


def last_lines(log: Path) -> str:
    """Return the end of a log."""
    if not log.is_file():
        return ""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])


def said_of(code: int) -> str:
    """Say how a process ended."""
    if code >= 0:
        return f"exit status {code}"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else str(-code)
    return f"killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
