"""From texts and pairs of texts to tokens, and from tokens to right-padded batches for a classifier.

Letters: b rows, s columns. A row has the tokenizer's special tokens::

    cls a1 a2 sep b1 b2 sep pad pad     input_ids, attention_mask, token_type_ids (if the tokenizer has them)
    label                               (b,) int64 classes, or float32 scores

Masks come from lengths, never from comparing ids with the pad id.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .encoding_cache import prepare
from .labelled import LabelledText
from .tokenizer_digest import encoding_settings

log = logging.getLogger(__name__)

TYPES = "token_type_ids"


class EncodedTexts(Dataset[dict[str, Any]]):
    """Encoded rows in a single token array; the 363,846 rows of QQP take 45 MB instead of half a gigabyte.

    A row longer than `max_length` loses tokens one at a time at the end of the longer text of its pair (the tokenizers'
    `longest_first`); the number of such rows is logged, and available as `truncated`. `lengths` holds the number of
    tokens in each row, and `targets` the number of targets over which its loss is averaged: one label.

    Raises:
        ValueError: if `max_length` leaves no room for one token of each text in addition to the special tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[LabelledText],
        max_length: int,
        what: str = "rows",
    ) -> None:
        least = tokenizer.num_special_tokens_to_add(pair=True) + 2
        if max_length < least:
            raise ValueError(f"max_length must be at least {least} for pairs of texts; got {max_length}")
        self.examples = list(examples)
        sides = zip(*(example.texts for example in self.examples), strict=True)
        typed = TYPES in (tokenizer("a") if self.examples else ())
        columns = prepare(
            partial(encode_texts, tokenizer=tokenizer, max_length=max_length),
            dict(zip(("first", "second"), map(list, sides), strict=False)) or {"first": []},
            {"ids": "[int32]", "cut": "bool"} | ({TYPES: "[int8]"} if typed else {}),
            depends_on=lambda: encoding_settings("text or pair", tokenizer, max_length),
            what=what,
        )
        self._tokens, lengths = columns["ids"], columns["ids.lengths"]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.lengths, self.targets = lengths.tolist(), [1] * len(lengths)
        # if all types are 0, leave them out: 0 is the default of every model, and decoders take no types
        self._types = columns[TYPES] if typed and columns[TYPES].any() else None
        self.truncated = int(columns["cut"].sum())
        if self.truncated:
            log.warning(
                "%d of %d %s: truncated to %d tokens, longer text first",
                self.truncated, len(self.examples), what, max_length,
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Return row i: input_ids, token_type_ids if there are any, the label and the row's index."""
        place = slice(self._starts[i], self._starts[i + 1])
        row: dict[str, Any] = {"input_ids": self._tokens[place], "label": self.examples[i].label, "row": i}
        return row if self._types is None else row | {TYPES: self._types[place]}


def encode_texts(
    texts: Mapping[str, list[str]],  # first, and second for pairs
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> dict[str, list]:
    """Return the ids, the token types if any, and whether each row was truncated."""
    read: Any = tokenizer  # its type stubs do not know pairs
    sides = [texts[name] for name in ("first", "second") if name in texts]
    # verbose=False: no warnings about texts beyond the model's length, which are truncated below
    whole = read(*sides, verbose=False)
    columns = {"ids": whole["input_ids"]} | ({TYPES: whole[TYPES]} if TYPES in whole else {})
    cut = [len(row) > max_length for row in columns["ids"]]
    for i in (i for i, long in enumerate(cut) if long):
        row = read(
            *(side[i] for side in sides), truncation="longest_first", max_length=max_length, verbose=False
        )
        columns["ids"][i] = row["input_ids"]
        if TYPES in columns:
            columns[TYPES][i] = row[TYPES]
    return {**columns, "cut": cut}


class TextCollator:
    """Pad rows on the right with `pad_token_id`; labels are classes (int64), or scores (float32) for a regression."""

    def __init__(self, pad_token_id: int | None, regression: bool) -> None:
        if pad_token_id is None:
            raise ValueError("the tokenizer has no pad token; base_models.load_tokenizer sets one")
        self.pad_token_id, self.regression = pad_token_id, regression

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, attention_mask, token_type_ids if any (b, s), labels (b,) and the row indices (b,)."""
        ids = [row["input_ids"] for row in rows]
        kind = torch.float32 if self.regression else torch.int64
        batch: dict[str, Any] = {
            "input_ids": padded(ids, self.pad_token_id),
            "attention_mask": padded([np.ones_like(row) for row in ids], 0),
            "labels": torch.tensor([row["label"] for row in rows], dtype=kind),
            "rows": torch.tensor([row["row"] for row in rows], dtype=torch.int64),
        }
        if TYPES in rows[0]:
            batch[TYPES] = padded([row[TYPES] for row in rows], 0)
        return batch


def padded(rows: Sequence[Sequence[int] | np.ndarray], value: int) -> Tensor:  # -> (b, s) int64
    """Return rows of numbers as a matrix, each padded on the right."""
    full = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for i, row in enumerate(rows):
        full[i, : len(row)] = row
    return torch.from_numpy(full)
