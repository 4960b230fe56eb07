"""Evaluate encoder-decoder models: the likelihood of targets, and generated texts.

Shapes: b rows, s columns of prompts, t columns of targets.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from .decoding import Decoding, Stop, own_randomness, without_generation_defaults
from .option_likelihood import summed_log_p


@torch.no_grad()
def target_log_likelihood(model: Any, batch: dict[str, Any]) -> Tensor:  # -> (b,)
    r"""Return :math:`\log p(\text{target} \mid \text{prompt})`, summed over the target's tokens.

    Args:
        model: an adapted encoder-decoder model.
        batch: ``input_ids`` and ``attention_mask`` (b, s), ``labels`` (b, t).
    """
    read = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    logits = model(**read).logits  # (b, t, v): the decoder reads the labels one column later
    return summed_log_p(logits, batch["labels"])


def first_tokens(base: Any, tokenizer: Any) -> dict[str, int | None]:
    """Return the tokens that a decoder starts with, under transformers' names.

    These are the base model's ``decoder_start_token_id``, followed by its ``forced_bos_token_id`` or else the token
    that the tokenizer puts before every target, such as a language code.
    """
    first = tokenizer(text_target="")["input_ids"][:1]
    forced = getattr(base.generation_config, "forced_bos_token_id", None)
    if forced is None and first and first[0] != tokenizer.eos_token_id:
        forced = first[0]
    starts = (
        getattr(owner, "decoder_start_token_id", None) for owner in (base.generation_config, base.config)
    )
    start = next((start for start in starts if start is not None), None)
    return {"decoder_start_token_id": start, "forced_bos_token_id": forced}


@torch.no_grad()
def write(model: Any, batch: dict[str, Any], tokenizer: Any, decoding: Decoding) -> list[list[str]]:
    """Return the texts that the decoder writes for the prompts of a batch: ``texts[row][sample]``.

    Texts start with :func:`first_tokens`; other generation defaults are ignored. Repetition penalties apply to the
    written text, not to the prompt.
    """
    settings = GenerationConfig(
        **decoding.arguments,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **first_tokens(model.base_model, tokenizer),
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    more: dict[str, Any] = {}
    if decoding.stop_strings:
        first = [1] * (len(ids) * decoding.samples)  # after the start token
        more["stopping_criteria"] = StoppingCriteriaList([Stop(tokenizer, decoding.stop_strings, first)])
    drawn = own_randomness(decoding.seed, ids) if decoding.do_sample else nullcontext()
    with without_generation_defaults(model), drawn:
        whole = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings, synced_gpus=False, **more
        )
    texts = tokenizer.batch_decode(whole[:, 1:], skip_special_tokens=True)
    return [texts[i : i + decoding.samples] for i in range(0, len(texts), decoding.samples)]
