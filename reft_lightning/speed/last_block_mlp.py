"""The feed-forward part of the last block, for the columns alone whose logits are read.

With logits of the last k columns, nothing reads what the last block says of the columns before them: their keys and
values are needed, their feed-forward part is not. Losses and gradients are those of the plain pass up to rounding:
what is left out had gradient 0. Of SmolLM2-135M's 30 blocks that is at most 2.5 % of the products of all blocks.

Shapes: b rows, s columns, k of them read, d width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.reft.sites import block_path
from ..base_models.checkpointing import runs_blocks_again
from ..base_models.patching import replaced
from .agreement import FirstBatch, Run

NAMES = ("mlp", "feed_forward", "ffn")  # of the module, in Hugging Face's blocks


class LastColumns:
    """A training pass whose last block leaves out the feed-forward part of the columns that nobody reads.

    The first batch is computed both ways. A model for which the logits differ, as something behind that part mixes
    columns, is trained plainly, with a warning.

    Args:
        model: the adapted model.
        feed_forward: the module.
        run: the pass to shorten.
    """

    def __init__(self, model: Any, feed_forward: nn.Module, run: Run) -> None:
        self.feed_forward, self.run = feed_forward, run
        self.first_batch = FirstBatch(model, "its last block reads fewer columns")

    def __call__(self, inputs: Mapping[str, Any], rows: Sequence[int], boundary: int | None = None) -> Any:
        """Return what the pass returns.

        Args:
            inputs: of the model, with ``labels`` and logits of the last ``logits_to_keep`` columns alone.
            rows: the numbers of the train rows they come from.
            boundary: the column in which targets start.
        """
        plain, short = (partial(run, inputs, rows, boundary) for run in (self.run, self._short))
        return self.first_batch.choose(inputs, plain, short)()

    def _short(self, inputs: Mapping[str, Any], rows: Sequence[int], boundary: int | None) -> Any:
        module = self.feed_forward
        limited = partial(_last_columns, module.forward, inputs["logits_to_keep"])
        with replaced([(module, "forward", limited)]):
            return self.run(inputs, rows, boundary)


def _last_columns(forward: Callable[[Tensor], Any], columns: int, hidden: Tensor) -> Any:
    """Return (b, s, d): the module's output in the last k columns, 0 before them."""
    read = hidden[:, -columns:].contiguous()  # GPT-2's linear map takes views of it
    output = forward(read)
    if not isinstance(output, Tensor):  # it says more, of all columns
        return forward(hidden)
    return F.pad(output, (0, 0, hidden.shape[1] - read.shape[1], 0))


def last_columns(model: Any, run: Run) -> Run:
    """Return the training pass with a shorter last block, or ``run`` itself where that could change a number.

    To be called where the model is trained, uncompiled.

    Args:
        model: a :class:`ReftModel` or a baseline, of a causal base model.
        run: the pass to shorten.
    """
    module = _feed_forward(model.base_model)
    if module is None or _keeps_the_last_block(run):
        return run
    return LastColumns(model, module, run)


def _keeps_the_last_block(run: Any) -> bool:
    """Whether a pass keeps what the last block says of all columns, perhaps for targets that begin elsewhere."""
    part = getattr(
        run, "part", None
    )  # a TrainingPass is not imported for isinstance: it brings metrics along
    return hasattr(part, "last") and part.last == len(part.blocks) - 1


def _feed_forward(base: Any) -> nn.Module | None:
    """Return the module in the last block, where nobody else looks into it."""
    if runs_blocks_again(base):
        return None
    if getattr(base.config.get_text_config(), "output_router_logits", False):
        return None  # the loss reads the routing of all columns
    try:
        *others, block = base.get_submodule(block_path(base))
    except (AttributeError, ValueError):  # there is no list of blocks
        return None
    module = next((child for name, child in block.named_children() if name in NAMES), None)
    if module is None or "forward" in vars(module):  # what put itself there may count columns
        return None
    if len(inspect.signature(module.forward).parameters) != 1:
        return None
    if hasattr(block, "backward_pass"):  # Reformer's, which runs it again
        return None
    if any(child is module for other in others for child in other.modules()):  # one for several blocks
        return None
    for child in module.modules():
        hooked = child is not module and (child._forward_hooks or child._forward_pre_hooks)
        if hooked or (isinstance(child, nn.Dropout) and child.p > 0):
            return None
    return module
