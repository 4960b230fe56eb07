"""Read batches whose rows share their prompts, without reading a column twice.

An evaluation reads the same prompts several times: for the likelihood of each option, for the loss of the target, and
to generate. These batches begin with the same columns: those of the prompts, and often the first of the targets ("the
correct answer is ..."). Their keys and values, and their logits, are kept.

If a model's cache does not hold every column (sliding windows, linear attention, virtual tokens), if its columns depend
on what comes after them, or the prompts differ (a long target may cut its prompt), every batch is read whole.

The logits are those of a whole read up to rounding, as matrix products have other shapes: with a 16-bit base model a
near tie between options may resolve differently (counts in ``experiments/speed/README.md``). Positions P that are a
callable see the columns read so far, as in generation.

Shapes: b rows, s columns of prompt | target, t target columns, v tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..base_models.caches import holds_columns
from ..base_models.reading import keeps_its_columns

COLUMNS = ("input_ids", "attention_mask", "prompt_mask")
ROWS = ("source_ids", "source_mask")  # what else a batch may hold of its rows, the same in all reads of a reader


def of_rows(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what a batch holds of its rows besides their columns, for the model."""
    return {name: batch[name] for name in ROWS if name in batch}


@dataclass
class _Read:
    columns: dict[str, Tensor]  # (b, s) each
    boundary: int
    logits: Tensor  # (b, t + 1, v)
    cache: DynamicCache | None  # of all s columns


class ColumnReader:
    """Reads one batch after another with one model, and keeps what it read last.

    The model must not change in the meantime: no training step, neither entering nor leaving ``disabled()``.

    Args:
        model: an adapted model. ``forward`` takes ``past_key_values`` with masks of all columns, and returns
            ``logits`` and ``past_key_values``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._last: _Read | None = None

    @torch.no_grad()
    def logits(self, batch: dict[str, Any]) -> Tensor:  # -> (b, t + 1, v)
        """Return the logits after the prompts and after each target column.

        Args:
            batch: ``input_ids``, ``attention_mask``, ``prompt_mask`` (b, s) and ``boundary``, the column in which
                prompts end and targets start.

        Raises:
            ValueError: if the batch ends before its boundary.
        """
        boundary, columns = batch["boundary"], {name: batch[name] for name in COLUMNS}
        more = of_rows(batch)
        width = columns["input_ids"].shape[1]
        if width < boundary:
            raise ValueError(f"prompts end at column {boundary}, but the batch has only {width} columns")
        shared = self._shared(columns, boundary)
        last, self._last = self._last, None  # a read that fails leaves nothing half done
        if shared == 0 or last is None:
            last = None
            logits, cache = self._read(columns, 0, width - boundary + 1, None, more)
        else:
            logits, cache = last.logits[:, : shared - boundary + 1], last.cache
            if cache is not None:
                _narrow(cache, shared)
            if shared < width:
                new, cache = self._read(columns, shared, width - shared, cache, more)
                logits = torch.cat([logits, new], 1)
        self._last = _Read(columns, boundary, logits, cache)
        return logits

    def take_cache(self) -> DynamicCache | None:
        """Hand over the keys and values of all columns read last, which the caller may change; forget everything else.

        None if the cache does not hold every column.
        """
        last, self._last = self._last, None
        return None if last is None else last.cache

    def forget(self) -> None:
        """Free the memory of what was read."""
        self._last = None

    def _read(
        self,
        columns: dict[str, Tensor],
        start: int,
        keep: int,
        cache: DynamicCache | None,
        more: dict[str, Tensor],
    ) -> tuple[Tensor, DynamicCache | None]:
        inputs: dict[str, Any] = {**columns, **more, "input_ids": columns["input_ids"][:, start:]}
        if cache is not None:
            inputs["past_key_values"] = cache
        output = self.model(**inputs, logits_to_keep=keep, use_cache=True)
        cache = output.get("past_key_values")
        holds = holds_columns(cache, columns["input_ids"].shape[1]) and keeps_its_columns(
            self.model.base_model
        )
        return output.logits[:, -keep:], cache if holds else None

    def _shared(self, columns: dict[str, Tensor], boundary: int) -> int:
        """Return how many leading columns need not be read: none, or at least the prompts'."""
        last = self._last
        if (
            last is None
            or last.boundary != boundary
            or len(last.columns["input_ids"]) != len(columns["input_ids"])
        ):
            return 0
        width = min(last.columns["input_ids"].shape[1], columns["input_ids"].shape[1])
        (ids, real, prompt), (ids_before, real_before, prompt_before) = (
            [c[name][:, :width] for name in COLUMNS] for c in (columns, last.columns)
        )
        same = (real == real_before) & (prompt == prompt_before) & ((ids == ids_before) | (real == 0))
        count = int(same.all(0).long().cumprod(0).sum())
        if not keeps_its_columns(self.model.base_model):
            widths = {c["input_ids"].shape[1] for c in (columns, last.columns)}
            return count if widths == {count} else 0
        whole = count == columns["input_ids"].shape[1]
        return count if count >= boundary and (last.cache is not None or whole) else 0


def _narrow(cache: Any, width: int) -> None:
    """Keep the first columns; the next read copies them where it adds its own."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., :width, :], layer.values[..., :width, :]
