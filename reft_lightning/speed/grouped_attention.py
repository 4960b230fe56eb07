"""Attention in training on a CPU: no copies of keys and values for the heads of a group, no 16-bit backward pass.

Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) has fewer heads of keys and values than of queries.
Hugging Face's ``sdpa`` copies them for each head of queries wherever there is a mask, and the copies are remembered for
the backward pass; torch's kernel for CPUs reads them where they lie (since 2.9) and gives the same numbers up to
rounding. In bfloat16 that kernel's backward pass took twice the time of float32's where it was measured (AMD EPYC), so
queries, keys and values of 16 bits are attended to in float32, which rounds less. See ``experiments/speed``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..base_models.checkpointing import runs_blocks_again
from ..base_models.patching import replaced
from ..interventions.base import HALVES
from .agreement import Run

READS_GROUPS = torch.__version__ >= "2.9"  # before, without copies there is no fused kernel


class GroupedAttention:
    """A training pass whose attention reads keys and values of groups where they lie, those of 16 bits in float32.

    Args:
        run: the pass.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, inputs: Mapping[str, Any], rows: Sequence[int], boundary: int | None = None) -> Any:
        """Return what the pass returns."""
        with _grouped():
            return self.run(inputs, rows, boundary)


def attend_in_groups(model: Any, run: Run) -> Run:
    """Return the training pass with cheaper attention; ``run`` itself elsewhere than on a CPU.

    To be called where the model is trained, uncompiled. Under gradient checkpointing, which runs blocks once more after
    the pass, attention stays as it is; so does any that is not Hugging Face's ``sdpa``.

    Args:
        model: a :class:`ReftModel` or a baseline.
        run: the pass.
    """
    base = model.base_model
    if base.device.type != "cpu" or runs_blocks_again(base):
        return run
    return GroupedAttention(run)


@contextmanager
def _grouped() -> Iterator[None]:
    # imported here: a model that trains has imported them
    from transformers.integrations import sdpa_attention as integration
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    plain = functions["sdpa"]
    if plain is not integration.sdpa_attention_forward:  # somebody's own
        yield
        return
    name, attributes = "use_gqa_in_sdpa", []
    if READS_GROUPS and hasattr(integration, name):
        attributes.append((integration, name, partial(_reads_groups, getattr(integration, name))))
    functions["sdpa"] = partial(_attend, plain)
    try:
        with replaced(attributes):
            yield
    finally:
        del functions["sdpa"]  # transformers' own is back


def _reads_groups(chosen: Callable[..., bool], mask: Tensor | None, key: Tensor, *others: Any) -> bool:
    """Whether torch is given keys and values as they are."""
    return key.device.type == "cpu" or chosen(mask, key, *others)


def _attend(
    plain: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Attend in float32 to what has 16 bits."""
    if query.device.type != "cpu" or value.dtype not in HALVES:
        return plain(module, query, key, value, *args, **kwargs)
    wide = [_widened(argument) for argument in (query, key, value, *args)]
    with torch.autocast("cpu", enabled=False):
        output, *others = plain(module, *wide, **{name: _widened(more) for name, more in kwargs.items()})
    return output.to(value.dtype), *others


def _widened(argument: Any) -> Any:
    """Return what has 16 bits in float32: an additive mask, too, has the type of the queries."""
    return argument.float() if isinstance(argument, Tensor) and argument.dtype in HALVES else argument
