"""The options of multiple-choice rows as batches, for ranking by likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from .encoding import Collator, encode, target_only
from .example import Example
from .text_to_text import side_by_side


def option_batches(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int, two_texts: bool = False
) -> list[dict[str, Any]]:
    """Return one batch for each option index, with logits for the targets only and rows in the order of the examples.

    A row with fewer options than others repeats its last one; exclude these repetitions from the ranking. Prompts take
    up the same columns in all batches, unless `max_length` cuts a prompt to make room for a long option.
    """
    pad: Any = tokenizer.pad_token_id
    collate = partial(side_by_side, pad) if two_texts else Collator(pad)
    batches = []
    for k in range(max(len(example.options) for example in examples)):
        rows = [replace(e, target=e.options[min(k, len(e.options) - 1)]) for e in examples]
        batch = collate([encode(tokenizer, row, max_length, two_texts) for row in rows])
        batches.append(batch if two_texts else target_only(batch))
    return batches
