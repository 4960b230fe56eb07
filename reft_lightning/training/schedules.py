r"""Learning rate schedules: a linear warm-up, followed by a shape f.

.. math:: lr(t) = lr \cdot t / w \;(t < w), \qquad lr \cdot f\big((t - w) / (T - w)\big) \;(t \ge w)

t is the optimizer step, w the number of warm-up steps, and T the total number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def linear(optimizer: Optimizer, total_steps: int, warmup_steps: int = 0) -> LambdaLR:
    """Return the schedule with f(x) = 1 - x."""
    return LambdaLR(optimizer, warmed_up(lambda x: 1 - x, total_steps, warmup_steps))


def cosine(optimizer: Optimizer, total_steps: int, warmup_steps: int = 0) -> LambdaLR:
    """Return the schedule with f(x) = (1 + cos(pi x)) / 2."""
    return LambdaLR(
        optimizer, warmed_up(lambda x: 0.5 * (1 + math.cos(math.pi * x)), total_steps, warmup_steps)
    )


def constant(optimizer: Optimizer, warmup_steps: int = 0) -> LambdaLR:
    """Return the schedule with f(x) = 1, which does not need the total number of steps."""
    return LambdaLR(optimizer, warmed_up(lambda x: 1.0, math.inf, warmup_steps))


def warmed_up(
    shape: Callable[[float], float], total_steps: float, warmup_steps: int
) -> Callable[[int], float]:
    """Return the factor on the learning rate as a function of the step."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        return shape(min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return factor
