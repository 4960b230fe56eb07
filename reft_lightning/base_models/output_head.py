"""The output head (``lm_head``) reads the columns that are asked of it in one matrix product.

Logits of the last k columns: Hugging Face hands the head a slice of the hidden states, (b, k, d) cut out of (b, s, d).
torch multiplies rows that do not lie side by side by b products, each of which reads all of the head's V x d weights;
in bfloat16 on a CPU it copies them b times. Side by side they are one product of (b k, d): the same logits up to
rounding. Measured in ``experiments/speed``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def join_columns(model: nn.Module) -> None:
    """Let the head of a Hugging Face model read its columns side by side; a model without one stays as it is."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(head, nn.Linear):
        head.register_forward_pre_hook(_side_by_side)


def _side_by_side(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not args or not isinstance(args[0], Tensor):
        return None
    return args[0].contiguous(), *args[1:]
