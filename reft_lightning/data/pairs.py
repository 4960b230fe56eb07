"""Rows in pairs: a chosen target and a rejected option, or a prompt and its source prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from .encoding import Encoded, EncodedRows
from .example import Example


def rejected(example: Example) -> Example:
    """Return an example with a wrong option as its target: the next non-empty option after the correct one."""
    place = example.options.index(example.target) if example.target in example.options else -1
    following = (*example.options[place + 1 :], *example.options[: max(place, 0)])
    other = next((option for option in following if option.strip() and option != example.target), None)
    if other is None:
        raise ValueError(
            f"{example.source or example.task}: a pair needs two options, the target and a rejected answer; got "
            f"{', '.join(example.options) or 'none'}. For custom rows set data.target=chosen "
            "'data.options=[chosen,rejected]'"
        )
    return replace(example, target=other)


class EncodedPairs(Dataset[tuple[Encoded, Encoded]]):
    """Pairs of encoded rows.

    Args:
        first: the rows with their targets.
        second: the same rows with a wrong option as the target, or with their source prompts.
        targets: number of targets of each pair, over which its loss is averaged; None counts each pair as one.
    """

    def __init__(self, first: EncodedRows, second: EncodedRows, targets: Sequence[int] | None = None) -> None:
        self.first, self.second = first, second
        self.examples = first.examples
        self.lengths = list(map(max, first.lengths, second.lengths))  # tokens of the longer row
        self.targets = [1] * len(first) if targets is None else targets

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, i: int) -> tuple[Encoded, Encoded]:
        return self.first[i], self.second[i]


class EncodedAnswers(EncodedPairs):
    """Pairs of answers to one prompt; both follow the same prompt, cut to make room for the longer answer."""

    def __getitem__(self, i: int) -> tuple[Encoded, Encoded]:
        chosen, other = super().__getitem__(i)
        if chosen.cut_prompt == other.cut_prompt:
            return chosen, other
        kept = min(chosen, other, key=lambda row: len(row.prompt_ids))
        prompt: dict[str, Any] = {
            name: getattr(kept, name) for name in ("prompt_ids", "cut_prompt", "edited")
        }
        return replace(chosen, **prompt), replace(other, **prompt)


def collate_pairs(
    collate: Callable[[list[Encoded]], dict[str, Any]], pairs: Sequence[tuple[Encoded, Encoded]]
) -> dict[str, Any]:
    """Return a batch of b pairs as 2 b rows, the chosen answers first."""
    return collate([row for rows in zip(*pairs, strict=True) for row in rows])


def collate_sources(
    collate: Callable[[list[Encoded]], dict[str, Any]], pairs: Sequence[tuple[Encoded, Encoded]]
) -> dict[str, Any]:
    """Return a batch of the first rows, with the second rows' prompts left-padded as source_ids and source_mask."""
    rows, sources = (list(side) for side in zip(*pairs, strict=True))
    batch, other = collate(rows), collate(sources)
    prompts = slice(0, other["boundary"])
    return batch | {
        "source_ids": other["input_ids"][:, prompts],
        "source_mask": other["attention_mask"][:, prompts],
    }
