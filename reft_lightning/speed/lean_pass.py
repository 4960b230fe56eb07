"""The training pass with all that makes it cheaper and changes numbers by rounding alone: for runs and benchmarks."""

from __future__ import annotations

from functools import partial
from typing import Any

from .agreement import Run, plain_pass
from .grouped_attention import attend_in_groups
from .last_block_mlp import last_columns
from .recompute_activation import recompute_activations


def lean_pass(model: Any, run: Run | None = None, *, last_logits: bool = True) -> Run:
    """Return the pass to train with.

    To be called where the model is trained: on its device, in its precision, uncompiled (a graph would be compiled for
    each number of columns that are read, and chooses itself what it remembers).

    Args:
        model: a :class:`ReftModel` or a baseline.
        run: a pass that computes less, as :func:`training_pass` makes it; None: the model's own.
        last_logits: whether logits of the last columns alone are read, as those of targets.
    """
    run = run or partial(plain_pass, model)
    if last_logits:
        run = last_columns(model, run)
    return attend_in_groups(model, recompute_activations(model, run))
