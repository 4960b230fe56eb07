"""First passes of the unedited base model before a call, for edits that depend on them.

Positions ``critical:N`` need to know which tokens of a prompt the others attend to; interchange interventions need the
hidden states of other texts. Passes run in evaluation mode and without unneeded logits.

Shapes: b rows, s columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...base_models.reading import evaluating, reading_of
from ...interventions import INTERVENTIONS
from ..arguments import forward_inputs
from ..masks import Spans, marked, spans_of
from .calls import Call, Choice, running
from .critical import most_attended

# arguments that make a first pass cheaper, if the base model takes them
SPARED = {"logits_to_keep": 1, "use_cache": False}

Known = frozenset[str] | None  # the names of a base model's arguments; None if they cannot be known


@torch.no_grad()
def with_critical(
    model: Any, known: Known, spans: Spans, counts: set[int], ids: Tensor | None, embeds: Tensor | None
) -> Spans:
    """Read the prompts and mark their critical tokens."""
    tokens: Any = ids if embeds is None else embeds
    if len(counts) > 1 or tokens.shape[1] != spans.width:
        raise ValueError(
            f"positions critical:{', critical:'.join(map(str, sorted(counts)))} are found by reading the whole "
            "prompt, for one N per call: use the same N in all layers, and pass no cache"
        )
    others = {"output_attentions": True} | ({} if embeds is None else {"inputs_embeds": embeds})
    attentions = _read(model, known, None, ids, spans.prompt.long(), others).attentions
    causal = reading_of(model).causal
    return marked(spans, critical=most_attended(attentions, spans.prompt, next(iter(counts)), causal))


@torch.no_grad()
def sources_of(
    model: Any, known: Known, call: Call, ids: Tensor, mask: Tensor | None, images: Tensor | None
) -> dict[Any, tuple[Tensor, Tensor]]:
    """Read other texts and return their hidden states at the tokens that the call's interventions would edit."""
    used = [call.adapters[choice.adapter] for choice in call.choices]
    if used and not any(adapter.takes_source for adapter in used):
        able = [name for name, cls in INTERVENTIONS.items() if cls.takes_source]
        raise ValueError(
            f"{', '.join(adapter.config.method for adapter in used)} takes no hidden states from source_ids; "
            f"{', '.join(able)} do"
        )
    if len(ids) != len(call.spans.prompt):
        raise ValueError(f"source_ids have {len(ids)} rows, but the batch has {len(call.spans.prompt)}")
    if images is not None and not images.is_meta and images.any():
        raise ValueError("source_ids contain image tokens, but come without images: give texts only")
    mask = torch.ones_like(ids) if mask is None else mask
    spans = marked(spans_of(mask, None, None), image=images)
    chosen: dict[str, Choice] = {}  # an adapter with several strengths reads once, for all of their rows
    for choice in call.choices:
        name, rows = choice.adapter, choice.rows
        others = chosen[name].rows if name in chosen else torch.zeros_like(mask[:, 0], dtype=torch.bool)
        chosen[name] = Choice(name, rows=None if rows is None or others is None else rows | others)
    reading = replace(call, spans=spans, choices=tuple(chosen.values()), reads_sources=True)
    _read(model, known, reading, ids, mask, {})
    return reading.sources


def _read(
    model: Any, known: Known, call: Call | None, ids: Tensor | None, mask: Tensor, others: dict[str, Any]
) -> Any:
    spared = {name: value for name, value in SPARED.items() if name in (known or ())}
    inputs = forward_inputs(model, known, ids, mask, None, spared | others)
    if ids is not None:  # with a model on the meta device, masks still have values
        inputs = {k: v.to(ids.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with running(call), evaluating(model):
        return model(**inputs)
