"""Rows for encoder-decoder models: the encoder reads the prompt, the decoder writes the target.

Letters: b rows, s columns of prompts, t columns of targets. Prompt and target are separate texts, each with the
tokenizer's special tokens and padding on the right, as these models expect::

    p1 p2 p3 eos pad     input_ids, attention_mask  (b, s)
    t1 t2 eos -100       labels                     (b, t)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .encoding import IGNORED, Encoded, encode
from .example import Example
from .generation_data import GenerationData
from .texts import padded


class TextToTextData(GenerationData):
    """Loaders of prompts and targets; takes the arguments of :class:`GenerationData`."""

    two_texts = True

    @staticmethod
    def lay_out(reader: Any, example: Example, max_length: int) -> dict[str, Any]:
        """Return the batch of one example, as in training; its prompt must already have its template."""
        return side_by_side(reader.pad_token_id, [encode(reader, example, max_length, two_texts=True)])

    def _collator(self, training: bool) -> Callable[[list[Any]], dict[str, Any]]:
        return partial(side_by_side, self.tokenizer.pad_token_id)


def side_by_side(pad_token_id: int, rows: Sequence[Encoded]) -> dict[str, Any]:
    """Return input_ids and attention_mask (b, s), labels (b, t), and the row indices (b,)."""
    return {
        "input_ids": padded([row.prompt_ids for row in rows], pad_token_id),
        "attention_mask": padded([[1] * len(row.prompt_ids) for row in rows], 0),
        "labels": padded([row.target_ids for row in rows], IGNORED),
        "rows": torch.tensor([row.row for row in rows], dtype=torch.int64),
    }
