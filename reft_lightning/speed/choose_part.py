"""The training forward pass without the part that no intervention can change."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ..adapters.reft.model import ReftModel
from ..base_models.checkpointing import runs_blocks_again
from ..base_models.reading import angles_depend_on_length, keeps_its_columns
from ..base_models.stacks import reads_two_texts
from ..base_models.vision import image_tokens
from .agreement import Difference, check_agreement, found_of
from .frozen_part import (
    SHORTEST,
    FrozenBlocks,
    FrozenPrefix,
    blocks_of,
    last_frozen_block,
    last_untrained_block,
    suffix_lengths,
)

log = logging.getLogger(__name__)

Part = FrozenPrefix | FrozenBlocks


class ShortenedPass:
    """Runs an adapted model in training without its frozen part, if it has one.

    The part is chosen on the first batch, when the model has its device and precision. It is checked on the first batch
    that leaves it out, and on every longer one. If that raises, or logits or losses differ from those of the plain
    pass, training falls back to the plain pass, with one warning.

    Args:
        model: the adapted model, whose base has no dropout in training.
        rows: the encoded training rows, with their ``lengths`` and, if causal, ``prompt_lengths``.
        causal: whether rows have prompts and targets; otherwise they are a classifier's.
        limit: bytes of memory for values kept across epochs, in this process.

    Attributes:
        part: the part to leave out; None before it is chosen, or if there is none.
    """

    def __init__(self, model: Any, rows: Any, *, causal: bool, limit: int = 0) -> None:
        self.model = model
        self.part: Part | None = None
        self._choose = partial(choose_part, model, rows, causal=causal, limit=limit)
        self._is_chosen = False
        self._checked = 0  # columns of the longest batch for which leaving out the part was found exact

    def __call__(self, inputs: Mapping[str, Any], rows: Sequence[int], boundary: int | None = None) -> Any:
        """Return the model's output.

        Args:
            inputs: inputs of the model; if there are targets, with labels and logits for their columns only.
            rows: the numbers of the training rows they come from.
            boundary: the column in which targets start; None for a classifier.
        """
        if not self._is_chosen:
            self._is_chosen = True
            try:
                self.part = self._choose()
            except Exception as error:
                self._refuse(f"its frozen part could not be found ({type(error).__name__}: {error})")
        if self.part is None or not self.part.columns(rows, boundary):
            return self.model(**inputs)
        if inputs["input_ids"].shape[1] <= self._checked:
            return self.part(inputs, rows, boundary)
        try:
            self._check(self.part, inputs, rows, boundary)
            output = self.part(inputs, rows, boundary)
        except Exception as error:
            reason = (
                str(error) if isinstance(error, Difference) else f"failed ({type(error).__name__}: {error})"
            )
            self._refuse(f"computing {self.part.name} separately {reason}")
            return self.model(**inputs)
        self._checked = inputs["input_ids"].shape[1]
        return output

    def _check(
        self, part: Part, inputs: Mapping[str, Any], rows: Sequence[int], boundary: int | None
    ) -> None:
        plain, short = partial(self.model, **inputs), partial(part, inputs, rows, boundary)
        found_of(self.model, short)  # fills the store, so that the comparison reads from it
        check_agreement(self.model, inputs, plain, short)

    def _refuse(self, reason: str) -> None:
        self.part = None
        log.warning("%s: %s; falling back to the plain pass", type(self.model.base_model).__name__, reason)


def choose_part(model: Any, rows: Any, *, causal: bool, limit: int = 0) -> Part | None:
    """Return the part to leave out of a model's training pass; None if there is none.

    This is the prefix, for suffix positions, or else the blocks below the first edited layer. It is kept if all rows
    fit into the limit; the prefix saves time even if it is not kept.
    """
    if not isinstance(model, ReftModel) or model.config.beside or len(model.adapters) > 1:
        return None
    if reason := _nothing_constant(model):
        log.info("nothing is left out of training steps: %s", reason)
        return None
    lengths = torch.tensor(rows.lengths)
    prompts = torch.tensor(rows.prompt_lengths) if causal else None
    prefix = None
    if prompts is not None and not any(positions.needs_mask for positions, _ in model.positions.values()):
        prefix = prefix_of(model, prompts, suffix_lengths(model, prompts, lengths - prompts))
    if prefix is not None and prefix.can_be_kept and prefix.bytes <= limit:
        prefix.keep()
        return _kept(prefix, len(lengths))
    if prefix is not None and limit and not prefix.can_be_kept:
        log.info("prefixes are not kept: a sliding-window cache does not hold every column")
    blocks = _blocks(model, lengths, prompts) if limit else None
    if blocks is not None and blocks.bytes <= limit:
        return _kept(blocks, len(lengths))
    if limit:
        log.warning("kept.limit_gb has no effect: %s", _why_not(prefix, blocks))
    if prefix is not None:
        log.info("the prompt up to the first edited token runs without gradient")
    return prefix


def _nothing_constant(model: ReftModel) -> str:
    """Return why no part of a pass can be left out, whatever its rows; empty if there is no reason."""
    base = model.base_model
    if runs_blocks_again(base):
        return "gradient checkpointing recomputes all of them"
    if isinstance(base, FSDPModule):
        return "all ranks must run a sharded base equally often"
    if reads_two_texts(base):
        return "an encoder and a decoder read different texts"
    return needs_whole_batches(model)


def needs_whole_batches(model: ReftModel) -> str:
    """Return why rows, or parts of them, cannot be read outside their batch; empty if they can."""
    adapter, config = model.adapters.first, model.base_model.config
    if adapter.seeing_rows:
        return f"{adapter.seeing_rows} needs whole prompts"
    if adapter.critical:
        return "the edited tokens are found in whole prompts"
    if image_tokens(config):
        return "rows may contain images"
    if angles_depend_on_length(config):
        return "RoPE's angles depend on the longest row of a batch"
    return ""


def prefix_of(model: ReftModel, prompts: Tensor, suffixes: Tensor) -> FrozenPrefix | None:  # (n,), (n,)
    """Return the part of rows before their first edited token, see :class:`FrozenPrefix`; None if there is none."""
    trains_blocks = last_untrained_block(model) < len(blocks_of(model)) - 1
    if not keeps_its_columns(model.base_model):
        log.info(
            "prompts are not split at their first edited token: tokens before it attend to those after it"
        )
        return None
    if not model.sites or trains_blocks or int((prompts - suffixes).max()) < SHORTEST:
        return None
    try:
        return FrozenPrefix(model, prompts, suffixes)
    except ValueError as error:
        log.info("prompts are not split at their first edited token: %s", error)
        return None


def _blocks(model: ReftModel, lengths: Tensor, prompts: Tensor | None) -> FrozenBlocks | None:
    last = last_frozen_block(model)
    if last < 0:
        return None
    try:
        return FrozenBlocks(model, last, lengths, prompts)
    except ValueError as error:
        log.warning("the output of block %d is not kept: %s", last, error)
        return None


def _kept(part: Part, rows: int) -> Part:
    log.info("keeping %s of %d rows, %.2f GB of memory", part.name, rows, part.bytes / 1e9)
    return part


def _why_not(prefix: FrozenPrefix | None, blocks: FrozenBlocks | None) -> str:
    parts: list[Part] = [prefix] if prefix is not None and prefix.can_be_kept else []
    parts += [blocks] if blocks is not None else []
    needed = [f"{part.name} of all rows would take {part.bytes / 1e9:.3g} GB" for part in parts]
    return ", ".join(needed) or "almost every layer depends on an edit or a trained weight"
