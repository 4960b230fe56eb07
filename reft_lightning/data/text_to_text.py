"""Rows for models with an encoder and a decoder: the encoder reads the prompt, the decoder writes the target.

Letters: b rows, s columns of prompts, t columns of targets. Each is a text of its own, with the tokenizer's special
tokens and padding on the right, where these models expect it::

    p1 p2 p3 eos pad     input_ids, attention_mask  (b, s)
    t1 t2 eos -100       labels                     (b, t)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import torch

from .encoding import IGNORED, Encoded, EncodedRows, encode, encode_all
from .example import Example
from .family import Family
from .generation_data import GenerationData
from .prompts import apply_template
from .texts import padded


class TextToTextFamily(Family):
    """A family whose prompts and targets are texts of their own."""

    kind: ClassVar[str] = "text_to_text"

    @classmethod
    def of(cls, family: Family) -> TextToTextFamily:
        """Return a family of one text a row as one of two."""
        return cls(**{field.name: getattr(family, field.name) for field in fields(family)})


class TextToTextData(GenerationData):
    """Loaders of prompts and targets; arguments as those of :class:`GenerationData`."""

    @staticmethod
    def lay_out(reader: Any, example: Example, max_length: int) -> dict[str, Any]:
        """Likewise."""
        return TextToText(reader.pad_token_id)([encode(reader, example, max_length, two_texts=True)])

    def _encoded(self, examples: list[Example], what: str, target_tokens: int | None = None) -> EncodedRows:
        texts = apply_template(self.template, examples, self.tokenizer, self.system_prompt)
        return encode_all(self.tokenizer, texts, self.max_length, what, target_tokens, two_texts=True)

    def _collator(self, with_examples: bool) -> Callable[[list[Any]], dict[str, Any]]:
        return TextToText(self.tokenizer.pad_token_id, with_examples)


class TextToText:
    """Lay encoded rows out for an encoder and a decoder.

    Args:
        pad_token_id: the tokenizer's.
        with_examples: add the `Example` objects, for evaluation.
    """

    def __init__(self, pad_token_id: int, with_examples: bool = False) -> None:
        self.pad_token_id, self.with_examples = pad_token_id, with_examples

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        """Return input_ids and attention_mask (b, s), labels (b, t), and the rows' numbers (b,)."""
        batch: dict[str, Any] = {
            "input_ids": padded([row.prompt_ids for row in rows], self.pad_token_id),
            "attention_mask": padded([[1] * len(row.prompt_ids) for row in rows], 0),
            "labels": padded([row.target_ids for row in rows], IGNORED),
            "rows": torch.tensor([row.row for row in rows], dtype=torch.int64),
        }
        return batch | ({"examples": [row.example for row in rows]} if self.with_examples else {})
