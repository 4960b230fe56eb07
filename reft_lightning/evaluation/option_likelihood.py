"""Rank the options of multiple-choice rows by likelihood.

The options of a row stand behind the same prompt, which is read once (:class:`~.shared_columns.ColumnReader`).

Shapes: b rows, s columns of prompt | target, t target columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .prefix_reader import COLUMNS, ColumnReader


@torch.no_grad()
def log_likelihood(reader: ColumnReader, batch: dict[str, Any]) -> Tensor:  # -> (b,)
    r"""Return :math:`\log p(\text{target} \mid \text{prompt})`, summed over the target's tokens.

    Args:
        reader: of an adapted model.
        batch: prompt | target with ``boundary``; ``labels`` of all columns or of the last ones.
    """
    width, boundary = batch["input_ids"].shape[1], batch["boundary"]
    labels = batch["labels"][:, batch["labels"].shape[1] - (width - boundary) :]  # (b, t)
    # column i predicts label i + 1, so that nobody needs the last column's logits
    read = {name: batch[name][:, :-1] for name in COLUMNS}
    logits = reader.logits({**read, "boundary": boundary})  # (b, t, v)
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    chosen = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen.masked_fill(labels == -100, 0.0).sum(-1)


def option_log_likelihoods(
    model: Any, batches: Sequence[dict[str, Any]], reader: ColumnReader | None = None
) -> Tensor:  # -> (b, number of options)
    r"""Return :math:`\log p(\text{option} \mid \text{prompt})`, summed over the option's tokens.

    Args:
        model: an adapted model.
        batches: one batch for each option index, rows in the same order, see :func:`log_likelihood`.
        reader: of the model, where something else is asked about the same prompts.
    """
    reader = reader or ColumnReader(model)
    return torch.stack([log_likelihood(reader, batch) for batch in batches], dim=-1)


def with_draft(
    batch: dict[str, Any], batches: Sequence[dict[str, Any]], choice: Sequence[int] | Tensor
) -> dict[str, Any]:
    """Return a batch with the chosen option of each row as its target, for :func:`~.decoding.generate` to check.

    A model that knows the format of the answers says its likeliest option: the better draft than the gold target
    where the two differ. The batch comes back as it is where the prompt of an option is not the batch's own.

    Args:
        batch: prompt | target with ``boundary``; not changed.
        batches: one for each option index.
        choice: (b,), the index for each row.
    """
    boundary = batch["boundary"]
    prompt = {name: batch[name][:, :boundary] for name in COLUMNS}
    for option in batches:
        same = option["boundary"] == boundary and all(
            torch.equal(option[name][:, :boundary], columns) for name, columns in prompt.items()
        )
        if not same:
            return batch
    width = max(option["input_ids"].shape[1] for option in batches)
    drafted = {**batch}
    rows = torch.arange(len(prompt["input_ids"]), device=prompt["input_ids"].device)
    chosen = torch.as_tensor(choice, device=rows.device)
    for name in COLUMNS:  # columns beyond an option's own are not real: 0 in every mask
        padded = [
            torch.nn.functional.pad(option[name], (0, width - option[name].shape[1])) for option in batches
        ]
        drafted[name] = torch.stack(padded)[chosen, rows]
    drafted.pop("labels", None)  # they are the gold target's
    return drafted
