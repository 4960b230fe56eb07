"""Whether two ways through an adapted model give the same logits, up to the rounding of its precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the largest logit
COARSE = 0.05  # where products have 16 bits or fewer


def difference(
    model: Any, inputs: Mapping[str, Any], plain: Callable[[], Any], short: Callable[[], Any]
) -> float:
    """Return how far the logits of two passes differ, relative to the largest one.

    Args:
        model: the adapted model that both run, with the same random numbers.
        inputs: of both.
        plain: runs the pass as it is; returns the model's output.
        short: the other one.
    """
    expected, found = (logits_of(model, run) for run in (plain, short))
    if expected.shape != found.shape:
        return float("inf")
    # logits of padding are never read
    real = ... if expected.ndim == 2 else inputs["attention_mask"][:, -expected.shape[1] :].bool()
    return float((expected - found)[real].abs().max() / expected[real].abs().max().clamp(min=1e-6))


@torch.no_grad()
def logits_of(model: Any, run: Callable[[], Any]) -> Tensor:
    """Return the logits of a pass without gradients; each call sees the same random numbers and consumes none."""
    device = model.base_model.device
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(0)
        return run().logits.float()


def tolerance(model: Any) -> float:
    """Return the difference that rounding explains in the precision of the model."""
    base = model.base_model
    if torch.is_autocast_enabled(base.device.type) or torch.get_float32_matmul_precision() != "highest":
        return COARSE
    return TOLERANCE.get(base.dtype, COARSE)
