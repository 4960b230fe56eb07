"""The feed-forward part of the last block, for the columns alone whose logits are read.

With logits of the last k columns, nothing reads what the last block says of the columns before them: their keys and
values are needed, their feed-forward part is not. Losses and gradients are those of the plain pass up to rounding:
what is left out had gradient 0. Of SmolLM2-135M's 30 blocks that is 2.5 % of the work of all blocks.

Shapes: b rows, s columns, k of them read, d width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .replaced import checkpointable, replaced
from .sites import block_path, text_config

NAMES = ("mlp", "feed_forward", "ffn")  # of the module, in Hugging Face's blocks
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # of the largest value; elsewhere products are coarse
COARSE = 0.02

Run = Callable[[Mapping[str, Any], Sequence[int], int | None], Any]


class LastColumns:
    """A training pass whose last block leaves out the feed-forward part of the columns that nobody reads.

    Args:
        feed_forward: the module, which reads each column for itself.
        run: the pass, from (inputs, rows, boundary), whose inputs hold ``logits_to_keep``.
    """

    def __init__(self, feed_forward: nn.Module, run: Run) -> None:
        self.feed_forward, self.run = feed_forward, run

    def __call__(self, inputs: Mapping[str, Any], rows: Sequence[int], boundary: int | None = None) -> Any:
        """Return what the pass returns."""
        module = self.feed_forward
        limited = partial(_last_columns, module.forward, inputs["logits_to_keep"])
        with replaced([(module, "forward", limited)]):
            return self.run(inputs, rows, boundary)


def _last_columns(forward: Callable[[Tensor], Tensor], columns: int, hidden: Tensor) -> Tensor:
    """Return (b, s, d): the module's output in the last k columns, 0 before them."""
    read = hidden[:, -columns:].contiguous()  # GPT-2's linear map takes views of it
    return F.pad(forward(read), (0, 0, hidden.shape[1] - read.shape[1], 0))


def last_columns(model: Any, run: Run | None) -> Run | None:
    """Return the training pass with a shorter last block, or ``run`` itself where that could change a number.

    To be called where the model is trained, uncompiled: on its device, in its precision.

    Args:
        model: a :class:`ReftModel` or a baseline, of a causal base model.
        run: the pass to shorten; None: the model's own.
    """
    base = model.base_model
    module = _feed_forward(base)
    if module is None or not _reads_columns_alone(module, text_config(base.config).hidden_size):
        return run
    return LastColumns(module, run or (lambda inputs, rows, boundary: model(**inputs)))


def _feed_forward(base: nn.Module) -> nn.Module | None:
    """Return the module in the last block, where nobody else looks into it."""
    if any(module.gradient_checkpointing for module in checkpointable(base.modules())):
        return None  # runs the block again, later
    try:
        block = list(base.get_submodule(block_path(base)))[-1]
    except ValueError:
        return None
    module = next((child for name, child in block.named_children() if name in NAMES), None)
    if module is None or "forward" in vars(module):  # what put itself there may count columns
        return None
    for child in module.modules():
        hooked = child is not module and (child._forward_hooks or child._forward_pre_hooks)
        if hooked or (isinstance(child, nn.Dropout) and child.p > 0):
            return None
    return module


@torch.no_grad()
def _reads_columns_alone(module: nn.Module, width: int) -> bool:
    """Whether the module takes (b, s, d) alone, and its last columns say the same without those before them."""
    parameters = inspect.signature(module.forward).parameters.values()
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    if weight is None or sum(p.default is p.empty for p in parameters) != 1:
        return False
    hidden = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0)).to(
        weight.device, weight.dtype
    )
    whole, part = module(hidden), module(hidden[:, -2:])
    if not isinstance(whole, Tensor) or whole.shape != hidden.shape:
        return False
    apart = (whole[:, -2:] - part).abs().max() / whole.abs().max()
    return float(apart) <= TOLERANCE.get(weight.dtype, COARSE)
