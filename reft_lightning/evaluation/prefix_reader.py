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
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..base_models.caches import holds_columns
from ..base_models.reading import keeps_its_columns

COLUMNS = ("input_ids", "attention_mask", "prompt_mask")
OF_BATCHES = (*COLUMNS, "labels", "logits_to_keep", "boundary", "rows", "examples")
OF_TOKENS = ("type_ids", "edit_mask")  # how arguments end that say of each token what it is
SOURCES = ("source_ids", "source_mask")  # of other texts, which interchange interventions read


@dataclass
class _Read:
    columns: dict[str, Tensor]  # (b, s) each
    boundary: int
    logits: Tensor  # (b, t + 1, v)
    cache: DynamicCache | None  # of all s columns


def seen_in(batch: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Return what a batch holds besides its text: images, other texts, and what is said of the first columns."""
    others = {name: value for name, value in batch.items() if name not in OF_BATCHES}
    return {name: value[:, :width] if name.endswith(OF_TOKENS) else value for name, value in others.items()}


def sources_in(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the other texts of a batch's rows, whatever is read after their prompts."""
    return {name: batch[name] for name in SOURCES if name in batch}


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
                prompts end and targets start; perhaps images, with which everything is read anew.
        """
        boundary, columns = batch["boundary"], {name: batch[name] for name in COLUMNS}
        width = columns["input_ids"].shape[1]
        if width < boundary:
            raise ValueError(f"prompts end at column {boundary}, but the batch has only {width} columns")
        seen = seen_in(batch, width)
        shared = 0 if seen else self._shared(columns, boundary)
        last, self._last = self._last, None  # a read that fails leaves nothing half done
        if shared == 0 or last is None:
            last = None
            logits, cache = self._read(columns, 0, width - boundary + 1, None, seen)
        else:
            logits, cache = last.logits[:, : shared - boundary + 1], last.cache
            if cache is not None:
                _narrow(cache, shared)
            if shared < width:
                new, cache = self._read(columns, shared, width - shared, cache)
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
        seen: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[Tensor, DynamicCache | None]:
        inputs: dict[str, Any] = {**seen, **columns, "input_ids": columns["input_ids"][:, start:]}
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
