"""Callbacks that schedule the weight of the penalties that interventions add to the loss (``train/penalty``)."""

from __future__ import annotations

import math
from typing import Any

from lightning import Callback
from torch import Tensor, nn


class PenaltySchedule(Callback):
    """Set the weight before each step; a subclass defines :meth:`weight`. A resumed run continues the schedule."""

    def weight(self, step: int, total: float) -> float:
        """Return the weight at a step out of ``total`` steps."""
        raise NotImplementedError(f"{type(self).__name__} must define weight(step, total)")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the model's penalty weight."""
        pl_module.model.penalty_weight = self.weight(trainer.global_step, pl_module.total_steps)


class LinearPenalty(PenaltySchedule):
    """Linear from 0 at the first step to 1 at the end, as in the code of ReFT-r1 (Wu et al. 2025, arXiv:2501.17148)."""

    def weight(self, step: int, total: float) -> float:
        """Return step / total."""
        return step / total


def mean_penalty(model: nn.Module) -> float:
    """Return the mean penalty of interventions on their parameters, without its weight.

    Raises:
        ValueError: if there is no such penalty.
    """
    found = _penalties(model)
    if not found:
        raise ValueError(
            "PIDPenalty holds a penalty on parameters at its target, but the model has none: set "
            "intervention=brep (red with options.restraint=1), or remove the callback"
        )
    return sum(penalty.item() for penalty in found) / len(found)


def has_penalty(model: Any) -> bool:
    """Return whether interventions have a penalty on their parameters, which may have no values yet."""
    try:
        return bool(_penalties(model))
    except RuntimeError:  # raised by a penalty that needs the values
        return True


def _penalties(model: Any) -> list[Tensor]:
    owners: list[Any] = [part for part in model.modules() if hasattr(part, "penalty")]
    return [penalty for owner in owners if (penalty := owner.penalty()) is not None]


class ExponentialPenalty(PenaltySchedule):
    r"""Exponential decay from ``start``, :math:`w = w_0 e^{-r t}`: a schedule in JoLA's code (Lai et al. 2025).

    Args:
        start: weight at step 0.
        rate: r.
    """

    def __init__(self, start: float = 1.0, rate: float = 0.01) -> None:
        self.start, self.rate = start, rate

    def weight(self, step: int, total: float) -> float:
        """Return the weight at a step."""
        return self.start * math.exp(-self.rate * step)


class PIDPenalty(PenaltySchedule):
    r"""Hold the mean penalty of an intervention at a target, with a PID controller of its weight w.

    .. math:: w \leftarrow w \big(1 + 5 (k_p e + k_i \textstyle\sum e + k_d \Delta e)\big)

    every fourth step and within bounds, where e is the penalty minus the target: BREP (Liang et al. 2025,
    arXiv:2511.10707), with the gains, the interval and the bounds of its code. If vectors are too long, that code
    instead reduces the weight of the loss, which hardly affects Adam's steps.

    Args:
        target: target of the penalty, which is a mean over interventions.
        start: initial weight.
        kp: gain of the error.
        ki: gain of its sum.
        kd: gain of its change.
        lowest: lower bound of the weight.
        highest: upper bound of the weight.

    Raises:
        ValueError: if the bounds do not contain the start or are not above 0; in training, if there is no penalty.
    """

    EVERY, SMOOTHING = 4, 5

    def __init__(
        self,
        target: float,
        start: float = 0.01,
        kp: float = 0.1,
        ki: float = 1e-4,
        kd: float = 0.01,
        lowest: float = 1e-5,
        highest: float = 1e-1,
    ) -> None:
        if not 0 < lowest <= start <= highest:
            raise ValueError(
                "the bounds must satisfy 0 < lowest <= start <= highest; got "
                f"lowest={lowest}, start={start}, highest={highest}"
            )
        self.target, self.gains, self.bounds = target, (kp, ki, kd), (lowest, highest)
        self.state = {"weight": start, "sum": 0.0, "error": 0.0, "step": 0}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Reject a model without penalties on its parameters."""
        mean_penalty(pl_module.model)

    def weight(self, step: int, total: float) -> float:
        """Return the weight as of its last update."""
        return self.state["weight"]

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the weight after every fourth step."""
        if trainer.global_step >= self.state["step"] + self.EVERY:
            self.move(mean_penalty(pl_module.model))
            self.state["step"] = trainer.global_step
            pl_module.log("train/penalty_weight", self.state["weight"])

    def move(self, penalty: float) -> None:
        """Update the weight according to the error of a mean penalty."""
        kp, ki, kd = self.gains
        error = penalty - self.target
        self.state["sum"] += ki * error
        change = kp * error + self.state["sum"] + kd * (error - self.state["error"])
        low, high = self.bounds
        self.state["weight"] = min(max(self.state["weight"] * (1 + self.SMOOTHING * change), low), high)
        self.state["error"] = error

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which a resumed run continues."""
        return dict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        self.state = dict(state_dict)
