"""The logit lens: the output head's logits for a direction (nostalgebraist 2020, "interpreting GPT: the logit lens").

Shapes: n directions, d width, v tokens of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .sites import Change, Site, find_sites, hook_at, number_of_layers

LARGE = 256  # times the norm of the residual stream


@torch.no_grad()
def logits_of(model: PreTrainedModel, directions: Tensor) -> Tensor:  # (n, d) -> (n, v)
    """Return the logits of directions put in place of the last block's output.

    The model itself computes them, with its final norm, its output head and anything in between, whatever their names.
    Directions are scaled to the length of a vector of ones: a norm removes lengths, but not every model has one.
    """
    rows = directions * (directions.shape[1] ** 0.5 / directions.norm(dim=-1, keepdim=True).clamp(min=1e-12))
    with _changed(model, _output_of(model, number_of_layers(model) - 1), lambda h: rows.to(h).view_as(h)):
        ids = torch.zeros(len(rows), 1, dtype=torch.long, device=model.device)
        return model(input_ids=ids, use_cache=False).logits[:, -1].float()


@torch.no_grad()
def in_stream(model: PreTrainedModel, site: Site) -> bool:
    """Whether a site is in the residual stream, or is added to it as is: only there is the lens meaningful.

    This is tested: a large vector added at such a site reaches the output of its block, and anything the block computes
    from it is small, because blocks read the stream through a norm. Elsewhere a map or a norm comes first.
    """
    if site.width != model.config.get_text_config().hidden_size:
        return False
    before = _block_output(model, site.layer)
    push = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)).to(before)
    push *= LARGE * (before.norm() + len(push) ** 0.5) / push.norm()  # a pad token may be all zeros
    with _changed(model, site, lambda h: h + push.to(h).view_as(h)):
        moved = _block_output(model, site.layer) - before
    return bool((moved - push).norm() < push.norm() / 2)


def _output_of(model: PreTrainedModel, layer: int) -> Site:
    return find_sites(model, {layer: "block_output"})[layer]


def _block_output(model: PreTrainedModel, layer: int) -> Tensor:  # (d,)
    seen: list[Tensor] = []

    def see(hidden: Tensor) -> Tensor:
        seen.append(hidden.flatten().float())
        return hidden

    with _changed(model, _output_of(model, layer), see):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    return seen[0]


def _changed(model: PreTrainedModel, site: Site, change: Change) -> RemovableHandle:
    """Replace the hidden states at a site; the handle is a context manager that removes the hook."""
    return hook_at(model.get_submodule(site.path), site.end, change)
