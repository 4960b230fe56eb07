"""Read batches whose rows share their prompts, without reading a column twice.

An evaluation reads the same prompts several times: for the likelihood of each option, for the loss of the target, and
for generation. These batches begin with the same columns: those of the prompts, and often the first columns of the
targets ("the correct answer is ..."). Their keys, values and logits are kept.

Every batch is read in full if the model's cache does not hold every column (sliding windows, linear attention, virtual
tokens), if columns depend on those after them, or if the prompts differ (a long target may cut its prompt).

The logits equal those of a full read up to rounding, because the shapes of the matrix products differ: with a 16-bit
base model a near tie between options may resolve differently (counts in ``experiments/speed/README.md``). If the
positions P are a callable, it sees the columns read so far, as in generation.

Shapes: b rows, s columns of prompt | target, t target columns, v tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..base_models.caches import CACHE, holds_columns
from ..base_models.reading import keeps_its_columns

COLUMNS = ("input_ids", "attention_mask", "prompt_mask")
OF_BATCHES = (*COLUMNS, "labels", "logits_to_keep", "boundary", "rows", "examples")
OF_TOKENS = ("type_ids", "edit_mask")  # suffixes of arguments with one value per token
SOURCES = ("source_ids", "source_mask")  # of source prompts, which interchange interventions read


@dataclass
class _Read:
    columns: dict[str, Tensor]  # (b, s) each
    boundary: int
    logits: Tensor  # (b, t + 1, v)
    cache: DynamicCache | None  # of all s columns


def seen_in(batch: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Return what a batch contains in addition to its text: images, source prompts, and values of its first columns."""
    others = {name: value for name, value in batch.items() if name not in OF_BATCHES}
    return {name: value[:, :width] if name.endswith(OF_TOKENS) else value for name, value in others.items()}


def sources_in(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the source prompts of a batch's rows, which do not depend on the columns read."""
    return {name: batch[name] for name in SOURCES if name in batch}


class ColumnReader:
    """Read one batch after another with one model, reusing the columns read last.

    The model must not change in the meantime: do not take a training step, or enter or leave ``disabled()``.

    Args:
        model: an adapted model. ``forward`` takes a cache with masks of all columns, and returns ``logits`` and
            the cache.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._last: _Read | None = None

    @torch.no_grad()
    def logits(self, batch: dict[str, Any]) -> Tensor:  # -> (b, t + 1, v)
        """Return the logits after the prompts and after each target column.

        Args:
            batch: ``input_ids``, ``attention_mask``, ``prompt_mask`` (b, s) and ``boundary``, the column where prompts
                end and targets start. With images or other inputs, nothing is reused.
        """
        boundary, columns = batch["boundary"], {name: batch[name] for name in COLUMNS}
        width = columns["input_ids"].shape[1]
        if width < boundary:
            raise ValueError(f"prompts end at column {boundary}, but the batch has only {width} columns")
        seen = seen_in(batch, width)
        shared = 0 if seen else self._shared(columns, boundary)
        last, self._last = self._last, None  # so a failed read leaves no inconsistent state
        if shared == 0 or last is None:
            last = None
            logits, cache = self._read(columns, 0, width - boundary + 1, None, seen)
        else:
            logits, cache = last.logits[:, : shared - boundary + 1], last.cache
            if cache is not None:
                _narrow(cache, shared)
            if shared < width:
                new, cache = self._read(columns, shared, width - shared, cache, seen)
                logits = torch.cat([logits, new], 1)
        self._last = _Read(columns, boundary, logits, cache)
        return logits

    def take_cache(self) -> DynamicCache | None:
        """Return the keys and values of all columns read last, which the caller may change; forget everything else.

        Returns None if the cache does not hold every column.
        """
        last, self._last = self._last, None
        return None if last is None else last.cache

    def forget(self) -> None:
        """Forget what was read, to free its memory."""
        self._last = None

    def _read(
        self,
        columns: dict[str, Tensor],
        start: int,
        keep: int,
        cache: DynamicCache | None,
        seen: Mapping[str, Any],
    ) -> tuple[Tensor, DynamicCache | None]:
        inputs: dict[str, Any] = {**seen, **columns, "input_ids": columns["input_ids"][:, start:]}
        if cache is not None:
            inputs[CACHE] = cache
        output = self.model(**inputs, logits_to_keep=keep, use_cache=True)
        cache = output.get(CACHE)
        holds = holds_columns(cache, columns["input_ids"].shape[1]) and keeps_its_columns(
            self.model.base_model
        )
        return output.logits[:, -keep:], cache if holds else None

    def _shared(self, columns: dict[str, Tensor], boundary: int) -> int:
        """Return the number of leading columns that can be reused: zero, or at least all columns of the prompts."""
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
    """Keep only the first columns; the next read copies them when it appends its own."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., :width, :], layer.values[..., :width, :]
