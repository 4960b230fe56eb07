r"""The tokens of a prompt that a first pass of the base model finds critical: those that the others attend to most.

.. math:: s_j = \text{mean over layers, heads and the tokens } i \ge j \text{ of the prompt of } A_{ij}

with the attention :math:`A_{ij}` of token i to token j; in an encoder, of all tokens i of the prompt. Positions
``critical:N`` are the N largest of each prompt, the same in training and generation. Critical representation
finetuning (CRFT: Huang et al. 2025, arXiv:2507.10085) edits such tokens; its filters (self-referential and
multi-referential attention and saliency, above a threshold and layer by layer) are one of several such scores, and its
code is not public.

Shapes: b rows, s columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...base_models.vision import image_tokens


def check_attends(model: PreTrainedModel) -> None:
    """Reject a model whose attention is computed without being there as numbers."""
    if image_tokens(model.config):
        raise ValueError(
            f"the positions critical:N are found by a first pass over text, and {type(model).__name__} reads images: "
            "mark the tokens yourself, with positions=given and edit_mask"
        )
    found = model.config.get_text_config()._attn_implementation
    if found != "eager":
        raise ValueError(
            f"the positions critical:N are found by the attention of a first pass, which attn_implementation={found} "
            "does not give as numbers: write model.attn_implementation=eager, an argument of from_pretrained too"
        )


def most_attended(
    attentions: Sequence[Tensor | None], prompt: Tensor, count: int, causal: bool = True
) -> Tensor:  # (b, s) -> (b, s)
    """Return which tokens of each prompt are attended to most, at most ``count`` of them.

    Args:
        attentions: (b, heads, s, s) of each layer; None of one without.
        prompt: (b, s) bool.
        count: N.
        causal: whether only later tokens attend to a token, and itself.

    Raises:
        ValueError: if no layer attends.
    """
    known = [layer.float().mean(1) for layer in attentions if layer is not None]
    if not known:
        raise ValueError(
            "the positions critical:N need attention as numbers, and no layer of the base model gives any: its "
            "attn_implementation must stay eager"
        )
    A = torch.stack(known).mean(0).masked_fill(~prompt.unsqueeze(-1), 0.0)  # (b, s, s)
    later = prompt.flip(-1).cumsum(-1).flip(-1)  # (b, s), how many come no earlier
    readers = (later if causal else prompt.sum(-1, keepdim=True)).clamp(min=1)
    scores = (A.sum(1) / readers).masked_fill(~prompt, -torch.inf)
    top = scores.topk(min(count, scores.shape[-1])).indices
    return torch.zeros_like(prompt).scatter(-1, top, True) & prompt
