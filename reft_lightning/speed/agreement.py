"""Check that two passes of an adapted model agree up to rounding in its precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # relative to the largest logit, or to the loss
COARSE = 0.05  # for products with 16 bits or fewer


class Difference(ValueError):
    """Two passes differ by more than rounding explains."""


def check_agreement(
    model: Any, inputs: Mapping[str, Any], plain: Callable[[], Any], short: Callable[[], Any]
) -> None:
    """Compare the logits of two passes, and their losses: a router loss depends on more than the logits.

    Raises:
        Difference: if they differ by more than the precision of the model explains.
    """
    (expected, losses), (found, others) = (found_of(model, run) for run in (plain, short))
    allowed = tolerance(model)
    # logits of padding are never read
    real = ... if expected.ndim == 2 else inputs["attention_mask"][:, -expected.shape[1] :].bool()
    apart = float("inf")
    if expected.shape == found.shape:
        apart = float((expected - found)[real].abs().max() / expected[real].abs().max().clamp(min=1e-6))
    if not apart <= allowed:
        raise Difference(
            f"changes the logits by {apart:.2g} of the largest; at most {allowed:.2g} is allowed"
        )
    for name, loss in losses.items():
        apart = float((loss - others[name]).abs() / loss.abs().clamp(min=1e-6))
        if not apart <= allowed:
            raise Difference(
                f"changes the {name} by {apart:.2g} of its value; at most {allowed:.2g} is allowed"
            )


@torch.no_grad()
def found_of(model: Any, run: Callable[[], Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and losses of a pass without gradients; all passes use the same random numbers and consume none."""
    device = model.base_model.device
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(0)
        output = run()
    losses = {name: value for name, value in output.items() if isinstance(value, Tensor) and value.ndim == 0}
    return output.logits.float(), losses


def tolerance(model: Any) -> float:
    """Return the largest difference that rounding explains in the model's precision."""
    base = model.base_model
    if torch.is_autocast_enabled(base.device.type) or torch.get_float32_matmul_precision() != "highest":
        return COARSE
    return TOLERANCE.get(base.dtype, COARSE)
