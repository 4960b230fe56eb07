"""Edit hidden states at a site, as the hooks do during a call.

Shapes: b rows, s columns, d width, n selected tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...interventions import Tokens
from .calls import Call, Edit, EditPlan
from .edit_plan import image_indices
from .sites import Site


def edit_tokens(call: Call, plan: EditPlan, place: str, hidden: Tensor) -> Tensor:  # (b, s, d) -> (b, s, d)
    """Return the hidden states at a site with the edits that the plan of a pass has for it."""
    edits = plan.edits[place]
    site = _site_of(call, edits[0])
    rows, columns = plan.tokens.shape[:2]
    if hidden.shape[:-1].numel() != rows * columns:  # in OPT's last map, tokens have one dimension
        raise ValueError(
            f"the {site.end} of {site.path} has the shape {tuple(hidden.shape)}, but the model reads "
            f"{rows} rows of {columns} tokens: positions are undefined there"
        )
    if plan.differentiable and not torch.is_grad_enabled():
        raise ValueError(
            f"no gradient reaches {site.path}: gradient checkpointing with use_reentrant=True cannot train "
            "interventions inside a block; pass use_reentrant=False"
        )
    return _with_edits(call, edits, hidden)


def edit_images(call: Call, place: str, hidden: Tensor) -> Tensor | None:  # (images, n, d) or (n, d)
    """Return the edited hidden states at a site that sees images, which needs no plan; None without edits."""
    edits = []
    for choice in call.choices:
        adapter = call.adapters[choice.adapter]
        for layer, site in adapter.sites.items():
            if not site.visual or site.place != place:
                continue
            if choice.rows is not None:
                raise ValueError(
                    f"adapter_names chooses adapters per row, but the adapter {choice.adapter!r} edits a vision tower, "
                    "which has no rows: choose it with set_adapter"
                )
            indices = image_indices(adapter.positions[layer][0], hidden, site.path)
            edits.append(Edit(choice.adapter, layer, choice.weight, indices))
    call.edited |= bool(edits)
    return _with_edits(call, edits, hidden) if edits else None


def _site_of(call: Call, edit: Edit) -> Site:
    return call.adapters[edit.adapter].sites[edit.layer]


def _with_edits(call: Call, edits: Sequence[Edit], hidden: Tensor) -> Tensor:  # (b, s, d) -> (b, s, d)
    """Return hidden states with edits applied in sequence, or with their sum."""
    site = _site_of(call, edits[0])
    if hidden.shape[-1] != site.width:
        raise ValueError(
            f"the {site.end} of {site.path} has width {hidden.shape[-1]}, expected {site.width}; use the input "
            "of the linear layer that consumes it, as '...{layer}....input'"
        )
    flat = hidden.reshape(-1, hidden.shape[-1])
    if call.summed and len(edits) > 1:
        return _sum_of(call, edits, flat).view_as(hidden)
    for edit in edits:
        flat = flat.view(-1, _site_of(call, edit).dim)  # the width of a head, or the whole width
        index, edited = _edited_by(call, edit, flat)
        flat = flat.index_copy(0, index, edited)
    return flat.view_as(hidden)


def _sum_of(call: Call, edits: Sequence[Edit], flat: Tensor) -> Tensor:  # (b s, d) -> (b s, d)
    """Return h plus the sum of the adapters' edits of h."""
    h = flat.to(torch.promote_types(flat.dtype, torch.float32))
    total = h
    for edit in edits:
        h, total = (x.view(-1, _site_of(call, edit).dim) for x in (h, total))
        index, edited = _edited_by(call, edit, h)
        total = total.index_add(0, index, edited - h.index_select(0, index))
    return total.to(flat.dtype)


def _edited_by(call: Call, edit: Edit, flat: Tensor) -> tuple[Tensor, Tensor]:  # (b s, d) -> (n,), (n, d)
    """Return the indices of the tokens that an adapter edits at a site, and their Phi(h)."""
    adapter = call.adapters[edit.adapter]
    indices = [index.to(flat.device) for index in edit.indices]
    edited = []
    for i, (phi, index) in enumerate(zip(adapter.interventions[edit.layer], indices, strict=True)):
        h = flat.index_select(0, index)
        if call.reads_sources:
            tokens = _tokens_at(call, edit, index)
            call.sources[edit.adapter, edit.layer, i] = tokens.padded(h), tokens.counts()
            edited.append(h)
        elif call.nulled:
            edited.append(phi(h, nulled=True))
        elif adapter.seeing_rows is not None and phi.sees_rows:
            edited.append(_edited_rows(call, phi, edit, i, h, index))
        else:
            edited.append(phi(h, edit.weight))
    return (indices[0], edited[0]) if len(edited) == 1 else (torch.cat(indices), torch.cat(edited))


def _edited_rows(
    call: Call, phi: Any, edit: Edit, i: int, h: Tensor, index: Tensor
) -> Tensor:  # (n, d) -> (n, d)
    """Return Phi(h) for an intervention that sees rows, and note its penalty."""
    device = next((parameter.device for parameter in phi.parameters()), h.device)  # where it computes
    tokens = _tokens_at(call, edit, index.to(device))

    def of_rows_now(value: Tensor) -> Tensor:  # beam search repeats every row
        return value.to(device).repeat_interleave(tokens.count // len(value), 0)

    tokens.given = {name: of_rows_now(value) for name, value in call.given.items()}
    if (source := call.sources.get((edit.adapter, edit.layer, i))) is not None:
        tokens.source = of_rows_now(source[0]), of_rows_now(source[1])
    edited = phi(h, edit.weight, tokens)
    assert tokens.found is not None
    if tokens.found.penalty is not None:
        call.penalties.append(tokens.found.penalty)
    return edited


def _tokens_at(call: Call, edit: Edit, index: Tensor) -> Tokens:  # (n,) flat token indices
    """Return the rows that the tokens of an edit belong to."""
    plan: Any = call.plan
    b, s = plan.tokens.shape[:2]
    index = index // _site_of(call, edit).divided  # the token's index, whatever the head
    prompt = plan.prompt.to(index.device)
    return Tokens(index // s, b, prompt[index], call.kept.setdefault(edit.adapter, {}))
