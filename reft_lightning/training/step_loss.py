r"""The loss of an optimizer step: a mean over all its targets, however they are divided into batches.

.. math:: L = \frac{1}{N} \sum_m n_m \ell_m, \qquad N = \sum_m n_m

m are the batches of the step: A accumulated ones on each of W ranks. A batch has n targets (the target tokens of a
language model, the rows of a classifier) and the mean loss l. Lightning divides each loss by A, and averages gradients
over the ranks: a batch's loss is therefore weighted by A W n / N. N is known before the step begins, because the order
of an epoch is; so nothing is summed over ranks, gradients have their usual size in every precision, and clipping sees
those of the mean. With one batch a step the weight is exactly 1.

``micro_batch_mean`` weights every batch by 1, as Hugging Face's Trainer did for the authors: tokens of short targets
count more, and a shorter last step counts less.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Part(NamedTuple):
    """A batch's part in its optimizer step.

    Args:
        share: n / N, of the step's targets.
        weight: A W n / N, of its loss.
        first: whether it begins the step.
        last: whether it ends it.
    """

    share: float
    weight: float
    first: bool
    last: bool


def part_of(trainer: Any, batch_index: int, reduction: str) -> Part:
    """Return the part of a batch of the present epoch, on this rank.

    Args:
        trainer: in training; its loader reads :class:`~reft_lightning.data.sampling.TrainBatches`.
        batch_index: of the batch in the epoch.
        reduction: ``token_mean`` or ``micro_batch_mean``.

    Raises:
        ValueError: for ``token_mean`` with a loader that cannot tell the targets of a step ahead.
    """
    accumulated, world_size = trainer.accumulate_grad_batches, trainer.world_size
    if accumulated * world_size == 1:
        return Part(1.0, 1.0, first=True, last=True)
    start = batch_index // accumulated * accumulated
    # Lightning steps at an epoch's last batch
    end = min(start + accumulated, int(trainer.num_training_batches))
    sampler: Any = getattr(trainer.train_dataloader, "batch_sampler", None)
    if hasattr(sampler, "targets_of"):
        counts = sampler.targets_of(trainer.current_epoch)[start:end]
        share = counts[batch_index - start][0] / sum(total for _, total in counts)
    elif reduction == "micro_batch_mean":
        share = 1 / ((end - start) * world_size)
    else:
        raise ValueError(
            "with accumulated batches or several devices, loss_reduction=token_mean needs to know the targets of a "
            "step ahead: give a loader whose batch_sampler has targets_of, such as "
            "reft_lightning.data.sampling.TrainBatches, or loss_reduction=micro_batch_mean"
        )
    return Part(share, share * accumulated * world_size, batch_index == start, batch_index + 1 == end)
