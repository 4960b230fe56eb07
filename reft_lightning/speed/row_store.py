"""Tensors of training rows that are computed once and kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


class RowStore:
    """A tensor for each training row, computed when the row is first read."""

    def __init__(self) -> None:
        self._tensors: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """Return the number of rows computed so far."""
        return len(self._tensors)

    def read(self, rows: Sequence[int], compute: Callable[[list[int]], Sequence[Tensor]]) -> list[Tensor]:
        """Return the tensors of some rows.

        Args:
            rows: numbers of training rows.
            compute: takes indices into ``rows`` and returns their tensors; called for rows that were not read before.
        """
        missing = [place for place, row in enumerate(rows) if row not in self._tensors]
        if missing:
            for place, tensor in zip(missing, compute(missing), strict=True):
                # a view would keep the whole batch alive
                self._tensors[rows[place]] = tensor.to("cpu", copy=True)
        return [self._tensors[row] for row in rows]
