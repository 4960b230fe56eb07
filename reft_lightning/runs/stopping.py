"""How a run ends that was told to stop: with the status of the signal, after what it had is written down."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
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


class StopTogether(Callback):
    """Let several ranks end together, before the next batch, when one of them is told to stop.

    Lightning broadcasts from within its signal handler, and waits for ever where another rank is in an operation of
    all ranks, such as the sum of gradients. Here the handler only notes the signal.
    """

    def __init__(self) -> None:
        self.told = False

    def _listen(self, trainer: Trainer) -> None:
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)  # Lightning restores the earlier one after its loop

    def _note(self, number: int, frame: Any) -> None:
        self.told = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self._listen(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self._listen(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self._listen(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End here: the last batch is complete, and its state noted."""
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self.told, all=False):
            raise SIGTERMException


def check_told_to_stop(trainer: Trainer) -> None:
    """Raise :class:`Terminated` where SIGTERM came too late for the loop that has just ended."""
    callbacks = cast(Any, trainer).callbacks
    noted = any(isinstance(callback, StopTogether) and callback.told for callback in callbacks)
    if trainer.strategy.reduce_boolean_decision(trainer.received_sigterm or noted, all=False):
        raise Terminated


def signal_of(error: BaseException) -> signal.Signals | None:
    """Return the signal that ended a run; None where something else did."""
    if isinstance(error, Terminated | SIGTERMException):
        return signal.SIGTERM
    # Lightning turns Ctrl-C into SystemExit(1)
    interrupted = error.__context__ if isinstance(error, SystemExit) else error
    return signal.SIGINT if isinstance(interrupted, KeyboardInterrupt) else None
