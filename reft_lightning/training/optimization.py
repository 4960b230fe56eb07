"""The optimizer, its parameter groups by role, and the learning rate scheduler."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..suggest import check_choice, did_you_mean
from .schedules import linear

log = logging.getLogger(__name__)

# The names of these two numbers in schedulers of torch, of transformers and in ours.
TOTAL_STEPS = ("total_steps", "num_training_steps", "T_max")
WARMUP_STEPS = ("warmup_steps", "num_warmup_steps")
LOSS_REDUCTIONS = ("token_mean", "micro_batch_mean")


@dataclass(frozen=True)
class Optimization:
    """The optimizer and the scheduler; the defaults are those of the paper's commonsense runs.

    Args:
        lr: learning rate.
        weight_decay: applied to weights, never to R or biases.
        head_lr: learning rate of trained heads; None for ``lr``.
        warmup_ratio: fraction of all optimizer steps used for warm-up.
        optimizer: a torch optimizer, called with the groups, ``lr`` and ``optimizer_options``.
        optimizer_options: its additional arguments.
        scheduler: returns a scheduler for an optimizer; the numbers of total steps and warm-up steps are passed if it
            takes them.
        scheduler_options: its additional arguments.
        loss_reduction: how the loss of a step is computed, see :mod:`.step_loss`.

    Raises:
        ValueError: if a value is out of range, or the optimizer or scheduler does not take an argument.
    """

    lr: float = 9e-4
    weight_decay: float = 0.0
    head_lr: float | None = None
    warmup_ratio: float = 0.1
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Callable[..., Any] = linear
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    loss_reduction: str = "token_mean"

    def __post_init__(self) -> None:
        for name in ("lr", "head_lr"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0; got {value}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(
                f"warmup_ratio, a fraction of all steps, must be in 0..1; got {self.warmup_ratio}"
            )
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0; got {self.weight_decay}")
        check_choice("loss_reduction", self.loss_reduction, LOSS_REDUCTIONS)
        for name in ("lr", "weight_decay"):  # set in each group, which overrides options
            if name in self.optimizer_options:
                raise ValueError(
                    f"optimizer.options.{name} would have no effect: set "
                    f"optimizer.{name}={self.optimizer_options[name]} instead"
                )
        check_options("optimizer", self.optimizer, self.optimizer_options)
        check_options("scheduler", self.scheduler, self.scheduler_options)
        if self.weight_decay and "weight_decay" not in inspect.signature(self.optimizer).parameters:
            raise ValueError(
                f"{self.optimizer.__name__} does not support weight decay: optimizer.weight_decay must be 0; got "
                f"{self.weight_decay}"
            )
        if self.warmup_ratio and not self._takes(WARMUP_STEPS):
            raise ValueError(
                f"{self.scheduler.__name__} does not support warm-up: scheduler.warmup_ratio must be 0; got "
                f"{self.warmup_ratio}"
            )
        # so that errors of their constructors are raised before a run begins
        group = {"name": "weight", "params": [nn.Parameter(torch.zeros(1, 1))], "lr": self.lr}
        self._made([group | {"weight_decay": self.weight_decay}], total_steps=100)

    def _takes(self, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in inspect.signature(self.scheduler).parameters), None)

    def build(
        self, roles: dict[str, list[nn.Parameter]], total_steps: float
    ) -> tuple[torch.optim.Optimizer, Any]:
        """Return optimizer and scheduler for a run of ``total_steps`` optimizer steps.

        Raises:
            ValueError: if the run has no end, but the scheduler needs one.
        """
        groups = parameter_groups(roles, self)
        for group in groups:
            count = sum(p.numel() for p in group["params"])
            log.info("optimizer group %s: %s parameters, lr %g, weight decay %g",
                     group["name"], f"{count:,}", group["lr"], group["weight_decay"])  # fmt: skip
        return self._made(groups, total_steps)

    def check(self, roles: dict[str, list[nn.Parameter]], total_steps: float) -> None:
        """Raise the errors that :meth:`build` would raise, for parameters that have no values yet.

        Raises:
            ValueError: as for :meth:`build`.
        """
        alike = {
            role: [nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape)) for p in parameters]
            for role, parameters in roles.items()
        }
        if groups := parameter_groups(alike, self):
            self._made(groups, total_steps)

    def _made(self, groups: list[dict[str, Any]], total_steps: float) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = _made("optimizer", self.optimizer, groups, lr=self.lr, **self.optimizer_options)
        total, warmup = self._takes(TOTAL_STEPS), self._takes(WARMUP_STEPS)
        if math.isinf(total_steps) and (self.warmup_ratio or (total and total not in self.scheduler_options)):
            raise ValueError(
                f"the scheduler {self.scheduler.__name__} with warmup_ratio={self.warmup_ratio} needs the total number "
                "of steps: set trainer.max_steps or trainer.max_epochs"
            )
        steps = {} if math.isinf(total_steps) else {total: total_steps}
        ahead = {warmup: math.ceil(self.warmup_ratio * total_steps) if self.warmup_ratio else 0}
        given = {name: value for name, value in (steps | ahead).items() if name}
        scheduler = _made("scheduler", self.scheduler, optimizer, **given | dict(self.scheduler_options))
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "scheduler: ReduceLROnPlateau needs a score, but schedulers are stepped after each optimizer step "
                "without one: choose a scheduler that needs only the step, such as scheduler=cosine"
            )
        return optimizer, scheduler


def _made(what: str, target: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        return target(*args, **options)
    except Exception as error:  # its constructor may raise anything
        listed = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ValueError(f"{what}: {target.__name__}({listed}) failed: {error}") from error


def check_options(what: str, target: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Reject options that a class or function does not take."""
    parameters = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in options:
        if name not in parameters:
            taken = ", ".join(list(parameters)[1:])
            raise ValueError(
                f"{what}.options: {target.__name__} does not take {name!r}{did_you_mean(name, parameters)}\n"
                f"it takes {taken}"
            )


def parameter_groups(roles: dict[str, list[nn.Parameter]], settings: Optimization) -> list[dict[str, Any]]:
    """Return one group per role; weight decay applies to weights, including those of heads, never to R or biases.

    Decay of R's free parameter would only change its scale, which does not affect R. With other parametrisations of R,
    decay destroys the model (torch's orthogonal map becomes exactly 0).
    """
    roles = dict(roles)
    heads = roles.pop("head", [])
    roles |= {"head": [p for p in heads if p.ndim > 1], "head_bias": [p for p in heads if p.ndim < 2]}
    decay: dict[str, float] = {"weight": settings.weight_decay, "head": settings.weight_decay}
    rates: dict[str, float] = dict.fromkeys(("head", "head_bias"), settings.head_lr or settings.lr)
    return [
        {
            "name": role,
            "params": parameters,
            "lr": rates.get(role, settings.lr),
            "weight_decay": decay.get(role, 0.0),
        }
        for role, parameters in roles.items()
        if parameters
    ]
