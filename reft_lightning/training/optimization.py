"""Optimizer groups by role, and the learning-rate schedule."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..suggest import did_you_mean

log = logging.getLogger(__name__)


# The factor on the learning rate after the warm-up, by the part x of the remaining steps that is done.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "constant": lambda x: 1.0,
}


@dataclass(frozen=True)
class Optimization:
    """AdamW and a schedule with linear warm-up; the defaults are the paper's commonsense runs."""

    lr: float = 9e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: str = "linear"
    warmup_ratio: float = 0.1
    head_lr: float | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: for a value that cannot train.
        """
        if self.schedule not in SHAPES:
            hint = did_you_mean(self.schedule, SHAPES)
            raise ValueError(f"schedule must be one of {', '.join(SHAPES)}; got {self.schedule!r}{hint}")
        for name in ("lr", "head_lr"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0; got {value}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio, a part of all steps, must lie in 0..1; got {self.warmup_ratio}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be 0 or more; got {self.weight_decay}")


def parameter_groups(roles: dict[str, list[nn.Parameter]], settings: Optimization) -> list[dict[str, Any]]:
    """Return one AdamW group a role: decay acts on weights, of heads too, never on R or on biases.

    Decay of R's free parameter would only change its scale, on which R does not depend; under other
    parametrisations of R it destroys the model (torch's orthogonal map turns to exactly 0).
    """
    roles = dict(roles)
    heads = roles.pop("head", [])
    roles |= {"head": [p for p in heads if p.ndim > 1], "head_bias": [p for p in heads if p.ndim < 2]}
    decay = {"weight": settings.weight_decay, "head": settings.weight_decay}
    rates = dict.fromkeys(("head", "head_bias"), settings.head_lr or settings.lr)
    groups = [
        {
            "name": role,
            "params": parameters,
            "lr": rates.get(role, settings.lr),
            "weight_decay": decay.get(role, 0.0),
        }
        for role, parameters in roles.items()
        if parameters
    ]
    for group in groups:
        count = sum(p.numel() for p in group["params"])
        log.info("optimizer group %s: %s parameters, lr %g, weight decay %g",
                 group["name"], f"{count:,}", group["lr"], group["weight_decay"])  # fmt: skip
    return groups


def schedule_factor(settings: Optimization, total_steps: float) -> Callable[[int], float]:
    """Return the factor on the learning rate by step: 0 -> 1 over the warm-up, then the schedule to 0.

    Raises:
        ValueError: for a run without an end that needs one.
    """
    if math.isinf(total_steps):
        if settings.schedule != "constant" or settings.warmup_ratio:
            raise ValueError(
                f"the {settings.schedule} schedule with warmup_ratio={settings.warmup_ratio} needs the number "
                "of steps: set trainer.max_steps or trainer.max_epochs"
            )
        return lambda step: 1.0
    warmup = math.ceil(settings.warmup_ratio * total_steps)
    shape = SHAPES[settings.schedule]

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return shape(min(1.0, (step - warmup) / max(1, total_steps - warmup)))

    return factor
