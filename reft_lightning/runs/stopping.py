"""End a run that was told to stop: save its state, then exit with the status of the signal."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

# Messages of the operating system, gloo and NCCL; safetensors and torch raise their own errors with these words.
DISK = ("No space left on device", "Disk quota exceeded", "Read-only file system")
RANK = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL error",
    "Socket Timeout",
)
# The module that fetches a batch from a data-loading process: if that has died, it raises any kind of connection error.
WORKERS_TENSORS = "multiprocessing.resource_sharer"


class Terminated(SystemExit):
    """SIGTERM arrived while none of Lightning's loops was running."""


@contextmanager
def until_sigterm(trainer: Trainer) -> Iterator[None]:
    """Raise :class:`Terminated` inside the block on SIGTERM; one of Lightning's loops ends after its batch instead."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return

    def stop(number: int, frame: Any) -> None:
        if not trainer.received_sigterm:  # its loops also call this handler
            raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopTogether(Callback):
    """End all ranks together, before the next batch, when one of them is told to stop.

    Lightning broadcasts from within its signal handler, and hangs if another rank is in a collective operation such as
    the gradient all-reduce. Here the handler only notes the signal.
    """

    def __init__(self) -> None:
        self.told = False

    def _listen(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)  # Lightning restores the earlier handler after its loop

    def _note(self, number: int, frame: Any) -> None:
        self.told = True

    on_train_start = on_validation_start = on_test_start = _listen

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if told to: the last batch is complete, and its state recorded."""
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self.told, all=False):
            raise SIGTERMException


def check_told_to_stop(trainer: Trainer) -> None:
    """Raise :class:`Terminated` if SIGTERM arrived too late for the loop that has just ended."""
    if trainer.strategy.reduce_boolean_decision(_told_to_stop(trainer), all=False):
        raise Terminated


def _told_to_stop(trainer: Trainer) -> bool:
    callbacks = cast(Any, trainer).callbacks
    noted = any(isinstance(callback, StopTogether) and callback.told for callback in callbacks)
    return trainer.received_sigterm or noted


def trouble_of(error: BaseException, loaded: bool = True) -> str | None:
    """Describe in one line what stopped a run, if not a bug: memory, disk, non-finite numbers, a dead process.

    Args:
        error: what stopped it.
        loaded: whether its model had been loaded.

    Returns:
        None for any other error, whose traceback is needed.
    """
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, FloatingPointError):
        return said
    if isinstance(error, torch.linalg.LinAlgError):  # pyright: ignore[reportPrivateImportUsage]
        return f"numbers are no longer finite ({said}): lower optimizer.lr"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in said:
        smaller = "model.dtype=bfloat16 or quantization=nf4 makes the base model smaller"
        less = "lower data.batch_size, and raise trainer.accumulate_grad_batches to compensate"
        return f"out of memory ({said}): {less if loaded else smaller}"
    if any(words in str(error) for words in DISK):
        return f"cannot write to disk ({said}): free some space, then resume"
    if _of_a_dead_worker(error):
        return f"a data-loading process died ({said}): data.num_workers=0 starts none"
    if type(error).__module__.startswith("wandb."):
        return f"W&B cannot be used ({said}): with WANDB_MODE=offline it logs to this machine"
    if isinstance(error, RuntimeError) and any(words in str(error) for words in RANK):
        return f"another process of this run died or cannot be reached ({said})"
    return None


def _of_a_dead_worker(error: BaseException) -> bool:
    return "DataLoader worker" in str(error) or _came_through(error, WORKERS_TENSORS)


def _came_through(error: BaseException, module: str) -> bool:
    return any(
        frame.f_globals.get("__name__") == module for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def signal_of(error: BaseException, trainer: Trainer) -> signal.Signals | None:
    """Return the signal that ended a run; None if something else did.

    A cluster sends SIGTERM to all processes of a job. The death of a data-loading process is then often seen first.
    """
    if isinstance(error, Terminated | SIGTERMException):
        return signal.SIGTERM
    if _of_a_dead_worker(error) and _told_to_stop(trainer):
        return signal.SIGTERM
    # Lightning turns Ctrl-C into SystemExit(1)
    interrupted = error.__context__ if isinstance(error, SystemExit) else error
    return signal.SIGINT if isinstance(interrupted, KeyboardInterrupt) else None
