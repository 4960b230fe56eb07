"""The forward pass of training: which constant part is left out of it, and whether that gives the same numbers."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from .constant import SHORTEST, ConstantInput, ConstantPrefix, last_constant_block, tokens_behind
from .kept import KeptRows, describe, key_of
from .model import ReftModel

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the largest logit; 16 bits: 0.05
FORMAT = 1  # of kept tensors: another number makes other keys

Part = ConstantPrefix | ConstantInput


class TrainingPass:
    """The adapted model's forward pass without its constant part.

    The first batch is computed both ways. A model for which they differ is trained plainly, with a warning.

    Args:
        model: the adapted model.
        part: its constant part.
    """

    def __init__(self, model: ReftModel, part: Part) -> None:
        self.model, self.part = model, part
        self._checked = self._refused = False

    def __call__(self, inputs: Mapping[str, Any], rows: Sequence[int], boundary: int | None = None) -> Any:
        """Return what the model returns for the inputs.

        Args:
            inputs: of ``ReftModel.forward``; with targets, labels and logits of their columns alone.
            rows: the numbers of the train rows they come from.
            boundary: the column in which targets start; None for a classifier.
        """
        rows = [int(row) for row in rows]
        if not self._checked:
            self._check(inputs, rows, boundary)
        return self.model(**inputs) if self._refused else self.part(inputs, rows, boundary)

    @torch.no_grad()
    def _check(self, inputs: Mapping[str, Any], rows: Sequence[int], boundary: int | None) -> None:
        plain = self._logits(lambda: self.model(**inputs))
        # the second time reads what the first one kept
        _, short = (self._logits(lambda: self.part(inputs, rows, boundary)) for _ in range(2))
        apart = float("inf")
        if plain.shape == short.shape:
            # padding says anything: nobody reads it
            real = ... if plain.ndim == 2 else inputs["attention_mask"][:, -plain.shape[1] :].bool()
            apart = float((plain - short)[real].abs().max() / plain[real].abs().max().clamp(min=1e-6))
        tolerance = TOLERANCE.get(self.model.base_model.dtype, 0.05)
        self._checked, self._refused = True, not apart <= tolerance
        if self._refused:
            log.warning(
                "%s gives other logits when %s are computed apart (%.2g of the largest, allowed %.2g): trained plainly",
                type(self.model.base_model).__name__, self.part.name, apart, tolerance,
            )  # fmt: skip

    def _logits(self, run: Callable[[], Any]) -> Tensor:
        """Run with the same random numbers for dropout each time."""
        device = self.model.base_model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            return run().logits.float()


def training_pass(
    model: Any, rows: Sequence[Any], *, causal: bool, limit: int = 0, folder: Path | None = None
) -> TrainingPass | None:
    """Return the pass that leaves out what is constant; None where nothing is, or nothing is worth it.

    Args:
        model: the adapted model, whose base has no dropout in training.
        rows: the encoded train rows.
        causal: whether they have prompts and targets; otherwise they are a classifier's.
        limit: bytes to keep over the epochs.
        folder: keep them on disk, below it, for later runs of the same model and data; None: in memory.
    """
    if not isinstance(model, ReftModel) or any(
        vars(module).get("gradient_checkpointing") for module in model.base_model.modules()
    ):
        return None
    parts = _parts(model, rows, causal, limit)
    if not parts:
        if limit:
            log.warning(
                "nothing is kept: every token, in every layer, comes behind an edit or a trained weight"
            )
        return None
    if not limit or not any(part.keepable for part in parts):
        log.info("gradients leave out the prompt up to the first edited token")
        return TrainingPass(model, parts[0])
    parts = [part for part in parts if part.keepable]
    sizes = {part: int(part.lengths.sum()) * part.width * part.dtype.itemsize for part in parts}
    part = next((part for part in parts if sizes[part] <= limit), parts[-1])
    about: dict[str, Any] = {"what": part.name, "rows": len(rows), "bytes": min(sizes[part], limit)}
    if folder is not None:
        folder = Path(folder).expanduser() / _key(model, part, rows)
        describe(folder, about | {"model": model.config.base_model or type(model.base_model).__name__})
    part.kept = KeptRows(part.lengths, part.width, part.dtype, limit, folder)
    log.info("keeps %s of %d of %d rows, %.2f GB %s", part.name, len(part.kept), len(rows), part.kept.bytes / 1e9,
             f"in {folder}" if folder else "of memory")  # fmt: skip
    return TrainingPass(model, part)


def _parts(model: ReftModel, rows: Sequence[Any], causal: bool, limit: int) -> list[Part]:
    """Return the constant parts there are, the one that saves more first."""
    parts: list[Part] = []
    if causal:
        prompts = torch.tensor([len(rows[i].prompt_ids) for i in range(len(rows))])
        targets = torch.tensor([len(rows[i].target_ids) for i in range(len(rows))])
        lengths = prompts + targets
        behind = tokens_behind(model, prompts, targets)
        if model.sites and int((prompts - behind).max()) >= SHORTEST:
            try:
                parts.append(ConstantPrefix(model, prompts, behind))
            except ValueError as error:
                log.info("prompts are not split at their first edited token: %s", error)
    else:
        lengths = torch.tensor(rows.lengths)
    last = last_constant_block(model) if limit else -1
    if last >= 0:
        try:
            parts.append(ConstantInput(model, last, lengths))
        except ValueError as error:
            log.warning("the output of block %d is not kept: %s", last, error)
    return parts


def _key(model: ReftModel, part: Part, rows: Sequence[Any]) -> str:
    about = {
        "format": FORMAT,
        "what": part.name,
        "dtype": part.dtype,
        "attention": model.base_model.config._attn_implementation,
        "lengths": hashlib.sha256(part.lengths.numpy()).hexdigest(),
        "versions": [torch.__version__, transformers.__version__],
    }
    return key_of(model.base_model, about, (_tokens(rows[i]) for i in range(len(rows))))


def _tokens(row: Any) -> list[int]:
    if isinstance(row, Mapping):
        return [*row["input_ids"], *row.get("token_type_ids", ())]
    return [*row.prompt_ids, *row.target_ids]
