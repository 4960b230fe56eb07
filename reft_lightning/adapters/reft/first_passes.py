"""First passes: what the base model reads, unedited, before a call, because edits depend on it.

Positions ``critical:N`` ask which tokens of a prompt the others attend to; interchange interventions ask for the hidden
states of other texts.

Shapes: b rows, s columns.
"""

from __future__ import annotations

from collections.abc import Mapping
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

# what a first pass does without, where the base model takes it
SPARED = {"logits_to_keep": 1, "use_cache": False}


class FirstPasses:
    """Reads texts with the base model, as in evaluation, and without logits that nobody asks for.

    Args:
        base_model: a Hugging Face model.
        known: the names of its arguments; None of one that takes all.
    """

    def __init__(self, base_model: Any, known: Any) -> None:
        self.base_model, self.known = base_model, known

    @torch.no_grad()
    def with_critical(
        self, spans: Spans, counts: set[int], ids: Tensor | None, embeds: Tensor | None
    ) -> Spans:
        """Read the prompts, and mark the tokens of them that are critical."""
        tokens: Any = ids if embeds is None else embeds
        if len(counts) > 1 or tokens.shape[1] != spans.width:
            raise ValueError(
                f"positions critical:{', critical:'.join(map(str, sorted(counts)))} are found by reading all of a "
                "prompt, and for one number of tokens a call: give no past_key_values, and one number in all layers"
            )
        others = {"output_attentions": True} | ({} if embeds is None else {"inputs_embeds": embeds})
        causal = reading_of(self.base_model).causal
        attentions = self._read(None, ids, spans.prompt.long(), others).attentions
        return marked(spans, critical=most_attended(attentions, spans.prompt, next(iter(counts)), causal))

    @torch.no_grad()
    def sources(
        self, call: Call, ids: Tensor, mask: Tensor | None, images: Tensor | None
    ) -> dict[Any, tuple[Tensor, Tensor]]:
        """Read other texts, and return their hidden states where the interventions of a call would edit."""
        used = [call.adapters[choice.adapter] for choice in call.choices]
        if used and not any(adapter.takes_source for adapter in used):
            able = [name for name, cls in INTERVENTIONS.items() if cls.takes_source]
            raise ValueError(
                f"{', '.join(adapter.config.method for adapter in used)} takes nothing from the texts source_ids; "
                f"{', '.join(able)} do"
            )
        if len(ids) != len(call.spans.prompt):
            raise ValueError(f"source_ids hold {len(ids)} rows, the batch {len(call.spans.prompt)}")
        if images is not None and not images.is_meta and images.any():
            raise ValueError(
                "source_ids hold places of images, and no pictures come with them: give texts alone"
            )
        mask = torch.ones_like(ids) if mask is None else mask
        spans = marked(spans_of(mask, None, None), image=images)
        chosen: dict[str, Choice] = {}  # an adapter of several strengths reads once, for all of their rows
        for choice in call.choices:
            name, rows = choice.adapter, choice.rows
            others = chosen[name].rows if name in chosen else torch.zeros_like(mask[:, 0], dtype=torch.bool)
            chosen[name] = Choice(name, rows=None if rows is None or others is None else rows | others)
        reading = replace(call, spans=spans, choices=tuple(chosen.values()), reads_sources=True)
        self._read(reading, ids, mask, {})
        return reading.sources

    def _read(self, call: Call | None, ids: Tensor | None, mask: Tensor, others: Mapping[str, Any]) -> Any:
        spared = {name: value for name, value in SPARED.items() if name in (self.known or ())}
        inputs = forward_inputs(self.base_model, self.known, ids, mask, None, spared | dict(others))
        if ids is not None:  # masks of a plan on the meta device have numbers
            inputs = {k: v.to(ids.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        with running(call), evaluating(self.base_model):
            return self.base_model(**inputs)
