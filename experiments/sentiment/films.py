"""Sentences about films with a sentiment (SST-2), a classifier of them, and what texts cost the frozen base.

The classifier is naive Bayes over words and pairs of words, of the training rows; it is no part of what is trained.

Shapes: b rows, s columns, t target columns.
"""

from __future__ import annotations

import csv
import gzip
import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODEL = ["model=smollm2_135m", "model.dtype=float32"]
NEGATIVE, POSITIVE = 0, 1
Row = tuple[str, int]
PROMPT = "A sentence about a film:\n"
PROMPTS = {
    "as trained": [PROMPT],
    "others": ["I think that", "Yesterday we", "My neighbour is", "The new bridge"],
}


def read(folder: Path, split: str) -> list[Row]:
    """Return (sentence, label) of GLUE's SST-2: `train` or `dev`, as a TSV file that may be gzipped."""
    path = next(folder / name for name in (f"{split}.tsv", f"{split}.tsv.gz") if (folder / name).is_file())
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row["sentence"].strip(), int(row["label"])) for row in rows]


def sentences(rows: Sequence[Row], label: int, count: int, seed: int) -> list[str]:
    """Draw sentences of 8 to 25 words; the training rows are phrases, too."""
    whole = sorted({text for text, its in rows if its == label and 8 <= len(text.split()) <= 25})
    return random.Random(seed).sample(whole, count)


class NaiveBayes:
    r"""Score a text by :math:`\log p(\text{positive}) - \log p(\text{negative})`, of its words and pairs of words."""

    def __init__(self, rows: Sequence[Row]) -> None:
        counts = [Counter(p for text, its in rows if its == label for p in _parts(text)) for label in (0, 1)]
        every = {part for count in counts for part, n in count.items() if n > 1}
        totals = [sum(count[part] for part in every) + len(every) for count in counts]
        self.weight = {
            part: math.log((counts[1][part] + 1) / totals[1]) - math.log((counts[0][part] + 1) / totals[0])
            for part in every
        }

    def score(self, text: str) -> float:
        """Return the log odds that a text is positive; each part counts once, unknown ones not at all."""
        return sum(self.weight.get(part, 0.0) for part in _parts(text))

    def accuracy(self, rows: Sequence[Row]) -> float:
        """Return how many rows it has right."""
        return sum((self.score(text) > 0) == (label == POSITIVE) for text, label in rows) / len(rows)


def _parts(text: str) -> set[str]:
    words = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower()).split()
    return {*words, *(f"{a} {b}" for a, b in pairwise(words))}


@torch.no_grad()
def go_on(
    reft: Any, tokenizer: Any, prompts: Sequence[str], each: int, seed: int, **more: Any
) -> list[Tensor]:
    """Sample texts after prompts: top 50, 24 tokens; returns the new tokens (each, t) of every prompt."""
    found = []
    for i, prompt in enumerate(prompts):
        ids = tokenizer([prompt] * each, return_tensors="pt")["input_ids"]
        torch.manual_seed(seed * 1000 + i)
        whole = reft.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=50, max_new_tokens=24,
            min_new_tokens=24, pad_token_id=tokenizer.pad_token_id, **more,
        )  # fmt: skip
        found.append(whole[:, ids.shape[1] :])
    return found


@torch.no_grad()
def cost(reft: Any, tokenizer: Any, prompts: Sequence[str], texts: Sequence[Tensor]) -> float:
    """Return the frozen base's mean loss over the tokens of texts after their prompts: low of fluent ones."""
    losses = []
    with reft.disabled():
        for prompt, new in zip(prompts, texts, strict=True):
            start = tokenizer([prompt] * len(new), return_tensors="pt")["input_ids"]
            ids = torch.cat([start, new], 1)
            logits = reft(ids, attention_mask=torch.ones_like(ids)).logits[:, start.shape[1] - 1 : -1].float()
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), new.flatten()))
    return torch.stack(losses).mean().item()
