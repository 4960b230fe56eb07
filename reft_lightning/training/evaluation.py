"""Evaluate a model on one split, and return the results."""

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
    """The results of one evaluation.

    Args:
        metrics: metric name such as ``test/<task>/<measure>`` -> value; the prefix is ``base/`` for the frozen base.
        counts: metric name -> ``total`` rows, ``correct`` rows, ``missing`` answers, ``interval``.
        predictions: one dictionary per row, from all processes.
        seconds: duration.
    """

    metrics: dict[str, float]
    counts: dict[str, dict[str, Any]]
    predictions: list[dict[str, Any]]
    seconds: float


def evaluate(
    trainer: Trainer, module: FinetuningModule, data: LightningDataModule, split: str, prefix: str = ""
) -> Evaluation:
    """Evaluate the model in its current state on ``validation`` or ``test``.

    The trainer's loggers are used, except for a validation after training, which evaluates the selected checkpoint and
    is not another point on the validation curve. Metric names begin with ``prefix``, ``base/`` for the frozen base.
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
