r"""The critical tokens of a prompt, those that the other tokens attend to most in a first pass of the base model.

.. math:: s_j = \text{mean over layers, heads and the tokens } i \ge j \text{ of the prompt of } A_{ij}

where :math:`A_{ij}` is the attention of token i to token j; in an encoder, i runs over all tokens of the prompt. The
positions ``critical:N`` are the N tokens of each prompt with the highest scores, the same in training and generation.
Critical representation finetuning (CRFT: Huang et al. 2025, arXiv:2507.10085) edits such tokens. Its filters
(self-referential and multi-referential attention and saliency, above a threshold and per layer) are another such score;
its code is not public.

Shapes: b rows, s columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...base_models.vision import image_tokens


def check_attends(model: PreTrainedModel) -> None:
    """Reject a model that does not return attention weights."""
    if image_tokens(model.config):
        raise ValueError(
            f"the positions critical:N are found by a first pass over text, but {type(model).__name__} reads images: "
            "mark the tokens yourself with positions=given and edit_mask"
        )
    found = model.config.get_text_config()._attn_implementation
    if found != "eager":
        raise ValueError(
            f"the positions critical:N need the attention weights of a first pass, which attn_implementation={found} "
            "does not return: use model.attn_implementation=eager (in Python, an argument of from_pretrained)"
        )


def most_attended(
    attentions: Sequence[Tensor | None], prompt: Tensor, count: int, causal: bool = True
) -> Tensor:  # (b, s) -> (b, s)
    """Return a mask of the tokens of each prompt that are attended to most, at most ``count`` of them.

    Args:
        attentions: (b, heads, s, s) for each layer; None for a layer without attention.
        prompt: (b, s) bool.
        count: N.
        causal: whether tokens attend only to themselves and earlier tokens.

    Raises:
        ValueError: if no layer returns attention weights.
    """
    known = [layer.float().mean(1) for layer in attentions if layer is not None]
    if not known:
        raise ValueError(
            "the positions critical:N need attention weights, but no layer of the base model returns them: its "
            "attn_implementation must stay eager"
        )
    A = torch.stack(known).mean(0).masked_fill(~prompt.unsqueeze(-1), 0.0)  # (b, s, s)
    later = prompt.flip(-1).cumsum(-1).flip(-1)  # (b, s), the number of tokens at or after each
    readers = (later if causal else prompt.sum(-1, keepdim=True)).clamp(min=1)
    scores = (A.sum(1) / readers).masked_fill(~prompt, -torch.inf)
    top = scores.topk(min(count, scores.shape[-1])).indices
    return torch.zeros_like(prompt).scatter(-1, top, True) & prompt
