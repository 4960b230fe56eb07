"""The logit lens: what the output head makes of a direction (nostalgebraist 2020, "interpreting GPT: the logit lens").

Shapes: n directions, d width, v tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .sites import find_sites, hidden_of, number_of_layers, with_hidden


@torch.no_grad()
def logits_of(model: PreTrainedModel, directions: Tensor) -> Tensor:  # (n, d) -> (n, v)
    """Return the logits of directions that stand where the last block leaves its output.

    The model computes them itself: its final norm, output head and whatever is between, whatever their names.
    Directions get the length of a vector of ones, since a norm forgets lengths and a model without one does not.
    """
    last = number_of_layers(model) - 1
    site = find_sites(model, {last: "block_output"})[last]
    rows = directions * (directions.shape[1] ** 0.5 / directions.norm(dim=-1, keepdim=True).clamp(min=1e-12))

    def put(module: nn.Module, args: tuple, output: Any) -> Any:
        hidden = hidden_of(output)
        return with_hidden(output, rows.to(hidden).view_as(hidden))

    handle = model.get_submodule(site.path).register_forward_hook(put)
    try:
        ids = torch.zeros(len(rows), 1, dtype=torch.long, device=model.device)
        return model(input_ids=ids, use_cache=False).logits[:, -1].float()
    finally:
        handle.remove()
