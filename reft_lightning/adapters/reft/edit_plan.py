"""Plan the edits of a pass of the base model: the selected tokens at every site.

Shapes: b rows, s columns, n selected tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...base_models.caches import cache_in, columns_in
from ...base_models.stacks import DECODER
from ..masks import Spans, spans_of_start
from .calls import Call, Edit, EditPlan
from .positions import Positions, spread


def plan_of(call: Call, stack: str, given: Mapping[str, Any], reads_images: bool) -> EditPlan | None:
    """Return the edits of a pass of a stack; None if there are none."""
    tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
    attention, spans = given.get("attention_mask"), call.spans
    length = columns_in(cache_in(given))
    held = 0 if length is None else length
    if stack == DECODER:
        call.decoder = spans = call.decoder or spans_of_start(tokens, held, spans.generating, attention)
    # a static cache counts on the device, and a model can read more columns for images than its text has
    known = length is not None and isinstance(held, int) and (held > 0 or tokens.ndim == 2)
    columns = spans.next_columns(tokens.shape[1], attention, held if known else None)
    decoding = columns.start >= spans.width
    edits: dict[str, list[Edit]] = {}
    here: Spans | None = None
    seeing: str | None = None
    for choice in call.choices:
        adapter = call.adapters[choice.adapter]
        seeing = seeing or adapter.seeing_rows
        for (positions, tied), layers in adapter.layers_by_positions.items():
            sites = {layer: adapter.sites[layer] for layer in layers}
            sites = {layer: s for layer, s in sites.items() if s.stack == stack and not s.visual}
            if not sites or (decoding and not positions.reaches_decode):
                continue
            here = here or spans.upto(columns.stop, len(tokens))
            told = "image" in here.marks or not reads_images or stack == DECODER  # a decoder only writes text
            if positions.tells_images_apart and not told:
                raise ValueError(
                    f"the positions {positions} distinguish text from images, but inputs_embeds and the columns of "
                    "a cache do not show which tokens are images: pass image_mask (b, s)"
                )
            indices = token_indices(positions, tied, here.of_rows(choice.rows), columns)
            for layer, site in sites.items():
                own = indices
                if site.divided > 1:
                    own = [part for index in indices for part in site.parts(index)]
                edits.setdefault(site.place, []).append(Edit(choice.adapter, layer, choice.weight, own))
    if here is None:
        return None
    plan = EditPlan(edits, tokens, torch.is_grad_enabled(), spans)
    if seeing:
        if not decoding and (columns.start or columns.stop < spans.width):
            raise ValueError(
                f"{seeing} needs whole prompts, but the model reads only a part of them here: pass neither "
                "a cache nor prefill_chunk_size"
            )
        plan.prompt = here.prompt[:, columns].flatten()
    return plan


def token_indices(positions: Positions, tied: str, spans: Spans, columns: slice) -> list[Tensor]:
    """Return the flat token indices (n,) of each intervention of a site, in the columns that are read."""
    slots = positions.select(spans.prompt, spans.target, spans.marks)
    groups = [of_group[:, columns].flatten() for of_group in slots]
    if tied == "all":
        return [(torch.stack(groups) >= 0).any(0).nonzero().squeeze(-1)]
    if tied == "group":
        return [(slots >= 0).nonzero().squeeze(-1) for slots in groups]
    counts = positions.slots()
    return [(s == k).nonzero().squeeze(-1) for s, n in zip(groups, counts, strict=True) for k in range(n)]


def image_indices(
    positions: Positions, hidden: Tensor, where: str
) -> list[Tensor]:  # (images, n, d) or (n, d)
    """Return the flat token indices that the one intervention of a site in a vision tower edits."""
    share = positions.share_of_images
    if share is not None and hidden.ndim != 3:
        raise ValueError(
            f"{where} has the tokens of all images in one list, so a share of them would not be a share of each image: "
            "use positions=image there, or image:S in the language model"
        )
    every = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    return [(spread(every, share) >= 0).flatten().nonzero().squeeze(-1)]
