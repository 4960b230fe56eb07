"""Whether two ways through an adapted model give the same logits, up to the rounding of its precision."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .matmul_precision import EXACT, product_error

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the largest logit
COARSE = 0.05  # where products have 16 bits or fewer

Run = Callable[[Mapping[str, Any], Sequence[int], int | None], Any]  # a training pass: inputs, rows, boundary


def plain_pass(
    model: Any, inputs: Mapping[str, Any], rows: Sequence[int], boundary: int | None = None
) -> Any:
    """Return what an adapted model itself returns: the pass that others shorten."""
    return model(**inputs)


class FirstBatch:
    """Chooses between a pass and a shorter one: both compute the first batch, and the shorter one stays if they agree.

    Args:
        model: what both run.
        shorter: what the shorter one does, for the warning that it is not used.

    Attributes:
        refused: whether they disagreed; None before the first batch.
    """

    def __init__(self, model: Any, shorter: str) -> None:
        self.model, self.shorter = model, shorter
        self.refused: bool | None = None

    def choose(
        self, inputs: Mapping[str, Any], plain: Callable[[], Any], short: Callable[[], Any]
    ) -> Callable[[], Any]:
        """Return ``short``, or ``plain`` where the first batch told them apart."""
        if self.refused is None:
            apart, allowed = compare(self.model, inputs, plain, short)
            self.refused = not apart <= allowed
            if self.refused:
                log.warning(
                    "%s gives other logits when %s (%.2g of the largest, allowed %.2g): not so in training",
                    type(self.model.base_model).__name__, self.shorter, apart, allowed,
                )  # fmt: skip
        return plain if self.refused else short


def compare(
    model: Any, inputs: Mapping[str, Any], plain: Callable[[], Any], short: Callable[[], Any]
) -> tuple[float, float]:
    """Return how far the logits of two passes lie apart, in shares of the largest one, and what is allowed.

    Args:
        model: a :class:`ReftModel` or a baseline, which both run, with the same random numbers.
        inputs: what both read.
        plain: runs the pass as it is; returns the model's output.
        short: the other one.
    """
    expected, found = (logits_of(model, run) for run in (plain, short))
    if expected.shape != found.shape:
        return float("inf"), _tolerance(model)
    # padding says anything: nobody reads it
    real = ... if expected.ndim == 2 else inputs["attention_mask"][:, -expected.shape[1] :].bool()
    apart = (expected - found)[real].abs().max() / expected[real].abs().max().clamp(min=1e-6)
    return float(apart), _tolerance(model)


@torch.no_grad()
def logits_of(model: Any, run: Callable[[], Any]) -> Tensor:
    """Return the logits of a pass without gradients; random numbers are the same each time, and none is used up."""
    device = model.base_model.device
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(0)
        return run().logits.float()


def _tolerance(model: Any) -> float:
    base, precision = model.base_model, torch.get_float32_matmul_precision()
    coarse = torch.is_autocast_enabled(base.device.type)
    if precision != "highest":
        coarse |= base.device.type != "cpu" or product_error(precision) > EXACT
    return COARSE if coarse else TOLERANCE.get(base.dtype, COARSE)
