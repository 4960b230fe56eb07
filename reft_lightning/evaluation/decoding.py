"""Two ways to an answer: generate greedily, or rank the options by likelihood.

Shapes: b rows, s columns of prompt | target, t target columns, n new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin


@torch.no_grad()
def generate_greedily(
    model: Any, batch: dict[str, Any], *, max_new_tokens: int, eos: int, pad: int
) -> Tensor:  # -> (b, n)
    """Return the new token ids that greedy decoding appends to the prompts of a batch.

    What a model ships as its own generation defaults (sampling, penalties, suppressed tokens) plays no part.
    """
    boundary = batch["boundary"]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=eos, pad_token_id=pad
    )
    with without_generation_defaults(model):
        ids = model.generate(
            input_ids=batch["input_ids"][:, :boundary],
            attention_mask=batch["attention_mask"][:, :boundary] * batch["prompt_mask"][:, :boundary],
            generation_config=settings,
        )
    return ids[:, boundary:]


@contextmanager
def without_generation_defaults(model: nn.Module) -> Iterator[None]:
    """Put aside the generation defaults of a model, from which ``generate`` fills what is not set."""
    owners = [module for module in model.modules() if isinstance(module, GenerationMixin)]
    shipped = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, settings in zip(owners, shipped, strict=True):
            owner.generation_config = settings


@torch.no_grad()
def option_log_likelihoods(model: Any, batches: list[dict[str, Any]]) -> Tensor:  # -> (b, number of options)
    r"""Return :math:`\log p(\text{option} \mid \text{prompt})`, summed over the option's tokens.

    Args:
        model: an adapted model.
        batches: one target-only batch for each option index, rows in the same order.
    """
    columns = []
    for batch in batches:
        labels = batch["labels"][:, 1:]
        logits = model(**batch).logits[:, :-1].float()  # column i predicts label i + 1
        log_p = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        columns.append(log_p.masked_fill(labels == -100, 0.0).sum(-1))
    return torch.stack(columns, dim=-1)
