"""Tensors of train rows that are computed once: a flat buffer with a place for each row, in memory or on disk.

A row's place follows from the numbers of tokens of the rows before it, so nothing but the key has to be known to
find it again. On disk a row counts as kept when its checksum is written, and is read only where the checksum holds:
what a killed process left half-written is computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

VALUES, SUMS, ABOUT = "values.bin", "sums.bin", "about.json"


class KeptRows:
    """A (tokens, width) tensor for each row, as many of the first rows as the limit holds.

    Args:
        lengths: tokens of each row; 0 where nothing is kept of a row.
        width: numbers a token.
        dtype: of the numbers.
        limit: bytes.
        folder: None for memory; otherwise the folder of exactly this model and data (see :func:`key_of`), which
            processes of one machine may share.

    Raises:
        OSError: if the disk has no room for the limit.
    """

    def __init__(
        self, lengths: Sequence[int], width: int, dtype: torch.dtype, limit: int, folder: Path | None = None
    ) -> None:
        self.lengths, self.width = torch.as_tensor(lengths, dtype=torch.int64), width
        ends = self.lengths.cumsum(0) * width
        fits = int((ends * dtype.itemsize <= limit).sum())
        self.starts = (ends - self.lengths * width)[:fits]
        size = int(ends[fits - 1]) if fits else 0
        self.bytes = size * dtype.itemsize
        if folder is None:
            self.values = torch.empty(size, dtype=dtype)
            self.sums = torch.zeros(fits, dtype=torch.int64)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self.values = _mapped(folder / VALUES, size, dtype)
            self.sums = _mapped(folder / SUMS, fits, torch.int64)
        self._checked = torch.full((fits,), folder is None)

    def __len__(self) -> int:
        """Return the number of rows that have a place."""
        return len(self.starts)

    def has(self, row: int) -> bool:
        """Whether a row is kept; the first read of a row from disk compares its checksum."""
        if not 0 <= row < len(self) or not self.sums[row]:
            return False
        if not self._checked[row]:
            self._checked[row] = self.sums[row] == _checksum(self._place(row))
        return bool(self._checked[row])

    def read(self, row: int) -> Tensor:  # (tokens, width)
        """Return what was written for a row."""
        return self._place(row).view(-1, self.width)

    def write(self, row: int, value: Tensor) -> None:  # (tokens, width)
        """Keep a row, where it has a place.

        Raises:
            ValueError: if the row has another number of tokens, so that it belongs to other data.
        """
        if not 0 <= row < len(self):
            return
        if value.shape != (self.lengths[row], self.width):
            raise ValueError(
                f"row {row} has {int(self.lengths[row])} tokens of {self.width} numbers; got {tuple(value.shape)}"
            )
        place = self._place(row)
        place.copy_(value.reshape(-1))
        self.sums[row] = _checksum(place)
        self._checked[row] = True

    def _place(self, row: int) -> Tensor:
        start = int(self.starts[row])
        return self.values[start : start + int(self.lengths[row]) * self.width]


def _checksum(values: Tensor) -> int:
    return zlib.crc32(values.view(torch.uint8).numpy()) + 1  # 0: not written


def _mapped(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor whose memory is a file; room for it is taken now, lest a full disk kills the process later."""
    with path.open("ab") as file:
        needed = size * dtype.itemsize
        if file.tell() < needed:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, needed)
            else:  # macOS
                file.truncate(needed)
    return (
        torch.from_file(str(path), shared=True, size=size, dtype=dtype)
        if size
        else torch.empty(0, dtype=dtype)
    )


def key_of(model: nn.Module, about: Mapping[str, Any], tokens: Iterable[Sequence[int]]) -> str:
    """Return a hash of everything that kept tensors depend on.

    Args:
        model: the base model: names, types and bits of its frozen parameters and buffers, and its configuration.
        about: what is kept, at which layer, versions; any of it that differs makes another key.
        tokens: of each row.
    """
    found = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    found.update(model.config.to_json_string().encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.requires_grad:
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for row in tokens:
        found.update(torch.tensor([len(row), *row], dtype=torch.int64).numpy())
    return found.hexdigest()[:32]


def describe(folder: Path, about: Mapping[str, Any]) -> None:
    """Write what a folder keeps, for whoever wonders whether it may be deleted: it may, always."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).write_text(json.dumps(about, indent=2, default=str) + "\n", encoding="utf-8")
