"""Evaluate a model on one split, and return what was found."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger

from .module import FinetuningModule


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

    Args:
        metrics: ``test/<task>/<measure>`` and the like -> value; under ``base/`` for the frozen base.
        counts: name of a metric -> ``total`` rows, ``correct`` of them, ``missing``, ``interval``.
        predictions: one dictionary for each row, of all processes.
        seconds: it took.
    """

    metrics: dict[str, float]
    counts: dict[str, dict[str, Any]]
    predictions: list[dict[str, Any]]
    seconds: float


def evaluate(
    trainer: Trainer, module: FinetuningModule, data: LightningDataModule, split: str, prefix: str = ""
) -> Evaluation:
    """Evaluate the model as it is.

    Args:
        trainer: any; its loggers are written to, but by a validation after training: it is that of the checkpoint
            that counts, and no further point of the curve of validations in training.
        module: holds the model.
        data: holds the rows.
        split: ``validation`` or ``test``.
        prefix: of the names of metrics: ``base/`` while the frozen base is evaluated.
    """
    start = time.perf_counter()
    run = {"validation": trainer.validate, "test": trainer.test}[split]
    after_training = split == "validation" and trainer.global_step > 0
    with module.named(prefix), _without_loggers(trainer) if after_training else nullcontext():
        run(module, data, verbose=False)
    names = (f"{prefix}val/", f"{prefix}test/")
    return Evaluation(
        metrics={k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(names)},
        counts=module.counts,
        predictions=_of_all_processes(trainer, module.predictions),
        seconds=time.perf_counter() - start,
    )


@contextmanager
def _without_loggers(trainer: Trainer) -> Iterator[None]:
    loggers = trainer.loggers
    trainer.logger = DummyLogger()  # callbacks may write to it
    try:
        yield
    finally:
        trainer.loggers = loggers


def _of_all_processes(trainer: Trainer, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if trainer.world_size == 1:
        return rows
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
