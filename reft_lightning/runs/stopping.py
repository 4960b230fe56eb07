"""How a run ends that was told to stop: with the status of the signal, after what it had is written down."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException


class Terminated(SystemExit):
    """SIGTERM came while none of Lightning's loops ran."""


@contextmanager
def until_sigterm(trainer: Trainer) -> Iterator[None]:
    """Raise :class:`Terminated` inside the block at SIGTERM; a loop of Lightning ends after its batch instead."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return

    def stop(number: int, frame: Any) -> None:
        if not trainer.received_sigterm:  # its loops call this handler, too
            raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_told_to_stop(trainer: Trainer) -> None:
    """Raise :class:`Terminated` where SIGTERM came too late for the loop that has just ended."""
    if trainer.received_sigterm:
        raise Terminated


def signal_of(error: BaseException) -> signal.Signals | None:
    """Return the signal that ended a run; None where something else did."""
    if isinstance(error, Terminated | SIGTERMException):
        return signal.SIGTERM
    # Lightning turns Ctrl-C into SystemExit(1)
    interrupted = error.__context__ if isinstance(error, SystemExit) else error
    return signal.SIGINT if isinstance(interrupted, KeyboardInterrupt) else None
