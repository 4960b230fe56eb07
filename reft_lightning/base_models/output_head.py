"""Make the output head (``lm_head``) compute the requested columns in a single matrix product.

For the logits of the last k columns, Hugging Face gives the head a slice of the hidden states, (b, k, d) out of
(b, s, d). torch multiplies such a slice in b products, each of which reads all V x d weights of the head; in bfloat16
on a CPU it also copies them b times. A contiguous slice takes one product of (b k, d), with the same logits up to
rounding. Measured in ``experiments/speed``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def join_columns(model: PreTrainedModel) -> None:
    """Make the input of a model's output head contiguous; leave a model without a linear head as it is."""
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        head.register_forward_pre_hook(_contiguous)


def _contiguous(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not args or not isinstance(args[0], Tensor):
        return None
    return args[0].contiguous(), *args[1:]
