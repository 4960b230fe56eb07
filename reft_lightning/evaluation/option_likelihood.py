"""Rank the options of multiple-choice rows by likelihood.

The options of a row share a prompt, which is read only once (:class:`~.prefix_reader.ColumnReader`).

Shapes: b rows, s columns of prompt | target, t target columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..base_models.reading import reading_of
from .prefix_reader import COLUMNS, ColumnReader, seen_in


@torch.no_grad()
def log_likelihood(reader: ColumnReader, batch: dict[str, Any]) -> Tensor:  # -> (b,)
    r"""Return :math:`\log p(\text{target} \mid \text{prompt})`, summed over the target's tokens.

    Args:
        reader: a reader of an adapted model.
        batch: prompt | target with ``boundary``; ``labels`` for all columns or only the last ones.

    Raises:
        ValueError: if the model is not causal, so it reads the target that it should predict.
    """
    base = reader.model.base_model
    if not reading_of(base).causal:
        raise ValueError(
            f"tokens of {type(base).__name__} attend to later tokens, so a pass over prompt and target does not give "
            "the likelihood of the target; choose a causal language model"
        )
    width, boundary = batch["input_ids"].shape[1], batch["boundary"]
    labels = batch["labels"][:, batch["labels"].shape[1] - (width - boundary) :]  # (b, t)
    # column i predicts label i + 1, so the last column's logits are not needed
    read = {name: batch[name][:, :-1] for name in COLUMNS} | seen_in(batch, width - 1)
    logits = reader.logits({**read, "boundary": boundary})  # (b, t, v)
    return summed_log_p(logits, labels)


def summed_log_p(logits: Tensor, labels: Tensor) -> Tensor:  # (b, t, v), (b, t) -> (b,)
    r"""Return the log-probabilities of labels under the logits that predict them, summed over labels except -100."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    chosen = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen.masked_fill(labels == -100, 0.0).sum(-1)


def option_log_likelihoods(
    model: Any, batches: Sequence[dict[str, Any]], reader: ColumnReader | None = None
) -> Tensor:  # -> (b, number of options)
    r"""Return :math:`\log p(\text{option} \mid \text{prompt})`, summed over the option's tokens.

    Args:
        model: an adapted model.
        batches: one batch for each option index, with rows in the same order, see :func:`log_likelihood`.
        reader: a reader of the model, if the same prompts are also read for other purposes.
    """
    reader = reader or ColumnReader(model)
    return torch.stack([log_likelihood(reader, batch) for batch in batches], dim=-1)


def with_draft(
    batch: dict[str, Any], batches: Sequence[dict[str, Any]], choice: Sequence[int] | Tensor
) -> dict[str, Any]:
    """Return a batch with the chosen option of each row as its target, for :func:`~.decoding.generate` to check.

    A model that knows the answer format generates its likeliest option, which is then a better draft than a different
    gold target. If the prompt of an option differs from the batch's (a long option may cut it), the batch is returned
    as is.

    Args:
        batch: prompt | target with ``boundary``; not modified.
        batches: one batch for each option index.
        choice: (b,), the option index of each row.
    """
    boundary = batch["boundary"]
    for option in batches:
        same = (torch.equal(option[name][:, :boundary], batch[name][:, :boundary]) for name in COLUMNS)
        if option["boundary"] != boundary or not all(same):
            return batch
    rows = torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device)
    chosen = torch.as_tensor(choice, device=rows.device)
    drafted = {name: value for name, value in batch.items() if name != "labels"}  # those of the gold target
    for name in COLUMNS:  # (s, options, b), padded with 0, which means padding in every mask
        drafted[name] = pad_sequence([option[name].mT for option in batches])[:, chosen, rows].mT
    return drafted
