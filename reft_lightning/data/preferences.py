"""Rows as preferences: a chosen and a rejected answer to a prompt, for reward models.

Letters: b pairs, which are 2 b rows; s columns. A row is the whole text, padded on the right; a reward model reads it
like a classifier. The end-of-text token is left out, because it serves as padding in tokenizers without a pad token,
and transformers' classifiers read the last token that is not padding::

    p1 p2 p3 y1 y2 pad      input_ids, attention_mask (2 b, s), chosen answers first
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .encoding import Encoded
from .example import Example
from .families import AnyFamily
from .family import Family
from .generation_data import GenerationData
from .pairs import EncodedAnswers, collate_pairs, rejected
from .texts import padded

PAIR_ACCURACY = "pair_accuracy"


class PreferenceFamily(Family):
    """A family whose rows are pairs of the target and a rejected option."""

    def measures_of(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Return the only measure: how often the chosen answer has the higher reward."""
        return (PAIR_ACCURACY,)

    def main_measure(self, tasks: Sequence[str]) -> str:
        """Return the measure that selects checkpoints."""
        return PAIR_ACCURACY

    def num_labels(self, tasks: Sequence[str]) -> int:
        """Return the number of outputs, which is one: the reward."""
        return 1


def as_preferences(family: AnyFamily) -> PreferenceFamily:
    """Return a family whose rows are read as preferences."""
    if not isinstance(family, Family) or family.kind != "generation":
        raise ValueError(
            f"a reward model compares two answers to a prompt, but the rows of {family.name} are not text questions "
            "with options: choose a family that has them, such as data=skills, or remove the objective"
        )
    # no generated texts to export
    return PreferenceFamily(**{**vars(family), "kind": "preference", "export": None})


class PreferenceData(GenerationData):
    """Loaders of pairs, in training and in evaluation; takes the arguments of :class:`GenerationData`."""

    def _encode(self, examples: list[Example], what: str, training: bool = False) -> EncodedAnswers:
        others = list(map(rejected, examples))
        return EncodedAnswers(
            self._encoded(examples, what), self._encoded(others, f"rejected answers of the {what}")
        )

    def _collator(self, training: bool) -> Callable[[list[Any]], dict[str, Any]]:
        return partial(collate_pairs, partial(whole_texts, self.tokenizer.pad_token_id))


def whole_texts(pad_token_id: int, rows: Sequence[Encoded]) -> dict[str, Any]:
    """Return input_ids and attention_mask (b, s) of prompts with their targets, and the row indices (b,)."""
    texts = [_text(row) for row in rows]
    return {
        "input_ids": padded(texts, pad_token_id),
        "attention_mask": padded([[1] * len(text) for text in texts], 0),
        "rows": torch.tensor([row.row for row in rows], dtype=torch.int64),
    }


def _text(row: Encoded) -> list[int]:
    answer = row.target_ids if row.cut_target else row.target_ids[:-1]  # a truncated target has no eos
    return [*row.prompt_ids, *answer]
