r"""The loss of an optimizer step: the mean over all its targets, however they are divided into batches.

.. math:: L = \frac{1}{N} \sum_m n_m \ell_m, \qquad N = \sum_m n_m

m runs over the batches of the step: A accumulated batches on each of W ranks. A batch has n targets (the target tokens
of a language model, or the rows of a classifier) and the mean loss l. Lightning divides each loss by A and averages
gradients over ranks, so a batch's loss is weighted by A W n / N. N is known before the step begins, because the order
of an epoch is known. Therefore nothing needs to be summed over ranks, gradients keep their usual magnitude in every
precision, and clipping applies to the gradients of the mean. With one batch per step the weight is exactly 1.

``micro_batch_mean`` weights every batch by 1, as in the version of Hugging Face's Trainer that the authors used: tokens
of short targets then count more, and a shorter last step counts less.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Part(NamedTuple):
    """A batch's part in its optimizer step.

    Args:
        share: its share of the step's targets, n / N.
        weight: the weight of its loss, A W n / N.
        first: whether it is the first batch of the step.
        last: whether it is the last batch of the step.
    """

    share: float
    weight: float
    first: bool
    last: bool


def part_of(trainer: Any, batch_index: int, reduction: str) -> Part:
    """Return the part of a batch of the current epoch in its step, on this rank.

    Args:
        trainer: a trainer in training, whose loader reads :class:`~reft_lightning.data.sampling.TrainBatches`.
        batch_index: index of the batch in the epoch.
        reduction: ``token_mean`` or ``micro_batch_mean``.

    Raises:
        ValueError: for ``token_mean`` with a loader that does not know the targets of a step in advance.
    """
    accumulated, world_size = trainer.accumulate_grad_batches, trainer.world_size
    if accumulated * world_size == 1:
        return Part(1.0, 1.0, first=True, last=True)
    start = batch_index // accumulated * accumulated
    # Lightning also steps at the last batch of an epoch
    end = min(start + accumulated, int(trainer.num_training_batches))
    sampler: Any = getattr(trainer.train_dataloader, "batch_sampler", None)
    if hasattr(sampler, "targets_of"):
        counts = sampler.targets_of(trainer.current_epoch)[start:end]
        share = counts[batch_index - start][0] / sum(total for _, total in counts)
    elif reduction == "micro_batch_mean":
        share = 1 / ((end - start) * world_size)
    else:
        raise ValueError(
            "with accumulated batches or several devices, loss_reduction=token_mean needs the number of targets of a "
            "step in advance: use a loader whose batch_sampler has targets_of, such as "
            "reft_lightning.data.sampling.TrainBatches, or set loss_reduction=micro_batch_mean"
        )
    return Part(share, share * accumulated * world_size, batch_index == start, batch_index + 1 == end)
