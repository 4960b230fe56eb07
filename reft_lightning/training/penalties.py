"""Callbacks that change, during training, the weight of what interventions add to the loss (``train/penalty``)."""

from __future__ import annotations

import math
from typing import Any

from lightning import Callback


class PenaltySchedule(Callback):
    """Set the weight before each step; a subclass defines :meth:`weight`. Resuming goes on with it."""

    def weight(self, step: int, total: float) -> float:
        """Return the weight at a step of so many."""
        raise NotImplementedError(f"{type(self).__name__} must define weight(step, total)")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the weight of the model."""
        pl_module.model.penalty_weight = self.weight(trainer.global_step, pl_module.total_steps)


class LinearPenalty(PenaltySchedule):
    """From 0 at the first step to 1 at the end: ReFT-r1 (Wu et al. 2025, arXiv:2501.17148), in its code."""

    def weight(self, step: int, total: float) -> float:
        """Return step / total."""
        return step / total


class ExponentialPenalty(PenaltySchedule):
    r"""From ``start`` down, :math:`w = w_0 e^{-r t}`: one of the schedules of JoLA's code (Lai et al. 2025).

    Args:
        start: of the weight, at step 0.
        rate: r.
    """

    def __init__(self, start: float = 1.0, rate: float = 0.01) -> None:
        self.start, self.rate = start, rate

    def weight(self, step: int, total: float) -> float:
        """Return the weight at a step."""
        return self.start * math.exp(-self.rate * step)
