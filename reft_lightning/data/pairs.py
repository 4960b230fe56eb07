"""Train rows as pairs: the target that is chosen, and another option, which is rejected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from .encoding import Encoded, EncodedRows
from .example import Example


def rejected(example: Example) -> Example:
    """Return an example whose target is an option that is wrong: of several with text, the one after the target.

    Raises:
        ValueError: for a row without one; names the row.
    """
    place = example.options.index(example.target) if example.target in example.options else -1
    following = (*example.options[place + 1 :], *example.options[: max(place, 0)])
    other = next((option for option in following if option.strip() and option != example.target), None)
    if other is None:
        raise ValueError(
            f"{example.source or example.task}: a pair needs options: the target and an answer that is rejected; the "
            f"row has {', '.join(example.options) or 'none'}. Own rows name them as data.target=chosen "
            "'data.options=[chosen,rejected]'"
        )
    return replace(example, target=other)


class EncodedPairs(Dataset[tuple[Encoded, Encoded]]):
    """Pairs of encoded rows, whose loss is a mean over pairs.

    Args:
        chosen: the rows with their targets.
        rejected: the same rows with a wrong option for their target.
    """

    def __init__(self, chosen: EncodedRows, rejected: EncodedRows) -> None:
        self.chosen, self.rejected = chosen, rejected
        self.examples, self.targets = chosen.examples, [1] * len(chosen)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.chosen)

    def __getitem__(self, i: int) -> tuple[Encoded, Encoded]:
        """Return pair i."""
        return self.chosen[i], self.rejected[i]

    @property
    def lengths(self) -> list[int]:
        """Return the number of tokens of the longer row of each pair."""
        return list(map(max, self.chosen.lengths, self.rejected.lengths))


def collate_pairs(
    collate: Callable[[list[Encoded]], dict[str, Any]], pairs: Sequence[tuple[Encoded, Encoded]]
) -> dict[str, Any]:
    """Return a batch of b pairs as 2 b rows, first those that are chosen."""
    return collate([row for rows in zip(*pairs, strict=True) for row in rows])
