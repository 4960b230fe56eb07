"""The forward pass of training: which constant part is left out of it, and whether that gives the same numbers."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from ..adapters.reft.model import ReftModel
from ..adapters.reft.sites import block_path
from ..base_models.checkpointing import runs_blocks_again
from .agreement import FirstBatch, logits_of
from .frozen_part import (
    SHORTEST,
    ConstantInput,
    ConstantPrefix,
    last_constant_block,
    last_untrained,
    tokens_behind,
)
from .row_store import KeptRows, describe, key_of

log = logging.getLogger(__name__)

FORMAT = 1  # of kept tensors: another number makes other keys

Part = ConstantPrefix | ConstantInput


class TrainingPass:
    """The adapted model's forward pass without its constant part.

    The first batch of which a part is left out is computed both ways. A model for which the logits differ is trained
    plainly, with a warning.

    Args:
        model: the adapted model.
        part: its constant part.
    """

    def __init__(self, model: ReftModel, part: Part) -> None:
        self.model, self.part = model, part
        self.first_batch = FirstBatch(model, f"computing {part.name} apart")

    def __call__(self, inputs: Mapping[str, Any], rows: Sequence[int], boundary: int | None = None) -> Any:
        """Return what the model returns for the inputs.

        Args:
            inputs: of ``ReftModel.forward``; with targets, labels and logits of their columns alone.
            rows: the numbers of the train rows they come from.
            boundary: the column in which targets start; None for a classifier.
        """
        rows = [int(row) for row in rows]
        plain, short = partial(self.model, **inputs), partial(self.part, inputs, rows, boundary)
        if not self.part.columns(rows, boundary):
            return plain()
        if self.first_batch.refused is None:
            logits_of(self.model, short)  # the second time reads what the first one kept
        chosen = self.first_batch.choose(inputs, plain, short)
        if self.first_batch.refused:
            self.part.kept = None
        return chosen()


def training_pass(
    model: Any,
    rows: Any,
    *,
    causal: bool,
    limit: int = 0,
    folder: Path | None = None,
    precision: str = "32-true",
    compiled: bool = False,
) -> TrainingPass | None:
    """Return the pass that leaves out what is constant; None where nothing is, or nothing is worth it.

    To be called where the model is trained: on its device, in its precision.

    Args:
        model: the adapted model, whose base has no dropout in training.
        rows: the encoded train rows, with their ``lengths`` and, if causal, ``prompt_lengths``.
        causal: whether they have prompts and targets; otherwise they are a classifier's.
        limit: bytes to keep over the epochs, in this process.
        folder: keep them on disk, below it, for later runs of the same model and data; None: in memory.
        precision: of the trainer; what is kept in one is not read in another.
        compiled: whether steps are; others, whose attention rounds less, do not read what compiled ones keep.
    """
    if not isinstance(model, ReftModel):
        return None
    if runs_blocks_again(model.base_model):
        return None
    parts = _parts(model, rows, causal, limit)
    shares = {part: _share(part, limit) for part in parts}
    part = min(parts, key=lambda part: _cost(part, shares[part]), default=None)
    if part is None or _cost(part, shares[part]) >= _plain_cost(model):
        if limit:
            log.warning("nothing is kept: nearly all of the model stands behind an edit or a trained weight")
        return None
    if not shares[part]:
        log.info("gradients leave out the prompt up to the first edited token")
        return TrainingPass(model, part)
    if folder is not None:
        folder = Path(folder).expanduser() / _key(model, part, rows, precision, compiled)
        name = model.config.base_model or type(model.base_model).__name__
        describe(folder, {"model": name, "what": part.name, "rows": len(rows), "precision": precision})
    part.kept = KeptRows(part.lengths, part.width, part.dtype, limit, folder)
    log.info("keeps %s of %d of %d rows, %.2f GB %s", part.name, len(part.kept), len(rows), part.kept.bytes / 1e9,
             f"in {folder}" if folder else "of memory")  # fmt: skip
    return TrainingPass(model, part)


def _parts(model: ReftModel, rows: Any, causal: bool, limit: int) -> list[Part]:
    """Return the constant parts there are."""
    parts: list[Part] = []
    prompts, lengths = None, torch.tensor(rows.lengths)
    if causal:
        prompts = torch.tensor(rows.prompt_lengths)
        behind = tokens_behind(model, prompts, lengths - prompts)
        frozen = last_untrained(model) == len(_blocks(model)) - 1
        if model.sites and frozen and int((prompts - behind).max()) >= SHORTEST:
            try:
                parts.append(ConstantPrefix(model, prompts, lengths - prompts, behind))
            except ValueError as error:
                log.info("prompts are not split at their first edited token: %s", error)
    last = last_constant_block(model) if limit else -1
    if last >= 0:
        try:
            parts.append(ConstantInput(model, last, lengths, prompts))
        except ValueError as error:
            log.warning("the output of block %d is not kept: %s", last, error)
    return parts


# --- which part is worth more ---------------------------------------------------------------------------------------
# Costs are forward and backward passes of a block for a token; a frozen block's backward pass costs about as much as
# its forward pass, and is needed behind the lowest site alone.


def _share(part: Part, limit: int) -> float:
    """Return which share of what is constant can be kept."""
    needed = int(part.lengths.sum()) * part.width * part.dtype.itemsize
    return min(1.0, limit / needed) if part.keepable and needed else 0.0


def _cost(part: Part, kept: float) -> float:
    blocks = len(_blocks(part.model))
    backward = _backward(part.model)
    if isinstance(part, ConstantInput):
        above = blocks - 1 - part.last
        return kept * above + (1 - kept) * blocks + backward
    constant = float(part.lengths.sum() / part.tokens.sum())
    return (1 - constant) * (blocks + backward) + constant * (1 - kept) * blocks


def _plain_cost(model: ReftModel) -> float:
    return len(_blocks(model)) + _backward(model)


def _backward(model: ReftModel) -> int:
    """Return how many blocks gradients pass."""
    return len(_blocks(model)) - 1 - last_constant_block(model)


def _blocks(model: ReftModel) -> list[Any]:
    return list(model.base_model.get_submodule(block_path(model.base_model)))


# --- keys -----------------------------------------------------------------------------------------------------------


def _key(model: ReftModel, part: Part, rows: Any, precision: str, compiled: bool) -> str:
    about = {
        "format": FORMAT,
        "what": part.name,
        "dtype": part.dtype,
        "precision": precision,
        "compiled": compiled,
        "products": torch.get_float32_matmul_precision(),
        "device": model.base_model.device.type,
        "attention": model.base_model.config._attn_implementation,
        "lengths": hashlib.sha256(part.lengths.numpy()).hexdigest(),
        "versions": [torch.__version__, transformers.__version__],
    }
    return key_of(model.base_model, about, _tokens(rows))


def _tokens(rows: Any) -> Iterable[list[int]]:
    for row in (rows[i] for i in range(len(rows))):
        if isinstance(row, Mapping):
            yield [*row["input_ids"], *row.get("token_type_ids", ())]
        else:
            yield [*row.prompt_ids, *row.target_ids]
